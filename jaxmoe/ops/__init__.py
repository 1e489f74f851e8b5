"""Pure functions on arrays, one folder per op.

A folder holds the signature of its op (api.py), a plain implementation that defines the results (reference.py), one
file for each backend, and the list of these backends (backends.py). registry.py collects the lists. To add a kernel for
another platform, add a file to the folder of its op, such as gpu.py or tpu.py, and an entry to the list there.
"""
