"""Pose proposals integration, one JSON line a set: `OMP_NUM_THREADS=1 python tests/bench/ppi.py [--rounds 15]`. Not
collected by pytest.

Per set milliseconds of CPU (median, least and most of interleaved rounds): `operator`, `ops.group_poses` of ext;
`twin`, the same in plain PyTorch; `integrate`, all of `lcrnet.ppi.integrate`, from proposals to people (the others are
given the boxes); `nms`, the same with postprocess nms; `image`, PPI with the choice of proposals from what the network
says of all regions and classes before it. Where there is a GPU also `cuda_64`: wall time of the operator on 64 images
of the set at once.

LCRNET_PPI_REFERENCE names a folder with naver/lcrnet-v2-improved-ppi's files. Their PPI then runs beside ours:
`improved` is compared with `image`, `lcrnet` (which is given the proposals) with `integrate`. `--scenes 1000` compares
results instead, for every iou_func, and fails where they differ.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, get_args

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
    """`people` seen by a trained network: regions round them, of each two likely anchor poses, most of which are within
    a few centimetres of one another in 3D. Of 0 people: boxes all over the image, each with all anchor poses, none
    likely; of -1 the same with scores up to 1 and 3D poses that scatter.
    """
    rng = np.random.default_rng(seed)
    joints, each = len(LCR13), 2 if people > 0 else K
    boxes = -(-count // each)
    anchor3d = rng.normal(0, 0.25, (K // 2, joints, 3))
    anchor2d = rng.uniform(0.05, 0.95, (K // 2, joints, 2))
    if people > 0:
        who = rng.integers(0, people, boxes)
        height = rng.uniform(120, 500, people)
        place = rng.uniform(0, 1, (people, 2)) * [SIZE[1], SIZE[0]]
        likely = rng.permuted(np.tile(np.arange(K), (people, 1)), axis=1)[who]
        anchor = likely[np.arange(boxes)[:, None], rng.permuted(np.tile(np.arange(4), (boxes, 1)), axis=1)[:, :each]]
        extent = (height[:, None] * [0.45, 1])[who] * rng.normal(1, 0.08, (boxes, 2))
        corner = place[who] - extent / 2 + rng.normal(0, 0.04, (boxes, 2)) * extent
        score = rng.uniform(0.07, 0.7, (boxes, each)) ** 2
        restless = 0.013 * np.exp(rng.normal(0, 0.4, (count, 1, 1)))
    else:
        anchor = np.tile(np.arange(K), (boxes, 1))
        extent = np.exp(rng.uniform(np.log(30), np.log(700), (boxes, 1))) * rng.uniform(0.5, 1.5, (boxes, 2))
        corner = rng.uniform(0, 1, (boxes, 2)) * [SIZE[1], SIZE[0]] - extent / 2
        logits = rng.normal(0, 0.5 if people == 0 else 2.5, (boxes, K + 1))
        score = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True))[:, 1:]
        restless = np.full((count, 1, 1), 0.01 if people == 0 else 0.1)
    anchor, score = anchor.ravel()[:count], score.ravel()[:count]
    extent, corner = (np.repeat(v, each, 0)[:count] for v in (extent, corner))
    pose2d = corner[:, None] + (anchor2d[anchor % (K // 2)] + rng.normal(0, 0.03, (count, joints, 2))) * extent[:, None]
    pose3d = anchor3d[anchor % (K // 2)] + rng.normal(0, 1, (count, joints, 3)) * restless
    return PoseProposals(
        box=np.concatenate([corner, corner + extent], 1).astype(np.float32),
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


Dense = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Scores (R, K + 1), boxes (R, 4), pose2d (R, K, J, 2), pose3d (R, K, J, 3) of R regions, as the network has them."""


