"""A training's `Run` in this process, and what tests ask of what it leaves."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lcrnet import config
from lcrnet.config import Config


@dataclass
class LocalRun:
    """One process; checkpoints go to folder/step_N. Killed after reporting the step `dies_at`, asked to stop from
    the question `stops_at` on."""

    folder: Path
    checkpoint: Path | None = None
    dies_at: int | None = None
    stops_at: int | None = None
    rank: int = 0
    world_size: int = 1
    threads: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    reported: list[dict[str, float]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    lines: list[dict[str, float]] = field(default_factory=list)
    asked: int = 0

    def resume(self) -> AbstractContextManager[Path | None]:
        return nullcontext(self.checkpoint)

    def say(self, text: str) -> None:
        self.said.append(text)

    def progress(
        self, step: int, last: int, losses: dict[str, float], images_per_s: float, seconds_left: float
    ) -> None:
        assert 0 < step <= last and images_per_s > 0 and seconds_left >= 0
        self.lines.append(losses)

    def stopping(self) -> bool:
        self.asked += 1
        return self.stops_at is not None and self.asked >= self.stops_at

    def report(self, metrics: dict[str, float], folder: Path | None) -> None:
        self.reported.append(metrics)
        if folder:
            self.folder.mkdir(exist_ok=True)
            self.checkpoint = Path(shutil.move(folder, self.folder / f"step_{int(metrics['step'])}"))
        if metrics["step"] == self.dies_at:
            raise KeyboardInterrupt


def changed(settings: Config, **fields: Any) -> Config:
    """A configuration with other fields of `train`, or `section__field=value`."""
    values = settings.model_dump()
    for name, value in fields.items():
        section, _, rest = name.rpartition("__")
        values[section or "train"][rest] = value
    return config.from_dict(values)


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"step_{step}" / "training.safetensors")


def bitwise(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())
