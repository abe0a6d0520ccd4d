"""Generating text: the loop, caches, sampling, tokens."""
