"""Checkpoints: locating, reading, converting and verifying them, and loading them into sharded parameters."""
