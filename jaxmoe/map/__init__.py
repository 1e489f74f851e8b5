"""Draw a model on a mesh as one HTML page: the arrays on each device, and the collectives of a token on each link."""
