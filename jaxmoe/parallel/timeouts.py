"""The times after which processes that act as one give up on each other. Imports nothing, so that it starts at once."""

LOST_AFTER_SECONDS = 30.0  # without a sign of life
LOST_CODE = 3  # exit code of a process that ends because another was lost
LAST_SECONDS = 5.0  # for processes that are told to end
JOIN_TIMEOUT_SECONDS = 60.0  # until all have joined
