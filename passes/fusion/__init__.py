"""Passes that make one operator of several: linear layers, normalizations, activations, integer products."""
