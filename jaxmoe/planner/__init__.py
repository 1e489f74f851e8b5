"""Estimate the time and memory of a step from a model's config, and search for the best parallelism."""
