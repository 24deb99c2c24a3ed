"""Everything that a training's step changes, and the folder that a run goes on from.

CHECKPOINT/model/                 a model folder (the averaged weights, where an average is kept)
CHECKPOINT/training.safetensors   weights, optimiser, average: what resuming needs
CHECKPOINT/state.json             step, metrics, configuration, scale of the loss
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lcrnet import config as configuration
from lcrnet import optim, weights
from lcrnet.config import UserError
from lcrnet.model import LCRNet


@dataclass
class State:
    """Everything that a step changes, which is what a checkpoint holds."""

    model: LCRNet
    optimizer: torch.optim.Optimizer
    average: optim.Average | None
    scaler: torch.amp.GradScaler

    @contextmanager
    def published(self) -> Iterator[LCRNet]:
        """The model as it is published: the averaged weights, for evaluation."""
        if self.average:
            self.average.swap(self.model)
        self.model.eval()
        # Other shapes than in training: compiling for them would cost more than it saves.
        eager = torch.compiler.set_stance("force_eager") if self.model.config.train.compile else nullcontext()
        try:
            with eager:
                yield self.model
        finally:
            self.model.train()
            if self.average:
                self.average.swap(self.model)

    def tensors(self) -> dict[str, Tensor]:
        """By name."""
        out = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            out |= {f"optimizer.{index}.{name}": value for name, value in state.items() if isinstance(value, Tensor)}
        if self.average:
            out |= {f"average.{i}": value for i, value in enumerate(self.average.weights)}
        return {name: value.detach().cpu().contiguous() for name, value in out.items()}

    def save(self, folder: Path, step: int, metrics: dict[str, float], evaluated: bool) -> None:
        """Completes a checkpoint that has its training.safetensors; to be called within `published`."""
        weights.save(self.model, folder / "model", {"step": step, "metrics": metrics})
        about = {"step": step, "metrics": metrics, "evaluated": evaluated, "scaler": self.scaler.state_dict(),
                 "config": self.model.config.model_dump(mode="json")}  # fmt: skip
        (folder / "state.json").write_text(json.dumps(about, indent=1), encoding="utf-8")

    def restore(self, folder: Path) -> tuple[int, dict[str, float], bool]:
        """Puts a checkpoint back; (its step, its metrics, whether it was evaluated). UserError: it is another's."""
        about = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        before, now = configuration.from_dict(about["config"], str(folder)), self.model.config
        # bias_lr: another number of groups of parameters
        same = before.train.optimizer == now.train.optimizer and before.train.bias_lr == now.train.bias_lr
        if before.model != now.model or not same:
            raise UserError(f"{folder}: a checkpoint of another network or optimiser; take another --out")
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "average": {}}
        for name, value in load_file(folder / "training.safetensors").items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        self.model.load_state_dict(parts["model"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in parts["optimizer"].items():
            index, _, moment = name.partition(".")
            moments.setdefault(int(index), {})[moment] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        for parameter, held in self.optimizer.state.items():
            # Laid out in memory as the parameter is: fused AdamW pairs their numbers by place, whatever the strides.
            for name, value in held.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    held[name] = torch.empty_like(parameter).copy_(value)
        if self.average:
            for i, weight in enumerate(self.average.weights):
                weight.copy_(parts["average"][str(i)])
        if self.scaler.is_enabled() and about.get("scaler"):
            self.scaler.load_state_dict(about["scaler"])
        return about["step"], about["metrics"], about.get("evaluated", True)
