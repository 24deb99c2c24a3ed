"""Formulas of the figures: the units of PCK, errors of 3D poses, curves, and what the predecessor measured.

Poses in pixels (2D) and metres (3D) as in pose.py; results in the unit that a name ends in. M people (pairs of a true
and a found person), J joints. NaN stands for what cannot be measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lcrnet.pose import People, Person, box_of, centre, procrustes
from lcrnet.skeleton import Skeleton, convert

MIN_TORSO = 0.1
"""PCK's unit is at least this part of the longer side of the pose's box: a torso seen from its end has no length."""

HEAD_PER_NECK = 1.1
"""Head size / distance from the middle of the shoulders to the middle of the head, in a standing person. Heights as
parts of stature, Drillis & Contini 1966: top of the head 1, chin 0.870, shoulder joint 0.818. So the head, 0.130, is
1.1 times as long as the way up from the shoulders to its middle, 0.935 - 0.818. (Leeds' annotators put the neck below
the chin: there the distance of their neck and head top is 1.4 times that way.)"""

MIN_HEAD = 0.04
"""PCKh's unit is at least this part of the longer side of the pose's box: like MIN_TORSO about a third of an upright
person's, for a head seen from above."""

AUC_MM = np.arange(0, 151, 5)
"""Thresholds of the 3D AUC (Mehta et al., "Monocular 3D human pose estimation in the wild", 3DV 2017)."""

CURVE_2D = np.arange(51) / 100
"""Thresholds of the PCK curve, torsos."""

CURVE_3D_MM = np.arange(0, 301, 5)
"""Thresholds of the 3DPCK curve: those of the AUC and as far again."""

_HEAD_AND_SHOULDERS = Skeleton("head_and_shoulders", ("r_shoulder", "l_shoulder", "head"))


def torso_size(people: People, skeleton: Skeleton) -> np.ndarray:
    """(P,) pixels from the middle of the shoulders to that of the hips; NaN where one of the four is unlabelled."""
    shoulders = people.pose2d[:, skeleton.indices("r_shoulder", "l_shoulder")].mean(1)
    hips = people.pose2d[:, skeleton.indices("r_hip", "l_hip")].mean(1)
    length = np.maximum(np.linalg.norm(shoulders - hips, axis=-1), MIN_TORSO * longer_side(people))
    return np.where((people.seen[:, skeleton.torso] > 0).all(-1), length, np.nan)


def head_size(people: People, skeleton: Skeleton) -> np.ndarray:
    """(P,) pixels, PCKh's unit; NaN where a joint that it takes is unlabelled or not in the skeleton.

    From neck to the top of the head where the skeleton has both: the "head segment length" of Andriluka et al., "2D
    human pose estimation: new benchmark", CVPR 2014. Else HEAD_PER_NECK times the distance from the middle of the
    shoulders to the middle of the head (by skeleton.py's rules, where it has no name of its own). MPII's own code takes
    0.6 of the diagonal of an annotated head box, which other data does not have: near these two, not equal.
    """
    if {"neck", "head_top"} <= set(skeleton.joints):
        ends = skeleton.indices("neck", "head_top")
        length = np.linalg.norm(people.pose2d[:, ends[0]] - people.pose2d[:, ends[1]], axis=-1)
        known = (people.seen[:, ends] > 0).all(-1)
    else:
        pose, seen = convert(people.pose2d, people.seen, skeleton, _HEAD_AND_SHOULDERS)
        length = HEAD_PER_NECK * np.linalg.norm(pose[:, 2] - pose[:, :2].mean(1), axis=-1)
        known = (seen > 0).all(-1)
    return np.where(known, np.maximum(length, MIN_HEAD * longer_side(people)), np.nan)


def longer_side(people: People) -> np.ndarray:
    """(P,) pixels: longer side of the box of the labelled joints."""
    box = box_of(people.pose2d, people.seen, margin=0)
    return (box[:, 2:] - box[:, :2]).max(-1)


def oks(true: People, pose2d: np.ndarray, skeleton: Skeleton) -> np.ndarray:
    """(P, N) object keypoint similarity 0..1 of true people and 2D poses (N, J, 2) in pixels.

    pycocotools' COCOeval.computeOks: exp(-d^2 / (2 area k^2)), k = 2 sigma, averaged over the labelled joints. A true
    person without a labelled joint gets 0. ValueError: the skeleton has no `oks_sigma`.
    """
    p, n = np.indices((len(true), len(pose2d))).reshape(2, -1)
    return oks_of_pairs(true, p, pose2d, n, skeleton).reshape(len(true), len(pose2d))


def oks_of_pairs(people: People, t: np.ndarray, pose2d: np.ndarray, d: np.ndarray, skeleton: Skeleton) -> np.ndarray:
    """(n,) OKS of people[t] and pose2d[d], each pair by itself."""
    if len(skeleton.oks_sigma) != len(skeleton):
        raise ValueError(f"{skeleton.name} has no oks_sigma, which OKS needs")
    known = people.seen[t] > 0
    away = ((people.pose2d[t].astype(np.float64) - pose2d[d]) ** 2).sum(-1)
    scale = 2 * (2 * skeleton.sigma) ** 2 * (people.area[t].astype(np.float64) + np.spacing(1))[:, None]
    near = np.where(known, np.exp(-away / scale), 0)
    return near.sum(-1) / np.maximum(known.sum(-1), 1)


