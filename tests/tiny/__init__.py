"""Tiny random checkpoints in the published on-disk form, and the reference results for them."""
