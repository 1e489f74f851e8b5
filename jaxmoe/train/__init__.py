"""Training of a small model with the meshes and sharding rules of inference: data, loss, step, loop, export."""
