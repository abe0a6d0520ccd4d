"""Passes that order nodes and place values so that less memory is needed."""
