"""Passes that divide a model: stages of a pipeline, ranks of tensor parallelism, devices."""
