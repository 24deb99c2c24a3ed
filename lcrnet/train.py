"""The training loop: `fit(config, run, ...)`, a straight line of evaluate, save, step, log.

RUN/step_N/model/                 a model folder (the averaged weights, where an average is kept)
RUN/step_N/training.safetensors   weights, optimiser, average: what resuming needs
RUN/step_N/state.json             step, metrics, configuration
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tensorboardX import SummaryWriter
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from lcrnet import config as configuration
from lcrnet import dataset, evaluate, optim, weights
from lcrnet.anchors import AnchorPoses
from lcrnet.config import Config, UserError
from lcrnet.dataset import Source
from lcrnet.model import LCRNet, build


class Run(Protocol):
    """Where a training runs: one process of `world_size`."""

    rank: int
    world_size: int
    device: torch.device
    threads: int
    """CPU threads that this process may use"""
    folder: Path
    """where rank 0 writes TensorBoard's files, on the driver's storage"""

    def resume(self) -> AbstractContextManager[Path | None]:
        """The folder of the last checkpoint, or None."""

    def say(self, text: str) -> None:
        """A line for the person who waits; only rank 0's are meant."""

    def report(self, metrics: dict[str, float], folder: Path | None) -> None:
        """Every rank calls it equally often; rank 0 hands over a checkpoint folder."""


class NonFinite(RuntimeError):
    """The loss became NaN or infinite; the message holds the losses."""


@dataclass
class Meter:
    """Means of the losses and the speed since the last line."""

    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0
    since: float = field(default_factory=time.monotonic)

    def add(self, losses: dict[str, float]) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1

    def read(self) -> tuple[dict[str, float], float]:
        """(mean losses, steps a second), and starts anew."""
        means = {name: value / self.count for name, value in self.sums.items()}
        speed = self.count / (time.monotonic() - self.since)
        self.sums, self.count, self.since = {}, 0, time.monotonic()
        return means, speed


