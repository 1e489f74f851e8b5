"""A model on a mesh as one page: which device holds what, and what a token's way through it sends over which links."""
