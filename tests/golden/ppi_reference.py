"""Pose proposals integration once more, one proposal and one joint at a time, to test lcrnet.ppi against.

Written from the paper's description and the facts of SEED.md (S21) and PEERS.md (2), in plain Python numbers. It
shares nothing with lcrnet.ppi: joints are named here again, by their places in LCR13.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

ANKLES_KNEES = (0, 1, 2, 3)
TORSO = (4, 5, 10, 11)
SHOULDERS = (10, 11)
HEAD = (12,)
OTHER_SIDE = (1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 12)


@dataclass
class Found:
    mass: float
    pose2d: list[list[float]]
    pose3d: list[list[float]]
    members: list[int]
    spread: list[float]


def joints_of(iou_func: str) -> tuple[int, ...]:
    name = iou_func.replace("LR", "").replace("bbox_", "")
    return {
        "bbox": tuple(range(13)), "mje": tuple(range(13)), "torso": TORSO, "torsohead": TORSO + HEAD, "head": HEAD,
        "shoulderhead": SHOULDERS + HEAD,
    }[name]  # fmt: skip


def box(pose: Any, joints: tuple[int, ...], height: int, width: int) -> tuple[float, float, float, float]:
    xs = [min(max(float(pose[j][0]), 0.0), width - 1.0) for j in joints]
    ys = [min(max(float(pose[j][1]), 0.0), height - 1.0) for j in joints]
    return min(xs), min(ys), max(xs) + 1, max(ys) + 1


def iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    both = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def mean_distance(p: Any, q: Any, pairs: list[tuple[int, int]]) -> float:
    return sum(math.dist([float(v) for v in p[i]], [float(v) for v in q[j]]) for i, j in pairs) / len(pairs)


def overlap(p: Any, c: Any, iou_func: str, threshold: float, height: int, width: int) -> bool:
    joints = joints_of(iou_func)
    if iou_func.startswith("bbox"):
        return iou(box(p, joints, height, width), box(c, joints, height, width)) > threshold
    x1, y1, x2, y2 = box(c, tuple(range(13)), height, width)
    apart = mean_distance(p, c, [(j, j) for j in joints])
    if iou_func.endswith("LR"):
        apart = min(apart, mean_distance(p, c, [(OTHER_SIDE[j], j) for j in joints]))
    return apart / (2 * max(x2 - x1, y2 - y1)) < threshold


def integrate(
    score: Any, anchor: Any, pose2d: Any, pose3d: Any, height: int, width: int, upper_only: Any, th_pose3D: float,
    th_iou: float, iou_func: str, min_mode_score: float, th_persondetect: float,
) -> list[Found]:  # fmt: skip
    """The people, largest mass first."""
    score = [float(s) for s in score]
    left = sorted(range(len(score)), key=lambda i: (-score[i], i))
    found = []
    while left:
        centre = left[0]
        group = [i for i in left if i == centre or overlap(pose2d[i], pose2d[centre], iou_func, th_iou, height, width)]
        left = [i for i in left if i not in group]
        candidates = modes(group, score, pose3d, th_pose3D, min_mode_score)
        best = max(candidates, key=lambda members: sum(score[i] for i in members))
        if sum(score[i] for i in best) > th_persondetect:
            found.append(merge(best, score, anchor, pose2d, pose3d, upper_only))
    return sorted(found, key=lambda f: -f.mass)


def modes(group: list[int], score: list[float], pose3d: Any, near: float, least: float) -> list[list[int]]:
    everywhere = [(j, j) for j in range(13)]
    out: list[list[int]] = []
    free = list(group)
    while free and (not out or score[free[0]] >= least):
        members = [i for i in group if mean_distance(pose3d[i], pose3d[free[0]], everywhere) < near]
        out.append(members)
        free = [i for i in free if i not in members]
    return out


def merge(members: list[int], score: list[float], anchor: Any, pose2d: Any, pose3d: Any, upper_only: Any) -> Found:
    mean2d, mean3d, spread = [], [], []
    for j in range(13):
        weight = [score[i] * (0.1 if j in ANKLES_KNEES and upper_only[int(anchor[i])] else 1.0) for i in members]
        total = sum(weight)

        def mean(pose: Any, size: int, j: int = j, weight: list[float] = weight, total: float = total) -> list[float]:
            return [
                sum(w * float(pose[i][j][a]) for w, i in zip(weight, members, strict=True)) / total for a in range(size)
            ]

        mean2d.append(mean(pose2d, 2))
        mean3d.append(mean(pose3d, 3))
        apart = [math.dist([float(v) for v in pose3d[i][j]], mean3d[-1]) for i in members]
        spread.append(sum(w * a for w, a in zip(weight, apart, strict=True)) / total)
    return Found(sum(score[i] for i in members), mean2d, mean3d, members, spread)
