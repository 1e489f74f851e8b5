"""The model in Flax NNX. Modules name logical dims; a Placement maps them to devices."""
