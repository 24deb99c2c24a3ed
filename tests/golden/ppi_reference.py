"""Pose proposals integration once more, one proposal and one joint at a time, to test lcrnet.ppi against.

Written from the paper's description and the facts of SEED.md (S21) and PEERS.md (2), in plain Python numbers. It
shares nothing with lcrnet.ppi: joints are named here again, by their places in LCR13. `faults` are those of the public
code; tests/bench/ppi.py compares with that code itself.
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
    anchor: int


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


def region_box(roi: Any) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (float(v) for v in roi)
    return x1, y1, x2 + 1, y2 + 1


def overlap(
    p: Any, c: Any, iou_func: str, threshold: float, height: int, width: int, rois: Any = None, mixed: bool = False
) -> bool:  # fmt: skip
    """rois: boxes of the regions of both, in place of those of their poses; mixed: x and y of different pairs."""
    joints = joints_of(iou_func)
    if iou_func.startswith("bbox"):
        boxes = [region_box(r) for r in rois] if rois else [box(pose, joints, height, width) for pose in (p, c)]
        return iou(*boxes) > threshold
    x1, y1, x2, y2 = region_box(rois[1]) if rois else box(c, tuple(range(13)), height, width)
    apart = mean_distance(p, c, [(j, j) for j in joints])
    if iou_func.endswith("LR"):
        other = [(OTHER_SIDE[j], j) for j in joints]
        if mixed:
            away = [math.hypot(float(p[m][0]) - float(c[j][0]), float(p[j][1]) - float(c[m][1])) for m, j in other]
            apart = min(apart, sum(away) / len(away))
        else:
            apart = min(apart, mean_distance(p, c, other))
    return apart / (2 * max(x2 - x1, y2 - y1)) < threshold


def integrate(
    score: Any, anchor: Any, pose2d: Any, pose3d: Any, height: int, width: int, upper_only: Any, th_pose3D: float,
    th_iou: float, iou_func: str, min_mode_score: float, th_persondetect: float, rois: Any = None,
    faults: frozenset[str] = frozenset(),
) -> list[Found]:  # fmt: skip
    """The people, largest mass first."""
    score = [float(s) for s in score]
    first = list(upper_only).index(True)
    legs = [upper and "legs_full" not in faults and not (k == first and "legs_off_by_one" in faults)
            for k, upper in enumerate(upper_only)]  # fmt: skip

    def near(i: int, c: int) -> bool:
        regions = (rois[i], rois[c]) if "roi_boxes" in faults else None
        return overlap(pose2d[i], pose2d[c], iou_func, th_iou, height, width, regions, "lr_mixed" in faults)

    left = sorted(range(len(score)), key=lambda i: (-score[i], i))
    found = []
    while left:
        centre = left[0]
        group = [i for i in left if i == centre or near(i, centre)]
        left = [i for i in left if i not in group]
        candidates = modes(group, score, pose3d, th_pose3D, min_mode_score)
        best, place = max(candidates, key=lambda mode: sum(score[i] for i in mode[0]))
        if sum(score[i] for i in best) > th_persondetect:
            found.append(merge(best, score, anchor, pose2d, pose3d, legs))
            if "anchor_by_position" in faults:
                found[-1].anchor = int(anchor[place])
    return sorted(found, key=lambda f: -f.mass)


def modes(
    group: list[int], score: list[float], pose3d: Any, near: float, least: float
) -> list[tuple[list[int], int]]:  # fmt: skip
    """The members of each mode, and the place of its centre among those of the group that were free, as given."""
    everywhere = [(j, j) for j in range(13)]
    out: list[tuple[list[int], int]] = []
    free = list(group)
    while free and (not out or score[free[0]] >= least):
        members = [i for i in group if mean_distance(pose3d[i], pose3d[free[0]], everywhere) < near]
        out.append((members, sorted(free).index(free[0])))
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
    return Found(sum(score[i] for i in members), mean2d, mean3d, members, spread, int(anchor[members[0]]))


def suppress(
    score: Any, pose2d: Any, least: float, most_overlap: float, margin: float = 0.1
) -> list[int]:  # fmt: skip
    """The rows that are left after greedy NMS of poses, best first."""
    boxes = []
    for pose in pose2d:
        xs, ys = [float(j[0]) for j in pose], [float(j[1]) for j in pose]
        w, h = margin * (max(xs) - min(xs)), margin * (max(ys) - min(ys))
        boxes.append((min(xs) - w, min(ys) - h, max(xs) + w, max(ys) + h))
    left = sorted((i for i in range(len(boxes)) if score[i] >= least), key=lambda i: (-score[i], i))
    kept = []
    while left:
        kept.append(left[0])
        left = [i for i in left[1:] if iou(boxes[i], boxes[kept[-1]]) <= most_overlap]
    return kept
