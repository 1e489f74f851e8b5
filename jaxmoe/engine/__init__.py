"""The inference engine: requests as token ids, scheduling, compiled steps."""
