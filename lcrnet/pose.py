"""People and their poses: the nouns that flow between all parts, and the geometry of poses.

Pixels: x right, y down, continuous (the centre of the first pixel is 0.5, 0.5); boxes (x1, y1, x2, y2) with
width = x2 - x1. 3D: metres, in the camera's frame (x right, y down, z away from the camera), the origin at the centre
of the torso (mean of hips and shoulders). P people, J joints, N proposals.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from lcrnet.skeleton import Skeleton

# One noun on both sides of the collate: NumPy in data, labels and evaluation, tensors in the network.
Array = Any

BOX_MARGIN = 0.09
"""A body reaches beyond its outer joints (skull, feet, flesh) by about this part of the longer side of their box."""


@dataclass
class People:
    """The labelled people of one image.

    box     (P, 4)     pixels, of what is visible inside the image
    pose2d  (P, J, 2)  pixels; joints may lie outside the image
    pose3d  (P, J, 3)  metres, root-centred
    seen    (P, J)     0 unlabelled, 1 hidden (its place is known all the same), 2 visible
    has3d   (P,)       bool
    crowd   (P,)       bool: a region to be ignored, neither person nor background
    trust   (P,)       1 = human or exact, < 1 = pseudo-label
    area    (P,)       pixels of the person inside the image, as COCO's `area`
    """

    box: Array
    pose2d: Array
    pose3d: Array
    seen: Array
    has3d: Array
    crowd: Array
    trust: Array
    area: Array

    def __len__(self) -> int:
        return len(self.box)

    @classmethod
    def empty(cls, count: int, joints: int) -> People:
        """`count` people without a label."""
        return cls(
            box=np.zeros((count, 4), np.float32),
            pose2d=np.zeros((count, joints, 2), np.float32),
            pose3d=np.zeros((count, joints, 3), np.float32),
            seen=np.zeros((count, joints), np.int64),
            has3d=np.zeros(count, bool),
            crowd=np.zeros(count, bool),
            trust=np.ones(count, np.float32),
            area=np.zeros(count, np.float32),
        )

    @classmethod
    def join(cls, parts: Iterable[People]) -> People:
        """Everybody of several lists, in order."""
        parts = list(parts)
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))

    def __getitem__(self, rows: Array) -> People:
        """The people of an index array or mask."""
        return People(*(getattr(self, f.name)[rows] for f in fields(self)))

    def copy(self) -> People:
        return replace(self, **{f.name: getattr(self, f.name).copy() for f in fields(self)})

    def tensors(self, device: torch.device | str | None = None) -> People:
        """The same with tensors in place of arrays."""
        return People(*(torch.as_tensor(getattr(self, f.name)).to(device) for f in fields(self)))


@dataclass
class PoseProposals:
    """What the network says of one image before PPI: one row per (box, anchor pose) above the score floor.

    box (N, 4) pixels, score (N,) in 0..1, anchor (N,) index of the anchor pose, pose2d (N, J, 2) pixels,
    pose3d (N, J, 3) metres.
    """

    box: Array
    score: Array
    anchor: Array
    pose2d: Array
    pose3d: Array

    def __len__(self) -> int:
        return len(self.score)

    def numpy(self) -> PoseProposals:
        """The same with NumPy arrays, on the host."""
        return PoseProposals(
            *(v.detach().cpu().numpy() if isinstance(v, torch.Tensor) else v for v in self.__dict__.values())
        )


@dataclass
class Person:
    """One detected person.

    box          (4,) pixels, the 2D pose's box clipped to the image
    pose2d       (J, 2) pixels, hidden and cut-off joints included
    pose3d       (J, 3) metres, root-centred
    score        0..1, higher is surer
    joint_score  (J,) 0..1
    anchor       the anchor pose of the best proposal
    support      number of proposals that were merged
    spread       (J,) metres: score-weighted disagreement of what was merged
    place        (3,) metres: the torso centre in the camera's frame, or None where it was not computed
    """

    box: np.ndarray
    pose2d: np.ndarray
    pose3d: np.ndarray
    score: float
    joint_score: np.ndarray
    anchor: int
    support: int
    spread: np.ndarray
    place: np.ndarray | None = None


def into_box(pose2d: Array, box: Array) -> Array:
    """Pixels -> units of the box ((0, 0) its top left corner, (1, 1) its bottom right). (..., J, 2), (..., 4)."""
    return (pose2d - box[..., None, :2]) / (box[..., None, 2:] - box[..., None, :2])


def out_of_box(pose2d: Array, box: Array) -> Array:
    """Units of the box -> pixels; the inverse of `into_box`."""
    return pose2d * (box[..., None, 2:] - box[..., None, :2]) + box[..., None, :2]


def centre(pose3d: Array, skeleton: Skeleton) -> Array:
    """3D poses (..., J, 3) with their origin moved to the centre of the torso."""
    return pose3d - pose3d[..., skeleton.torso, :].mean(-2)[..., None, :]


def mirror2d(pose2d: Array, width: float, skeleton: Skeleton) -> Array:
    """2D poses (..., J, 2) in the horizontally mirrored image: x -> width - x, left and right joints swapped."""
    out = pose2d[..., skeleton.mirror, :] * 1
    out[..., 0] = width - out[..., 0]
    return out


def mirror3d(pose3d: Array, skeleton: Skeleton) -> Array:
    """3D poses (..., J, 3) of the mirrored image: x -> -x, left and right joints swapped."""
    out = pose3d[..., skeleton.mirror, :] * 1
    out[..., 0] = -out[..., 0]
    return out


def box_of(pose2d: np.ndarray, labelled: np.ndarray | None = None, margin: float = BOX_MARGIN) -> np.ndarray:
    """(..., 4) boxes round 2D poses (..., J, 2), grown on each side by `margin` of the longer side.

    labelled (..., J): only joints > 0 count. A pose without any gets (0, 0, 0, 0).
    """
    if labelled is None:
        low, high = pose2d.min(-2), pose2d.max(-2)
    else:
        known = np.asarray(labelled) > 0
        low = np.where(known[..., None], pose2d, np.inf).min(-2)
        high = np.where(known[..., None], pose2d, -np.inf).max(-2)
        some = np.asarray(known.any(-1))[..., None]
        low, high = np.where(some, low, 0), np.where(some, high, 0)
    grow = margin * (high - low).max(-1, keepdims=True)
    return np.concatenate([low - grow, high + grow], -1).astype(pose2d.dtype)


def clip(box: np.ndarray, height: float, width: float) -> np.ndarray:
    """Boxes (..., 4) cut to the image."""
    return np.clip(box, 0, np.array([width, height, width, height], dtype=box.dtype))


def procrustes(pose: np.ndarray, target: np.ndarray, scale: bool = True) -> np.ndarray:
    """Poses (..., J, 3) rotated, moved and (with `scale`) scaled onto their targets in the least-squares sense.

    No reflections. Umeyama, "Least-squares estimation of transformation parameters", PAMI 1991.
    """
    mean, goal = pose.mean(-2, keepdims=True), target.mean(-2, keepdims=True)
    a, b = pose - mean, target - goal
    u, s, vt = np.linalg.svd(np.swapaxes(b, -1, -2) @ a)
    sign = np.ones_like(s)
    sign[..., -1] = np.sign(np.linalg.det(u) * np.linalg.det(vt))
    rotation = (u * sign[..., None, :]) @ vt
    size = (a**2).sum((-1, -2))
    factor = (s * sign).sum(-1) / np.maximum(size, 1e-12) if scale else np.ones(size.shape)
    return factor[..., None, None] * a @ np.swapaxes(rotation, -1, -2) + goal
