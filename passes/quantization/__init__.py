"""Passes that quantize weights and activations, correct what that costs, or halve floats."""