def fit(
    config: Config, run: Run, data: Source, anchors: AnchorPoses, val: Source | None = None
) -> dict[str, float] | None:
    """Trains to the last step, from the run's last checkpoint if it has one, and returns the last metrics.

    Same seed, data and number of workers: same weights, whether interrupted or not. NonFinite names the losses.
    """
    torch.set_num_threads(run.threads)
    torch.manual_seed(config.train.seed)
    skeleton = anchors.skeleton
    images = dataset.read(data, skeleton, config.data.min_joints)
    truth = dataset.read(val, skeleton) if val and run.rank == 0 else None
    model = build(config, anchors).to(memory_format=torch.channels_last).to(run.device).train()
    if config.train.init:
        for line in weights.start(model, config.train.init):
            run.say(f"train.init: {line}")
    parallel = _parallel(model, config, run)
    optimizer = optim.build(model, config.train)
    average = optim.Average(model, config.train.ema) if config.train.ema else None
    start, metrics = 0, cast(dict[str, float] | None, None)
    with run.resume() as folder:
        if folder is not None:
            start, metrics = _restore(folder, model, optimizer, average)
            run.say(f"resumed at step {start}")
    last = config.train.steps
    if start >= last:
        return metrics

    board = SummaryWriter(str(run.folder), purge_step=start) if run.rank == 0 else None
    samples = dataset.PoseDataset(images, data.images, config, skeleton)
    batches = dataset.loader(samples, run.rank, run.world_size, start)
    meter, began = Meter(), time.monotonic()
    for step in range(start, last + 1):
        if step == last or (step > start and step % config.train.save_every == 0):
            metrics = _evaluate_and_save(step, run, model, optimizer, average, truth, val, board)
            meter = Meter()
        if step == last:
            break
        batch = next(batches).to(run.device)
        seed = np.random.SeedSequence([config.train.seed, step, run.rank]).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(seed))  # whatever is drawn in this step depends on nothing before it
        rate = optim.learning_rate(step, config.train)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(run.device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            losses: dict[str, Tensor] = parallel(batch.images, batch.sizes, batch.people)
            total = torch.stack(list(losses.values())).sum()
        values = dict(zip(losses, _mean(torch.stack(list(losses.values())), run).tolist(), strict=True))
        if not math.isfinite(sum(values.values())):
            raise NonFinite(f"step {step}: the loss is not finite: {values}; images {batch.ids}; lower --train.lr?")
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        if config.train.clip:
            nn.utils.clip_grad_norm_(model.parameters(), config.train.clip)
        optimizer.step()
        if average:
            average.update(model.parameters(), step)
        meter.add(values)
        if board and (step + 1) % config.train.log_every == 0:
            means, speed = meter.read()
            for name, value in means.items():
                board.add_scalar(f"loss/{name}", value, step + 1)
            board.add_scalar("loss/total", sum(means.values()), step + 1)
            board.add_scalar("train/lr", rate, step + 1)
            board.add_scalar("train/images_per_second", speed * config.train.batch, step + 1)
            left = (time.monotonic() - began) / (step + 1 - start) * (last - step - 1)
            text = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
            run.say(f"step {step + 1}/{last}  {text}  {speed * config.train.batch:.1f} images/s  {left:.0f} s left")
    if board:
        board.close()
    return metrics


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


def _mean(losses: Tensor, run: Run) -> Tensor:
    """The losses' means over the workers, so that all of them stop at a loss that is not finite on one."""
    losses = losses.detach().float()
    if run.world_size > 1:
        torch.distributed.all_reduce(losses)
    return losses / run.world_size


def _evaluate_and_save(
    step: int,
    run: Run,
    model: LCRNet,
    optimizer: torch.optim.Optimizer,
    average: optim.Average | None,
    truth: list[Any] | None,
    val: Source | None,
    board: SummaryWriter | None,
) -> dict[str, float]:
    """Figures on the validation set (rank 0 has it), and the checkpoint, handed over to the run."""
    metrics: dict[str, float] = {"step": step}
    if run.rank != 0:
        run.report(metrics, None)
        return metrics
    with tempfile.TemporaryDirectory(prefix="lcrnet-") as scratch:
        folder = Path(scratch)
        save_file(_tensors(model, optimizer, average), folder / "training.safetensors")
        if average:
            average.swap(model)
        if truth is not None and val is not None:
            model.eval()
            found, _ = evaluate.detect(model.detect_batch, [val.images / i.file_name for i in truth])
            figures = evaluate.evaluate([i.people for i in truth], found, model.skeleton, model.config.evaluate)
            metrics |= {k: float(v) for k, v in figures.items() if isinstance(v, (int, float))}
            model.train()
            for name, value in metrics.items():
                if board:
                    board.add_scalar(f"val/{name}", value, step)
        weights.save(model, folder / "model", {"step": step, "metrics": metrics})
        if average:
            average.swap(model)
        state = {"step": step, "metrics": metrics, "config": model.config.model_dump(mode="json")}
        (folder / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        run.report(metrics, folder)
    return metrics


def _tensors(model: LCRNet, optimizer: torch.optim.Optimizer, average: optim.Average | None) -> dict[str, Tensor]:
    """Everything that a step changes, by name."""
    out = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        out |= {f"optimizer.{index}.{name}": value for name, value in state.items() if isinstance(value, Tensor)}
    if average:
        out |= {f"average.{i}": value for i, value in enumerate(average.weights)}
    return {name: value.detach().cpu().contiguous() for name, value in out.items()}


def _restore(
    folder: Path, model: LCRNet, optimizer: torch.optim.Optimizer, average: optim.Average | None
) -> tuple[int, dict[str, float]]:
    """Puts a checkpoint back; (its step, its metrics). UserError: it is of another configuration."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    before = configuration.from_dict(state["config"], str(folder))
    if before.model != model.config.model or before.train.optimizer != model.config.train.optimizer:
        raise UserError(f"{folder}: a checkpoint of another network or optimiser; take another --out")
    tensors = load_file(folder / "training.safetensors")
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "average": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    model.load_state_dict(parts["model"])
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in parts["optimizer"].items():
        index, _, moment = name.partition(".")
        moments.setdefault(int(index), {})[moment] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, held in optimizer.state.items():
        # Laid out in memory as the parameter is: fused AdamW pairs their numbers by place, whatever the strides.
        for name, value in held.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                held[name] = torch.empty_like(parameter).copy_(value)
    if average:
        for i, weight in enumerate(average.weights):
            weight.copy_(parts["average"][str(i)])
    return state["step"], state["metrics"]
