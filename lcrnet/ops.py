"""The operators of the network: `nms`, `roi_align`, `roi_pool`, with torchvision's arguments and conventions.

Each has a readable twin here, in plain PyTorch. Until ext/ is built, torchvision's compiled operators run
where they are the faster ones.
"""

from __future__ import annotations

import torch
import torchvision.ops as tv
from torch import Tensor

# Up to this many cells a map, RoIAlign as two matrix products is faster on a CPU than torchvision's scalar loop, above
# all its backward (tests/bench/ops.py).
MATMUL_CELLS = 64 * 64


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, max_keep: int | None = None) -> Tensor:
    """Greedy non-maximum suppression. boxes (N, 4), scores (N,) -> (M,) int64 indices kept, by falling score.

    max_keep   at most so many
    """
    keep: Tensor = tv.nms(boxes.float(), scores.float(), iou_threshold)
    return keep if max_keep is None else keep[:max_keep]


def nms_twin(boxes: Tensor, scores: Tensor, iou_threshold: float, max_keep: int | None = None) -> Tensor:
    """`nms` in plain PyTorch; ties keep the order of the input."""
    order = scores.argsort(descending=True, stable=True)
    overlap = tv.box_iou(boxes[order], boxes[order]) > iou_threshold
    alive = torch.ones(len(order), dtype=torch.bool, device=boxes.device)
    kept: list[int] = []
    for i in range(len(order)):
        if len(kept) == max_keep:
            break
        if alive[i]:
            kept.append(i)
            alive &= ~overlap[i]
    return order[torch.tensor(kept, dtype=torch.int64, device=boxes.device)]


def roi_align(
    input: Tensor,
    boxes: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """RoIAlign (He et al., Mask R-CNN, ICCV 2017). input (B, C, H, W); boxes (R, 5), rows of (image, x1, y1, x2, y2),
    or a list of (r, 4) an image -> (R, C, h, w). aligned: half a cell is taken off, so that cells are centred.
    """
    if isinstance(boxes, (list, tuple)):
        boxes = rois(boxes)
    small = input.shape[-2] * input.shape[-1] <= MATMUL_CELLS
    # Without regions torchvision's result still hangs on the input, so that every worker of DDP has every gradient.
    if input.device.type == "cpu" and sampling_ratio > 0 and small and len(boxes):
        return roi_align_twin(input, boxes, output_size, spatial_scale, sampling_ratio, aligned)
    half = input.device.type == "cpu" and input.dtype in (torch.bfloat16, torch.float16)  # torchvision has none
    out: Tensor = tv.roi_align(
        input.float() if half else input,
        boxes.to(torch.float32 if half else input.dtype),
        output_size,
        spatial_scale,
        sampling_ratio,
        aligned,
    )
    return out.to(input.dtype)


def roi_align_twin(
    input: Tensor,
    boxes: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """`roi_align` as two matrix products: bilinear sampling and the mean over a bin are separable in x and y."""
    height, width = (output_size, output_size) if isinstance(output_size, int) else output_size
    image = boxes[:, 0].long()
    low, high = (boxes[:, 1:].float() * spatial_scale - (0.5 if aligned else 0)).split(2, dim=1)
    extent = high - low
    if not aligned:  # Detectron's convention: no region is smaller than a cell
        extent = extent.clamp(min=1)
    across = _samples(low[:, 0], extent[:, 0], width, sampling_ratio, input.shape[3]).to(input.dtype)
    down = _samples(low[:, 1], extent[:, 1], height, sampling_ratio, input.shape[2]).to(input.dtype)
    # Image by image: (r * h, H) x (H, W * C), then (w, W) x (W, C) a region. The map stays channels-last throughout.
    out = input.new_zeros(len(boxes), height, width, input.shape[1])
    parts, places = [], []
    for b in range(len(input)):
        mine = (image == b).nonzero()[:, 0]
        if len(mine) == 0:
            continue
        cells = input[b].permute(1, 2, 0).flatten(1)
        rows = (down[mine].flatten(0, 1) @ cells).view(len(mine), height, input.shape[3], input.shape[1])
        parts.append(across[mine][:, None] @ rows)
        places.append(mine)
    if parts:
        out = out.index_copy(0, torch.cat(places), torch.cat(parts))
    return out.permute(0, 3, 1, 2)


def _samples(low: Tensor, extent: Tensor, bins: int, ratio: int, cells: int) -> Tensor:
    """(R, bins, cells) weights of the cells in each bin's mean of bilinear samples, along one axis."""
    count = torch.full_like(low, ratio) if ratio > 0 else (extent / bins).ceil().clamp(min=0)  # flat: no sample, 0
    most = int(count.max()) if len(count) else 1
    steps = torch.arange(most, device=low.device)
    bin_size = extent / bins
    at = (
        torch.arange(bins, device=low.device)[None, :, None]
        + ((steps + 0.5)[None] / count[:, None].clamp(min=1))[:, None]
    )
    at = low[:, None, None] + at * bin_size[:, None, None]  # (R, bins, most)
    use = (steps[None] < count[:, None])[:, None] & (at >= -1) & (at <= cells)
    at = at.clamp(0, cells - 1)
    hats = (1 - (at[..., None] - torch.arange(cells, device=low.device)).abs()).clamp(min=0)
    return (hats * use[..., None]).sum(2) / count[:, None, None].clamp(min=1)


def roi_pool(input: Tensor, boxes: Tensor, output_size: int | tuple[int, int], spatial_scale: float = 1.0) -> Tensor:
    """RoIPool: the maximum of each bin (Girshick, Fast R-CNN, ICCV 2015). Arguments as `roi_align`."""
    if isinstance(boxes, (list, tuple)):
        boxes = rois(boxes)
    half = input.device.type == "cpu" and input.dtype in (torch.bfloat16, torch.float16)
    out: Tensor = tv.roi_pool(
        input.float() if half else input,
        boxes.to(torch.float32 if half else input.dtype),
        output_size,
        spatial_scale,
    )
    return out.to(input.dtype)


def roi_pool_twin(
    input: Tensor, boxes: Tensor, output_size: int | tuple[int, int], spatial_scale: float = 1.0
) -> Tensor:
    """`roi_pool` in plain PyTorch."""
    height, width = (output_size, output_size) if isinstance(output_size, int) else output_size
    out = input.new_zeros(len(boxes), input.shape[1], height, width)
    corners = torch.floor(boxes[:, 1:] * spatial_scale + 0.5).long()  # rounds .5 up, as C's round does for x >= 0
    for r, (x1, y1, x2, y2) in enumerate(corners.tolist()):
        w, h = max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)
        for i in range(height):
            top = min(max(y1 + (i * h) // height, 0), input.shape[2])
            bottom = min(max(y1 + -((-(i + 1) * h) // height), 0), input.shape[2])
            for j in range(width):
                left = min(max(x1 + (j * w) // width, 0), input.shape[3])
                right = min(max(x1 + -((-(j + 1) * w) // width), 0), input.shape[3])
                if top < bottom and left < right:
                    out[r, :, i, j] = input[int(boxes[r, 0]), :, top:bottom, left:right].amax((-2, -1))
    return out


def rois(boxes: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Boxes (r, 4) of each image -> (R, 5) rows of (image, x1, y1, x2, y2)."""
    image = torch.cat([b.new_full((len(b), 1), i) for i, b in enumerate(boxes)])
    return torch.cat([image, torch.cat(list(boxes))], dim=1)
