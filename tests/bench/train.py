"""A training step beside its peers in one run: `OMP_NUM_THREADS=1 python tests/bench/train.py --threads 1`. Not
collected by pytest.

ResNet-50 C4 with frozen BN, two stages fixed, 7 x 7 bins and stride 2 in res5 (the released LCR-Nets' size of it), 2
images, short side 320, 128 regions each; random weights, photographs of a COCO file. Interleaved rounds, one JSON line
a contestant and precision: medians and [least, most].

    ours         the network as `lcrnet.train` runs it
    torchvision  the same network and weights as written, on torchvision's RoIAlign and NMS, in the memory format that
                 these know (NCHW)
    keypoints    torchvision's keypointrcnn_resnet50_fpn on the same images, as many regions, the same stages fixed

`seconds` of a step and its parts: forward (of it in `parts`: body, rpn, sampling, pooling, head), backward, optimiser.
CPU seconds with --threads 1, so that other processes disturb less; else wall time, which needs a quiet machine: with
OpenMP a foreign process on one core costs both. `ratio`: a peer's time by ours, round by round. GFLOP: of its matrix
products and convolutions, by torch.utils.flop_counter, so that GFLOP/s compares with what the machine reaches.

    --profile    the operators that take longest in `ours`
    --workers 2  only this: so many processes (gloo, DistributedDataParallel) of `ours` against one, each with --batch
                 images and --threads: images/s, wall time, and the share of a step that communication takes, waiting
                 for the others included. Means something only where each has a core
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.multiprocessing
import torch.nn.functional as F
import torchvision.ops as tv
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet50
from torchvision.models.detection import KeypointRCNN
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops.misc import FrozenBatchNorm2d

from lcrnet import coco, config, image, model, optim
from lcrnet.anchors import AnchorPoses
from lcrnet.config import Config
from lcrnet.dataset import Batch
from lcrnet.skeleton import LCR13

MINI = Path("/work/shared/data/coco-mini")


def settings(args: argparse.Namespace) -> Config:
    """lr: so small that random weights stay as they are."""
    stage5 = {"roi_size": args.roi_size, "res5_stride": args.stride, "stride_in_1x1": args.stride_in_1x1}
    return config.from_dict({
        "model": {"backbone": args.backbone, **(stage5 if args.backbone != "tiny" else {})},
        "image": {"short_side": args.short, "max_side": 2 * args.short},
        "head": {"samples": args.regions},
        "train": {"lr": 1e-6, "warmup": 0, "steps": 100000, "batch": args.batch * max(1, args.workers)},
    })  # fmt: skip


def anchors(k: int = 20) -> AnchorPoses:
    rng = np.random.default_rng(0)
    pose2d, pose3d = rng.random((k, len(LCR13), 2)), rng.normal(0, 0.3, (k, len(LCR13), 3))
    return AnchorPoses(pose2d.astype(np.float32), pose3d.astype(np.float32), np.zeros(k, bool), LCR13)


def batches(args: argparse.Namespace, setting: Config, device: torch.device) -> Iterator[Batch]:
    """Resized photographs with somebody in them, over and over."""
    entries = [e for e in coco.read(args.annotations, LCR13, 1).images if len(e.people)]
    size, made = setting.image, []
    for first in range(0, len(entries) - args.batch + 1, args.batch):
        shots, people = [], []
        for entry in entries[first : first + args.batch]:
            shot, scale = image.resize(
                image.read(args.images / entry.file_name), size.short_side, size.max_side, size.resize
            )
            who = entry.people.copy()
            scale = scale.astype(np.float32)
            who.box, who.pose2d = who.box * np.tile(scale, 2), who.pose2d * scale
            shots.append(shot)
            people.append(who.tensors(device))
        pixels, sizes = image.stack(shots, size.multiple)
        made.append(Batch(pixels.to(device), sizes.to(device), people, []))
    return itertools.cycle(made)


def quiet(net: nn.Module) -> nn.Module:
    """Random weights whose activations do not grow from block to block."""
    for name, module in net.named_modules():
        if isinstance(module, FrozenBatchNorm2d) and name.endswith("bn3"):
            module.weight.fill_(0.2)
    return net


@dataclass
class Contestant:
    """`losses` of a batch are minimised; `seconds` gathers the parts of its steps."""

    name: str
    net: nn.Module
    losses: Callable[[Batch], dict[str, Tensor]]
    optimizer: torch.optim.Optimizer
    device: torch.device
    half: bool
    now: Callable[[], float]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    parts: dict[str, list[float]] = field(default_factory=dict)

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.now()

    def step(self, batch: Batch) -> None:
        torch.manual_seed(0)
        start = self.clock()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            total = torch.stack(list(self.losses(batch).values())).sum()
        assert total.isfinite(), self.name
        middle = self.clock()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        late = self.clock()
        self.optimizer.step()
        end = self.clock()
        for name, value in zip(
            ("step", "forward", "backward", "optimiser"),
            (end - start, middle - start, late - middle, end - late),
            strict=True,
        ):
            self.seconds.setdefault(name, []).append(value)

    def watch(self, owner: Any, method: str, part: str) -> None:
        """Adds up what a method of the network takes, as a part of the forward pass."""
        call = getattr(owner, method)

        @functools.wraps(call)
        def timed(*args: Any, **more: Any) -> Any:
            start = self.clock()
            out = call(*args, **more)
            self.parts.setdefault(part, []).append(self.clock() - start)
            return out

        setattr(owner, method, timed)


def lcrnet(name: str, setting: Config, half: bool, plain: bool, device: torch.device, now: Any) -> Contestant:
    torch.manual_seed(0)
    net = model.build(setting, anchors())
    quiet(net)
    form = torch.contiguous_format if plain else torch.channels_last
    net = net.to(memory_format=form).to(device).train()
    if plain:
        as_written(net)
    out = Contestant(
        name, net, lambda b: net(b.images, b.sizes, b.people), optim.build(net, setting.train), device, half, now
    )
    for owner, method, part in (
        (net.body, "forward", "body"), (net.rpn, "forward", "rpn"), (net.rpn, "propose", "proposals"),
        (net.rpn, "loss", "rpn loss"), (net.predictor, "sample", "sampling"), (net, "_regions", "pooling and head"),
    ):  # fmt: skip
        out.watch(owner, method, part)
    return out


def as_written(net: model.LCRNet) -> None:
    """The network on torchvision's operators, each layer where torchvision's ResNet has it."""
    setting = net.config.model
    step = getattr(net.box_head, "step", 1)

    def nms(boxes: Tensor, scores: Tensor, overlap: float, most: int, level: Tensor | None) -> tuple[Tensor, Tensor]:
        kept = []
        for box, score in zip(boxes, scores, strict=True):
            real = (score > -torch.inf).nonzero()[:, 0]
            kept.append(real[tv.nms(box[real], score[real], overlap)[:most]])
        rows = [F.pad(k, (0, min(most, boxes.shape[1]) - len(k)), value=-1) for k in kept]
        return torch.stack(rows), torch.tensor([len(k) for k in kept])

    def body(images: Tensor) -> dict[int, Tensor]:
        b: Any = net.body
        x = F.max_pool2d(F.relu(b.bn1(b.conv1(images))), 3, stride=2, padding=1)
        return {16: b.layer3(b.layer2(b.layer1(x)))}

    def regions(maps: list[Tensor], roi: Tensor) -> tuple[Tensor, Tensor]:
        map = maps[0].float()  # autocast does not know the operator on CPU; it has no bfloat16 there
        pooled = tv.roi_align(map, roi, setting.roi_size, 1 / 16, setting.sampling_ratio or -1, setting.aligned)
        head: Any = net.box_head
        said: tuple[Tensor, Tensor] = net.predictor(head.layer4(pooled[..., ::step, ::step]).mean((-2, -1)))
        return said

    normalise = net._normalise
    net.rpn.best = functools.partial(net.rpn.best, nms=nms)  # type: ignore[method-assign]
    net.body.forward = body  # type: ignore[method-assign]
    net._regions = regions  # type: ignore[method-assign]
    net._normalise = lambda *given: normalise(*given).contiguous()  # type: ignore[method-assign]


def keypoints(setting: Config, half: bool, device: torch.device, now: Any) -> Contestant:
    """Images as they are: its own resizing finds the size that it wants."""
    torch.manual_seed(0)
    body = _resnet_fpn_extractor(resnet50(weights=None, norm_layer=FrozenBatchNorm2d), 3)
    net = KeypointRCNN(
        body, 2, num_keypoints=len(LCR13), box_batch_size_per_image=setting.head.samples,
        min_size=setting.image.short_side, max_size=setting.image.max_side,
    )  # fmt: skip
    net = quiet(net).to(device).train()

    def losses(batch: Batch) -> dict[str, Tensor]:
        images, goals = [], []
        for pixels, (height, width), who in zip(batch.images, batch.sizes.tolist(), batch.people, strict=True):
            images.append(pixels[:, :height, :width] / 255)
            real = who[(who.box[:, 2:] > who.box[:, :2]).all(1)]
            points = torch.cat([real.pose2d, (real.seen > 0)[..., None].float()], -1)
            ones = torch.ones(len(real), dtype=torch.int64, device=device)
            goals.append({"boxes": real.box.float(), "labels": ones, "keypoints": points.float()})
        out: dict[str, Tensor] = net(images, goals)
        return out

    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], setting.train.lr, 0.9)
    return Contestant("keypoints", net, losses, optimizer, device, half, now)


def compare(args: argparse.Namespace, half: bool) -> None:
    device = torch.device(args.device)
    now = time.process_time if args.threads == 1 and args.device == "cpu" else time.perf_counter
    setting = settings(args)
    shots = batches(args, setting, device)
    rivals = [lcrnet("ours", setting, half, False, device, now)]
    if args.backbone != "tiny" and not args.alone:
        rivals.append(lcrnet("torchvision", setting, half, True, device, now))
        rivals.append(keypoints(setting, half, device, now))
    flops = {}
    for rival in rivals:
        first = next(shots)
        with FlopCounterMode(display=False) as counter:
            rival.step(first)  # and warms up
        flops[rival.name] = counter.get_total_flops()
        rival.step(first)
        rival.seconds.clear()
        rival.parts.clear()
    if args.profile:
        with torch.profiler.profile() as profile:
            rivals[0].step(next(shots))
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))
        return
    for _ in range(args.rounds):
        batch = next(shots)
        for rival in rivals:
            rival.step(batch)
    ours = rivals[0].seconds["step"]
    for rival in rivals:
        step = rival.seconds["step"]
        median = statistics.median(step)
        line: dict[str, Any] = {
            "step": rival.name, "precision": "bf16" if half else "fp32", "threads": args.threads,
            "seconds": round(median, 4), "spread": [round(min(step), 4), round(max(step), 4)],
            "images/s": round(args.batch / median, 2), "GFLOP": round(flops[rival.name] / 1e9),
            "GFLOP/s": round(flops[rival.name] / 1e9 / median),
        }  # fmt: skip
        line |= {k: round(statistics.median(v), 4) for k, v in rival.seconds.items() if k != "step"}
        if rival.parts:
            line["parts"] = {k: round(statistics.median(v), 4) for k, v in rival.parts.items()}
        if rival is not rivals[0]:
            ratios = [theirs / mine for theirs, mine in zip(step, ours, strict=True)]
            line |= {"ratio": round(statistics.median(ratios), 2)}
            line |= {"ratios": [round(min(ratios), 2), round(max(ratios), 2)]}
        print(json.dumps(line), flush=True)


def worker(rank: int, world: int, args: argparse.Namespace, port: int, half: bool) -> None:
    """Steps of one of several processes; rank 0 prints."""
    torch.set_num_threads(args.threads)
    store = torch.distributed.TCPStore("127.0.0.1", port, world, rank == 0)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    device, setting = torch.device("cpu"), settings(args)
    shots = batches(args, setting, device)
    mine = lcrnet("ours", setting, half, False, device, time.perf_counter)
    sent = []

    def send(bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
        """The mean over the processes, waited for: on a CPU there is one bucket, at the end of the backward pass."""
        start = time.perf_counter()
        torch.distributed.all_reduce(bucket.buffer())
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer().div_(world))
        sent.append(time.perf_counter() - start)
        return done

    if world > 1:
        net = DistributedDataParallel(mine.net, gradient_as_bucket_view=True, bucket_cap_mb=1000)
        net.register_comm_hook(None, lambda _, bucket: send(bucket))  # DDP cannot read annotations as text
        mine.losses = lambda b: net(b.images, b.sizes, b.people)
    for step in range(args.rounds + 2):
        if step == 2:  # warm, and DDP has put its buckets in order
            mine.seconds.clear()
            sent.clear()
        mine.step(next(shots))
    if rank == 0:
        median = statistics.median(mine.seconds["step"])
        print(json.dumps({
            "workers": world, "precision": "bf16" if half else "fp32", "threads": args.threads,
            "seconds": round(median, 4), "images/s": round(world * args.batch / median, 2),
            "communication": round(sum(sent) / sum(mine.seconds["step"]), 3),
        }), flush=True)  # fmt: skip
    torch.distributed.destroy_process_group()


def scale(args: argparse.Namespace, half: bool) -> None:
    for world in (1, args.workers):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(worker, (world, args, port, half), nprocs=world)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--annotations", type=Path, default=MINI / "annotations/person_keypoints.json")
    parser.add_argument("--images", type=Path, default=MINI / "images")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--batch", type=int, default=2, help="images a step (of each worker)")
    parser.add_argument("--short", type=int, default=320)
    parser.add_argument("--regions", type=int, default=128)
    parser.add_argument("--roi-size", type=int, default=7)
    parser.add_argument("--stride", type=int, default=2, help="of res5; the configuration's default is 1 for 7 bins")
    parser.add_argument("--stride-in-1x1", action="store_true")
    parser.add_argument("--alone", action="store_true", help="without the peers")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--workers", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    for precision in args.precision:
        (scale if args.workers else compare)(args, precision == "bf16")


if __name__ == "__main__":
    main()
