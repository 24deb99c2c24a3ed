"""What a training leaves in TensorBoard's files: losses, speed, figures of the validation, pictures.

    with Board(run / "tensorboard", start=0) as board:
        board.step(20, losses, {"lr": 0.02})

Several boards may write into one folder, say one of a validation beside the training.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import yaml
from tensorboardX import SummaryWriter

from lcrnet import draw
from lcrnet.config import Config


class Board:
    """Scalars loss/, train/ and val/, pictures and text, by step."""

    def __init__(self, folder: Path, start: int | None = None):
        """start: the step that a run goes on from; what an earlier life wrote of later steps is not shown any more."""
        # Files are named by the second: a run that goes on within it would overwrite what it wrote before.
        suffix = f".{time.time_ns():020d}"
        self._writer = SummaryWriter(
            str(folder), purge_step=None if start is None else start + 1, filename_suffix=suffix
        )

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def config(self, config: Config, step: int) -> None:
        """The resolved configuration, as text."""
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        self._writer.add_text("config", "    " + text.replace("\n", "\n    "), step)  # Markdown's mark of code

    def step(self, step: int, losses: Mapping[str, float], train: Mapping[str, float]) -> None:
        """Mean losses, their sum, and what else there is to say of a training's steps."""
        for name, value in losses.items():
            self._writer.add_scalar(f"loss/{name}", value, step)
        self._writer.add_scalar("loss/total", sum(losses.values()), step)
        for name, value in train.items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def validation(self, step: int, figures: Mapping[str, Any]) -> None:
        """Figures of `evaluate.evaluate`: numbers, and the PCK curve (unit: the torso's length)."""
        for name, value in scalars(figures).items():
            self._writer.add_scalar(f"val/{name}", value, step)
        curve = figures.get("curves", {}).get("pck2d", {})
        series = {f"PCK of {kind} people": (curve["threshold"], curve[key])
                  for kind, key in (("found", "matched"), ("all", "all")) if curve.get(key)}  # fmt: skip
        if series:
            self.picture("val/pck", draw.curves(series, size=(300, 700)), step)

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """(H, W, 3) uint8 RGB."""
        self._writer.add_image(name, image, step, dataformats="HWC")
        self._writer.flush()


def scalars(figures: Mapping[str, Any]) -> dict[str, float]:
    """Those figures of a validation that are numbers; figures of nobody are left out."""
    return {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}
