"""The figures of lcrnet.evaluate once more, one person and one joint at a time, to test it against.

Written apart from it, from the papers, in plain Python numbers and LCR13's places of joints. Where a formula has a
second form the other one is taken: Procrustes by Horn's quaternions ("Closed-form solution of absolute orientation
using unit quaternions", JOSA A 1987) in place of an SVD, the assignment by trying all of them, the predecessor's
figures on flat rows of 65 numbers.

A true person: {"pose2d", "pose3d", "seen", "area", "has3d", "crowd"}; a found one: {"pose2d", "pose3d", "score"}.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

R_HIP, L_HIP, R_SHOULDER, L_SHOULDER, HEAD = 4, 5, 10, 11, 12
SIGMA = (0.089, 0.089, 0.087, 0.087, 0.107, 0.107, 0.062, 0.062, 0.072, 0.072, 0.079, 0.079, 0.062)
Pose = list[list[float]]


def middle(*points: list[float]) -> list[float]:
    return [sum(values) / len(points) for values in zip(*points, strict=True)]


def centred(pose: Pose) -> Pose:
    origin = middle(pose[R_HIP], pose[L_HIP], pose[R_SHOULDER], pose[L_SHOULDER])
    return [[v - o for v, o in zip(point, origin, strict=True)] for point in pose]


def distances(a: Pose, b: Pose) -> list[float]:
    return [math.dist(p, q) for p, q in zip(a, b, strict=True)]


def mpjpe(pose: Pose, goal: Pose) -> list[float]:
    """Millimetres by joint."""
    return [1000 * d for d in distances(centred(pose), centred(goal))]


def n_mpjpe(pose: Pose, goal: Pose) -> list[float]:
    pose, goal = centred(pose), centred(goal)
    above = sum(a * b for p, q in zip(pose, goal, strict=True) for a, b in zip(p, q, strict=True))
    below = sum(a * a for p in pose for a in p)
    return [1000 * d for d in distances([[a * above / below for a in p] for p in pose], goal)]


def pa_mpjpe(pose: Pose, goal: Pose) -> list[float]:
    """Horn: the rotation is the quaternion of the largest eigenvalue of a matrix of moments; never a reflection."""
    from_, to = middle(*pose), middle(*goal)
    a = [[v - o for v, o in zip(p, from_, strict=True)] for p in pose]
    b = [[v - o for v, o in zip(p, to, strict=True)] for p in goal]
    s = [[sum(p[i] * q[j] for p, q in zip(a, b, strict=True)) for j in range(3)] for i in range(3)]
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = s
    moments = [
        [xx + yy + zz, yz - zy, zx - xz, xy - yx],
        [yz - zy, xx - yy - zz, xy + yx, zx + xz],
        [zx - xz, xy + yx, -xx + yy - zz, yz + zy],
        [xy - yx, zx + xz, yz + zy, -xx - yy + zz],
    ]
    w, x, y, z = np.linalg.eigh(np.array(moments))[1][:, -1].tolist()
    rotation = [
        [w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z],
    ]
    turned = [[sum(r * v for r, v in zip(row, p, strict=True)) for row in rotation] for p in a]
    above = sum(u * v for p, q in zip(turned, b, strict=True) for u, v in zip(p, q, strict=True))
    scale = above / sum(u * u for p in a for u in p)
    return [1000 * d for d in distances([[scale * u for u in p] for p in turned], b)]


def side(true: Any) -> float:
    points = [p for p, seen in zip(true["pose2d"], true["seen"], strict=True) if seen > 0]
    return max(max(p[axis] for p in points) - min(p[axis] for p in points) for axis in (0, 1))


def height(true: Any) -> float:
    ys = [p[1] for p, seen in zip(true["pose2d"], true["seen"], strict=True) if seen > 0]
    return max(ys) - min(ys)


def torso(true: Any) -> float | None:
    if any(true["seen"][j] == 0 for j in (R_HIP, L_HIP, R_SHOULDER, L_SHOULDER)):
        return None
    pose = true["pose2d"]
    length = math.dist(middle(pose[R_HIP], pose[L_HIP]), middle(pose[R_SHOULDER], pose[L_SHOULDER]))
    return max(length, 0.1 * side(true))


def head(true: Any) -> float | None:
    if any(true["seen"][j] == 0 for j in (HEAD, R_SHOULDER, L_SHOULDER)):
        return None
    pose = true["pose2d"]
    return max(1.1 * math.dist(pose[HEAD], middle(pose[R_SHOULDER], pose[L_SHOULDER])), 0.04 * side(true))


def oks(true: Any, pose2d: Pose) -> float:
    """COCO's: ks = exp(-d^2 / (2 s^2 k^2)), s^2 the area, k twice the sigma (cocodataset.org, keypoints-eval)."""
    total, labelled = 0.0, 0
    for j in range(13):
        if true["seen"][j] > 0:
            k = 2 * SIGMA[j]
            total += math.exp(-(math.dist(true["pose2d"][j], pose2d[j]) ** 2) / (2 * true["area"] * k * k))
            labelled += 1
    return total / labelled


def apart(true: Any, pose2d: Pose) -> float:
    own = [math.dist(true["pose2d"][j], pose2d[j]) for j in range(13) if true["seen"][j] > 0]
    return sum(own) / len(own) / side(true)


def matched(gain: list[list[float]]) -> list[tuple[int, int]]:
    """Pairs of the largest sum of gain, those of gain 0 left out; of all assignments, one by one."""
    if not gain or not gain[0]:
        return []
    rows, columns = len(gain), len(gain[0])
    small = min(rows, columns)
    best, chosen = -1.0, []
    for some in itertools.combinations(range(rows), small):
        for others in itertools.permutations(range(columns), small):
            total = sum(gain[r][c] for r, c in zip(some, others, strict=True))
            if total > best + 1e-12:
                best, chosen = total, [(r, c) for r, c in zip(some, others, strict=True) if gain[r][c] > 0]
    return chosen


