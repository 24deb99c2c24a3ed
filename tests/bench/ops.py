"""Operators beside torchvision's, one JSON line each: `python tests/bench/ops.py`. Not collected by pytest.

Forward and forward + backward of RoIAlign on CPU, at the sizes of the tiny network and of ResNet-50 C4, medians of
interleaved runs.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch
import torchvision.ops as tv

from lcrnet import ops

CASES = {  # images, channels, height, width, stride, regions, bins
    "tiny 128 px": (6, 64, 32, 32, 4, 96, 7),
    "C4 512 px": (2, 1024, 32, 32, 16, 128, 7),
    "C4 800 px": (1, 1024, 50, 84, 16, 256, 7),
}


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    torch.manual_seed(0)
    for name, (images, channels, height, width, stride, regions, bins) in CASES.items():
        features = torch.randn(images, channels, height, width).to(memory_format=torch.channels_last).requires_grad_()
        corner = torch.rand(regions, 2) * torch.tensor([width, height]) * stride * 0.7
        size = torch.rand(regions, 2) * torch.tensor([width, height]) * stride * 0.3
        boxes = torch.cat([torch.arange(regions)[:, None] % images, corner, corner + size], 1)
        arguments = (boxes, bins, 1 / stride, 2, True)

        def step(op: Callable[..., torch.Tensor], backward: bool, x: torch.Tensor, a: tuple[object, ...]) -> None:
            out = op(x, *a)
            if backward:
                out.backward(torch.ones_like(out))
                x.grad = None

        for backward in (False, True):
            times: dict[str, list[float]] = {"twin": [], "torchvision": []}
            for round_ in range(6):
                for which, op in (("twin", ops.roi_align_twin), ("torchvision", tv.roi_align)):
                    took = seconds(lambda op=op, b=backward, x=features, a=arguments: step(op, b, x, a))
                    if round_:  # the first warms up
                        times[which].append(took)
            ours, theirs = (statistics.median(times[which]) for which in ("twin", "torchvision"))
            print(json.dumps({"op": "roi_align", "case": name, "backward": backward, "twin_ms": round(1e3 * ours, 2),
                              "torchvision_ms": round(1e3 * theirs, 2), "ratio": round(theirs / ours, 2)}))  # fmt: skip


if __name__ == "__main__":
    main()
