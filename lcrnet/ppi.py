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
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from lcrnet import config, pose
from lcrnet.pose import Person, PoseProposals
from lcrnet.skeleton import LCR13, Skeleton

LEGS_UNSEEN = 0.1
"""Weight of the joints below the hips in proposals of upper-body anchor poses."""


PIVOTS = 8
"""Centres of a group whose distances from all of it are computed; see `_best_mode`."""

ROUNDING = 1e-4
"""Metres; more than the error of a float32 distance."""


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
    proposals = proposals.numpy()
    lower = np.isin(np.arange(len(skeleton)), skeleton.lower)
    people = []
    for rows in modes(proposals, size, params, skeleton):
        weight = proposals.score[rows].astype(np.float64)
        mass = weight.sum()
        score = mass / (1 + mass)
        trust = np.repeat(weight[:, None], len(skeleton), 1)
        if upper_only is not None:
            trust[np.ix_(np.asarray(upper_only)[proposals.anchor[rows]], lower)] *= LEGS_UNSEEN
        trust /= trust.sum(0)
        pose2d = np.einsum("nj,njd->jd", trust, proposals.pose2d[rows])
        pose3d = np.einsum("nj,njd->jd", trust, proposals.pose3d[rows])
        spread = (trust * np.linalg.norm(proposals.pose3d[rows] - pose3d, axis=-1)).sum(0)
        people.append(
            Person(
                box=pose.clip(pose.box_of(pose2d), *size).astype(np.float32),
                pose2d=pose2d.astype(np.float32),
                pose3d=pose3d.astype(np.float32),
                score=float(score),
                joint_score=(score * np.exp(-spread / params.th_pose3D)).astype(np.float32),
                anchor=int(proposals.anchor[rows[0]]),
                support=len(rows),
                spread=spread.astype(np.float32),
            )
        )
    return people


def modes(
    proposals: PoseProposals, size: tuple[int, int], params: config.Ppi, skeleton: Skeleton = LCR13
) -> list[np.ndarray]:  # fmt: skip
    """The proposals of each person, as `integrate` merges them: int64 rows, best first; the largest mass first."""
    proposals = proposals.numpy()
    rows = np.flatnonzero(usable(proposals))
    rows = rows[np.argsort(-proposals.score[rows], kind="stable")]
    score = proposals.score[rows].astype(np.float64)
    pose3d = np.ascontiguousarray(proposals.pose3d[rows].astype(np.float32, copy=False).swapaxes(1, 2))
    near = _overlap(proposals.pose2d[rows].astype(np.float64), size, params, skeleton)
    found = [_best_mode(group, score[group], pose3d[group], params) for group in _groups(len(rows), near)]
    masses = np.array([mass for _, mass in found])
    order = [i for i in np.argsort(-masses, kind="stable") if masses[i] >= params.th_persondetect]
    return [rows[found[i][0]] for i in order]


def usable(proposals: PoseProposals) -> np.ndarray:
    """(N,) bool: finite poses and a finite score above 0. `(~usable(p)).sum()` counts what `integrate` leaves out."""
    finite = np.isfinite(proposals.score) & (proposals.score > 0)
    return finite & np.isfinite(proposals.pose2d).all((1, 2)) & np.isfinite(proposals.pose3d).all((1, 2))


Near = Callable[[np.ndarray], np.ndarray]
"""Rows (n,) -> (n,) bool: which of them overlap the first in 2D."""


def _groups(count: int, near: Near) -> Iterator[np.ndarray]:
    """Rows of each group, of `count` rows in the order of their scores."""
    left = np.arange(count)
    while len(left):
        member = near(left)
        member[0] = True
        yield left[member]
        left = left[~member]


def _best_mode(
    group: np.ndarray, score: np.ndarray, pose3d: np.ndarray, params: config.Ppi
) -> tuple[np.ndarray, float]:
    """(rows, mass) of the mode of the largest mass; group (n,), score (n,) falling, pose3d (n, 3, J)."""
    free = np.ones(len(group), bool)
    best, most = group[:1], 0.0
    # The distances from the first centres spare most of those from later ones: by the triangle inequality a proposal
    # near centre c is about as far from any other pose as c is.
    pivots = np.empty((PIVOTS, len(group)), np.float32)
    made = centre = 0
    while free[centre] and (centre == 0 or score[centre] >= params.min_mode_score):
        if made < PIVOTS:
            pivots[made] = _distance(pose3d, pose3d[centre])
            member = np.flatnonzero(pivots[made] < params.th_pose3D)
        else:
            maybe = np.flatnonzero(np.abs(pivots - pivots[:, centre, None]).max(0) < params.th_pose3D + ROUNDING)
            member = maybe[_distance(pose3d[maybe], pose3d[centre]) < params.th_pose3D]
        made += 1
        mass = float(score[member].sum())
        if mass > most:
            best, most = group[member], mass
        free[member] = free[centre] = False
        centre = int(free.argmax())
    return best, most


def _distance(pose3d: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """(n,) mean distance of the joints between poses (n, 3, J) and one (3, J)."""
    apart = pose3d - centre
    np.multiply(apart, apart, out=apart)
    square = apart[:, 0] + apart[:, 1]
    square += apart[:, 2]
    return np.sqrt(square, out=square).sum(1) / square.shape[1]


def _overlap(pose2d: np.ndarray, size: tuple[int, int], params: config.Ppi, skeleton: Skeleton) -> Near:
    """The test that `params.iou_func` names, on 2D poses (n, J, 2)."""
    part = params.iou_func.removeprefix("bbox_").removesuffix("LR")
    joints = _joints(part, skeleton)
    if params.iou_func.startswith("bbox"):
        x1, y1, x2, y2 = _boxes(pose2d[:, joints], size).T
        area = (x2 - x1) * (y2 - y1)

        def boxes_overlap(rows: np.ndarray) -> np.ndarray:
            c = rows[0]
            width = np.minimum(x2[rows], x2[c]) - np.maximum(x1[rows], x1[c])
            height = np.minimum(y2[rows], y2[c]) - np.maximum(y1[rows], y1[c])
            both = np.maximum(width, 0) * np.maximum(height, 0)
            return both > params.th_iou * (area[rows] + area[c] - both)

        return boxes_overlap

    box = _boxes(pose2d, size)
    limit = params.th_iou * 2 * (box[:, 2:] - box[:, :2]).max(1)
    points = pose2d[:, joints]
    swapped = pose2d[:, skeleton.mirror[joints]] if params.iou_func.endswith("LR") else None

    def joints_near(rows: np.ndarray) -> np.ndarray:
        c = rows[0]
        apart = np.linalg.norm(points[rows] - points[c], axis=-1).mean(-1)
        if swapped is not None:
            apart = np.minimum(apart, np.linalg.norm(swapped[rows] - points[c], axis=-1).mean(-1))
        return apart < limit[c]

    return joints_near


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


def _boxes(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(n, 4) boxes round points (n, J, 2), as the module's docstring describes them."""
    height, width = size
    inside = np.clip(points, 0, np.array([width - 1, height - 1]))
    return np.concatenate([inside.min(1), inside.max(1) + 1], 1)