def dense(proposals: PoseProposals, least: float) -> Dense:
    """What a network says of regions, of which `chosen` takes these proposals: of each box some classes score `least`
    or more, the rest less."""
    boxes, region = np.unique(proposals.box, axis=0, return_inverse=True)
    place = region.reshape(-1), proposals.anchor
    rng = np.random.default_rng(0)
    scores = rng.uniform(0, least / 2, (len(boxes), K + 1)).astype(np.float32)
    pose2d = rng.uniform(0, 100, (len(boxes), K, len(LCR13), 2)).astype(np.float32)
    pose3d = rng.normal(0, 0.3, (len(boxes), K, len(LCR13), 3)).astype(np.float32)
    scores[place[0], place[1] + 1] = np.maximum(proposals.score, least)
    pose2d[place], pose3d[place] = proposals.pose2d, proposals.pose3d
    return scores, boxes, pose2d, pose3d


def chosen(given: Dense, least: float) -> PoseProposals:
    """The (region, class) pairs that score at least so much, as `heads.PosePredictor.decode` chooses them."""
    scores, boxes, pose2d, pose3d = given
    likely = np.flatnonzero(scores[:, 1:] >= least)
    region, anchor = np.divmod(likely, K)
    flat2d, flat3d = (v.reshape(-1, *v.shape[2:]).take(likely, 0) for v in (pose2d, pose3d))
    found = boxes.take(region, 0), scores[region, anchor + 1], anchor, flat2d, flat3d
    return PoseProposals(*(torch.from_numpy(v) for v in found))


class Reference:
    """The public code."""

    def __init__(self, folder: str):
        sys.path.insert(0, folder)
        self.lcrnet_code = importlib.import_module("lcr_net_ppi").LCRNet_PPI
        self.improved_code = importlib.import_module("lcr_net_ppi_improved").LCRNet_PPI_improved

    def improved(self, given: Dense, size: tuple[int, int], whole: int, params: config.Ppi) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.improved_code(*given, size, K=whole, **settings(params))
        return found

    def lcrnet(self, p: PoseProposals, size: tuple[int, int], whole: int, params: config.Ppi) -> list[dict[str, Any]]:
        flat = {
            "regpose2d": np.asarray(p.pose2d).transpose(0, 2, 1).reshape(len(p), -1),
            "regpose3d": np.asarray(p.pose3d).transpose(0, 2, 1).reshape(len(p), -1),
            "regscore": np.asarray(p.score)[:, None],
            "regclass": np.asarray(p.anchor)[:, None] + 1,
        }
        found = self.lcrnet_code(flat, whole, size, **settings(params))
        for one in found:
            one |= {"score": one["cumscore"], "pose2d": one["pose2d"].reshape(2, -1).T,
                    "pose3d": one["pose3d"].reshape(3, -1).T}  # fmt: skip
        return list(found)


def settings(params: config.Ppi) -> dict[str, Any]:
    names = ("th_pose3D", "th_iou", "iou_func", "min_mode_score", "th_persondetect")
    return {name: getattr(params, name) for name in names}


