"""Training a small model on the same mesh and tables as inference: data, loss, sharded step, loop, export."""
