"""A worker of a training: `lcrnet.train.Run` over Ray Train, and the validation beside it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import Checkpoint, CheckpointUploadMode

from lcrnet import board, train, weights
from lcrnet.config import Config, UserError
from lcrnet.dataset import Source


def work(args: dict[str, Any]) -> dict[str, Any]:
    """One process of the training; what it returns on rank 0 reaches the driver."""
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    desk = args["desk"]
    if fault := ray.get(desk.given_up.remote()):
        return {"error": fault}
    run = RayRun(args["out"], args["config"], desk, bool(args["val"]), args["mended"])
    try:
        metrics = train.fit(args["config"], run, args["data"], args["anchors"], args["val"])
    except train.NonFinite as error:  # on all workers alike; starting again would only repeat it
        return {"error": str(error)}
    except UserError as error:
        if run.world_size == 1:
            return {"error": str(error)}
        # The others wait for this worker: they are ended with it, started again, and then told.
        ray.get(desk.give_up.remote(str(error)))
        raise
    return {"metrics": metrics}


@dataclass
class RayRun:
    """`lcrnet.train.Run` over Ray Train."""

    folder: Path
    config: Config
    desk: Any
    val: bool
    mended: Checkpoint | None = None
    """what to go on from where Ray has no checkpoint"""

    def __post_init__(self) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.threads = max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))
        self.stop = False
        self.desk.tell.remote("begun", self.rank)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            self.stop = ray.get(self.desk.stopped.remote())
        except ray.exceptions.RayError:  # the driver is gone, and so will be this worker
            pass

    @contextmanager
    def resume(self) -> Iterator[Path | None]:
        checkpoint = ray.train.get_checkpoint() or self.mended
        with checkpoint.as_directory() if checkpoint else nullcontext() as folder:
            yield Path(folder) if folder else None

    def say(self, text: str) -> None:
        if self.rank == 0:
            ray.get(self.desk.tell.remote("say", text))

    def progress(
        self, step: int, last: int, losses: dict[str, float], images_per_s: float, seconds_left: float
    ) -> None:
        line = train.line(step, last, losses, images_per_s, seconds_left)
        self.desk.tell.remote("progress", (step, last, line))

    def stopping(self) -> bool:
        return self.stop

    def report(self, metrics: dict[str, float], folder: Path | None) -> None:
        checkpoint = Checkpoint.from_directory(str(folder)) if folder else None
        beside = self.config.store.upload == "beside"
        if beside:
            self._committed()  # the one before: copies must not pile up
        ray.train.report(
            metrics,
            checkpoint=checkpoint,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC if beside else CheckpointUploadMode.SYNC,
            delete_local_checkpoint_after_upload=True,
            # Who asked for a stop waits no longer than for the checkpoint.
            validation=bool(folder and self.val and self.config.train.validation == "beside" and not self.stop),
        )
        if not beside:
            self._committed()

    def _committed(self) -> None:
        # A report is only safe once the controller has taken it (RAY.md 2.2).
        ray.train.get_all_reported_checkpoints(consistency_mode=ray.train.CheckpointConsistencyMode.COMMITTED)


def validate(checkpoint: Checkpoint, val: Source, desk: Any) -> dict[str, float]:
    """The figures of a checkpoint, in a task of its own beside the training."""
    with checkpoint.as_directory() as folder:
        about = weights.read_about(Path(folder) / "model")
        model = weights.load(Path(folder) / "model", "cuda" if ray.get_gpu_ids() else "cpu")
    figures = train.validate(model, val)
    ray.get(desk.tell.remote("figures", (about["step"], figures)))
    found = board.scalars(figures)
    shown = "  ".join(f"{name} {found[name]:.3f}" for name in ("oks_ap", "recall", "mpjpe_mm") if name in found)
    ray.get(desk.tell.remote("say", f"step {about['step']} validated: {shown}"))
    return found
