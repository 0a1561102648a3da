"""Measures what a cache costs: models and texts to measure on, and the evaluations."""
