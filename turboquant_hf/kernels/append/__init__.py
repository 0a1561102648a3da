"""Storing the newest tokens in a cache whose arrays never move."""
