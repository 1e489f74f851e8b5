"""The model in Flax NNX. Modules name logical dims; a MeshPlacement maps them to devices."""
