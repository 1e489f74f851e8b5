"""The model in Flax NNX: names of dims inside, placement outside."""
