"""Pure functions on arrays, one family a file. Fast paths stand beside an oracle of the same signature."""