def figures(truth: list[list[Any]], found: list[list[Any]], match: str = "oks") -> dict[str, Any]:
    """Figures of images without crowds, everybody with a label: those of evaluate() under the same names."""
    people = people3d = people3d_all = pairs = detections = 0
    joints: dict[str, list[list[float]]] = {name: [[] for _ in range(13)] for name in (
        "height", "torso", "head", "mpjpe_mm", "n_mpjpe_mm", "pa_mpjpe_mm")}  # fmt: skip
    due_torso = due_head = 0
    for trues, all_found in zip(truth, found, strict=True):
        kept = [f for f in all_found if f["score"] >= 0.5]
        people, detections = people + len(trues), detections + len(kept)
        for true in trues:
            labelled = sum(1 for seen in true["seen"] if seen > 0)
            due_torso += labelled if torso(true) is not None else 0
            due_head += labelled if head(true) is not None else 0
            people3d_all += 1 if true["has3d"] else 0
        gain = [[0.0] * len(kept) for _ in trues]
        for i, true in enumerate(trues):
            for k, f in enumerate(kept):
                near = oks(true, f["pose2d"]) if match == "oks" else 0.25 - apart(true, f["pose2d"])
                gain[i][k] = near if near >= (0.5 if match == "oks" else 0) else 0.0
        for i, k in matched(gain):
            true, f = trues[i], kept[k]
            pairs += 1
            away = distances(true["pose2d"], f["pose2d"])
            for j in range(13):
                if true["seen"][j] > 0:
                    joints["height"][j].append(away[j] / height(true))
                    for name, unit in (("torso", torso(true)), ("head", head(true))):
                        if unit is not None:
                            joints[name][j].append(away[j] / unit)
            if true["has3d"]:
                people3d += 1
                for name, measure in (("mpjpe_mm", mpjpe), ("n_mpjpe_mm", n_mpjpe), ("pa_mpjpe_mm", pa_mpjpe)):
                    for j, d in enumerate(measure(f["pose3d"], true["pose3d"])):
                        joints[name][j].append(d)

    def flat(name: str) -> list[float]:
        return [value for own in joints[name] for value in own]

    def part(name: str, limit: float, whole: int | None = None, closed: bool = True) -> float:
        right = sum(1 for v in flat(name) if v < limit or (closed and v == limit))
        return right / (len(flat(name)) if whole is None else whole)

    def auc(whole: int) -> float:
        return sum(part("mpjpe_mm", limit, whole, closed=False) for limit in range(0, 151, 5)) / 31

    return {
        "people": people, "people3d": people3d, "people3d_all": people3d_all, "found": pairs,
        "missed": people - pairs, "false": detections - pairs,
        "recall": pairs / people, "precision": pairs / detections,
        "error2d_height_median": float(np.median(flat("height"))),
        "pck2d": part("torso", 0.2), "pck2d_all": part("torso", 0.2, due_torso),
        "pckh": part("head", 0.5), "pckh_all": part("head", 0.5, due_head),
        **{name: sum(flat(name)) / len(flat(name)) for name in ("mpjpe_mm", "n_mpjpe_mm", "pa_mpjpe_mm")},
        "pck3d": part("mpjpe_mm", 150, closed=False), "pck3d_all": part("mpjpe_mm", 150, 13 * people3d_all, False),
        "auc3d": auc(13 * people3d), "auc3d_all": auc(13 * people3d_all),
        "curve2d": [part("torso", n / 100) for n in range(51)],
        "curve2d_all": [part("torso", n / 100, due_torso) for n in range(51)],
        "curve3d": [part("mpjpe_mm", limit, closed=False) for limit in range(0, 301, 5)],
        "curve3d_all": [part("mpjpe_mm", limit, 13 * people3d_all, False) for limit in range(0, 301, 5)],
        "per_joint_pa": [sum(own) / len(own) for own in joints["pa_mpjpe_mm"]],
        "per_joint_pckh": [sum(1 for v in own if v <= 0.5) / len(own) for own in joints["head"]],
    }  # fmt: skip


def predecessor(images: list[tuple[list[list[float]], list[tuple[list[float], list[float]]]]]) -> dict[str, float]:
    """What the seed prints (SEED.md S18), on its rows: truth of 65 numbers (13 x, 13 y, 13 X, 13 Y, 13 Z), detections
    (2D of 26, 3D of 39). Raises ZeroDivisionError where it would have done so.
    """
    sum2d = sum3d = 0.0
    near2d = near3d = total = 0
    for people, detections in images:
        for flat2d, flat3d in detections:
            first = people[0]
            shoulders = math.hypot(first[10] - first[11], first[23] - first[24])
            for j in range(13):
                d2 = math.hypot(flat2d[j] - first[j], flat2d[13 + j] - first[13 + j]) / shoulders
                d3 = math.sqrt(sum((flat3d[13 * k + j] - first[26 + 13 * k + j]) ** 2 for k in range(3)))
                sum2d, sum3d, total = sum2d + d2, sum3d + d3, total + 1
                near2d, near3d = near2d + (d2 <= 2), near3d + (d3 <= 0.3)
    return {"Err2d": sum2d, "Err3d": sum3d * 1000, "Err2d_avg": sum2d / len(images), "Err3d_avg": sum3d / len(images),
            "PCK2d": near2d / total, "PCK3d": near3d / total}  # fmt: skip
