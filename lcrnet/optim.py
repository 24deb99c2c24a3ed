"""Parameter groups, learning rate schedule, and the average of weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from lcrnet.config import Train

JUMP = 1.1
"""Detectron's SCALE_MOMENTUM_THRESHOLD: the momentum is corrected where the learning rate changes by more than this."""


def scaled(config: Train) -> Train:
    """The configuration with lr, steps and warmup as they are for its batch; the same once more changes nothing.

    lr grows with the batch, steps and warm-up shrink with it: the linear scaling rule (Goyal et al., "Accurate, large
    minibatch SGD", 2017), as in Detectron.pytorch's train_net_step.py, which rounds so, too. The batch is that of a
    step, however accumulated: our gradient is a mean over it (there it is a sum, which scales by itself).
    """
    if not config.lr_reference or config.lr_reference == config.batch:
        return config
    factor = config.batch / config.lr_reference
    return config.model_copy(update={
        "lr": config.lr * factor,
        "steps": max(1, int(config.steps / factor + 0.5)),
        "warmup": int(config.warmup / factor + 0.5),
        "lr_reference": config.batch,
    })  # fmt: skip


def build(model: nn.Module, config: Train) -> torch.optim.Optimizer:
    """SGD or AdamW over what is trainable; no weight decay on biases and norms.

    A group's `factor` multiplies the learning rate (see `at`).
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    flat = [p for p in trainable if p.ndim <= 1]
    norms = {id(p) for m in model.modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm) or _is_batch_norm(m)
             for p in m.parameters(recurse=False)}  # fmt: skip
    quick = [p for p in flat if id(p) not in norms and config.bias_lr != 1]
    some = {id(p) for p in quick}
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay, "factor": 1.0},
        {"params": [p for p in flat if id(p) not in some], "weight_decay": 0.0, "factor": 1.0},
    ]
    if quick:
        groups.append({"params": quick, "weight_decay": 0.0, "factor": config.bias_lr})
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.lr, config.momentum)
    return torch.optim.AdamW(groups, config.lr, (config.momentum, config.beta2), fused=True)


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.SyncBatchNorm)


def learning_rate(step: int, config: Train) -> float:
    """The learning rate of a step: warm-up, then `steps` (times `gamma` after each of `decay_at`) or a cosine to 0.

    The warm-up is Detectron's: a factor of `warmup_factor`, or one that goes linearly from there to 1. From its default
    of 1 / (warmup + 1) the first step is as far from 0 as the second is from the first.
    """
    done = step / config.steps
    if config.schedule == "cosine":
        rate = config.lr * (1 + math.cos(math.pi * done)) / 2
    else:
        rate = config.lr * config.gamma ** sum(done >= at for at in config.decay_at)
    if step >= config.warmup:
        return rate
    least = config.warmup_factor or 1 / (config.warmup + 1)
    if config.warmup_kind == "constant":
        return rate * least
    if not config.warmup_factor:
        return rate * ((step + 1) / (config.warmup + 1))
    return rate * (least + (1 - least) * step / config.warmup)


@torch.no_grad()
def at(step: int, optimizer: torch.optim.Optimizer, config: Train) -> float:
    """Sets the learning rate of a step, which it returns.

    `momentum_correction`: where it jumps, SGD's momentum is multiplied by new / old, as in Detectron.pytorch. In
    Caffe2, where that comes from, the momentum holds steps already multiplied by their learning rate (v = m v + r g,
    w -= v), and the correction makes old gradients count at the new rate. In torch (v = m v + g, w -= r v) they do so
    without it; with it they count by new / old once more, which is what networks trained there have had.
    """
    rate = learning_rate(step, config)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    if config.momentum_correction and config.optimizer == "sgd" and step:
        before = learning_rate(step - 1, config)
        if before > 1e-7 and max(rate / before, before / max(rate, 1e-30)) > JUMP:
            for state in optimizer.state.values():
                if state.get("momentum_buffer") is not None:
                    state["momentum_buffer"].mul_(rate / before)
    return rate


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
