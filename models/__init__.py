"""Builders of models used by tests, benchmarks, examples and the demo."""
