"""Inspect models and compiled programs: collectives, matmuls, memory, plans."""
