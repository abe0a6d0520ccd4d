"""Passes that store weights in 8, 4, 2 or fewer bits."""
