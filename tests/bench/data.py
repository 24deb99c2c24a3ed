"""What training images cost: `OMP_NUM_THREADS=1 python tests/bench/data.py [--images DIR] [--short 320]`. Not
collected.

JSON lines, all of one core, CPU seconds, medians of interleaved rounds with least and most:
decode  images/s of reading and resizing: ours (Pillow), OpenCV, torchvision, and each at a reduced size where that
        suffices (libjpeg's scaling); photographs as they are and enlarged to --large pixels of short side
sample  images/s and milliseconds of decoding, augmenting and collating, with each kind of augmentation
padding share of the pixels of batches that is padding, without and with data.group_aspect
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torchvision.io import ImageReadMode, decode_jpeg

from lcrnet import config, dataset, image
from lcrnet.augment import augment
from lcrnet.coco import CocoImage
from lcrnet.pose import People
from lcrnet.skeleton import LCR13

REDUCED = {1: cv2.IMREAD_COLOR, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4,
           8: cv2.IMREAD_REDUCED_COLOR_8}  # fmt: skip


def timed(ways: dict[str, Callable[[], Any]], rounds: int, count: int) -> dict[str, dict[str, float]]:
    """Images a CPU second of each way over `count` images, in turns."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.process_time()
            way()
            spent[name].append((time.process_time() - began) / count)
    return {
        name: {"images_per_s": round(1 / statistics.median(s), 1), "ms": round(1e3 * statistics.median(s), 2),
               "least_ms": round(1e3 * min(s), 2), "most_ms": round(1e3 * max(s), 2)}
        for name, s in spent.items()
    }  # fmt: skip


def decoders(files: list[bytes], short: int, longest: int) -> dict[str, Callable[[], Any]]:
    """Ways from encoded bytes to pixels of the size that is asked for."""

    def all_of(one: Callable[[bytes], np.ndarray]) -> Callable[[], Any]:
        return lambda: [image.resize(one(data), short, longest) for data in files]

    def factor(data: bytes) -> float:
        return image.factor(image.size(data), short, longest)

    def opencv(data: bytes, reduced: bool) -> np.ndarray:
        scale = 2 ** max(0, min(3, math.floor(-math.log2(factor(data))))) if reduced else 1
        return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), REDUCED[scale]), cv2.COLOR_BGR2RGB)

    def torchvision(data: bytes) -> np.ndarray:
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB).permute(
            1, 2, 0
        ).contiguous().numpy()  # fmt: skip

    return {
        "ours": all_of(image.decode),
        "opencv": all_of(lambda data: opencv(data, False)),
        "torchvision": all_of(torchvision),
        "ours_reduced": all_of(lambda data: image.decode(data, at_least=factor(data))),
        "opencv_reduced": all_of(lambda data: opencv(data, True)),
    }


def padding(sizes: list[tuple[int, int]], grouped: bool) -> float:
    """The share of padding in 64 batches of 16 images of these sizes (height, width)."""
    asked = config.from_dict({"train": {"steps": 64, "batch": 16}})
    aspects = [w / h for h, w in sizes] if grouped else None
    pixels = room = 0
    for keys in dataset.Steps(asked, dataset.Mix([len(sizes)], [1]), 0, 1, 0, aspects):
        mine = np.array([sizes[key.index] for key in keys])
        mine = np.round(mine * (800 / mine.min(1))[:, None])
        pixels, room = pixels + mine.prod(1).sum(), room + len(mine) * mine.max(0).prod()
    return 1 - float(pixels / room)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=Path, default=Path("../shared/data/coco-mini/images"))
    parser.add_argument("--short", type=int, default=320)
    parser.add_argument("--large", type=int, default=2400)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    files = [file.read_bytes() for file in sorted(args.images.glob("*.jpg"))]
    large = []
    for data in files[:6]:
        shot = image.resize(image.decode(data), args.large, 10**6)[0]
        large.append(cv2.imencode(".jpg", shot[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes())
    longest = round(args.short * 1333 / 800)
    for what, several in (("as they are", files), (f"short side {args.large}", large)):
        found = timed(decoders(several, args.short, longest), args.rounds, len(several))
        print(json.dumps({"what": "decode", "images": what, "to": args.short, "found": found}))

    kinds: dict[str, dict[str, Any]] = {
        "plain": {}, "colour": {"colour": 0.3}, "crop": {"crop": 0.3}, "rotate": {"rotate": 30},
        "occlude": {"occlude": 1}, "all": {"colour": 0.3, "crop": 0.3, "rotate": 30, "occlude": 1},
    }  # fmt: skip
    people = People.empty(3, len(LCR13))
    people.seen[:], people.box[:] = 2, [[50, 50, 200, 300], [100, 20, 300, 400], [10, 10, 90, 200]]
    people.pose2d = np.random.default_rng(0).uniform(20, 280, people.pose2d.shape).astype(np.float32)
    sizes = [image.size(data) for data in files]
    entries = [CocoImage(n, "", w, h, None, people) for n, (h, w) in enumerate(sizes)]

    def sample(fields: dict[str, Any]) -> Callable[[], Any]:
        asked = config.from_dict({"image": {"short_side": args.short, "max_side": longest}, "data": fields})

        def one(n: int, data: bytes) -> dataset.Sample:
            return dataset.Sample(*augment(image.decode(data), entries[n].people, n, 1, asked, LCR13), n)

        def run() -> None:
            for first in range(0, len(files), 8):
                dataset.collate([one(n, data) for n, data in enumerate(files[first : first + 8], first)], 16)

        return run

    ways = {name: sample(fields) for name, fields in kinds.items()}
    print(json.dumps({"what": "sample", "to": args.short, "found": timed(ways, args.rounds, len(files))}))
    shares = {"loose": round(padding(sizes, False), 3), "grouped": round(padding(sizes, True), 3)}
    print(json.dumps({"what": "padding", "share": shares}))


if __name__ == "__main__":
    main()
