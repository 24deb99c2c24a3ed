"""3D poses for people with 2D labels only: motion-capture poses that look alike to a camera, made to fit.

    bank = Bank.of(mocap.read("poses.npz"), settings)
    people, error = lift(people, bank, settings)

This is how images in the wild get pseudo ground truth in LCR-Net++ (Rogez, Weinzaepfel, Schmid, TPAMI 2019) and how
Chen and Ramanan ("3D Human Pose Estimation = 2D Pose Estimation + Matching", CVPR 2017) lift: the bank holds every pose
and its mirror image as a scaled orthographic camera sees it from many sides; a person is compared with all of it
under the best 2D similarity; what is found is turned, scaled and moved with the camera, and takes over the labelled x
and y. Three things differ from one nearest neighbour, each measured on one half of shared/data/lspet (PA-MPJPE
against a teacher network's 3D; on the other half, which nothing was chosen on, 142 mm become 102):

* The weighted mean of many near poses is taken, not the nearest: 2D says little of depth, and neighbours with
  the opposite depth outvote each other (151 -> 117 mm; with the labelled x and y 101 mm).
* Means have short limbs (9 to 15 %), so the lengths of the bones, the neighbours' own, are given back (104 mm).
* The rotations found are not refined: fitting them to the 2D joints made the poses worse (by 1 to 3 mm), for they
  explain differences of the pose by turning it.

Frame and units as in pose.py; the size of the body is that of the motion capture. P people, J joints, N poses,
V views, k neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lcrnet import mocap
from lcrnet.annotations import CocoImage
from lcrnet.config import Lift, UserError
from lcrnet.mocap import Mocap
from lcrnet.pose import People, centre, mirror3d, procrustes
from lcrnet.skeleton import Skeleton

MOST_POSES = 20_000
"""A bank takes at most so many poses of a file, drawn at random: 400 MB with their mirror images and views."""

ENTRIES = 2**23
"""Comparisons made at a time, which bounds the memory: 32 MB for each of a handful of arrays."""

SMALL = 1e-4
"""Square metres: a pose whose labelled joints are less spread to the camera (1 cm) is no match for anybody."""

STEPS, STRETCH, PULL = 50, 0.3, 0.05
"""Restoring bones: steps, and the parts of a bone's and of a labelled joint's error that one step takes away."""


@dataclass(frozen=True, eq=False)
class Bank:
    """Motion-capture poses and how they look.

    pose3d  (N, J, 3)  float32 metres, root-centred, heading removed; mirror images included
    view    (V, 2)     radians: the heading it is turned by, then the camera's elevation
    flat    (N, V, J)  complex64 metres: x + iy of every pose in every view, orthographic
    """

    pose3d: np.ndarray
    view: np.ndarray
    flat: np.ndarray
    skeleton: Skeleton

    @classmethod
    def of(cls, poses: Mocap, settings: Lift, seed: int = 0) -> Bank:
        """The bank of `poses`: settings.headings evenly round, at each of settings.elevations (degrees)."""
        pose3d = poses.pose3d
        if len(pose3d) > MOST_POSES:
            rows = np.random.default_rng(seed).choice(len(pose3d), MOST_POSES, replace=False)
            pose3d = pose3d[np.sort(rows)]
        pose3d = np.concatenate([pose3d, mirror3d(pose3d, poses.skeleton)])
        pose3d = mocap.turn(pose3d, mocap.heading(pose3d, poses.skeleton))
        headings = 2 * np.pi * np.arange(settings.headings) / settings.headings
        view = np.array([(h, np.radians(e)) for e in settings.elevations for h in headings])
        flat = np.empty((len(pose3d), len(view), len(poses.skeleton)), np.complex64)
        for v, (turn, rise) in enumerate(view):
            x, y, _ = np.moveaxis(_look(pose3d, turn, rise), -1, 0)
            flat[:, v] = x + 1j * y
        return cls(pose3d, view, flat, poses.skeleton)


@dataclass(frozen=True, eq=False)
class Fit:
    """What was found for P people.

    pose3d   (P, J, 3)  metres, the result
    nearest  (P, J, 3)  metres: the nearest pose of the bank in its view and roll, as it is
    error    (P,)       2D residual of the nearest pose under the best similarity, of the labelled joints: root mean
                        square, in units of their own root-mean-square distance from their mean; 0 fits, 1 does not
    doubt    (P,)       metres: that residual and the disagreement of the neighbours in what the labels leave open,
                        which is an estimate of the error of a joint, added in squares
    """

    pose3d: np.ndarray
    nearest: np.ndarray
    error: np.ndarray
    doubt: np.ndarray


def lift(
    people: People, bank: Bank, settings: Lift, replace_3d: bool = False, advance: Callable[[int], Any] | None = None
) -> tuple[People, np.ndarray]:
    """People with 2D labels get `pose3d`, `has3d` and `trust`.

    replace_3d  also those who have a 3D pose, which is kept otherwise
    advance     called with the number of people done since the last call

    -> people; (P,) `Fit.error`, NaN for those not tried: crowd regions, those who keep their 3D pose, and those with
    fewer than settings.min_joints labelled joints. Whose error is above settings.max_error stays without a 3D pose too.
    `trust` is multiplied by 1 / (1 + (doubt / settings.doubt)^2): it falls with the fit error and with the neighbours'
    disagreement. 2D labels are not touched: a joint unlabelled there has its place in 3D only.
    """
    wanted = possible(people, settings) & (replace_3d | ~people.has3d)
    rows = np.flatnonzero(wanted)
    out, error = people.copy(), np.full(len(people), np.nan)
    for part, fit in fits(people[rows], bank, settings):
        who = rows[part]
        error[who] = fit.error
        good = fit.error <= settings.max_error
        out.pose3d[who[good]], out.has3d[who[good]] = fit.pose3d[good], True
        out.trust[who[good]] *= 1 / (1 + (fit.doubt[good] / settings.doubt) ** 2)
        if advance:
            advance(len(who))
    return out, error


@dataclass(frozen=True)
class Left:
    """A person without a 3D pose: whose `file_name` and annotation id (0 = none yet), and why it has none."""

    file_name: str
    id: int
    reason: str


def everybody(images: Sequence[CocoImage], skeleton: Skeleton) -> People:
    """The people of all images, in order."""
    return People.join([People.empty(0, len(skeleton)), *(image.people for image in images)])


def lift_images(
    images: Sequence[CocoImage], bank: Bank, settings: Lift, replace_3d: bool = False,
    advance: Callable[[int], Any] | None = None,
) -> tuple[list[CocoImage], int, list[Left]]:  # fmt: skip
    """`lift` of everybody in COCO images -> the images, the number of people who got a 3D pose, those left without.

    Annotations of those who were tried get `lift_error` (`Fit.error`), of those who got a pose `pose_3d_source`:
    "lift", by the name that shared/data has for it. All other fields stay.
    """
    people, error = lift(everybody(images, bank.skeleton), bank, settings, replace_3d, advance)
    labelled = (people.seen > 0).sum(1)
    done = error <= settings.max_error
    out, left, start = [], [], 0
    for image in images:
        rows = range(start, start + len(image.people))
        start += len(image.people)
        ids, extras = image.ids or [0] * len(rows), [dict(e) for e in image.extras or [{} for _ in rows]]
        for row, number, extra in zip(rows, ids, extras, strict=True):
            if not np.isnan(error[row]):
                extra["lift_error"] = round(float(error[row]), 4)
            if done[row]:
                extra["pose_3d_source"] = "lift"
            if not people.has3d[row] and not people.crowd[row]:
                tried = f"error {error[row]:.2f} > lift.max_error {settings.max_error:g}"
                few = f"{labelled[row]} joints labelled, lift.min_joints is {settings.min_joints}"
                flat = "its joints are all in one place, or not finite"
                enough = labelled[row] >= settings.min_joints
                reason = tried if not np.isnan(error[row]) else flat if enough else few
                left.append(Left(image.file_name, number, reason))
        out.append(replace(image, people=people[np.array(rows, np.int64)], ids=list(ids), extras=extras))
    return out, int(done.sum()), left


def possible(people: People, settings: Lift) -> np.ndarray:
    """(P,) bool: enough joints are labelled, finite and not all in one place."""
    known = people.seen > 0
    finite = (np.isfinite(people.pose2d).all(-1) | ~known).all(-1)
    low = np.where(known[..., None], people.pose2d, np.inf).min(1)
    high = np.where(known[..., None], people.pose2d, -np.inf).max(1)
    return finite & (high > low).any(-1) & (known.sum(1) >= settings.min_joints) & ~people.crowd.astype(bool)


def fits(people: People, bank: Bank, settings: Lift) -> Iterator[tuple[np.ndarray, Fit]]:
    """(rows, Fit of them), until every one of the people, all of them `possible`, had its turn."""
    if people.seen.shape[1] != len(bank.skeleton):
        raise ValueError(f"people of {people.seen.shape[1]} joints, a bank of {bank.skeleton.name}")
    masks, kind = np.unique(people.seen > 0, axis=0, return_inverse=True)
    kind = kind.reshape(-1)
    flat = bank.flat.reshape(-1, len(bank.skeleton))
    # complex products as products of real matrices, which are twice as fast and need half the memory
    real, square = np.concatenate([flat.real, flat.imag], 1).T.copy(), (flat.real**2 + flat.imag**2).T.copy()
    many = max(1, ENTRIES // len(flat))
    for k, known in enumerate(masks):
        weight = (known / known.sum()).astype(np.float32)
        mean = np.concatenate([weight, weight * 0]) @ real, np.concatenate([weight * 0, weight]) @ real
        size = weight @ square - mean[0] ** 2 - mean[1] ** 2
        scale = np.where(size > SMALL, np.maximum(size, SMALL) ** -0.5, 0).astype(np.float32)
        rows = np.flatnonzero(kind == k)
        for start in range(0, len(rows), many):
            part = rows[start : start + many]
            yield part, _fit(people.pose2d[part].astype(np.float64), known, real, scale, bank, settings)


def _fit(pose2d: np.ndarray, known: np.ndarray, real: np.ndarray, scale: np.ndarray, bank: Bank, settings: Lift) -> Fit:
    """The fit of people (P, J, 2) with the same labelled joints (J,).

    real   (2 J, N V)  x's and y's of the bank
    scale  (N V,)      1 / root-mean-square distance of their labelled joints from their mean; 0 = never to be taken
    """
    weight = known / known.sum()
    query = np.where(known[:, None], pose2d, 0)
    query = np.where(known[:, None], query - (weight[:, None] * query).sum(1, keepdims=True), 0)
    query /= np.sqrt((weight[:, None] * query**2).sum((1, 2), keepdims=True))
    pose, view, cost, roll = _search(query, weight, real, scale, bank, settings)

    near = _look(bank.pose3d[pose], bank.view[view, 0], bank.view[view, 1]).astype(np.float64)  # (P, k, J, 3)
    cos, sin = np.cos(roll)[..., None], np.sin(roll)[..., None]
    x, y, z = np.moveaxis(near, -1, 0)
    near = np.stack([x * cos - y * sin, x * sin + y * cos, z], -1)

    # The labels in each neighbour's metres; where there is no label, the neighbour itself.
    middle = (weight[:, None] * near[..., :2]).sum(-2, keepdims=True)
    away = near[..., :2] - middle
    size = (weight[:, None] * away**2).sum((-1, -2)) / (weight[:, None] * away * query[:, None]).sum((-1, -2))
    size = size[..., None, None]
    label = np.where(known[:, None], query[:, None] * size + middle, near[..., :2])
    residual = np.sqrt((weight * ((label - near[..., :2]) ** 2).sum(-1)).sum(-1))  # (P, k) metres

    share = np.exp((cost[:, :1] - cost) / settings.softness)
    share = (share / share.sum(1, keepdims=True))[..., None, None]
    fitted = centre(np.concatenate([label, near[..., 2:]], -1), bank.skeleton)
    mean = (share * fitted).sum(1)
    spread = np.sqrt((share * (fitted - mean[:, None]) ** 2).sum((1, 3)).mean(-1))
    bones = bank.skeleton.bones
    length = (share[..., 0] * np.linalg.norm(near[..., bones[:, 0], :] - near[..., bones[:, 1], :], axis=-1)).sum(1)
    return Fit(
        centre(_with_bones(mean, length, known, bank.skeleton), bank.skeleton).astype(np.float32),
        near[:, 0].astype(np.float32), residual[:, 0] / size[:, 0, 0, 0], np.hypot(residual[:, 0], spread),
    )  # fmt: skip


def _search(
    query: np.ndarray, weight: np.ndarray, real: np.ndarray, scale: np.ndarray, bank: Bank, settings: Lift
) -> tuple[np.ndarray, ...]:
    """The k nearest poses, each in its best view: (P, k) pose, view, cost and roll (radians), nearest first.

    The least-squares similarity of complex numbers a q + b (|a| scale, arg a roll) leaves 1 - |<flat, q>|^2 of the
    variance of q, both centred and normalised. The cost is that and penalties for roll and elevation.
    """
    poses, views = bank.flat.shape[:2]
    x, y = np.moveaxis(weight[:, None] * query, -1, 0)
    # In place: these are the large arrays, and what they cost is the way to memory and back.
    straight = np.concatenate([x, y], 1).astype(np.float32) @ real  # real part of <flat, q>
    across = np.concatenate([y, -x], 1).astype(np.float32) @ real
    straight *= scale
    across *= scale
    score = straight**2
    part = across**2
    score += part
    if settings.roll:
        np.maximum(score, 1e-12, out=part)
        np.sqrt(part, out=part)
        np.divide(straight, part, out=part)  # the cosine of the roll
        part *= settings.roll
        score += part
    score = score.reshape(len(query), poses, views)
    score -= (settings.roll + settings.tilt * (1 - np.cos(bank.view[:, 1]))).astype(np.float32)
    best = score.argmax(2)
    cost = 1 - np.take_along_axis(score, best[..., None], 2)[..., 0]
    k = min(settings.neighbours, poses)
    near = np.argpartition(cost, k - 1, 1)[:, :k]
    near = np.take_along_axis(near, np.take_along_axis(cost, near, 1).argsort(1, kind="stable"), 1)
    view = np.take_along_axis(best, near, 1)
    at = near * views + view
    roll = np.arctan2(np.take_along_axis(across, at, 1), np.take_along_axis(straight, at, 1))
    return near, view, np.take_along_axis(cost, near, 1).astype(np.float64), roll.astype(np.float64)


def _look(pose3d: np.ndarray, heading: np.ndarray | float, elevation: np.ndarray | float) -> np.ndarray:
    """Poses (..., J, 3) turned by headings and seen by a camera so far (radians) above the horizon."""
    x, y, z = np.moveaxis(mocap.turn(pose3d, heading), -1, 0)
    elevation = np.asarray(elevation)[..., None]
    cos, sin = np.cos(elevation), np.sin(elevation)
    return np.stack([x, y * cos - z * sin, y * sin + z * cos], -1)


def _with_bones(pose3d: np.ndarray, length: np.ndarray, known: np.ndarray, skeleton: Skeleton) -> np.ndarray:
    """Poses (P, J, 3) with bones of length (P, E), by small steps; labelled joints are pulled back to their x and y.

    Position-based dynamics (Mueller et al., VRIPhys 2006), all bones at once.
    """
    ends = np.zeros((len(skeleton.bones), len(skeleton)))
    ends[np.arange(len(ends)), skeleton.bones[:, 0]] = 1
    ends[np.arange(len(ends)), skeleton.bones[:, 1]] = -1
    out = pose3d.copy()
    for _ in range(STEPS):
        bone = ends @ out
        now = np.linalg.norm(bone, axis=-1, keepdims=True)
        out -= STRETCH * (ends.T @ ((1 - length[..., None] / np.maximum(now, 1e-6)) * bone))
        out[:, known, :2] += PULL * (pose3d - out)[:, known, :2]
    return out


def check(
    people: People, bank: Bank, settings: Lift, seed: int = 0, advance: Callable[[int], Any] | None = None
) -> dict[str, Any]:
    """How far lifted poses are from the 3D poses that people have, of which only the 2D labels are used.

    -> people; methods: {name: (MPJPE, PA-MPJPE) mm} of the lifted and of simpler ways: the mean pose facing the
    camera, a pose and view at random, the nearest as it is; trust: fifths of the people from the most trusted on,
    (lowest trust, highest, people, MPJPE, PA-MPJPE). UserError: nobody has both.
    """
    people = people[people.has3d & possible(people, settings)]
    if not len(people):
        raise UserError("--check: nobody has a 3D pose and enough 2D joints to compare with")
    random = np.random.default_rng(seed)
    view = bank.view[random.integers(len(bank.view), size=len(people))]
    shape = people.pose3d.shape
    ways = {
        "mean pose": np.broadcast_to(bank.pose3d.mean(0), shape),
        "random pose": _look(bank.pose3d[random.integers(len(bank.pose3d), size=len(people))], *view.T),
        "nearest, as it is": np.zeros(shape),
        "lifted": np.zeros(shape),
    }
    trust = np.zeros(len(people))
    for rows, fit in fits(people, bank, settings):
        ways["nearest, as it is"][rows], ways["lifted"][rows] = fit.nearest, fit.pose3d
        trust[rows] = 1 / (1 + (fit.doubt / settings.doubt) ** 2)
        if advance:
            advance(len(rows))
    errors = {name: _errors(poses, people.pose3d) for name, poses in ways.items()}
    fifths = []
    for rows in np.array_split(np.argsort(-trust, kind="stable"), 5):
        if len(rows):
            mean = errors["lifted"][rows].mean(0).tolist()
            fifths.append((float(trust[rows[-1]]), float(trust[rows[0]]), len(rows), *mean))
    return {
        "people": len(people),
        "methods": {name: tuple(error.mean(0).tolist()) for name, error in errors.items()},
        "trust": fifths,
    }


def _errors(pose3d: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(P, 2) MPJPE and PA-MPJPE, millimetres."""
    pose3d = np.asarray(pose3d, np.float64)
    ways = (pose3d, procrustes(pose3d, truth.astype(np.float64)))
    return np.stack([1000 * np.linalg.norm(p - truth, axis=-1).mean(-1) for p in ways], -1)
