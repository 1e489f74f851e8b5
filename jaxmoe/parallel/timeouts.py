"""Timeouts of joined processes. A module without imports, so that commands start fast."""

LOST_AFTER_SECONDS = 30.0  # without a sign of life
LOST_CODE = 3  # exit code of a process that ends because another was lost
LAST_SECONDS = 5.0  # for processes to end after they were asked to
JOIN_TIMEOUT_SECONDS = 60.0  # until all have joined
