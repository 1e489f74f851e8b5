"""Meshes, layouts, sharding, pipeline stages, the collectives they imply, and expert placement (EPLB)."""
