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

Public code. `variant="lcrnet"` gives what LCR-Net 2.0 gives (lcr_net_ppi.py, in YangDi666's port too), "improved" what
naver/lcrnet-v2-improved-ppi gives; released models were tuned with their faults, which `faults` also names one by one:

    lr_mixed            lcrnet    the exchanged d takes x of (mirror of j, j) and y of (j, mirror of j)
    roi_boxes           improved  all boxes, B(c) too, are those of the regions, not those of the poses
    legs_off_by_one     improved  the first anchor pose of the upper body counts as one of the whole body
    anchor_by_position  improved  `anchor` (there: of which hand a pose is) is read at a place within the group
    score_sum           both      a person's score is the mass, which has no limit
    legs_full           callers   legs always count fully: the demos say K = all anchor poses

Which proposals there are is the model's affair: `head.score_floor` 0.1 / K is improved's, `head.at_least` 500 lcrnet's.

Instead of all that, `postprocess="nms"` is greedy NMS as DOPE does it: of proposals that score at least th_persondetect
the best is a person and drops those whose boxes overlap its own by an IoU above th_iou. Boxes are those of the poses
and a tenth of their width and height more on each side. Nothing is merged.
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

NMS_MARGIN = 0.1
"""How far boxes of poses are widened for NMS, in units of their sides (DOPE's postprocess.py)."""

HEAD = {"head", "neck", "nose", "eye", "ear", "mouth", "jaw"}
"""A joint with one of these words in its name is of the head."""


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
    return integrate_batch([proposals], [size], params, skeleton, upper_only)[0][0]


@torch.no_grad()
def integrate_batch(
    proposals: Sequence[PoseProposals],
    sizes: Sequence[tuple[int, int]],
    params: config.Ppi,
    skeleton: Skeleton = LCR13,
    upper_only: np.ndarray | None = None,
) -> tuple[list[list[Person]], list[int]]:
    """`integrate` of several images at once, on the device that their proposals are on.

    -> their people; of each, the number of proposals left out because one of their numbers is not finite
    """
    if not any(len(p) for p in proposals):
        return [[] for _ in proposals], [0 for _ in proposals]
    if params.postprocess == "nms":
        return _suppressed(proposals, sizes, params)
    given = _given(proposals, sizes, params, skeleton, upper_only)
    wrong_anchor = "anchor_by_position" in params.wrong
    found = ops.group_poses(**given, max_people=MAX_PEOPLE)
    count, dropped = torch.stack([found.total, found.dropped]).tolist()
    if max(count) > MAX_PEOPLE:
        found = ops.group_poses(**given, max_people=max(count))
    anchor = _pad([p.anchor for p in proposals])
    anchor = _misread(given, found, anchor) if wrong_anchor else anchor.gather(1, found.best.clamp(min=0))
    mass, pose2d, pose3d, spread, support, best = (v[:, : max(count)].cpu().numpy() for v in (*found[:5], anchor))
    score = mass.astype(np.float64)
    if "score_sum" not in params.wrong:
        score = score / (1 + score)
    joint_score = (score[..., None] * np.exp(-spread / params.th_pose3D)).astype(np.float32)
    return _people(count, sizes, pose2d, pose3d, score, joint_score, best, support, spread), dropped


def _people(
    count: Sequence[int], sizes: Sequence[tuple[int, int]], pose2d: np.ndarray, pose3d: np.ndarray, score: np.ndarray,
    joint_score: np.ndarray, anchor: np.ndarray, support: np.ndarray, spread: np.ndarray,
) -> list[list[Person]]:  # fmt: skip
    """The first `count` of the P people of each image, whose fields are arrays (B, P, ...)."""
    box = pose.box_of(pose2d)
    out = []
    for b, (n, size) in enumerate(zip(count, sizes, strict=True)):
        fields = (pose.clip(box[b, :n], *size), pose2d[b], pose3d[b], score[b].tolist(), joint_score[b],
                  anchor[b].tolist(), support[b].tolist(), spread[b])  # fmt: skip
        out.append([Person(*(field[p] for field in fields)) for p in range(n)])
    return out


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
    """(N,) bool: finite poses and a finite score above 0."""
    proposals = proposals.numpy()
    finite = np.isfinite(proposals.score) & (proposals.score > 0)
    return finite & np.isfinite(proposals.pose2d).all((1, 2)) & np.isfinite(proposals.pose3d).all((1, 2))


def _suppressed(
    proposals: Sequence[PoseProposals], sizes: Sequence[tuple[int, int]], params: config.Ppi
) -> tuple[list[list[Person]], list[int]]:
    """What is left after NMS of whole poses."""
    score, pose2d, pose3d = (_pad([getattr(p, n) for p in proposals]).float() for n in ("score", "pose2d", "pose3d"))
    finite = pose2d.isfinite().all(-1).all(-1) & pose3d.isfinite().all(-1).all(-1) & score.isfinite()
    dropped = (~finite & ~(score.isfinite() & (score <= 0))).sum(1)
    low, high = pose2d.nan_to_num().amin(2), pose2d.nan_to_num().amax(2)
    grow = NMS_MARGIN * (high - low)
    sure = finite & (score >= params.th_persondetect) & (score > 0)
    rank = torch.where(sure, score, -torch.inf)
    keep, count = ops.batched_nms(torch.cat([low - grow, high + grow], -1), rank, params.th_iou)
    counts = count.tolist()
    rows = keep[:, : max(counts)].clamp(min=0)
    anchor = _pad([p.anchor for p in proposals]).gather(1, rows)
    chosen = [v[torch.arange(len(rows), device=rows.device)[:, None], rows] for v in (score, pose2d, pose3d)]
    scores, poses2d, poses3d, anchors = (v.cpu().numpy() for v in (*chosen, anchor))
    shape = poses2d.shape[:3]
    alike = np.broadcast_to(scores[..., None], shape)
    alone = np.ones(shape[:2], np.int64), np.zeros(shape, np.float32)
    people = _people(counts, sizes, poses2d, poses3d, scores, alike, anchors, *alone)
    return people, dropped.tolist()


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
    box, wrong = None, params.wrong
    if "roi_boxes" in wrong:
        box = _pad([p.box for p in proposals]).double()
        box = torch.cat([box[..., :2], box[..., 2:] + 1], -1)
    given = _overlap(pose2d, torch.tensor(sizes, device=score.device), params, skeleton, box)
    if upper_only is not None and "legs_full" not in wrong:
        late = "legs_off_by_one" in wrong
        weight, lower = _legs(np.asarray(upper_only, bool).tobytes(), late, skeleton, str(score.device))
        anchor = _pad([p.anchor for p in proposals])
        given["legs"] = weight.index_select(0, anchor.flatten()).view(anchor.shape)
        given["lower"] = lower
    return given | {
        "score": score,
        "pose2d": pose2d,
        "pose3d": pose3d,
        "th_iou": params.th_iou,
        "th_pose3d": params.th_pose3D,
        "min_mode_score": params.min_mode_score,
        "th_persondetect": params.th_persondetect,
    }


@functools.cache
def _legs(upper_only: bytes, late: bool, skeleton: Skeleton, device: str) -> tuple[Tensor, Tensor]:
    """Of each anchor pose the weight of its legs, (K,); which joints those are, (J,) bool. late: `legs_off_by_one`."""
    whole = ~np.frombuffer(upper_only, bool)
    if late:
        whole |= np.arange(len(whole)) == whole.sum()
    lower = np.zeros(len(skeleton), bool)
    lower[skeleton.lower] = True
    weight = np.where(whole, 1, LEGS_UNSEEN).astype(np.float32)
    return torch.from_numpy(weight).to(device), torch.from_numpy(lower).to(device)


def _pad(values: Sequence[Array]) -> Tensor:
    """(n, ...) of each image -> (B, N, ...), the shorter ones filled up with 0."""
    every = [torch.as_tensor(v) for v in values]
    return every[0][None] if len(every) == 1 else pad_sequence(every, batch_first=True)


def _overlap(
    pose2d: Tensor, size: Tensor, params: config.Ppi, skeleton: Skeleton, box: Tensor | None
) -> dict[str, Tensor]:
    """What `ops.group_poses` needs for the test that `params.iou_func` names; pose2d (B, N, J, 2), size (B, 2).

    box   (B, N, 4) float64: those to take for all boxes
    """
    part = params.iou_func.removeprefix("bbox_").removesuffix("LR")
    if params.iou_func.startswith("bbox"):
        return {"joints": _mask(part, skeleton, str(pose2d.device)), "size": size} if box is None else {"boxes": box}
    joints = torch.from_numpy(_joints(part, skeleton)).to(pose2d.device)
    box = _boxes(pose2d, size) if box is None else box
    points = pose2d.index_select(2, joints)
    given = {"points": points, "limit": params.th_iou * 2 * (box[..., 2:] - box[..., :2]).amax(-1)}
    if params.iou_func.endswith("LR"):
        given["swapped"] = pose2d.index_select(2, torch.from_numpy(skeleton.mirror).to(joints.device)[joints])
        if "lr_mixed" in params.wrong:
            swapped = given["swapped"]
            given["swapped"] = torch.stack([swapped[..., 0], points[..., 1]], -1)
            given["centres"] = torch.stack([points[..., 0], swapped[..., 1]], -1)
    return given


@functools.cache
def _mask(part: str, skeleton: Skeleton, device: str) -> Tensor:
    """(J,) bool: which joints are of the part."""
    return torch.from_numpy(np.isin(np.arange(len(skeleton)), _joints(part, skeleton))).to(device)


@functools.cache
def _joints(part: str, skeleton: Skeleton) -> np.ndarray:
    """The joints of a part of the body: bbox and mje mean all."""
    if part in ("bbox", "mje"):
        return np.arange(len(skeleton))
    shoulders = skeleton.indices("r_shoulder", "l_shoulder")
    head = np.array([j for j, name in enumerate(skeleton.joints) if HEAD & set(name.split("_"))], np.int64)
    parts = {
        "torso": skeleton.torso,
        "torsohead": np.concatenate([skeleton.torso, head]),
        "head": head,
        "shoulderhead": np.concatenate([shoulders, head]),
    }
    if not len(parts[part]):
        raise config.UserError(f"ppi.iou_func: {skeleton.name} has no joints of the head; take torso, bbox or mje")
    return parts[part]


def _misread(given: dict[str, Any], found: ops.PeopleFound, anchor: Tensor) -> Tensor:
    """(B, P): the anchor poses (B, N) at the places that the improved code takes for those of the people's modes: where
    the centre of a mode is among the proposals of its group that were in no mode yet."""
    score = given["score"]
    # Groups are what one mode each would be, were all 3D poses alike.
    alike = {"th_pose3d": float("inf"), "th_persondetect": -1.0, "max_people": score.shape[1]}
    group = ops.group_poses(**given | alike).person.cpu().numpy()
    scores, pose3d, best = (v.cpu().numpy() for v in (score, given["pose3d"].double(), found.best))
    out = found.best.clamp(min=0).clone()
    for b, p in np.argwhere(best >= 0):
        left = np.flatnonzero(group[b] == group[b, best[b, p]])
        # The centre is the mode's best proposal that no mode before has: walk through them as the code does.
        centre, heaviest = 0, -1.0
        members = left
        while len(left):
            at = int(scores[b, left].argmax())
            if heaviest >= 0 and scores[b, left[at]] < given["min_mode_score"]:
                break
            apart = np.linalg.norm(pose3d[b, members] - pose3d[b, left[at]], axis=-1).mean(-1)
            mode = members[apart < given["th_pose3d"]]
            if scores[b, mode].astype(np.float64).sum() > heaviest:
                centre, heaviest = at, scores[b, mode].astype(np.float64).sum()
            left = np.setdiff1d(left, mode)
        out[b, p] = anchor[b, centre]
    return out


def _boxes(pose2d: Tensor, size: Tensor) -> Tensor:
    """(B, N, 4) float64 boxes round poses (B, N, J, 2), as the module's docstring describes them; size (B, 2)."""
    points = pose2d.permute(2, 0, 1, 3).contiguous()  # joints first: four times as fast as reducing short rows
    most = (size.flip(1) - 1)[:, None].to(points.dtype)
    low, high = (torch.minimum(edge.clamp_(min=0), most).double() for edge in (points.amin(0), points.amax(0)))
    return torch.cat([low, high + 1], -1)
