"""Pure functions on arrays, one family of ops per file. Each fast path has an oracle with the same signature."""
