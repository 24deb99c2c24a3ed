"""RoIPool and RoICrop beside their peers, one JSON line each: `python tests/bench/roi_pool.py [--threads N]`. Not
collected by pytest.

The peer of roi_pool is torchvision's; of roi_crop grid_sample on all points of an image in one call, and max_pool2d.
Medians and [least, most] of interleaved rounds, results being compared in the same run: CPU seconds with one thread, so
that other processes disturb less, else wall time; on a GPU, where there is one, of the work queued and waited for.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision.ops as tv
from torch import Tensor

from lcrnet import ops

CHANNELS, HEIGHT, WIDTH, STRIDE, REGIONS = 1024, 50, 84, 16, 512
ROUNDS = 5


def regions(count: int, device: str) -> Tensor:
    """Boxes up to a third of the image."""
    corner, extent = torch.rand(2, count, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([WIDTH, HEIGHT])
    boxes = torch.cat([0.7 * corner, 0.7 * corner + 0.3 * extent], 1) * STRIDE
    return torch.cat([torch.zeros(count, 1), boxes], 1).to(device)


def sampled(map: Tensor, boxes: Tensor, size: int, max_pool: bool) -> Tensor:
    """What roi_crop computes of a batch of one image: (C, R, h, w) seen as (R, C, h, w), not copied."""
    points = size * (2 if max_pool else 1)
    at = torch.linspace(0, 1, points, device=map.device)
    low, high = boxes[:, 1:3, None] / STRIDE, boxes[:, 3:, None] / STRIDE
    x, y = (low + (high - low) * at).unbind(1)
    grid = torch.stack([
        (2 * x / (WIDTH - 1) - 1)[:, None].expand(-1, points, -1),
        (2 * y / (HEIGHT - 1) - 1)[:, :, None].expand(-1, -1, points),
    ], 3).view(1, -1, points, 2).to(map.dtype)  # fmt: skip
    out = F.grid_sample(map, grid, align_corners=True, padding_mode="zeros")
    out = F.max_pool2d(out, 2, 2) if max_pool else out
    return out.view(map.shape[1], -1, size, size).transpose(0, 1)


def case(op: str, size: int, dtype: torch.dtype, layout: torch.memory_format, device: str) -> None:
    map = torch.randn(1, CHANNELS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    boxes = regions(REGIONS, device)
    # Peers run in float32: torchvision has no bfloat16, whose points would lie cells away from where they should.
    mine, other = (x.to(memory_format=layout).requires_grad_() for x in (map, map.float()))

    def ours(x: Tensor) -> Tensor:
        if op == "roi_pool":
            return ops.roi_pool(x, boxes, size, 1 / STRIDE)
        return ops.roi_crop(x, boxes, size, 1 / STRIDE, op == "roi_crop+max")

    def theirs(x: Tensor) -> Tensor:
        if op == "roi_pool":
            return tv.roi_pool(x, boxes, size, 1 / STRIDE)
        return sampled(x, boxes, size, op == "roi_crop+max")

    clock = time.perf_counter if device == "cuda" or torch.get_num_threads() > 1 else time.process_time

    def timed(run: Callable[[], Any]) -> tuple[float, Any]:
        if device == "cuda":
            torch.cuda.synchronize()
        start = clock()
        result = run()
        if device == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (clock() - start), result

    times: dict[tuple[str, bool], list[float]] = {}
    error = ""
    for round_ in range(1 + ROUNDS):
        outs, gradients = [], []
        for is_ours, run, x in ((True, ours, mine), (False, theirs, other)):
            forward, out = timed(lambda run=run, x=x: run(x))
            grad = torch.ones_like(out) if round_ else torch.linspace(0, 1, size, device=device).to(out).expand_as(out)
            backward, (gradient,) = timed(lambda out=out, x=x, grad=grad: torch.autograd.grad(out, x, grad))
            if round_:
                times.setdefault(("forward", is_ours), []).append(forward)
                times.setdefault(("backward", is_ours), []).append(backward)
            else:
                outs.append(out.detach())
                gradients.append(gradient)
            del out, grad, gradient
        if not round_:
            error = ", ".join(f"{float((a - b).abs().max()):.1e}" for a, b in (outs, gradients))
            outs.clear()
    for direction in ("forward", "backward"):
        us, them = times[direction, True], times[direction, False]
        median, peer = statistics.median(us), statistics.median(them)
        print(json.dumps({
            "op": op, "case": f"{REGIONS} regions {size}x{size}, 1x{CHANNELS}x{HEIGHT}x{WIDTH}",
            "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} thread(s)",
            "direction": direction, "dtype": str(dtype)[6:],
            "layout": "channels-last" if layout == torch.channels_last else "nchw",
            "ms": round(median, 2), "spread": [round(min(us), 2), round(max(us), 2)],
            "peer": ("torchvision" if op == "roi_pool" else "grid_sample") + ", float32",
            "peer_ms": round(peer, 2), "peer_spread": [round(min(them), 2), round(max(them), 2)],
            "ratio": round(peer / median, 1), "difference": error,
        }), flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--ops", nargs="+", default=["roi_pool", "roi_crop", "roi_crop+max"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        for op in args.ops:
            for size in (14, 7):
                for dtype in (torch.float32, torch.bfloat16):
                    for layout in (torch.contiguous_format, torch.channels_last):
                        case(op, size, dtype, layout, device)


if __name__ == "__main__":
    main()
