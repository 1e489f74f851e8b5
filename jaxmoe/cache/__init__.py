"""Host-side bookkeeping of KV cache pages. Never imports jax."""
