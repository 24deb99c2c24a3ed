"""Evaluation of a data set, one JSON line: `OMP_NUM_THREADS=1 python tests/bench/evaluate.py [--images 10000]`. Not
collected by pytest.

Seconds of CPU, median, least and most of interleaved rounds. `evaluate`: everything, with groups, curves and the
predecessor's figures. Its parts: `outcomes`, matching; `oks_ap`, pycocotools' included; `figures`, the rest. `peer`:
COCOeval (evaluate and accumulate, one size, as `oks_ap` has it) alone on the same people, its COCO objects ready.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from lcrnet import config, evaluate
from lcrnet.pose import People, Person
from lcrnet.skeleton import LCR13

J = len(LCR13)
TARGET_S = 20.0


def draw(images: int, people: int = 3, seed: int = 0) -> tuple[list[People], list[list[Person]]]:
    """Each image with `people` true people and as many found: of ten eight are near, one doubled, one nobody's."""
    rng = np.random.default_rng(seed)
    shape = rng.uniform(-1, 1, (J, 3)) * [0.4, 0.9, 0.3]
    truth, found = [], []
    for _ in range(images):
        true = People.empty(people, J)
        size, place = rng.uniform(30, 150, (people, 1, 1)), rng.uniform(100, 900, (people, 1, 2))
        true.pose3d[:] = shape + rng.normal(0, 0.1, (people, J, 3))
        true.pose2d[:] = true.pose3d[..., :2] * size + place
        true.seen[:] = rng.choice([0, 1, 2], (people, J), p=[0.1, 0.2, 0.7])
        true.has3d[:], true.area[:] = True, (size[:, 0, 0] * 1.2) ** 2
        true.box = np.concatenate([true.pose2d.min(1), true.pose2d.max(1)], -1)
        who, kind = np.arange(people), rng.uniform(size=people)
        who[kind < 0.1] = 0
        pose2d = true.pose2d[who] + rng.normal(0, 0.05, (people, J, 2)) * size[who]
        pose2d[kind > 0.9] += 2000
        pose3d = true.pose3d[who] + rng.normal(0, 0.06, (people, J, 3))
        score = rng.uniform(0.4, 1, people)
        box = np.concatenate([pose2d.min(1), pose2d.max(1)], -1)
        found.append([
            Person(box[n], pose2d[n].astype(np.float32), pose3d[n].astype(np.float32), float(score[n]), np.ones(J), 0,
                   1, np.zeros(J))
            for n in range(people)
        ])  # fmt: skip
        truth.append(true)
    return truth, found


def judge(truth: list[People], found: list[list[Person]]) -> COCOeval:
    """pycocotools' own, ready to run."""
    labels: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for i, (true, persons) in enumerate(zip(truth, found, strict=True), 1):
        for p in range(len(true)):
            keypoints = np.concatenate([true.pose2d[p], true.seen[p, :, None]], 1, dtype=np.float64).ravel()
            labels.append({"id": len(labels) + 1, "image_id": i, "category_id": 1, "keypoints": keypoints,
                           "num_keypoints": int((true.seen[p] > 0).sum()), "bbox": [0.0, 0.0, 1.0, 1.0],
                           "area": float(true.area[p]), "iscrowd": 0})  # fmt: skip
        for person in persons:
            keypoints = np.concatenate([person.pose2d, np.ones((J, 1))], 1, dtype=np.float64).ravel()
            results.append({"id": len(results) + 1, "image_id": i, "category_id": 1, "keypoints": keypoints,
                            "score": person.score, "area": 1.0})  # fmt: skip
    images = [{"id": i} for i in range(1, len(truth) + 1)]
    peer = COCOeval(evaluate._coco(images, labels), evaluate._coco(images, results), "keypoints")
    peer.params.kpt_oks_sigmas = LCR13.sigma
    peer.params.areaRng, peer.params.areaRngLbl = peer.params.areaRng[:1], ["all"]
    return peer


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        result = run()
    return time.process_time() - start, result


def told(times: list[float]) -> dict[str, float]:
    return {"s": round(statistics.median(times), 2), "least": round(min(times), 2), "most": round(max(times), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--people", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    settings = config.Evaluate(predecessor=True)
    truth, found = draw(args.images, args.people)
    groups = [f"group {i % 15}" for i in range(args.images)]
    with contextlib.redirect_stdout(io.StringIO()):
        peer = judge(truth, found)

    def run_peer() -> float:
        peer.evaluate()
        peer.accumulate()
        return float(peer.eval["precision"].mean())

    times: dict[str, list[float]] = {"evaluate": [], "outcomes": [], "oks_ap": [], "figures": [], "peer": []}
    evaluate.evaluate(truth[:10], found[:10], LCR13, settings, groups[:10])  # warms up
    for _ in range(args.rounds):
        whole, metrics = timed(lambda: evaluate.evaluate(truth, found, LCR13, settings, groups))
        matching, _ = timed(lambda: evaluate.outcomes(truth, found, LCR13, settings))
        ap, _ = timed(lambda: evaluate.oks_ap(truth, found, LCR13))
        alone, theirs = timed(run_peer)
        assert abs(metrics["oks_ap"] - theirs) < 1e-12, (metrics["oks_ap"], theirs)
        for name, value in zip(times, (whole, matching, ap, whole - matching - ap, alone), strict=True):
            times[name].append(value)
    line: dict[str, Any] = {"bench": "evaluate", "images": args.images, "people": args.people * args.images}
    line |= {key: round(metrics[key], 4) for key in ("recall", "oks_ap", "pck3d_all")}
    line |= {name: told(value) for name, value in times.items()}
    line["evaluate_over_peer"] = round(line["evaluate"]["s"] / line["peer"]["s"], 2)
    line |= {"target_s": TARGET_S, "met": line["evaluate"]["most"] < TARGET_S}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
