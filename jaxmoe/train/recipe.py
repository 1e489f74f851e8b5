"""Hyperparameters of a training run. With the corpus they determine the run; the defaults give checkpoints/demo."""

from __future__ import annotations

from dataclasses import dataclass

from jaxmoe.config import ModelConfig
from jaxmoe.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """Configure a training run.

    The optimizer is AdamW with linear warmup and cosine decay to learning_rate * final_fraction. Gradients are clipped
    by global norm. A step trains on batch_rows windows of window_tokens. The loss is the cross entropy plus
    balance_weight times the load-balancing loss. Weights and optimizer state are float32.

    Raises: ConfigError with the value and its limit if a value is out of range.
    """

    model: ModelConfig
    seed: int = 0
    num_steps: int = 1800
    batch_rows: int = 4
    window_tokens: int = 512
    learning_rate: float = 2.5e-3
    final_fraction: float = 0.02
    warmup_steps: int = 100
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    balance_weight: float = 0.01

    def __post_init__(self) -> None:
        limits = {
            "num_steps": self.num_steps > self.warmup_steps,
            "warmup_steps": self.warmup_steps >= 1,
            "batch_rows": self.batch_rows >= 1,
            "window_tokens": 1 <= self.window_tokens <= self.model.max_position_embeddings,
            "learning_rate": self.learning_rate > 0,
            "final_fraction": 0 <= self.final_fraction <= 1,
            "clip_norm": self.clip_norm > 0,
            "balance_weight": self.balance_weight >= 0,
            "weight_decay": self.weight_decay >= 0,
            "seed": 0 <= self.seed < 2**32,
        }
        wanted = {
            "num_steps": f"above warmup_steps={self.warmup_steps}",
            "warmup_steps": "at least 1",
            "batch_rows": "at least 1",
            "window_tokens": f"in [1, max_position_embeddings={self.model.max_position_embeddings}]",
            "learning_rate": "above 0",
            "final_fraction": "in [0, 1]",
            "clip_norm": "above 0",
            "balance_weight": "at least 0",
            "weight_decay": "at least 0",
            "seed": "in [0, 2^32)",
        }
        for name, within in limits.items():
            if not within:
                raise ConfigError(f"{name}={getattr(self, name)} must be {wanted[name]}")