def distance_of_pairs(people: People, t: np.ndarray, pose2d: np.ndarray, d: np.ndarray) -> np.ndarray:
    """(n,) mean distance of the labelled joints of people[t] from those of pose2d[d], each pair by itself.

    Unit: longer side of the box of the true pose (of the person's box where that is a point). Without a label: inf.
    """
    true = people[t]
    side, known = longer_side(true), true.seen > 0
    unit = np.where(side > 0, side, np.maximum((true.box[:, 2:] - true.box[:, :2]).max(-1), 1e-9)).astype(np.float64)
    away = np.linalg.norm(true.pose2d.astype(np.float64) - pose2d[d], axis=-1)
    total, count = np.where(known, away, 0).sum(-1), known.sum(-1)
    return np.where(count > 0, total / np.maximum(count, 1) / unit, np.inf)


@dataclass(frozen=True)
class Errors3d:
    """Distances of joints, (M, J) millimetres, both poses centred on the torso first; NaN where a pose is not finite.

    plain       as they are (MPJPE)
    scaled      after the scale that fits best in the least-squares sense: N-MPJPE of Rhodin et al., "Learning
                monocular 3D human pose estimation from multi-view images", CVPR 2018
    procrustes  after rotation, translation and scale, without reflection (PA-MPJPE, "protocol 2" of Human3.6M)
    """

    plain: np.ndarray
    scaled: np.ndarray
    procrustes: np.ndarray


def errors3d(pose: np.ndarray, goal: np.ndarray, skeleton: Skeleton) -> Errors3d:
    """Of poses (M, J, 3) from their goals, metres."""
    finite = np.isfinite(pose).all((-1, -2)) & np.isfinite(goal).all((-1, -2))
    use = finite[:, None, None]
    pose, goal = centre(np.where(use, pose, 0), skeleton), centre(np.where(use, goal, 0), skeleton)
    scale = (pose * goal).sum((-1, -2)) / np.maximum((pose**2).sum((-1, -2)), 1e-12)
    fitted = (pose, scale[:, None, None] * pose, procrustes(pose, goal))
    return Errors3d(*(np.where(finite[:, None], 1000 * np.linalg.norm(p - goal, axis=-1), np.nan) for p in fitted))


def shares(values: np.ndarray, limits: Sequence[float] | np.ndarray, whole: int, closed: bool) -> list[float]:
    """Part of `whole` values at each limit: those below it, and with `closed` those on it. NaN is never; [] of none."""
    ordered = np.sort(values[np.isfinite(values)], axis=None)
    count = np.searchsorted(ordered, limits, "right" if closed else "left")
    return [float(n / whole) for n in count] if whole else []


def auc(error_mm: np.ndarray, whole: int) -> float | None:
    """Mean share of `whole` joints that are under 0, 5 .. 150 mm: a perfect pose has 30/31, as in MPI-INF-3DHP."""
    return mean(shares(error_mm, AUC_MM, whole, closed=False))


def predecessor(
    truth: Sequence[People], found: Sequence[Sequence[Person]], skeleton: Skeleton
) -> dict[str, float | None]:
    """The figures that the seed's tools/test_net.py prints, its faults included: to compare with its logs, no more.

    Every detection of an image, of whatever score, is compared with the image's FIRST person who has a full 2D and 3D
    label, crowd or not: a second person's detection is a gross error, a missed person none, a doubled one counts twice.
    Err2d      SUM over detections and joints of the 2D distance / that person's shoulder width in 2D (which nears 0 in
               side views); grows with the data set
    Err3d      SUM of the 3D distances, x 1000: millimetres; poses as they stand, neither centred nor aligned
    Err2d_avg  Err2d / number of images: neither the people nor the joints divide it
    Err3d_avg  the same of Err3d but WITHOUT the 1000: metres
    PCK2d      share of joints within 2 shoulder widths (!)
    PCK3d      share of joints within 0.3 m (!)
    None where it would divide by zero: PCK without detections, Err2d with a shoulder width of 0, averages of no image.
    Where it would stop, at detections in an image without such a person, that image's detections are left out.
    """
    error2d = error3d = 0.0
    right2d = right3d = joints = 0
    for true, persons in zip(truth, found, strict=True):
        full = np.flatnonzero(true.has3d.astype(bool) & (true.seen > 0).all(-1))
        if not len(full) or not persons:
            continue
        goal2d, goal3d = true.pose2d[full[0]].astype(np.float64), true.pose3d[full[0]].astype(np.float64)
        right, left = goal2d[skeleton.indices("r_shoulder", "l_shoulder")]
        pose2d, pose3d = np.array([p.pose2d for p in persons]), np.array([p.pose3d for p in persons])
        with np.errstate(divide="ignore", invalid="ignore"):
            away2d = np.linalg.norm(pose2d - goal2d, axis=-1) / np.linalg.norm(right - left)
        away3d = np.linalg.norm(pose3d - goal3d, axis=-1)
        error2d, error3d = error2d + away2d.sum(), error3d + away3d.sum()
        right2d, right3d = right2d + (away2d <= 2).sum(), right3d + (away3d <= 0.3).sum()
        joints += away2d.size
    images = len(truth)
    figures = {
        "Err2d": error2d,
        "Err3d": 1000 * error3d,
        "Err2d_avg": error2d / images if images else np.nan,
        "Err3d_avg": error3d / images if images else np.nan,
        "PCK2d": right2d / joints if joints else np.nan,
        "PCK3d": right3d / joints if joints else np.nan,
    }
    return {name: float(value) if np.isfinite(value) else None for name, value in figures.items()}


def mean(values: Any) -> float | None:
    """Of the finite ones; None without any."""
    known = np.asarray(values, np.float64)
    known = known[np.isfinite(known)]
    return float(known.mean()) if known.size else None


def median(values: np.ndarray) -> float | None:
    """Of the finite ones; None without any."""
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else None


def share(part: Any, whole: Any) -> float | None:
    """part / whole; None of nothing."""
    return float(part) / float(whole) if whole else None
