"""Loads the built operators into PyTorch as `torch.ops.lcrnet.*`, with what C++ does not say: the shapes of results
(for torch.compile and torch.export) and gradients. Boxes, scores and regions never have gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@functools.cache
def load(library: Path) -> None:
    """Loads the CPU library, or, after it, the CUDA library."""
    torch.ops.load_library(library)
    if library.name == "lcrnet_cpu.so":
        describe()


def channels_last(map: Tensor) -> bool:
    """How a map (B, C, H, W) lies in memory, and with it the result of an operator: (B, H, W, C), else (B, C, H, W)."""
    return map.is_contiguous(memory_format=torch.channels_last) and not map.is_contiguous()


def describe(namespace: str = "lcrnet") -> None:
    """Fake kernels and gradients of the operators of a library."""
    ops = getattr(torch.ops, namespace)

    def fake(name: str, shape: Callable[..., object]) -> None:
        torch.library.register_fake(f"{namespace}::{name}", shape)

    def gradient(name: str, save: Callable[..., None], back: Callable[..., object]) -> None:
        torch.library.register_autograd(f"{namespace}::{name}", functools.partial(back, ops), setup_context=save)

    fake("roi_align", _roi_align)
    fake("roi_align_backward", _roi_align_backward)
    gradient("roi_align", _roi_align_save, _roi_align_gradient)
    for name, back in (("roi_pool", _roi_pool_gradient), ("roi_crop", _roi_crop_gradient)):
        fake(name, _one_map)
        fake(f"{name}_backward", _one_map_backward)
        gradient(name, _one_map_save, back)
    fake("nms", _nms)
    fake("group_poses", _group_poses)


def _empty(shape: Sequence[int | torch.SymInt], like: Tensor, last: bool, dtype: torch.dtype | None = None) -> Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=layout)


# roi_align


def _roi_align(
    maps: list[Tensor], rois: Tensor, level: Tensor | None, scales: list[float], height: int, width: int,
    sampling_ratio: int, aligned: bool, step: int,
) -> Tensor:  # fmt: skip
    shape = (rois.shape[0], maps[0].shape[1], -(-height // step), -(-width // step))
    return _empty(shape, maps[0], channels_last(maps[0]))


def _roi_align_backward(
    grad: Tensor, rois: Tensor, level: Tensor | None, scales: list[float], shape: list[int], height: int, width: int,
    sampling_ratio: int, aligned: bool, step: int, channels_last: bool,
) -> list[Tensor]:  # fmt: skip
    return [_empty((*shape[:2], *shape[i : i + 2]), grad, channels_last) for i in range(2, len(shape), 2)]


def _roi_align_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    maps, rois, level, ctx.scales, *ctx.rest = inputs
    ctx.save_for_backward(rois, level)
    ctx.shape = [*maps[0].shape[:2], *(n for m in maps for n in m.shape[2:])]
    ctx.last = channels_last(maps[0])


def _roi_align_gradient(ops: Any, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rois, level = ctx.saved_tensors
    maps = ops.roi_align_backward(grad, rois, level, ctx.scales, ctx.shape, *ctx.rest, ctx.last)
    return maps, *[None] * 8


# roi_pool, roi_crop


def _one_map(map: Tensor, rois: Tensor, scale: float, height: int, width: int, max_pool: bool = False) -> Tensor:
    return _empty((rois.shape[0], map.shape[1], height, width), map, channels_last(map))


def _one_map_backward(grad: Tensor, map: Tensor, rois: Tensor, scale: float, max_pool: bool = False) -> Tensor:
    return _empty(map.shape, map, channels_last(map))


def _one_map_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    map, rois, ctx.scale, _, _, *ctx.rest = inputs
    ctx.save_for_backward(map, rois)


def _roi_pool_gradient(ops: Any, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return ops.roi_pool_backward(grad, *ctx.saved_tensors, ctx.scale), *[None] * 4


def _roi_crop_gradient(ops: Any, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return ops.roi_crop_backward(grad, *ctx.saved_tensors, ctx.scale, *ctx.rest), *[None] * 5


# nms


def _nms(
    boxes: Tensor, scores: Tensor, group: Tensor | None, iou_threshold: float, max_keep: int
) -> tuple[Tensor, Tensor]:
    keep = scores.new_empty((scores.shape[0], max_keep), dtype=torch.int64)
    return keep, scores.new_empty(scores.shape[0], dtype=torch.int64)


# group_poses


def _group_poses(
    score: Tensor, pose2d: Tensor, pose3d: Tensor, legs: Tensor, lower: Tensor, boxes: Tensor | None,
    joints: Tensor | None, size: Tensor | None, points: Tensor | None, swapped: Tensor | None,
    centres: Tensor | None, limit: Tensor | None, th_iou: float, th_pose3d: float, min_mode_score: float,
    th_persondetect: float, max_people: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    images, J = score.shape[0], lower.shape[0]
    poses = [score.new_empty(images, max_people, *each) for each in [(), (J, 2), (J, 3), (J,)]]
    whole = [(images, max_people), (images, max_people), score.shape, (images,), (images,)]
    return *poses, *(score.new_empty(shape, dtype=torch.int64) for shape in whole)
