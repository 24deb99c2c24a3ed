"""The benchmarks' rules in plain loops over people and joints, written apart from lcrnet/protocols.py to test it.

Poses are dicts of joint name -> point; a joint that a model has not is not in the dict. Rules: the MATLAB files that
lcrnet/protocols.py names (MuPoTS-3D), the definitions of MPJPE and PA-MPJPE (Human3.6M). Millimetres.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

Pose = dict[str, np.ndarray]

LIMBS = ["neck"] + [f"{s}_{j}" for s in "rl" for j in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")]
CHAINS = ["pelvis spine neck head_top", "pelvis spine neck head"] + [
    row.replace("?", s) for s in "rl" for row in ("neck ?_shoulder ?_elbow ?_wrist", "pelvis ?_hip ?_knee ?_ankle")
]


def middle(pose: Pose, a: str, b: str) -> np.ndarray:
    return (pose[a] + pose[b]) / 2


def completed(pose: Pose) -> Pose:
    """With a neck and a pelvis."""
    out = dict(pose)
    out.setdefault("neck", middle(pose, "r_shoulder", "l_shoulder"))
    out.setdefault("pelvis", middle(pose, "r_hip", "l_hip"))
    return out


def matched(true: list[Pose], found: list[Pose]) -> list[int | None]:
    """For each true 2D pose the found one."""
    out: list[int | None] = []
    for t in true:
        best, most = None, 0
        for n, f in enumerate(found):
            if n in out:
                continue
            count = sum(abs(t[j][0] - f[j][0]) < 40 and abs(t[j][1] - f[j][1]) < 40 for j in LIMBS if j in f)
            if count > most:
                best, most = n, count
        out.append(best)
    return out


def rescaled(pose: Pose, goal: Pose) -> Pose:
    """The found pose with the true lengths of bones."""
    out = {"pelvis": pose["pelvis"]}
    for chain in CHAINS:
        names = [name for name in chain.split() if name in pose]
        for above, name in pairwise(names):
            bone = pose[name] - pose[above]
            out[name] = out[above] + bone * math.dist(goal[name], goal[above]) / math.sqrt(sum(bone**2))
    return out


def mupots(frames: list[dict[str, Any]], joints: list[str], scale: bool) -> dict[str, Any]:
    """frames: {sequence, true2d, true3d, hidden: [set of names], found2d, found3d}; joints that count."""
    errors: dict[str, list[tuple[bool, dict[str, float], set[str]]]] = {}
    for frame in frames:
        found2d = [completed(f) for f in frame["found2d"]]
        pairs = matched(frame["true2d"], found2d)
        for true, n, hidden in zip(frame["true3d"], pairs, frame["hidden"], strict=True):
            goal = {name: point - true["pelvis"] for name, point in true.items()}
            distance = dict.fromkeys(joints, 1e5)
            if n is not None:
                pose = completed(frame["found3d"][n])
                pose = {name: point - pose["pelvis"] for name, point in pose.items()}
                pose = rescaled(pose, goal) if scale else pose
                distance = {name: math.dist(pose[name], goal[name]) for name in joints}
            errors.setdefault(frame["sequence"], []).append((n is not None, distance, hidden))

    def share(which: str, limit: float, part: str) -> float:
        """Mean over sequences of the share of joints nearer than limit."""
        shares = []
        for people in errors.values():
            good = whole = 0
            for hit, distance, hidden in people:
                for name in joints:
                    if (which == "matched" and not hit) or part == ("visible" if name in hidden else "occluded"):
                        continue
                    good, whole = good + (distance[name] < limit), whole + 1
            if whole:
                shares.append(good / whole)
        return sum(shares) / len(shares)

    return {
        which: {
            "pck3d": share(which, 150, "both"),
            "auc3d": sum(share(which, limit, "both") for limit in range(0, 151, 5)) / 31,
            "pck3d_visible": share(which, 150, "visible"),
            "pck3d_occluded": share(which, 150, "occluded"),
        }
        for which in ("all", "matched")
    }


def h36m(pairs: list[tuple[str, Pose, Pose]]) -> dict[str, dict[str, float]]:
    """(action, found, true) of each image -> {action: mpjpe, pa, rigid} in the unit of the poses."""
    out: dict[str, list[list[float]]] = {}
    for action, found, true in pairs:
        names = [name for name in found if name in true]
        a, b = np.array([found[n] for n in names]), np.array([true[n] for n in names])
        a, b = a - completed(found)["pelvis"], b - completed(true)["pelvis"]
        plain = [math.dist(p, q) for p, q in zip(a, b, strict=True)]
        a, b = a - a.mean(0), b - b.mean(0)
        rotated = Rotation.align_vectors(b, a)[0].apply(a)
        factor = (rotated * b).sum() / (rotated**2).sum()
        rigid = [math.dist(p, q) for p, q in zip(rotated, b, strict=True)]
        aligned = [math.dist(p, q) for p, q in zip(factor * rotated, b, strict=True)]
        out.setdefault(action, []).append([sum(e) / len(e) for e in (plain, aligned, rigid)])
    return {a: dict(zip(("mpjpe", "pa", "rigid"), np.mean(rows, 0), strict=True)) for a, rows in out.items()}
