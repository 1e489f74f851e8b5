"""The inference engine: requests, scheduling, compiled steps, tokenization and the Python API."""
