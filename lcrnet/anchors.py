"""Anchor poses, the classes of the network: clustered from people or read from a file; how well they cover a data set.

An anchor pose is the mean of similar training poses: 3D in metres, 2D in units of a box. There are two kinds with the
same 3D pose, for boxes round the whole body and for boxes round the upper body, which is what a cut-off person shows
(LCR-Net, CVPR 2017). The network tells them apart, and PPI trusts the legs of the second kind less.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lcrnet import pose, unpickle
from lcrnet.config import UserError
from lcrnet.pose import People
from lcrnet.skeleton import LCR13, SKELETONS, Skeleton

FORMAT = "lcrnet-anchor-poses-1"
FRAME = "x right, y down, z away from the camera; origin at the mean of hips and shoulders"
UNITS = {"pose2d": "units of the box, (0, 0) top left, (1, 1) bottom right", "pose3d": "metres"}

MOST_POSES = 50_000
"""k-means sees at most so many poses: its centres no longer move with more."""


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
    people: People, k: int, skeleton: Skeleton = LCR13, upper: bool = True, seed: int = 0
) -> AnchorPoses:  # fmt: skip
    """Anchor poses of a training set: k-means on root-centred 3D poses.

    people  those with a 3D pose and all joints known in 2D are used, with their mirror images, so that neither side
            is preferred and mirrored training meets the same anchors; `box` is not: boxes are those of the whole 2D
            pose (`pose.box_of`), for cut-off people too
    k       3D poses; with `upper` there are 2 k anchors, first all for the whole body, then all for the upper body:
            2D in units of the box round `skeleton.upper`, so legs reach beyond 1
    seed    same people and seed, same anchors

    The most frequent pose comes first. UserError: there are fewer than k different poses.
    """
    from sklearn.cluster import KMeans

    pose2d, pose3d = _usable(people)
    whole = pose.into_box(pose2d, pose.box_of(pose2d))
    half = pose.into_box(pose2d, pose.box_of(pose2d[:, skeleton.upper]))
    pose3d = pose.centre(pose3d, skeleton)
    whole, half = (np.concatenate([x, pose.mirror2d(x, 1, skeleton)]) for x in (whole, half))
    pose3d = np.concatenate([pose3d, pose.mirror3d(pose3d, skeleton)])
    if len(pose3d) > MOST_POSES:
        rows = np.sort(np.random.default_rng(seed).choice(len(pose3d), MOST_POSES, replace=False))
        whole, half, pose3d = whole[rows], half[rows], pose3d[rows]

    flat = pose3d.reshape(len(pose3d), -1)
    distinct = len(np.unique(flat.astype(np.float32), axis=0))
    if distinct < k:
        raise UserError(
            f"anchors.k: {k} anchor poses need as many different 3D poses, there are {distinct} (mirror images "
            f"included); set anchors.k to {distinct} or less, bring more people with a 3D pose, or name anchors.file"
        )
    label = KMeans(k, n_init=4, random_state=seed).fit(flat).labels_
    members = [np.flatnonzero(label == i) for i in np.argsort(-np.bincount(label, minlength=k), kind="stable")]

    def means(values: np.ndarray) -> np.ndarray:
        # Not k-means' own centres: sums over threads differ in their last bits from run to run.
        return np.stack([values[rows].mean(0) for rows in members]).astype(np.float32)

    variants = (whole, half) if upper else (whole,)
    return AnchorPoses(
        pose2d=np.concatenate([means(v) for v in variants]),
        pose3d=np.concatenate([means(pose3d)] * len(variants)),
        upper_only=np.repeat([False, True][: len(variants)], k),
        skeleton=skeleton,
    )


def nearest3d(pose3d: np.ndarray, anchors: AnchorPoses) -> tuple[np.ndarray, np.ndarray]:
    """The nearest distinct 3D pose to each of (P, J, 3) root-centred poses, by mean distance of the joints.

    -> (P,) int64 rows of `anchors.pose3d_distinct`, (P,) distance in metres. Ties go to the first.
    """
    distance = np.stack([np.linalg.norm(pose3d - centre, axis=-1).mean(-1) for centre in anchors.pose3d_distinct], 1)
    nearest = distance.argmin(1)
    return nearest, distance[np.arange(len(distance)), nearest]


def coverage(pose3d: np.ndarray, anchors: AnchorPoses) -> dict[str, Any]:
    """How far (P, J, 3) root-centred poses are from the anchor poses: what regression has to bridge.

    -> people; mean, p95, worst: mean joint distance to the nearest anchor pose, metres; worst_person: its row;
    count: people nearest to each of `anchors.pose3d_distinct`. UserError without a pose.
    """
    if not len(pose3d):
        raise UserError("no person has a 3D pose: there is nothing to measure the coverage of the anchor poses on")
    nearest, distance = nearest3d(pose3d, anchors)
    return {
        "people": len(pose3d),
        "mean": float(distance.mean()),
        "p95": float(np.percentile(distance, 95)),
        "worst": float(distance.max()),
        "worst_person": int(distance.argmax()),
        "count": np.bincount(nearest, minlength=len(anchors.pose3d_distinct)).tolist(),
    }


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


def _usable(people: People) -> tuple[np.ndarray, np.ndarray]:
    """(2D, 3D) float64 poses of the people that can be clustered."""
    pose2d, pose3d = np.asarray(people.pose2d, np.float64), np.asarray(people.pose3d, np.float64)
    known = np.asarray(people.has3d, bool) & ~np.asarray(people.crowd, bool) & (np.asarray(people.seen) > 0).all(-1)
    known &= np.isfinite(pose2d).all((1, 2)) & np.isfinite(pose3d).all((1, 2))
    # A flat pose has no box to take units of.
    known &= (np.ptp(pose2d, axis=1) > 0).any(-1)
    if not known.any():
        raise UserError(
            f"none of {len(known)} people has a 3D pose and all 2D joints, which anchor poses are clustered from; "
            "bring such a data set or name anchors.file"
        )
    return pose2d[known], pose3d[known]


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
