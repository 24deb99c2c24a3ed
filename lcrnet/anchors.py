"""Anchor poses, the classes of the network: clustered from people or read from a file; how well they cover a data set.

An anchor pose is the mean of similar training poses: 3D in metres, 2D in units of a box. There are two kinds with the
same 3D pose, for boxes round the whole body and for boxes round the upper body, which is what a cut-off person shows
(LCR-Net, CVPR 2017). The network tells them apart, and PPI trusts the legs of the second kind less.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np

from lcrnet import mocap, pose, unpickle
from lcrnet.config import Anchors, UserError
from lcrnet.pose import People
from lcrnet.skeleton import LCR13, SKELETONS, Skeleton

FORMAT = "lcrnet-anchor-poses-1"
FRAME = "x right, y down, z away from the camera; origin at the mean of hips and shoulders"
UNITS = {"pose2d": "units of the box, (0, 0) top left, (1, 1) bottom right", "pose3d": "metres"}

MOST_POSES = 50_000
"""k-means sees at most so many poses: its centres no longer move with more."""

MOST_ON_CURVE = 20_000
"""The same of a coverage curve, which is made of many runs; it is measured on at most so many, too."""

SAME = 1e-5
"""Metres under which poses differ by rounding only."""

FOLDS = 5
"""Parts of the people for a coverage curve."""

KS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""What a coverage curve tries: beyond that a network would see too few people of each class."""


@dataclass(frozen=True, eq=False)
class AnchorPoses:
    """K anchor poses, float32.

    pose2d      (K, J, 2)  units of the box; joints may lie outside, the legs of `upper_only` always do
    pose3d      (K, J, 3)  metres, camera's frame (x right, y down, z away), root-centred
    upper_only  (K,)       bool: the box is one round the upper body
    """

    pose2d: np.ndarray
    pose3d: np.ndarray
    upper_only: np.ndarray
    skeleton: Skeleton = LCR13

    def __len__(self) -> int:
        return len(self.pose3d)

    @cached_property
    def _distinct(self) -> tuple[np.ndarray, np.ndarray]:
        """(first anchor of each distinct 3D pose (G,), `group` (K,)), in the order of the anchors."""
        _, first, group = np.unique(self.pose3d.reshape(len(self), -1), axis=0, return_index=True, return_inverse=True)
        order = np.argsort(first)
        return first[order], np.argsort(order)[group.reshape(-1)]

    @property
    def group(self) -> np.ndarray:
        """(K,) int64: the row of `pose3d_distinct` that is each anchor's 3D pose."""
        return self._distinct[1]

    @property
    def pose3d_distinct(self) -> np.ndarray:
        """(G, J, 3): the different 3D poses; the variants for the whole and the upper body share one."""
        return self.pose3d[self._distinct[0]]


