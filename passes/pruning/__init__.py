"""Passes that make models smaller by leaving parts of them out."""
