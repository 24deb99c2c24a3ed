"""The operators of the network. In C++ and CUDA where ext/ is built, which the first call sees to; else their readable
twins in `twins`, with one warning that says why.

The environment variable LCRNET_OPS forces one: `ext` (an error where it cannot be built) or `torch` (the twins).

Common to all: B images, C channels, boxes (x1, y1, x2, y2) in pixels, regions (R, 5) of (image, box); maps are float32,
float16, bfloat16 or float64, in (B, C, H, W) or channels-last memory; results are of the same type and memory. Boxes
count as float32 whatever the map's type (as float64 for float64 maps): half precision cannot tell pixels apart. A
region that is not finite, or of an image that does not exist, gives zeros. Under autocast the
operators take what they get.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ext import build, register
from lcrnet import twins

Size = int | tuple[int, int]


def use_ext(kind: str) -> bool:
    """Whether the operators of ext/ run on devices of `kind`, "cpu" or "cuda"; the first call loads them and, if need
    be, builds them. Raises ValueError for an unknown LCRNET_OPS, ext.build.BuildError where LCRNET_OPS=ext fails.
    """
    return _use_ext(kind, os.environ.get("LCRNET_OPS", ""))


@functools.cache
def _use_ext(kind: str, forced: str) -> bool:
    if forced not in ("", "ext", "torch"):
        raise ValueError(f"LCRNET_OPS is ext or torch, not {forced!r}")
    if forced == "torch" or kind not in ("cpu", "cuda"):
        return False
    try:
        register.load(build.library("cpu"))  # it holds the schemas
        if kind == "cuda":
            register.load(build.library("cuda"))
    except build.BuildError as error:
        if forced:
            raise
        warnings.warn(f"slower PyTorch operators run on the {kind}: {error}", RuntimeWarning, stacklevel=2)
        return False
    return True


# Seen by torch.compile as a constant: nothing is built while a graph is traced.
_built = torch.compiler.assume_constant_result(use_ext)


def _operator(name: str, where: Tensor) -> Any:
    """The operator of ext/, or its twin, for tensors of that device."""
    return getattr(torch.ops.lcrnet if _built(where.device.type) else twins, name)


def roi_align(
    maps: Tensor | Sequence[Tensor],
    boxes: Tensor | Sequence[Tensor],
    output_size: Size,
    spatial_scale: float | Sequence[float] = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    level: Tensor | None = None,
    step: int = 1,
) -> Tensor:
    """RoIAlign (He et al., Mask R-CNN, ICCV 2017) -> (R, C, h, w): each bin the mean of bilinear samples.

    maps            (B, C, H, W), or one such map a pyramid level
    boxes           regions (R, 5), or (r, 4) for each image
    spatial_scale   cells a pixel, of each map
    sampling_ratio  samples a bin along each axis; below 1: as many as a bin has cells, rounded up
    aligned         half a cell is taken off coordinates, which then name places, not cells; without it no region is
                    smaller than a cell (Detectron's first convention)
    level           (R,) int, the map of each region; needed with several maps
    step            only bins 0, step, 2 step, ... of each axis are made: what a convolution of that stride reads

    As torchvision's, except that regions far larger than the map cost no more than others. Gradients reach the maps, in
    the same order of additions on every run and any number of threads.
    """
    every = [maps] if isinstance(maps, Tensor) else list(maps)
    scales = [float(spatial_scale)] if isinstance(spatial_scale, (int, float)) else [float(s) for s in spatial_scale]
    if len(every) > 1 and level is None:
        raise ValueError("several maps need the level of each region")
    height, width = _pair(output_size)
    out: Tensor = _operator("roi_align", every[0])(
        every, _rois(boxes, every[0]), level, scales, height, width, sampling_ratio, aligned, step
    )
    return out


def roi_pool(map: Tensor, boxes: Tensor | Sequence[Tensor], output_size: Size, spatial_scale: float = 1.0) -> Tensor:
    """RoIPool (Girshick, Fast R-CNN, ICCV 2015) -> (R, C, h, w): the maximum of each bin.

    map            (B, C, H, W), of less than 2^31 cells
    boxes          regions (R, 5), or (r, 4) for each image
    spatial_scale  cells a pixel

    As torchvision's, rounding included: corners to whole cells, halves away from zero, the last cell belonging to the
    box, which is at least one cell large; bins of whole cells, up to one of which they share. One without a cell is 0.
    The gradient goes to the first of equal cells. NaN is never greater: it counts where all of a bin is NaN only, which
    gives the least float32 number and no gradient, as -inf does. No box is too large, or costs more than the whole map.
    The backward pass reads the map again, and adds in the same order on every run and any number of threads.
    """
    height, width = _pair(output_size)
    out: Tensor = _operator("roi_pool", map)(map, _rois(boxes, map), float(spatial_scale), height, width)
    return out


def roi_crop(
    map: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: Size,
    spatial_scale: float = 1.0,
    max_pool: bool = False,
) -> Tensor:
    """RoICrop -> (R, C, h, w): bilinear samples at h x w points of a box, its corners included; one point: the middle.

    Arguments as `roi_pool`. Whole coordinates, x times spatial_scale, are the centres of cells; cells outside the map
    count as zero (grid_sample with align_corners and padding by zeros, on the affine grid of the box).
    max_pool: of 2h x 2w points, each 2 x 2 give their maximum; of equals the first gets the gradient, and NaN is the
    greatest, as in max_pool2d. The large crop is never stored. Gradients as those of `roi_pool`.
    """
    height, width = _pair(output_size)
    scale = float(spatial_scale)
    out: Tensor = _operator("roi_crop", map)(map, _rois(boxes, map), scale, height, width, bool(max_pool))
    return out


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, max_keep: int | None = None) -> Tensor:
    """Greedy non-maximum suppression of one image: boxes (N, 4), scores (N,) -> (M,) int64, the boxes kept, by falling
    score. As torchvision's, and `batched_nms`, which on CUDA does not wait for the device.
    """
    keep, count = batched_nms(boxes[None], scores[None], iou_threshold, max_keep)
    return keep[0, : count.item()]


def batched_nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float, max_keep: int | None = None, group: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Greedy non-maximum suppression of B images with N boxes each -> keep (B, M) int64: the boxes kept, by falling
    score, then -1; count (B,) int64 of those kept.

    boxes          (B, N, 4)
    scores         (B, N); -inf: there is no such box, which pads images with fewer; NaN comes first, as in torch.sort
    iou_threshold  at least 0; of two boxes with an IoU above it the one of the lower score goes; of equals the later
    max_keep       M, at most N, which it is if not given; an image is done when so many are kept
    group          (B, N) int64, a pyramid level or a class: boxes of different groups leave each other alone

    IoUs are float32 (float64 where boxes or scores are), operation by operation as torchvision's on a CPU, and so is
    the outcome. A box that is not finite, or of no or negative size, neither drops another nor is dropped. No
    gradients. On CUDA nothing waits for the device.
    """
    if not iou_threshold >= 0:
        raise ValueError(f"iou_threshold is at least 0, not {iou_threshold}")
    most = boxes.shape[1] if max_keep is None else min(max_keep, boxes.shape[1])
    out: tuple[Tensor, Tensor] = _operator("nms", boxes)(boxes.detach(), scores.detach(), group, iou_threshold, most)
    return out


class PeopleFound(NamedTuple):
    """What `group_poses` returns: P people an image, those of the largest mass, by falling mass; then zeros.

    mass (B, P)           sum of the scores of the merged proposals
    pose2d (B, P, J, 2)   their weighted mean
    pose3d (B, P, J, 3)
    spread (B, P, J)      their weighted mean distance from it, in 3D
    support (B, P)        int64: how many they are
    best (B, P)           int64: the best of them, its place among the N; -1 where there is no person
    person (B, N)         int64: into which of the P a proposal was merged; -1: into none
    total (B,)            int64: people found, who may be more than P
    dropped (B,)          int64: proposals left out for a number that is not finite
    """

    mass: Tensor
    pose2d: Tensor
    pose3d: Tensor
    spread: Tensor
    support: Tensor
    best: Tensor
    person: Tensor
    total: Tensor
    dropped: Tensor


def group_poses(
    score: Tensor,
    pose2d: Tensor,
    pose3d: Tensor,
    *,
    th_pose3d: float,
    min_mode_score: float,
    th_persondetect: float,
    max_people: int,
    th_iou: float = 0.0,
    boxes: Tensor | None = None,
    joints: Tensor | None = None,
    size: Tensor | None = None,
    points: Tensor | None = None,
    swapped: Tensor | None = None,
    centres: Tensor | None = None,
    limit: Tensor | None = None,
    legs: Tensor | None = None,
    lower: Tensor | None = None,
) -> PeopleFound:
    """Pose proposals integration of B images with N proposals each: the groups, modes and means of `lcrnet.ppi`, whose
    docstring defines them.

    score           (B, N); a proposal with a score of 0 or less is none, which pads images with fewer
    pose2d          (B, N, J, 2) pixels
    pose3d          (B, N, J, 3) metres
    boxes           (B, N, 4): two proposals overlap where the IoU of their boxes is above `th_iou`; or ...
    joints, size    (J,) bool, (B, 2) height and width: ... of boxes round these joints of the poses, x cut to 0 ..
                    width - 1 and y to 0 .. height - 1, and a pixel more to the right and bottom; or ...
    points, limit   (B, N, Q, 2), (B, N): ... where the mean distance of p's points from those of the centre c is below
                    the limit of c
    swapped         (B, N, Q, 2): the points with left and right exchanged; the smaller distance of the two counts
    centres         (B, N, Q, 2): the points of the centre that `swapped` is compared with, where not `points`
    legs            (B, N): the weight of the joints of `lower`, above 0; without it 1
    lower           (J,) bool
    th_pose3d       metres: mean distance of the joints below which a proposal belongs to the mode of a centre
    min_mode_score  score of the centre of a further mode
    th_persondetect a person's mass is above it
    max_people      P

    "Best" is the highest score; of equals the first. A proposal with a number that is not finite counts as none.
    Numbers are taken as float32, boxes and limits as float64; comparisons with thresholds come out as in float64. No
    gradients. On CUDA nothing waits for the device.
    """

    def ready(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if t is None else t.detach().to(dtype)

    single, double = torch.float32, torch.float64
    legs = torch.ones_like(score) if legs is None else legs
    lower = torch.zeros(pose3d.shape[2], dtype=torch.bool, device=score.device) if lower is None else lower
    out = _operator("group_poses", score)(
        *(ready(t, single) for t in (score, pose2d, pose3d, legs)), lower, ready(boxes, double), joints, size,
        ready(points, single), ready(swapped, single), ready(centres, single), ready(limit, double), th_iou, th_pose3d,
        min_mode_score, th_persondetect, max_people,
    )  # fmt: skip
    return PeopleFound(*out)


def rois(boxes: Sequence[Tensor]) -> Tensor:
    """Boxes (r, 4) of each image -> regions (R, 5)."""
    image = torch.cat([b.new_full((len(b), 1), i) for i, b in enumerate(boxes)])
    return torch.cat([image, torch.cat(list(boxes))], dim=1)


def _rois(boxes: Tensor | Sequence[Tensor], map: Tensor) -> Tensor:
    """Regions as the operators take them."""
    regions = boxes if isinstance(boxes, Tensor) else rois(boxes)
    return regions.detach().to(torch.float64 if map.dtype == torch.float64 else torch.float32)


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
