"""Pose proposals integration: the many proposals of an image -> its people. It takes the place of NMS.

Rogez, Weinzaepfel, Schmid: LCR-Net++ (TPAMI 2019), section on pose proposals integration, as the released code does it,
less the faults of that code that SEED.md lists under S21. "Best" is the highest score; of equals the first.

1. Groups. The best proposal left is the centre of a group of all proposals left that overlap it in 2D; again with
   the rest, until none is left.
2. Modes of a group. The best proposal of the group that is in no mode yet is the centre of a mode of *all* proposals
   of the group (those of other modes too) whose 3D poses are near: (1 / J) sum_j |p_j - c_j| < th_pose3D. Modes after
   the first are made only from centres that score at least min_mode_score. A mode's mass is the sum of its scores.
3. The mode of the largest mass is the group's one person, if that mass is at least th_persondetect; a group never
   gives two. With weights w_ij = score_i, times 0.1 where j is below the hips and i comes from an upper-body anchor
   pose (it has not seen the legs), the pose is p_j = sum_i w_ij p_ij / sum_i w_ij, in 2D and in 3D.

Overlap (`iou_func`) compares a proposal p with the centre c. A box is that of 2D joints put into the image, x to
0 .. width - 1, y to 0 .. height - 1, and reaches one pixel further to the right and bottom, so that a pose which is
cut off altogether still has an area. B(c) is the box of all joints, the distance of joints J is

    d = (1 / |J|) sum_{j in J} |p_j - c_j| / (2 max(width of B(c), height of B(c)))

    bbox                         IoU(B(p), B(c)) > th_iou
    bbox_torsohead               the same with boxes of torso and head only
    torso, torsohead, head,      d < th_iou, of the joints named
    shoulderhead
    mje                          d < th_iou, of all joints
    torsoLR, torsoheadLR,        d or d with left and right of p exchanged, whichever is smaller, < th_iou
    shoulderheadLR

All but the boxes is `ops.group_poses`, on a batch of images at once; of what is on a GPU only the people leave it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lcrnet import config, ops, pose
from lcrnet.pose import Array, Person, PoseProposals
from lcrnet.skeleton import LCR13, Skeleton

LEGS_UNSEEN = 0.1
"""Weight of the joints below the hips in proposals of upper-body anchor poses."""

MAX_PEOPLE = 256
"""People an image that room is made for; where there are more, the operator runs once more, with room for all."""


def integrate(
    proposals: PoseProposals,
    size: tuple[int, int],
    params: config.Ppi,
    skeleton: Skeleton = LCR13,
    upper_only: np.ndarray | None = None,
) -> list[Person]:
    """The people of one image, surest first.

    proposals   of the image, arrays or tensors; those that are not `usable` are left out
    size        (height, width) of the image, pixels
    upper_only  (K,) bool, `AnchorPoses.upper_only`: whose legs count less; without it all count fully

    A person's score is m / (1 + m) for a mode of mass m: rising with the mass, of which it is no more than another
    scale, and never above 1. `spread`_j is the w_ij-weighted mean distance of the merged 3D joints from their mean,
    and joint_score_j = score exp(-spread_j / th_pose3D): merged proposals that disagree about a joint lower it.
    """
    return integrate_batch([proposals], [size], params, skeleton, upper_only)[0]


@torch.no_grad()
def integrate_batch(
    proposals: Sequence[PoseProposals],
    sizes: Sequence[tuple[int, int]],
    params: config.Ppi,
    skeleton: Skeleton = LCR13,
    upper_only: np.ndarray | None = None,
) -> list[list[Person]]:
    """`integrate` of several images at once, on the device that their proposals are on."""
    if not any(len(p) for p in proposals):
        return [[] for _ in proposals]
    given = _given(proposals, sizes, params, skeleton, upper_only)
    found = ops.group_poses(**given, max_people=MAX_PEOPLE)
    count = found.total.tolist()
    if max(count) > MAX_PEOPLE:
        found = ops.group_poses(**given, max_people=max(count))
    anchor = _pad([p.anchor for p in proposals]).gather(1, found.best.clamp(min=0))
    mass, pose2d, pose3d, spread, support, best = (v[:, : max(count)].cpu().numpy() for v in (*found[:5], anchor))
    score = mass.astype(np.float64) / (1 + mass.astype(np.float64))
    joint_score = (score[..., None] * np.exp(-spread / params.th_pose3D)).astype(np.float32)
    people = []
    for b, size in enumerate(sizes):
        box = pose.clip(pose.box_of(pose2d[b]), *size)
        people.append([
            Person(
                box=box[p],
                pose2d=pose2d[b, p],
                pose3d=pose3d[b, p],
                score=float(score[b, p]),
                joint_score=joint_score[b, p],
                anchor=int(best[b, p]),
                support=int(support[b, p]),
                spread=spread[b, p],
            )
            for p in range(count[b])
        ])  # fmt: skip
    return people


def modes(
    proposals: PoseProposals, size: tuple[int, int], params: config.Ppi, skeleton: Skeleton = LCR13
) -> list[np.ndarray]:  # fmt: skip
    """The proposals of each person, as `integrate` merges them: int64 rows, best first; the largest mass first."""
    found = ops.group_poses(**_given([proposals], [size], params, skeleton, None), max_people=len(proposals))
    person = found.person[0].cpu().numpy()
    score = proposals.numpy().score
    rows = np.argsort(-np.where(person < 0, 0, score), kind="stable")
    return [rows[person[rows] == p] for p in range(int(found.total))]


def usable(proposals: PoseProposals) -> np.ndarray:
    """(N,) bool: finite poses and a finite score above 0. `(~usable(p)).sum()` counts what `integrate` leaves out."""
    proposals = proposals.numpy()
    finite = np.isfinite(proposals.score) & (proposals.score > 0)
    return finite & np.isfinite(proposals.pose2d).all((1, 2)) & np.isfinite(proposals.pose3d).all((1, 2))


def _given(
    proposals: Sequence[PoseProposals],
    sizes: Sequence[tuple[int, int]],
    params: config.Ppi,
    skeleton: Skeleton,
    upper_only: np.ndarray | None,
) -> dict[str, Any]:
    """The arguments of `ops.group_poses`."""
    score, pose2d, pose3d = (
        _pad([getattr(p, name) for p in proposals]).float() for name in ("score", "pose2d", "pose3d")
    )
    given = _overlap(pose2d, torch.tensor(sizes, device=score.device), params, skeleton)
    if upper_only is not None:
        weight = torch.from_numpy(np.where(upper_only, LEGS_UNSEEN, 1).astype(np.float32)).to(score.device)
        given["legs"] = weight[_pad([p.anchor for p in proposals])]
        lower = np.zeros(len(skeleton), bool)
        lower[skeleton.lower] = True
        given["lower"] = torch.from_numpy(lower).to(score.device)
    return given | {
        "score": score,
        "pose2d": pose2d,
        "pose3d": pose3d,
        "th_iou": params.th_iou,
        "th_pose3d": params.th_pose3D,
        "min_mode_score": params.min_mode_score,
        "th_persondetect": params.th_persondetect,
    }


def _pad(values: Sequence[Array]) -> Tensor:
    """(n, ...) of each image -> (B, N, ...), the shorter ones filled up with 0."""
    every = [torch.as_tensor(v) for v in values]
    return every[0][None] if len(every) == 1 else pad_sequence(every, batch_first=True)


def _overlap(pose2d: Tensor, size: Tensor, params: config.Ppi, skeleton: Skeleton) -> dict[str, Tensor]:
    """What `ops.group_poses` needs for the test that `params.iou_func` names; pose2d (B, N, J, 2), size (B, 2)."""
    part = params.iou_func.removeprefix("bbox_").removesuffix("LR")
    joints = torch.from_numpy(_joints(part, skeleton)).to(pose2d.device)
    if params.iou_func.startswith("bbox"):
        return {"boxes": _boxes(pose2d.index_select(2, joints), size)}
    box = _boxes(pose2d, size)
    given = {
        "points": pose2d.index_select(2, joints),
        "limit": params.th_iou * 2 * (box[..., 2:] - box[..., :2]).amax(-1),
    }
    if params.iou_func.endswith("LR"):
        given["swapped"] = pose2d.index_select(2, torch.from_numpy(skeleton.mirror).to(joints.device)[joints])
    return given


@functools.cache
def _joints(part: str, skeleton: Skeleton) -> np.ndarray:
    """The joints of a part of the body; the head's are those that are neither of the torso nor of a limb."""
    arms = skeleton.indices("r_wrist", "l_wrist", "r_elbow", "l_elbow")
    head = np.setdiff1d(skeleton.upper, [*skeleton.torso, *arms])
    parts = {
        "torso": skeleton.torso,
        "torsohead": np.concatenate([skeleton.torso, head]),
        "head": head,
        "shoulderhead": np.concatenate([skeleton.indices("r_shoulder", "l_shoulder"), head]),
    }
    return parts.get(part, np.arange(len(skeleton)))


def _boxes(points: Tensor, size: Tensor) -> Tensor:
    """(B, N, 4) float64 boxes round points (B, N, J, 2), as the module's docstring describes them; size (B, 2)."""
    most = (size.flip(1) - 1)[:, None].to(points.dtype)
    low, high = (torch.minimum(edge.clamp(min=0), most).double() for edge in (points.amin(2), points.amax(2)))
    return torch.cat([low, high + 1], -1)
