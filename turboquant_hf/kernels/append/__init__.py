"""Storing the newest tokens of a cache whose buffers never move."""
