"""Requests in, tokens out: sampling values, the compiled steps, and the Python API."""
