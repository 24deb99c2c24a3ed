"""Every operator beside its peer (torchvision's, or what PyTorch has) in one run: `python tests/bench/ops.py [--device
cuda] [--op roi_align] [--threads 1] [--rounds 7]`. Not collected by pytest.

One JSON line a case: median and [least, most] of the interleaved rounds, in ms; `ratio`, the median of the peer's time
by ours, round by round, and its spread; GB/s of what must at least be read and written, and what part that is of this
machine's copy bandwidth, measured first; `fill_ms`, what writing a result of that size into fresh memory takes torch;
the peak of memory beyond what lay there before, of ours and of the peer. Results are compared before anything is timed.
CPU seconds with --threads 1, so that other processes disturb less; else wall time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.ops as tv
from torch import Tensor

from lcrnet import ops

HEIGHT, WIDTH, CHANNELS, SCALE = 50, 84, 1024, 1 / 16  # the map of an 800 x 1344 image


@dataclass
class Case:
    """`ours` and `peer` give tensors that must agree within `tolerance`; `bytes` must be moved at least."""

    op: str
    case: str
    ours: Callable[[], Tensor]
    peer: Callable[[], Tensor]
    bytes: int = 0
    tolerance: float = 0.0
    peer_name: str = "torchvision"
    fill: tuple[int, ...] = ()


def bytes_of(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def regions(count: int, images: int, device: torch.device) -> Tensor:
    """Corners anywhere, up to half of the map wide and high."""
    g = torch.Generator().manual_seed(0)
    size = torch.tensor([WIDTH, HEIGHT]) / SCALE
    low = torch.rand(count, 2, generator=g) * size * 0.7
    image = torch.arange(count)[:, None] * images // count
    return torch.cat([image, low, low + torch.rand(count, 2, generator=g) * size * 0.3 + 8], 1).to(device)


def uniform(count: int, g: torch.Generator) -> Tensor:
    """Boxes (N, 4) with corners anywhere in an image and sizes up to 30 % of it: most are kept."""
    image = torch.tensor([1344.0, 800.0])
    low = torch.rand(count, 2, generator=g) * image
    return torch.cat([low, low + 0.3 * image * torch.rand(count, 2, generator=g)], 1)


def clustered(count: int, g: torch.Generator) -> Tensor:
    """Near-duplicates of 40 boxes, as an RPN proposes them: few are kept."""
    box = uniform(40, g)[torch.randint(40, (count,), generator=g)]
    size = (box[:, 2:] - box[:, :2]).repeat(1, 2)
    return box + 0.12 * size * torch.randn(count, 4, generator=g)


def gradient(out: Tensor, map: Tensor, upstream: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.autograd.grad(out, map, upstream, retain_graph=True)[0]


def layouts(map: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "channels_last", map.contiguous(memory_format=torch.channels_last)
    yield "nchw", map


def roi_align(device: torch.device) -> Iterator[Case]:
    for images in (1, 8):
        map = torch.randn(images, CHANNELS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1)).to(device)
        for count, bins in ((1000, 14), (512, 14), (1000, 7), (512, 7)):
            if images == 8 and bins == 14 and count == 1000:
                continue
            roi = regions(count, images, device)
            rest = (bins, SCALE, 2, True)
            name = f"B={images} R={count} {bins}x{bins}"
            shape = (count, CHANNELS, bins, bins)
            for layout, x in layouts(map):

                def peer(x: Tensor = map, roi: Tensor = roi, rest: tuple[object, ...] = rest) -> Tensor:
                    return tv.roi_align(x, roi, *rest)

                def ours(x: Tensor = x, roi: Tensor = roi, rest: tuple[object, ...] = rest, step: int = 1) -> Tensor:
                    return ops.roi_align(x, roi, *rest, step=step)

                moved = bytes_of(x) + 4 * count * CHANNELS * bins**2
                yield Case("roi_align", f"{name} {layout} float32", ours, peer, moved, 1e-4, fill=shape)
                if layout == "nchw" or images == 8:
                    continue
                half = x.bfloat16()
                yield Case(
                    "roi_align", f"{name} {layout} bfloat16", lambda half=half, ours=ours: ours(half), peer,
                    moved // 2, 5e-2,
                )  # fmt: skip
                adaptive = (bins, SCALE, -1, True)
                yield Case(
                    "roi_align", f"{name} {layout} float32 adaptive", lambda ours=ours, a=adaptive: ours(rest=a),
                    lambda peer=peer, a=adaptive: peer(rest=a), moved, 1e-4,
                )  # fmt: skip
                if bins == 14:
                    yield Case(
                        "roi_align", f"{name} {layout} float32 step 2", lambda ours=ours: ours(step=2),
                        lambda peer=peer: peer()[:, :, ::2, ::2], bytes_of(x) + count * CHANNELS * bins**2, 1e-4,
                    )  # fmt: skip
            for layout, x in layouts(map):
                if images == 8 or count == (1000 if bins == 14 else 512):
                    continue
                mine, other = x.detach().requires_grad_(), map.detach().requires_grad_()
                upstream = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device)
                last = upstream.to(memory_format=torch.channels_last) if layout != "nchw" else upstream
                moved = bytes_of(x, upstream)
                yield Case(
                    "roi_align backward", f"{name} {layout} float32",
                    gradient(ops.roi_align(mine, roi, *rest), mine, last),
                    gradient(tv.roi_align(other, roi, *rest), other, upstream), moved, 1e-3,
                )  # fmt: skip


def nms(device: torch.device) -> Iterator[Case]:
    for make in (uniform, clustered):
        for images, count, most, groups in (
            (1, 1000, None, 1), (1, 6000, None, 1), (1, 6000, 1000, 1), (1, 12000, None, 1), (1, 12000, 1000, 1),
            (1, 6000, 1000, 5), (8, 6000, 1000, 1), (8, 12000, 1000, 1),
        ):  # fmt: skip
            g = torch.Generator().manual_seed(count)
            box = torch.stack([make(count, g) for _ in range(images)]).to(device)
            score = torch.rand(images, count, generator=g).to(device)
            level = torch.randint(groups, (images, count), generator=g).to(device)

            def ours(b: Tensor = box, s: Tensor = score, m: int | None = most, g: Tensor = level) -> Tensor:
                return ops.batched_nms(b, s, 0.7, m, g if int(g.max()) else None)[0]

            def peer(b: Tensor = box, s: Tensor = score, m: int | None = most, g: Tensor = level) -> Tensor:
                kept = [
                    (tv.batched_nms(b[i], s[i], g[i], 0.7) if int(g.max()) else tv.nms(b[i], s[i], 0.7))[:m]
                    for i in range(len(b))
                ]
                width = min(m or b.shape[1], b.shape[1])
                return torch.stack([F.pad(k, (0, width - len(k)), value=-1) for k in kept])

            yield Case("nms", f"B={images} N={count} {make.__name__} groups={groups} keep={most or 'all'}", ours, peer)


OPERATORS: dict[str, Callable[[torch.device], Iterator[Case]]] = {"roi_align": roi_align, "nms": nms}


class Clock:
    """Seconds that a call takes, and the memory that it takes beyond what lies there."""

    def __init__(self, device: torch.device, threads: int):
        self.cuda, self.now = device.type == "cuda", time.process_time if threads == 1 else time.perf_counter

    def seconds(self, call: Callable[[], Tensor]) -> float:
        if not self.cuda:
            start = self.now()
            call()
            return self.now() - start
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start_event.record()
        call()
        end_event.record()
        torch.cuda.synchronize()
        return float(start_event.elapsed_time(end_event)) / 1e3

    def peak(self, call: Callable[[], Tensor]) -> float:
        """MiB."""
        if self.cuda:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            torch.cuda.synchronize()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = status("VmRSS")
        call()
        return (status("VmHWM") - before) / 2**10


def status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0])


def copy_bandwidth(clock: Clock, device: torch.device) -> float:
    """Bytes a second, read and written, of a copy into memory that is there."""
    source, target = torch.ones(2, 1 << 26, device=device)
    return 2 * bytes_of(source) / min(clock.seconds(lambda: target.copy_(source)) for _ in range(8))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--op", choices=list(OPERATORS), help="this one only")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    clock = Clock(device, args.threads)
    bandwidth = copy_bandwidth(clock, device)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"cpu, {args.threads} threads"
    print(json.dumps({"device": where, "copy_GB/s": round(bandwidth / 1e9, 1), "torch": torch.__version__}), flush=True)
    for name, cases in OPERATORS.items():
        if args.op in (None, name):
            for case in cases(device):
                print(json.dumps(measure(case, clock, bandwidth, args.rounds)), flush=True)


def measure(case: Case, clock: Clock, bandwidth: float, rounds: int) -> dict[str, object]:
    ours, peer = case.ours(), case.peer()
    if case.tolerance:
        apart = float((ours.float() - peer.float()).abs().max())
        assert apart <= case.tolerance * max(1, float(peer.abs().max())), f"{case.case}: {apart} apart"
    else:
        assert torch.equal(ours, peer), f"{case.case}: not the same"
    del ours, peer
    memory = round(clock.peak(case.ours)), round(clock.peak(case.peer))
    mine, other = [], []
    for _ in range(rounds):
        other.append(clock.seconds(case.peer))
        times = [clock.seconds(case.ours) for _ in range(3)]
        mine += times
    median, theirs = statistics.median(mine), statistics.median(other)
    ratios = [t / statistics.median(mine[3 * i : 3 * i + 3]) for i, t in enumerate(other)]
    line: dict[str, object] = {
        "op": case.op, "case": case.case, "ms": round(1e3 * median, 3),
        "spread_ms": [round(1e3 * min(mine), 3), round(1e3 * max(mine), 3)],
        "peer": case.peer_name, "peer_ms": round(1e3 * theirs, 3), "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(min(ratios), 2), round(max(ratios), 2)], "peak_MiB": memory[0], "peer_peak_MiB": memory[1],
    }  # fmt: skip
    if case.bytes:
        line |= {"GB/s": round(case.bytes / median / 1e9, 1), "of_copy": round(case.bytes / median / bandwidth, 3)}
    if case.fill and not clock.cuda:
        fill = [clock.seconds(lambda: torch.empty(case.fill).fill_(1)) for _ in range(3)]
        line["fill_ms"] = round(1e3 * statistics.median(fill), 3)
    return line


if __name__ == "__main__":
    main()
