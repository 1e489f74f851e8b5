"""Published checkpoints: finding them, reading them by slice, putting each slice where it belongs."""
