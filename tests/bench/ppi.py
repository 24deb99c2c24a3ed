"""Pose proposals integration, one JSON line a set: `OMP_NUM_THREADS=1 python tests/bench/ppi.py [--rounds 15]`. Not
collected by pytest.

Per set milliseconds of CPU (median, least and most of interleaved rounds): `operator`, `ops.group_poses` of ext;
`twin`, the same in plain PyTorch; `integrate`, all of `lcrnet.ppi.integrate`, from proposals to people (the others are
given the boxes). Where there is a GPU also `cuda_64`: wall time of the operator on 64 images of the set at once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcrnet import config, ops, pose, ppi, twins
from lcrnet.pose import PoseProposals
from lcrnet.skeleton import LCR13

SIZE = (800, 1200)
K = 20
UPPER_ONLY = np.arange(K) >= K // 2
SETS = {  # people, proposals; of nobody: what an untrained network proposes
    "1 person": (1, 500),
    "3 people": (3, 1000),
    "8 people": (8, 2000),
    "30 people": (30, 5000),
    "30 people, 10000": (30, 10000),
    "untrained": (0, 20000),
    "untrained, restless": (-1, 20000),
}


def draw(people: int, count: int, seed: int = 0) -> PoseProposals:
    """`people` seen by a trained network: places, a few likely anchor poses each. Of 0 people: boxes all over the
    image, each with all anchor poses, none likely; of -1 the same with scores up to 1 and 3D poses that scatter.
    """
    rng = np.random.default_rng(seed)
    joints = len(LCR13)
    anchor3d = rng.normal(0, 0.25, (K // 2, joints, 3))
    anchor2d = rng.uniform(0.05, 0.95, (K // 2, joints, 2))
    if people > 0:
        who = rng.integers(0, people, count)
        height = rng.uniform(120, 500, people)
        place = rng.uniform(0, 1, (people, 2)) * [SIZE[1], SIZE[0]]
        likely = rng.integers(0, K // 2, (people, 3))[who, np.minimum(rng.geometric(0.6, count) - 1, 2)]
        anchor = likely + K // 2 * rng.integers(0, 2, count)
        extent = (height[:, None] * [0.45, 1])[who] * rng.normal(1, 0.08, (count, 2))
        corner = place[who] - extent / 2 + rng.normal(0, 0.04, (count, 2)) * extent
        score, restless = rng.uniform(0.07, 1, count) ** 2, 0.04
    else:
        boxes = -(-count // K)
        anchor = np.tile(np.arange(K), boxes)[:count]
        extent = np.exp(rng.uniform(np.log(30), np.log(700), (boxes, 1))) * rng.uniform(0.5, 1.5, (boxes, 2))
        corner = rng.uniform(0, 1, (boxes, 2)) * [SIZE[1], SIZE[0]] - extent / 2
        extent, corner = (np.repeat(v, K, 0)[:count] for v in (extent, corner))
        logits = rng.normal(0, 0.5 if people == 0 else 2.5, (boxes, K + 1))
        score = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True))[:, 1:].ravel()[:count]
        restless = 0.01 if people == 0 else 0.1
    pose2d = corner[:, None] + (anchor2d[anchor % (K // 2)] + rng.normal(0, 0.03, (count, joints, 2))) * extent[:, None]
    pose3d = anchor3d[anchor % (K // 2)] + rng.normal(0, restless, (count, joints, 3))
    return PoseProposals(
        box=pose.box_of(pose2d).astype(np.float32),
        score=score.astype(np.float32),
        anchor=anchor,
        pose2d=pose2d.astype(np.float32),
        pose3d=pose3d.astype(np.float32),
    )


def timed(run: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    start = clock()
    run()
    return 1e3 * (clock() - start)


def told(times: list[float]) -> dict[str, float]:
    return {"ms": round(statistics.median(times), 3), "least": round(min(times), 3), "most": round(max(times), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    params = config.Ppi()
    assert ops.use_ext("cpu")
    choose = ops._operator
    for name, (people, count) in SETS.items():
        proposals = draw(people, count)
        given = ppi._given([proposals], [SIZE], params, LCR13, UPPER_ONLY) | {"max_people": ppi.MAX_PEOPLE}

        def operator(given: dict[str, Any] = given) -> None:
            ops.group_poses(**given)

        def twin(given: dict[str, Any] = given) -> None:
            ops._operator = lambda op, where: getattr(twins, op)
            ops.group_poses(**given)
            ops._operator = choose

        def integrate(proposals: PoseProposals = proposals) -> list[pose.Person]:
            return ppi.integrate(proposals, SIZE, params, LCR13, UPPER_ONLY)

        times: dict[str, list[float]] = {"operator": [], "integrate": [], "twin": []}
        for round_ in range(rounds + 1):
            for run in (operator, integrate, twin):
                took = timed(run)
                if round_:  # the first warms up
                    times[run.__name__].append(took)
        line: dict[str, Any] = {"set": name, "proposals": count, "found": len(integrate())}
        line |= {key: told(value) for key, value in times.items()}
        line["operator_over_twin"] = round(line["twin"]["ms"] / line["operator"]["ms"], 1)
        if torch.cuda.is_available():
            line["cuda_64"] = told(on_cuda(given, rounds))
        print(json.dumps(line), flush=True)


def on_cuda(given: dict[str, Any], rounds: int) -> list[float]:
    batch = {
        key: value.cuda().expand(64, *value.shape[1:]).contiguous()
        if isinstance(value, Tensor) and key != "lower"
        else value
        for key, value in given.items()
    } | {"lower": given["lower"].cuda()}

    def run() -> None:
        ops.group_poses(**batch)
        torch.cuda.synchronize()

    run()
    return [timed(run, time.perf_counter) for _ in range(rounds)]


if __name__ == "__main__":
    main()
