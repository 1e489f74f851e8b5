"""Bookkeeping of cached keys and values on the host: which page holds what. Never imports jax."""
