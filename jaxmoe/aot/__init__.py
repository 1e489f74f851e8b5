"""Ahead-of-time compilation for devices one does not own, and the collectives of compiled programs."""
