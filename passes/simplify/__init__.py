"""Passes that take out what a graph does not need, and those that bring it to a newer opset."""
