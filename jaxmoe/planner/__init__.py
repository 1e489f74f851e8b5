"""What a step should cost, from the same abstract facts the model is built of."""
