"""Parameter groups, learning rate schedule, and the average of weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from lcrnet.config import Train


def build(model: nn.Module, config: Train) -> torch.optim.Optimizer:
    """SGD or AdamW over what is trainable; no weight decay on biases and norms."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.lr, config.momentum)
    return torch.optim.AdamW(groups, config.lr, (config.momentum, config.beta2), fused=True)


def learning_rate(step: int, config: Train) -> float:
    """The learning rate of a step: linear warm-up, then `steps` (a tenth after each of `decay_at`) or a cosine to 0."""
    done = step / config.steps
    if config.schedule == "cosine":
        rate = config.lr * (1 + math.cos(math.pi * done)) / 2
    else:
        rate = config.lr * 0.1 ** sum(done >= at for at in config.decay_at)
    return rate * min(1.0, (step + 1) / (config.warmup + 1))


class Average:
    """Exponential moving average of a model's parameters; short in the first steps (as timm's, 1 / (step + 10))."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self, parameters: Iterable[torch.Tensor], step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.weights, [p.detach() for p in parameters], 1 - decay)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchanges the model's weights and the average."""
        for mine, theirs in zip(self.weights, model.parameters(), strict=True):
            kept = theirs.detach().clone()
            theirs.copy_(mine)
            mine.copy_(kept)