def compare(reference: Reference, scenes: int) -> int:
    """Prints a line an iou_func and variant: scenes, people, how many scenes differ, and the largest differences."""
    wrong = 0
    for variant in ("lcrnet", "improved"):
        for iou_func in get_args(config.Ppi.model_fields["iou_func"].annotation):
            if (variant, iou_func) == ("lcrnet", "mje"):
                continue
            people, other, far = 0, [], dict.fromkeys(("score", "pose2d", "pose3d"), 0.0)
            for seed in range(scenes):
                whole = K // 2 if seed % 2 else K  # as it should be called, and as the demos do
                count = seed % 31
                params = config.Ppi(
                    released=("InTheWild-ResNet50", "DEMO_ECCV18")[seed // 2 % 2], iou_func=iou_func, variant=variant,
                    faults=() if seed % 2 else ("legs_full",),
                )  # fmt: skip
                given = dense(draw(count, 12 * count, seed), 0.1 / K)
                # The public code would compute in float32, in which a sum may come out on the other side of a
                # threshold; the numbers themselves are the same.
                given = tuple(v.astype(np.float64) for v in given)
                proposals = chosen(given, 0.1 / K)
                if variant == "lcrnet":
                    truth = reference.lcrnet(proposals.numpy(), SIZE, whole, params) if count else []
                else:
                    truth = reference.improved(given, SIZE, whole, params)
                found = ppi.integrate(proposals, SIZE, params, LCR13, UPPER_ONLY)
                people += len(truth)
                if len(found) != len(truth):
                    other.append(seed)
                    continue
                apart = {
                    name: max(
                        (np.abs(getattr(p, name) - t[name]).max() for p, t in zip(found, truth, strict=True)), default=0
                    )
                    for name in far
                }
                if apart["score"] > 1e-5 or apart["pose2d"] > 0.01 or apart["pose3d"] > 1e-5:
                    other.append(seed)
                far = {name: max(far[name], float(apart[name])) for name in far}
            wrong += len(other)
            line = {"variant": variant, "iou_func": iou_func, "scenes": scenes, "people": people, "different": other}
            print(json.dumps(line | {"largest": {k: float(f"{v:.2g}") for k, v in far.items()}}), flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--scenes", type=int, default=0, help="compare the results of so many scenes instead")
    args = parser.parse_args()
    params = config.Ppi(released="InTheWild-ResNet50")
    assert ops.use_ext("cpu")
    folder = os.environ.get("LCRNET_PPI_REFERENCE")
    reference = Reference(folder) if folder else None
    if args.scenes:
        if not reference:
            parser.error("LCRNET_PPI_REFERENCE names no folder to compare with")
        return min(1, compare(reference, args.scenes))
    choose = ops._operator
    for name, (people, count) in SETS.items():
        least = 0.1 / K
        everything = dense(draw(people, count), least)
        proposals = chosen(everything, least)
        given = ppi._given([proposals], [SIZE], params, LCR13, UPPER_ONLY) | {"max_people": ppi.MAX_PEOPLE}

        def operator(given: dict[str, Any] = given) -> None:
            ops.group_poses(**given)

        def twin(given: dict[str, Any] = given) -> None:
            ops._operator = lambda op, where: getattr(twins, op)
            ops.group_poses(**given)
            ops._operator = choose

        def integrate(proposals: PoseProposals = proposals) -> list[pose.Person]:
            return ppi.integrate(proposals, SIZE, params, LCR13, UPPER_ONLY)

        def nms(proposals: PoseProposals = proposals) -> list[pose.Person]:
            return ppi.integrate(proposals, SIZE, params.model_copy(update={"postprocess": "nms"}), LCR13, UPPER_ONLY)

        def image(everything: Dense = everything, least: float = least) -> list[pose.Person]:
            return ppi.integrate(chosen(everything, least), SIZE, params, LCR13, UPPER_ONLY)

        def improved(everything: Dense = everything) -> object:
            return reference.improved(everything, SIZE, K, params) if reference else None

        def lcrnet(proposals: PoseProposals = proposals) -> object:
            return reference.lcrnet(proposals.numpy(), SIZE, K, params) if reference else None

        runs = [operator, integrate, nms, image, *([improved, lcrnet] if reference else [twin])]
        times: dict[str, list[float]] = {run.__name__: [] for run in runs}
        for round_ in range(args.rounds + 1):
            for run in runs:
                took = timed(run)
                if round_:  # the first warms up
                    times[run.__name__].append(took)
        line: dict[str, Any] = {"set": name, "proposals": len(proposals), "found": len(integrate())}
        line |= {key: told(value) for key, value in times.items()}
        for ours, theirs in (("operator", "twin"), ("image", "improved"), ("integrate", "lcrnet")):
            with contextlib.suppress(KeyError):
                line[f"{theirs}_over_{ours}"] = round(line[theirs]["ms"] / line[ours]["ms"], 1)
        if torch.cuda.is_available():
            line["cuda_64"] = told(on_cuda(given, args.rounds))
        print(json.dumps(line), flush=True)
    return 0


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
    sys.exit(main())