def cluster(
    people: People, k: int, skeleton: Skeleton = LCR13, upper: bool = True, seed: int = 0, headings: int = 0
) -> AnchorPoses:
    """Anchor poses of a training set: k-means on root-centred 3D poses.

    people    those with a 3D pose and all joints known in 2D are used, with their mirror images, so that neither side
              is preferred and mirrored training meets the same anchors; `box` is not: boxes are those of the whole 2D
              pose (`pose.box_of`), for cut-off people too
    k         3D poses; with `upper` there are twice as many anchors, first all for the whole body, then all for the
              upper body: 2D in units of the box round `skeleton.upper`, so legs reach beyond 1
    headings  0: poses are clustered as they face the camera. n: they are turned to face it first, and each of the k
              centres is put into n headings evenly round (the first faces the camera): k n 3D poses. The 2D of each is
              the mean of the centre's poses nearest to that heading or, where there is none, what a level camera sees
    seed      same people and seed, same anchors

    The most frequent pose comes first. UserError: there are fewer than k different poses.
    """
    pose2d, pose3d = _usable(people)
    boxes = [pose.box_of(pose2d)] + ([pose.box_of(pose2d[:, skeleton.upper])] if upper else [])
    rows, source = _sample(len(pose3d), seed, MOST_POSES), pose.centre(pose3d, skeleton)
    centres, members = _centres(_mirrored(source, rows, skeleton), k, headings, seed, skeleton)
    if (distinct := len(centres) // max(headings, 1)) < k:
        raise UserError(
            f"anchors.k: {k} anchor poses need as many different 3D poses, there are {distinct} (mirror images "
            f"included); set anchors.k to {distinct} or less, bring more people with a 3D pose, or name anchors.file"
        )
    variants = []
    for box, joints in zip(boxes, (np.arange(len(skeleton)), skeleton.upper), strict=False):
        inside = pose.into_box(pose2d, box)
        inside = np.concatenate([inside, pose.mirror2d(inside, 1, skeleton)])[rows]
        flat = mocap.seen(centres, skeleton).pose2d.astype(np.float64)
        projected = pose.into_box(flat, pose.box_of(flat[:, joints]))
        means = [inside[m].mean(0) if len(m) else p for m, p in zip(members, projected, strict=True)]
        variants.append(np.stack(means).astype(np.float32))
    return AnchorPoses(
        pose2d=np.concatenate(variants),
        pose3d=np.concatenate([centres.astype(np.float32)] * len(variants)),
        upper_only=np.repeat([False, True][: len(variants)], len(centres)),
        skeleton=skeleton,
    )


def curve(
    people: People, group: Sequence[Any], ks: Sequence[int] = KS, skeleton: Skeleton = LCR13, seed: int = 0,
    headings: int = 0,
) -> list[dict[str, float]]:  # fmt: skip
    """How well anchor poses cover people that they were not clustered from, for several k.

    group  (P,) hashable: what must not be parted, such as the image or the clip of each of the people

    Cross-validation: each of `FOLDS` parts of the people, whole groups, is measured by the anchor poses of the others.
    -> a row for each k: k; mean, p95, worst: mean joint distance to the nearest anchor pose, metres. It ends where
    there are fewer than k different poses. UserError: all people are of one group.
    """
    known = _known(people)
    pose3d = pose.centre(np.asarray(people.pose3d, np.float64)[known], skeleton)
    fold = _folds([g for g, one in zip(group, known, strict=True) if one], seed)
    parts = []
    for f in range(fold.max() + 1):
        source = pose3d[fold != f]
        source = _mirrored(source, _sample(len(source), seed, MOST_ON_CURVE), skeleton)
        asked = pose3d[fold == f]
        if (share := MOST_ON_CURVE // FOLDS) < len(asked):
            asked = asked[np.sort(np.random.default_rng(seed).choice(len(asked), share, replace=False))]
        parts.append((source, asked))
    found: list[dict[str, float]] = []
    for k in ks:
        centres = [_centres(source, k, headings, seed, skeleton, tries=1)[0] for source, _ in parts]
        if found and min(map(len, centres)) < k * max(headings, 1):
            break
        distance = np.concatenate([_nearest(asked, c)[1] for (_, asked), c in zip(parts, centres, strict=True)])
        spread = {"mean": distance.mean(), "p95": np.percentile(distance, 95), "worst": distance.max()}
        found.append({"k": k} | {name: float(value) for name, value in spread.items()})
    return found


def choose(rows: Sequence[dict[str, float]], gain: float) -> int:
    """The k of a coverage curve: the smallest after which no doubling lowers p95 by the share `gain` any more.

    The largest whose double is on the curve where each of them does, for which more is not known.
    """
    p95 = {int(row["k"]): row["p95"] for row in rows}
    doubled = sorted(k for k in p95 if 2 * k in p95)
    if not doubled:
        return max(p95)
    worth = [k for k in doubled if p95[2 * k] < (1 - gain) * p95[k]]
    return min((k for k in doubled if not worth or k > worth[-1]), default=doubled[-1])


def fit(
    people: People, group: Sequence[Any], settings: Anchors, skeleton: Skeleton = LCR13, seed: int = 0
) -> tuple[AnchorPoses, list[dict[str, float]], int]:
    """Anchor poses as the configuration asks for them: (anchor poses, the coverage curve, k).

    The curve is empty where the configuration names k. `group` as for `curve`. UserError as `cluster` and `curve`.
    """
    rows: list[dict[str, float]] = []
    k = settings.k
    if k == "auto":
        rows = curve(people, group, skeleton=skeleton, seed=seed, headings=settings.headings)
        k = choose(rows, settings.gain)
    return cluster(people, k, skeleton, settings.upper, seed, settings.headings), rows, k


def nearest3d(pose3d: np.ndarray, anchors: AnchorPoses) -> tuple[np.ndarray, np.ndarray]:
    """The nearest distinct 3D pose to each of (P, J, 3) root-centred poses, by mean distance of the joints.

    -> (P,) int64 rows of `anchors.pose3d_distinct`, (P,) distance in metres. Ties go to the first.
    """
    return _nearest(pose3d, anchors.pose3d_distinct)


def coverage(pose3d: np.ndarray, anchors: AnchorPoses, twin: float = 0.05) -> dict[str, Any]:
    """How far (P, J, 3) root-centred poses are from the anchor poses: what regression has to bridge.

    -> people; mean, p95, worst: mean joint distance to the nearest anchor pose, metres; worst_person: its row;
    count: people nearest to each of `anchors.pose3d_distinct`; empty: its rows that nobody is nearest to; twins: see
    `twins`, for that distance. UserError without a pose.
    """
    if not len(pose3d):
        raise UserError("no person has a 3D pose: there is nothing to measure the coverage of the anchor poses on")
    nearest, distance = nearest3d(pose3d, anchors)
    count = np.bincount(nearest, minlength=len(anchors.pose3d_distinct))
    return {
        "people": len(pose3d),
        "mean": float(distance.mean()),
        "p95": float(np.percentile(distance, 95)),
        "worst": float(distance.max()),
        "worst_person": int(distance.argmax()),
        "count": count.tolist(),
        "empty": np.flatnonzero(count == 0).tolist(),
        "twins": twins(anchors, twin),
    }


def twins(anchors: AnchorPoses, nearer: float) -> list[tuple[int, int, float]]:
    """Distinct 3D poses whose joints are nearer than that on average, metres: (row, row, distance), rows of
    `pose3d_distinct`; a row with itself where two anchors of one kind have the same 3D pose. The closest first."""
    centres = anchors.pose3d_distinct
    found = []
    for i in range(len(centres) - 1):
        distance = np.linalg.norm(centres[i + 1 :] - centres[i], axis=-1).mean(-1)
        found += [(i, i + 1 + int(j), float(distance[j])) for j in np.flatnonzero(distance < nearer)]
    kinds = 2 * anchors.group + anchors.upper_only
    doubles = np.unique(np.flatnonzero(np.bincount(kinds) > 1) // 2)
    return sorted(found + [(int(i), int(i), 0.0) for i in doubles], key=lambda row: row[2])


def save(anchors: AnchorPoses, file: str | os.PathLike[str]) -> None:
    """Writes anchor poses as JSON, one a line, from which `load` reads exactly the same.

    The file is replaced in one step or not at all. UserError: it cannot be written.
    """
    head = {
        "format": FORMAT,
        "skeleton": anchors.skeleton.name,
        "joints": anchors.skeleton.joints,
        "frame": FRAME,
        "units": UNITS,
    }
    rows = ",\n".join("  " + json.dumps(row) for row in _rows(anchors))
    file = Path(file)
    half = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        half.write_text(json.dumps(head, indent=1)[:-2] + f',\n "anchors": [\n{rows}\n ]\n}}\n', encoding="utf-8")
        os.replace(half, file)
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            half.unlink(missing_ok=True)


def load(file: str | os.PathLike[str]) -> AnchorPoses:
    """Anchor poses of a JSON file (`save`) or of a released LCR-Net pickle, whichever it is by its content.

    UserError names the file, the field and what is wrong with it. Pickles are read without running what is in them.
    """
    try:
        data = Path(file).read_bytes()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    if data.lstrip()[:1] == b"{":
        return _from_json(data, str(file))
    if data[:1] not in (b"\x80", b"("):
        raise UserError(f"{file}: neither anchor poses as JSON nor a released .pkl file")
    bundle = unpickle.load(data, str(file))
    return from_flat(bundle.get("anchor_poses") if isinstance(bundle, dict) else bundle, str(file))


def _known(people: People) -> np.ndarray:
    """(P,) bool: the people that can be clustered. UserError: nobody."""
    pose2d, pose3d = np.asarray(people.pose2d), np.asarray(people.pose3d)
    known = np.asarray(people.has3d, bool) & ~np.asarray(people.crowd, bool) & (np.asarray(people.seen) > 0).all(-1)
    known &= np.isfinite(pose2d).all((1, 2)) & np.isfinite(pose3d).all((1, 2))
    # A flat pose has no box to take units of.
    known &= (np.ptp(pose2d, axis=1) > 0).any(-1)
    if not known.any():
        raise UserError(
            f"none of {len(known)} people has a 3D pose and all 2D joints, which anchor poses are clustered from; "
            "bring such a data set or name anchors.file"
        )
    return known


def _usable(people: People) -> tuple[np.ndarray, np.ndarray]:
    """(2D, 3D) float64 poses of the people that can be clustered."""
    known = _known(people)
    return np.asarray(people.pose2d, np.float64)[known], np.asarray(people.pose3d, np.float64)[known]


def _sample(count: int, seed: int, most: int) -> np.ndarray:
    """Rows of `count` poses and, after them, their mirror images: `most` of them or all."""
    if 2 * count <= most:
        return np.arange(2 * count)
    return np.sort(np.random.default_rng(seed).choice(2 * count, most, replace=False))


def _mirrored(pose3d: np.ndarray, rows: np.ndarray, skeleton: Skeleton) -> np.ndarray:
    return np.concatenate([pose3d, pose.mirror3d(pose3d, skeleton)])[rows]


def _folds(group: Sequence[Any], seed: int) -> np.ndarray:
    """(P,) int64: the part of the people that each is in, of about the same size; no group is in two."""
    number = {name: i for i, name in enumerate(dict.fromkeys(group))}
    if len(number) < 2:
        raise UserError(
            "anchors.k: auto measures anchor poses on images or clips that they were not clustered from, and all "
            "people are of one; set anchors.k to a number, or bring more images, or a motion-capture file with `clip`"
        )
    label = np.array([number[g] for g in group])
    size, fold = np.bincount(label), np.zeros(len(number), np.int64)
    full = np.zeros(min(FOLDS, len(number)))
    order = np.random.default_rng(seed).permutation(len(number))
    for g in order[np.argsort(-size[order], kind="stable")].tolist():  # the largest first, each into the emptiest
        fold[g] = full.argmin()
        full[fold[g]] += size[g]
    return fold[label]


def _centres(
    pose3d: np.ndarray, k: int, headings: int, seed: int, skeleton: Skeleton, tries: int = 4
) -> tuple[np.ndarray, list[np.ndarray]]:
    """k-means: the 3D poses (k or k `headings`, J, 3) float64 and the rows that each stands for.

    Of fewer than k different poses there are fewer centres.
    """
    from scipy.spatial.distance import cdist
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    angle = mocap.heading(pose3d, skeleton) if headings else np.zeros(len(pose3d))
    poses = mocap.turn(pose3d, angle) if headings else pose3d
    flat = poses.reshape(len(poses), -1)
    k = min(k, len(np.unique(flat.astype(np.float32), axis=0)))
    with catch_warnings():
        simplefilter("ignore", ConvergenceWarning)  # of fewer different poses than centres
        means = KMeans(k, n_init=tries, random_state=seed).fit(flat)
    # Turned to face the camera, the views of one pose differ in their last bits: centres as near as that are one.
    label = (cdist(means.cluster_centers_, means.cluster_centers_, "chebyshev") < SAME).argmax(1)[means.labels_]
    count = np.bincount(label, minlength=k)
    members = [np.flatnonzero(label == i) for i in np.argsort(-count, kind="stable") if count[i]]
    # Not k-means' own centres: sums over threads differ in their last bits from run to run.
    centres = np.stack([poses[rows].mean(0) for rows in members])
    if not headings:
        return centres, members
    step = 2 * np.pi / headings
    centres = np.stack([mocap.turn(centre, -step * h) for centre in centres for h in range(headings)])
    nearest = np.rint(angle / step).astype(np.int64) % headings
    return centres, [rows[nearest[rows] == h] for rows in members for h in range(headings)]


def _nearest(pose3d: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(P,) rows of `centres` (G, J, 3), (P,) mean joint distances; a few thousand poses at a time."""
    from scipy.spatial.distance import cdist

    nearest, least = [np.zeros(0, np.int64)], [np.zeros(0)]
    for start in range(0, len(pose3d), 8192):
        part = pose3d[start : start + 8192]
        distance = sum(cdist(part[:, j], centres[:, j]) for j in range(centres.shape[1])) / centres.shape[1]
        nearest.append(distance.argmin(1))
        least.append(distance.min(1))
    return np.concatenate(nearest), np.concatenate(least)


def _rows(anchors: AnchorPoses) -> Iterator[dict[str, Any]]:
    def shortest(values: np.ndarray) -> list[Any]:
        # The shortest text of a float32, where json.dumps would write the digits of its double.
        return [shortest(v) if v.ndim else float(str(v)) for v in values.astype(np.float32)]

    for upper_only, pose2d, pose3d in zip(anchors.upper_only, anchors.pose2d, anchors.pose3d, strict=True):
        yield {"upper_only": bool(upper_only), "pose2d": shortest(pose2d), "pose3d": shortest(pose3d)}


def _from_json(data: bytes, file: str) -> AnchorPoses:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON: {error}") from None
    if values.get("format") != FORMAT:
        raise UserError(f"{file}: format: expected {FORMAT!r}, found {values.get('format')!r}")
    joints = values.get("joints")
    if not isinstance(joints, list) or not all(isinstance(joint, str) for joint in joints):
        raise UserError(f"{file}: joints: expected a list of names")
    skeleton = SKELETONS.get(str(values.get("skeleton"))) or Skeleton("custom", tuple(joints))
    if list(skeleton.joints) != joints:
        raise UserError(f"{file}: joints: they are not those of {skeleton.name}: {', '.join(skeleton.joints)}")
    rows = values.get("anchors")
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{file}: anchors: expected a list of anchor poses")
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("upper_only"), bool):
            raise UserError(f"{file}: anchors[{i}].upper_only: expected true or false")
    return AnchorPoses(
        pose2d=np.stack([_array(r, "pose2d", (len(skeleton), 2), f"{file}: anchors[{i}]") for i, r in enumerate(rows)]),
        pose3d=np.stack([_array(r, "pose3d", (len(skeleton), 3), f"{file}: anchors[{i}]") for i, r in enumerate(rows)]),
        upper_only=np.array([row["upper_only"] for row in rows]),
        skeleton=skeleton,
    )


def _array(row: dict[str, Any], field: str, shape: tuple[int, ...], where: str) -> np.ndarray:
    try:
        value = np.asarray(row.get(field), dtype=np.float32)
    except (TypeError, ValueError):
        value = np.empty(0, np.float32)
    if value.shape != shape or not np.isfinite(value).all():
        raise UserError(f"{where}.{field}: expected {' x '.join(map(str, shape))} finite numbers")
    return value


def from_flat(flat: Any, file: str) -> AnchorPoses:
    """Those of a released file, (K, 5 J): J x's and y's (box units), J X's, Y's, Z's (metres, x left, y up)."""
    skeleton = LCR13
    width = 5 * len(skeleton)
    if not isinstance(flat, np.ndarray) or flat.ndim != 2 or flat.shape[1] != width or not len(flat):
        found = f"shape {flat.shape}" if isinstance(flat, np.ndarray) else type(flat).__name__
        raise UserError(f"{file}: anchor_poses: expected an array of K x {width} numbers, found {found}")
    if flat.dtype.kind != "f" or not np.isfinite(flat).all():
        raise UserError(f"{file}: anchor_poses: expected finite numbers")
    return from_joints(flat.astype(np.float32).reshape(len(flat), 5, -1).transpose(0, 2, 1), skeleton)


def from_joints(values: np.ndarray, skeleton: Skeleton = LCR13) -> AnchorPoses:
    """From (K, J, 5): x, y (box units), X, Y, Z (metres, x left, y up), which is how DOPE has them."""
    pose2d = np.ascontiguousarray(values[..., :2])
    pose3d = np.ascontiguousarray(values[..., 2:] * np.array([-1, -1, 1], np.float32))
    anchors = AnchorPoses(pose2d, pose3d, np.zeros(len(values), bool), skeleton)
    # How far legs reach out of the box. Of the anchors that share a 3D pose, those round the upper body have it much
    # larger (by 1.2 and more in the released files, where all else is alike), whatever the pose.
    legs = pose2d[:, skeleton.lower]
    reach = np.maximum(-legs, legs - 1).max((1, 2))
    least = np.full(len(anchors.pose3d_distinct), np.inf)
    np.minimum.at(least, anchors.group, reach)
    return AnchorPoses(pose2d, pose3d, reach > least[anchors.group] + 0.5, skeleton)
