"""The training loop: `fit(config, run, ...)`, a straight line of evaluate, save, step, log.

    python -m lcrnet.train RUN/nonfinite/step_N-rank_R

runs the step again whose loss or gradient was not finite.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from lcrnet import config as configuration
from lcrnet import dataset, draw, evaluate, optim, snapshot, weights
from lcrnet.anchors import AnchorPoses
from lcrnet.board import Board, scalars
from lcrnet.checkpoint import State
from lcrnet.coco import CocoImage
from lcrnet.config import Config, UserError
from lcrnet.dataset import Batch, Source
from lcrnet.model import LCRNet, build
from lcrnet.pose import People

LEAST_SCALE = 1e-4
"""fp16: a loss scaled by less than this has a gradient that is never finite (fairseq's --min-loss-scale)."""

PICTURES = 4
"""Training images that TensorBoard shows people of."""

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Run(Protocol):
    """Where a training runs: one process of `world_size`.

    A restart may have another world size. Whoever asked for a stop sees it kept: `fit` returns metrics whose "step" is
    below the last (`optim.scaled(config.train).steps`), after a checkpoint of that step was reported.
    """

    rank: int
    world_size: int
    device: torch.device
    threads: int
    """CPU threads that this process may use"""
    folder: Path
    """the run's own folder RUN, on the driver's storage: `fit` writes RUN/tensorboard (rank 0) and RUN/nonfinite"""

    def resume(self) -> AbstractContextManager[Path | None]:
        """The folder of the last checkpoint, or None."""

    def say(self, text: str) -> None:
        """A line for the person who waits, one that stays; only rank 0's are meant."""

    def progress(
        self, step: int, last: int, losses: dict[str, float], images_per_s: float, seconds_left: float
    ) -> None:
        """How far it is, every `log_every` steps, from rank 0 alone: a live line, or `line` of the same as text."""

    def stopping(self) -> bool:
        """Whether this process was asked to end; asked on every rank in every step, so it must be cheap.

        One rank's yes is enough: all of them save a checkpoint after the step, without an evaluation, and return.
        """

    def report(self, metrics: dict[str, float], folder: Path | None) -> None:
        """Every rank calls it equally often; rank 0 hands over a checkpoint folder.

        folder    a temporary one, the run's from then on: it moves or removes it, during the call or later
        metrics   "step", and the figures of the validation where `train.validation` is inline and one was asked for
        """


def line(step: int, last: int, losses: dict[str, float], images_per_s: float, seconds_left: float) -> str:
    """A run's progress as a line of text."""
    text = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
    return f"step {step}/{last}  {text}  {images_per_s:.1f} images/s  {seconds_left:.0f} s left"


class NonFinite(RuntimeError):
    """A loss or the gradient became NaN or infinite; the message holds the losses and names a snapshot of the step."""


class OutOfMemory(RuntimeError):
    """The GPU's memory did not suffice for a step; the message names fields to lower."""


class Stopped(Exception):
    """The run is to end, and the evaluation with it."""


@dataclass
class Meter:
    """Means of the losses and the gradient's norm, the speed, and the waits for data, since the last line."""

    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0
    norm: float = 0
    waited: float = 0
    since: float = field(default_factory=time.monotonic)

    def add(self, losses: dict[str, float], norm: float, waited: float) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count, self.norm, self.waited = self.count + 1, self.norm + norm, self.waited + waited

    def read(self) -> tuple[dict[str, float], dict[str, float], float]:
        """(mean losses, other scalars, steps a second)."""
        elapsed = time.monotonic() - self.since
        means = {name: value / self.count for name, value in self.sums.items()}
        return means, self._others(elapsed), self.count / elapsed

    def _others(self, elapsed: float) -> dict[str, float]:
        others = {"data_wait_percent": 100 * self.waited / elapsed}
        if math.isfinite(self.norm):  # with fp16 a step may be left out
            others["gradient_norm"] = self.norm / self.count
        return others


def fit(
    config: Config, run: Run, data: Source | Sequence[Source], anchors: AnchorPoses, val: Source | None = None
) -> dict[str, float] | None:
    """Trains to the last step, from the run's last checkpoint if it has one, and returns the last metrics.

    Same seed, data and number of workers: same weights, whether interrupted or not. NonFinite names the losses.
    Metrics of a step before the last: the run was asked to stop there, and did.
    """
    torch.set_num_threads(run.threads)
    torch.manual_seed(config.train.seed)
    config = config.model_copy(update={"train": optim.scaled(config.train)})
    if config.train.batch % (run.world_size * config.train.accumulate):
        raise UserError(f"train.batch {config.train.batch} is not divisible by {run.world_size} workers x "
                        f"train.accumulate {config.train.accumulate}: change one of them")  # fmt: skip
    skeleton = anchors.skeleton
    samples = dataset.load(data, config, skeleton)
    truth = dataset.read(val, skeleton) if val and run.rank == 0 and config.train.validation == "inline" else None
    model = build(config, anchors).to(memory_format=torch.channels_last).to(run.device).train()
    if config.train.init:
        for text in weights.start(model, config.train.init):
            run.say(f"train.init: {text}")
    if config.train.compile:
        _compile(model.body)
    parallel = _parallel(model, config, run)
    optimizer = optim.build(model, config.train)
    average = optim.Average(model, config.train.ema) if config.train.ema else None
    scaler = torch.amp.GradScaler(run.device.type, enabled=config.train.precision == "fp16")
    state = State(model, optimizer, average, scaler)
    start, evaluated, metrics = 0, True, cast(dict[str, float] | None, None)
    with run.resume() as folder:
        if folder is not None:
            start, metrics, evaluated = state.restore(folder)
            run.say(f"resumed at step {start}")
    last = config.train.steps
    if start > last or (start == last and evaluated):
        return metrics

    batches = dataset.loader(samples, run.rank, run.world_size, start)
    shown: list[tuple[np.ndarray, People]] = []
    with ExitStack() as stack:
        board = stack.enter_context(Board(run.folder / "tensorboard", start)) if run.rank == 0 else None
        if board:
            board.config(config, start)
        meter, began, stopping = Meter(), time.monotonic(), False
        for step in range(start, last + 1):
            fresh = step > start or not evaluated
            due = fresh and step > 0 and (step == last or step % config.train.save_every == 0)
            if board and fresh and _pictures_due(step, config) and not stopping:
                shown = shown or _first_images(samples, config)
                board.picture("found", _sheet(state, shown), step)
            if due or stopping:
                metrics = _evaluate_and_save(step, run, state, truth, val, board, evaluated=not stopping)
                meter = Meter()
            if stopping:
                run.say(f"stopped at step {step}")
                break
            if step == last:
                break
            waiting = time.monotonic()
            batch = next(batches).to(run.device)
            waited = time.monotonic() - waiting
            seed = _seed(config, step, run.rank)
            torch.manual_seed(seed)  # whatever is drawn in this step depends on nothing before it
            rate = optim.at(step, optimizer, config.train)
            optimizer.zero_grad(set_to_none=True)
            own = _losses_and_gradient(parallel, batch, config, run, scaler, step)
            scaler.unscale_(optimizer)
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            said, stopping, length = _agree(torch.stack(list(own.values())), norm, run)
            values = dict(zip(own, said, strict=True))
            if not (_finite(values.values()) and (math.isfinite(length) or _passing(scaler))):
                raise _not_finite(step, seed, values, length, own, batch, state, run)
            if config.train.clip:
                nn.utils.clip_grads_with_norm_(model.parameters(), config.train.clip, norm)
            scaler.step(optimizer)
            scaler.update()
            if average:
                average.update(model.parameters(), step)
            meter.add(values, length, waited)
            if board and (step + 1) % config.train.log_every == 0:
                means, others, speed = meter.read()
                others |= {"lr": rate, "images_per_second": speed * config.train.batch}
                if scaler.is_enabled():
                    others["loss_scale"] = scaler.get_scale()
                if run.device.type == "cuda":
                    others["gpu_memory_gib"] = torch.cuda.max_memory_allocated(run.device) / 2**30
                board.step(step + 1, means, others)
                left = (time.monotonic() - began) / (step + 1 - start) * (last - step - 1)
                run.progress(step + 1, last, means, speed * config.train.batch, left)
                meter = Meter()
    return metrics


def validate(
    model: LCRNet, val: Source, truth: Sequence[CocoImage] | None = None, stopping: Callable[[], bool] | None = None
) -> dict[str, Any]:
    """The figures of a model (in evaluation mode) on a data set (`truth`, if it has been read).

    `board.scalars` are those that a run reports. Stopped: when asked between two batches, `stopping` was true.
    """

    def progress(done: int, count: int) -> None:
        if stopping and stopping():
            raise Stopped

    images = dataset.read(val, model.skeleton) if truth is None else truth
    files = [val.images / i.file_name for i in images]
    found, _ = evaluate.detect(model.detect_batch, files, progress=progress)
    return evaluate.evaluate([i.people for i in images], found, model.skeleton, model.config.evaluate)


def replay(folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> dict[str, float]:
    """The step of a snapshot once more: its losses, and `gradient_norm`, both of that worker's images alone.

    Of a run of one worker it is what the run had, to the bit on the same machine. UserError: not a snapshot.
    """
    model, batch, about = snapshot.read(Path(folder))
    device = torch.device(device)
    model = model.to(device).train()
    torch.set_num_threads(about["threads"])
    torch.manual_seed(about["seed"])
    own = _forward_backward(model, batch.to(device), model.config, device, lambda total: total * about["scale"])
    norm = nn.utils.get_total_norm([p.grad / about["scale"] for p in model.parameters() if p.grad is not None])
    return {name: float(value) for name, value in own.items()} | {"gradient_norm": float(norm)}


def _losses_and_gradient(
    parallel: nn.Module, batch: Batch, config: Config, run: Run, scaler: torch.amp.GradScaler, step: int
) -> dict[str, Tensor]:
    """`_forward_backward`; OutOfMemory with the fix."""
    try:
        return _forward_backward(parallel, batch, config, run.device, scaler.scale)
    except torch.OutOfMemoryError:
        share, parts = len(batch.ids), config.train.accumulate
        more = next((n for n in range(parts + 1, share + 1) if share % n == 0), None)
        fix = f"--train.accumulate {more} (the same step in smaller parts)" if more else "a lower --image.short_side"
        text = f"step {step}: out of GPU memory with {share // parts} images of {tuple(batch.images.shape[-2:])} pixels"
        raise OutOfMemory(f"{text} at a time on worker {run.rank}: {fix} or a lower --train.batch") from None


def _forward_backward(
    parallel: nn.Module, batch: Batch, config: Config, device: torch.device, scale: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The losses of a worker's images, means over the parts of the batch; adds their gradient, scaled."""
    parts = config.train.accumulate
    size = len(batch.ids) // parts
    means: dict[str, Tensor] = {}
    for n in range(parts):
        part = batch if parts == 1 else _part(batch, slice(n * size, (n + 1) * size))
        # Workers exchange gradients once, with those of the last part.
        wait = isinstance(parallel, DistributedDataParallel) and n < parts - 1
        with cast(DistributedDataParallel, parallel).no_sync() if wait else nullcontext():
            kind = AUTOCAST.get(config.train.precision)
            with torch.autocast(device.type, kind, enabled=kind is not None):
                losses: dict[str, Tensor] = parallel(part.images, part.sizes, part.people)
                total = torch.stack(list(losses.values())).sum() / parts
            scale(total).backward()
        for name, value in losses.items():
            means[name] = means.get(name, 0) + value.detach().float() / parts
    return means


def _part(batch: Batch, rows: slice) -> Batch:
    """Some images of a batch, padded as they are in it."""
    return Batch(**{f.name: getattr(batch, f.name)[rows] for f in fields(batch)})


def _agree(losses: Tensor, norm: Tensor, run: Run) -> tuple[list[float], bool, float]:
    """Means of the losses over the workers, so that all of them stop at a loss that is not finite on one; whether one
    of them is to stop; the gradient's norm, which all have the same. One exchange, one wait for the device."""
    stop = losses.new_tensor([float(run.stopping())])
    both = torch.cat([losses, stop])
    if run.world_size > 1:
        torch.distributed.all_reduce(both)
    both[:-1] /= run.world_size
    *means, stops, length = torch.cat([both, norm.detach().float().view(1)]).tolist()
    return means, stops > 0, length


def _passing(scaler: torch.amp.GradScaler) -> bool:
    """Whether a gradient that is not finite is but a scale that is too large, as it is now and then with fp16."""
    return scaler.is_enabled() and scaler.get_scale() > LEAST_SCALE


def _finite(values: Any) -> bool:
    return math.isfinite(sum(values))


def _not_finite(
    step: int, seed: int, values: dict[str, float], norm: float, own: dict[str, Tensor], batch: Batch, state: State,
    run: Run,
) -> NonFinite:  # fmt: skip
    """The error that names the images to blame, after each worker that has some wrote a snapshot."""
    mine = {name: float(value) for name, value in own.items()}
    what = "gradient" if _finite(values.values()) else "loss"
    folder = run.folder / "nonfinite" / f"step_{step}-rank_{run.rank}"
    guilty = what == "gradient" or not _finite(mine.values())
    if guilty:
        about = {"step": step, "rank": run.rank, "seed": seed, "threads": run.threads, "losses": mine,
                 "gradient_norm": norm, "mean_losses": values, "scale": state.scaler.get_scale()}  # fmt: skip
        snapshot.write(folder, state.model, batch, about)
    report: list[Any] = [(batch.ids, str(folder)) if guilty else None]
    if run.world_size > 1:
        told, report = report[0], [None] * run.world_size
        torch.distributed.all_gather_object(report, told)
    ids = [i for r in report if r for i in r[0]]
    folders = " ".join(r[1] for r in report if r)
    return NonFinite(
        f"step {step}: the {what} is not finite: {values}; images {ids}; lower --train.lr, or set --train.clip? "
        f"The step again: python -m lcrnet.train {folders}"
    )


def _seed(config: Config, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([config.train.seed, step, rank]).generate_state(1, np.uint64)[0])


def _compile(body: nn.Module) -> None:
    """Compiles the backbone, whose names stay. UserError: no compiler here."""
    names = (os.environ.get("CXX"), "g++", "clang++")
    if not any(name and shutil.which(name) for name in names):
        raise UserError("train.compile: torch.compile needs a C++ compiler (g++, or the one that CXX names), which is "
                        "not on this machine: install one, or --train.compile false")  # fmt: skip
    body.compile()


def _parallel(model: LCRNet, config: Config, run: Run) -> nn.Module:
    """The model, its gradients averaged over the workers."""
    if run.world_size == 1:
        return model
    # On a CPU sending and computing take the same core: nothing is won by sending in parts.
    out = DistributedDataParallel(
        model, forward_sync_buffers=False, gradient_as_bucket_view=True,
        bucket_cap_mb=25 if run.device.type == "cuda" else 1000,
    )  # fmt: skip
    if config.train.precision == "bf16":
        out.register_comm_hook(None, bf16_compress_hook)
    return out


def _pictures_due(step: int, config: Config) -> bool:
    every = config.train.picture_every
    return every > 0 and step > 0 and step % every == 0


def _first_images(samples: dataset.PoseDataset, config: Config) -> list[tuple[np.ndarray, People]]:
    """The first training images of the run, (H, W, 3) uint8, as the network gets them."""
    world = max(1, config.train.batch // PICTURES)
    while config.train.batch % world:
        world -= 1
    batch = next(dataset.loader(samples, 0, world, 0))
    images = batch.images.float().round().clamp(0, 255).byte()
    pixels = [image[:, :h, :w].permute(1, 2, 0).contiguous().numpy()
              for image, (h, w) in zip(images, batch.sizes.tolist(), strict=True)]  # fmt: skip
    people = [People(*(getattr(p, f.name).numpy() for f in fields(People))) for p in batch.people]
    return list(zip(pixels, people, strict=True))[:PICTURES]


def _sheet(state: State, shown: Sequence[tuple[np.ndarray, People]]) -> np.ndarray:
    """A picture (H, W, 3) of the people that the published model finds in images, beside the true ones."""
    with state.published() as model:
        found = model.detect_batch([pixels for pixels, _ in shown])
    sure = [[p for p in people if p.score >= model.config.evaluate.min_score] for people in found]
    return draw.sheet([
        draw.tile(pixels, {"truth": true, "found": those}, model.skeleton)
        for (pixels, true), those in zip(shown, sure, strict=True)
    ], columns=1)  # fmt: skip


def _evaluate_and_save(
    step: int, run: Run, state: State, truth: list[CocoImage] | None, val: Source | None, board: Board | None,
    evaluated: bool,
) -> dict[str, float]:  # fmt: skip
    """The checkpoint, handed over to the run, with the figures on the validation set (rank 0 has it) if `evaluated`."""
    metrics: dict[str, float] = {"step": step}
    if run.rank != 0:
        run.report(metrics, None)
        return metrics
    folder = Path(tempfile.mkdtemp(prefix="lcrnet-"))
    save_file(state.tensors(), folder / "training.safetensors")
    with state.published() as model:
        if evaluated and truth is not None and val is not None:
            try:
                figures = validate(model, val, truth, run.stopping)
                metrics |= scalars(figures)
                if board:
                    board.validation(step, figures)
            except Stopped:
                evaluated = False
        state.save(folder, step, metrics, evaluated)
    run.report(metrics, folder)
    return metrics


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcrnet.train", description="Runs the step of a snapshot again.")
    parser.add_argument("folders", metavar="RUN/nonfinite/step_N-rank_R", nargs="+")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    for folder in args.folders:
        print(f"{folder}: {json.dumps(replay(folder, args.device))}")
    return 0


if __name__ == "__main__":
    configuration.run(main)
