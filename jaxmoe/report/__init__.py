"""Reports about a model: its parameters on a mesh, its size, parity over meshes, benchmarks."""
