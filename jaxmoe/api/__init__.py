"""The Python API: LLM for offline use, AsyncEngine for requests that come and go."""
