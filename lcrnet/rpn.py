"""Region proposal network (Ren et al., Faster R-CNN, NIPS 2015): anchor boxes, proposals, loss.

B images, A anchor boxes an image. Boxes are (x1, y1, x2, y2) in pixels of the resized image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou

from lcrnet import ops
from lcrnet.config import Rpn
from lcrnet.pose import People

MAX_LOG_SCALE = math.log(1000 / 16)  # a box grows at most so much: exp() of an untrained network stays finite


class RPN(nn.Module):
    """One convolution, then objectness and box offsets of every anchor box of every cell."""

    def __init__(self, channels: int, strides: Sequence[int], config: Rpn):
        super().__init__()
        self.config, self.strides = config, tuple(strides)
        # Several maps share the convolutions, each with the anchor boxes of one size.
        self.sizes = [(s,) for s in config.sizes] if len(strides) > 1 else [config.sizes]
        shapes = len(self.sizes[0]) * len(config.ratios)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, shapes, 1)
        self.offsets = nn.Conv2d(channels, 4 * shapes, 1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.01 if parameter.ndim > 1 else 0)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Maps (B, C, h, w), one a level -> logits (B, A), offsets (B, A, 4), anchor boxes (A, 4), how many of the A
        are of each level: h * w * shapes, in that order.
        """
        logits, offsets, boxes = [], [], []
        for map, stride, sizes in zip(maps, self.strides, self.sizes, strict=True):
            x = F.relu(self.conv(map))
            logits.append(self.objectness(x).permute(0, 2, 3, 1).flatten(1).float())
            offsets.append(self.offsets(x).permute(0, 2, 3, 1).reshape(len(x), -1, 4).float())
            boxes.append(anchor_boxes(map.shape[-2:], stride, sizes, self.config.ratios, self.config.convention))
        counts = [len(b) for b in boxes]
        return torch.cat(logits, 1), torch.cat(offsets, 1), torch.cat(boxes).to(maps[0].device), counts

    @torch.no_grad()
    def propose(
        self, logits: Tensor, offsets: Tensor, anchors: Tensor, counts: Sequence[int], sizes: Tensor, train: bool
    ) -> list[Tensor]:
        """The best proposals of each image after NMS: B tensors (r, 4), clipped to `sizes` (B, 2) = (height, width)."""
        boxes, count = self.best(logits, offsets, anchors, counts, sizes, train)
        return [box[:kept] for box, kept in zip(boxes, count.tolist(), strict=True)]

    def best(
        self, logits: Tensor, offsets: Tensor, anchors: Tensor, counts: Sequence[int], sizes: Tensor, train: bool,
        nms: Callable[..., tuple[Tensor, Tensor]] = ops.batched_nms,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`propose` in tensors of fixed shapes: boxes (B, M, 4), of which the first `count` (B,) are meant.

        `pre_nms` are taken of each level, whose boxes leave those of others alone, and `post_nms` of all together.
        In Detectron's convention a box (x1, y1, x2, y2) includes the pixels of its last row and column. Within this
        function it is the same box by its borders, (x1, y1, x2 + 1, y2 + 1), for which all is as in the others.
        """
        config = self.config
        pre = config.train_pre_nms if train else config.pre_nms
        post = config.train_post_nms if train else config.post_nms
        last = 1 if config.convention == "detectron" else 0
        index, first = [], 0
        for part in logits.split(list(counts), 1):
            index.append(first + part.topk(min(pre, part.shape[1]), dim=1).indices)
            first += part.shape[1]
        level = torch.cat([torch.full_like(i, n) for n, i in enumerate(index)], 1) if len(index) > 1 else None
        chosen = torch.cat(index, 1)
        score = logits.gather(1, chosen)
        boxes = decode(offsets.gather(1, chosen[..., None].expand(-1, -1, 4)), anchors[chosen])
        limit = sizes.to(boxes)[:, None, [1, 0, 1, 0]]
        lowest = boxes.new_tensor([0, 0, last, last])
        boxes = torch.minimum(torch.maximum(boxes, lowest), limit + lowest - last)
        big = ((boxes[..., 2:] - boxes[..., :2]) >= config.min_size).all(-1)
        overlap = config.nms_iou
        if last and overlap < 1:  # there a box goes from the threshold on, a float32: above the number before it
            overlap = float(np.nextafter(np.float32(overlap), np.float32(-1)).clip(0))
        keep, count = nms(boxes, score.masked_fill(~big, -torch.inf), overlap, post, level)
        return boxes.gather(1, keep.clamp(min=0)[..., None].expand(-1, -1, 4)) - lowest, count

    def loss(self, logits: Tensor, offsets: Tensor, anchors: Tensor, people: list[People]) -> dict[str, Tensor]:
        """Losses `rpn_class` and `rpn_box`. People with `crowd` are regions where nothing is learnt.

        The anchor boxes of a person count by its trust, in a pseudo-label the chance that somebody is there. The rest
        of the weight goes nowhere: as background it would cost recall, which is all that proposals are for.
        """
        config = self.config
        label, trust = torch.full_like(logits, -1), torch.ones_like(logits)
        goal = torch.zeros_like(offsets)
        for b, who in enumerate(people):
            label[b], goal[b], trust[b] = self._targets(anchors, who)
        # At most `samples` an image, at most `positive_share` of them positive, chosen by random keys.
        key = torch.rand_like(logits)
        positive = _first(key, label == 1, round(config.samples * config.positive_share))
        negative = _first(key, label == 0, config.samples - positive.sum(1))
        use = positive | negative
        count = per_worker(use.sum())
        classes = F.binary_cross_entropy_with_logits(logits[use], label[use], trust[use], reduction="sum") / count
        boxes = F.smooth_l1_loss(offsets[positive], goal[positive], beta=1 / 9, reduction="none")
        boxes = (boxes * trust[positive][:, None]).sum() / count
        return {"rpn_class": classes, "rpn_box": boxes}

    @torch.no_grad()
    def _targets(self, anchors: Tensor, people: People) -> tuple[Tensor, Tensor, Tensor]:
        """label (A,): 1 person, 0 background, -1 neither; offsets (A, 4) to the person of largest overlap; trust (A,):
        that person's where the label is 1, else 1.
        """
        label, trust = anchors.new_zeros(len(anchors)), anchors.new_ones(len(anchors))
        goal = torch.zeros_like(anchors)
        label[coverage(anchors, people.box[people.crowd]) > 0.5] = -1
        box = people.box[~people.crowd]
        if len(box) == 0:
            return label, goal, trust
        overlap = box_iou(anchors, box)
        best, who = overlap.max(1)
        label[best >= self.config.negative_iou] = -1
        best_of_person = overlap.max(0).values
        # Every person has an anchor box, however small the overlap (and all that tie for it).
        forced = ((overlap == best_of_person) & (best_of_person > 0)).any(1)
        label[(best >= self.config.positive_iou) | forced] = 1
        trust = torch.where(label == 1, people.trust[~people.crowd][who].to(trust), trust)
        return label, encode(box[who], anchors), trust


def anchor_boxes(
    shape: torch.Size, stride: int, sizes: tuple[float, ...], ratios: tuple[float, ...], convention: str = "exact"
) -> Tensor:
    """(h * w * shapes, 4): boxes of area size^2 and the ratios (height / width) round the centre of every cell.

    detectron    width and height of the box of a cell's size are rounded, and then scaled (generate_anchors.py there)
    torchvision  corners are rounded, round the corner of every cell (AnchorGenerator)
    """
    size = torch.tensor(sizes, dtype=torch.float32)[:, None]
    root = torch.tensor(ratios, dtype=torch.float32).sqrt()[None]
    if convention == "detectron":
        ratio = torch.tensor(ratios, dtype=torch.float64)  # half a pixel is exact, and is rounded to even, as there
        width = (stride**2 / ratio).sqrt().round()
        height = (width * ratio).round()
        half = torch.stack([width * size / stride, height * size / stride], -1).flatten(0, 1).float() / 2
    else:
        half = torch.stack([size / root, size * root], -1).flatten(0, 1) / 2
    if convention == "torchvision":
        half = half.round()
    offset = 0 if convention == "torchvision" else 0.5
    y, x = torch.meshgrid(*(stride * (torch.arange(n) + offset) for n in shape), indexing="ij")
    centre = torch.stack([x, y], -1).view(-1, 1, 2)
    return torch.cat([centre - half, centre + half], -1).view(-1, 4)


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Boxes (..., 4) as offsets from anchor boxes: centre in units of its size, log of the scale (R-CNN)."""
    size = anchors[..., 2:] - anchors[..., :2]
    goal = boxes[..., 2:] - boxes[..., :2]
    move = ((boxes[..., :2] + boxes[..., 2:]) - (anchors[..., :2] + anchors[..., 2:])) / (2 * size)
    return torch.cat([move, (goal / size).log()], -1)


def decode(offsets: Tensor, anchors: Tensor) -> Tensor:
    """The inverse of `encode`."""
    size = anchors[..., 2:] - anchors[..., :2]
    centre = (anchors[..., :2] + anchors[..., 2:]) / 2 + offsets[..., :2] * size
    half = size * offsets[..., 2:].clamp(max=MAX_LOG_SCALE).exp() / 2
    return torch.cat([centre - half, centre + half], -1)


def levels(boxes: Tensor, strides: Sequence[int], convention: str) -> Tensor:
    """(R, 4) -> (R,) int64: which of the maps of these strides a region is pooled from, by the root of its area (Lin et
    al., CVPR 2017, equation 1): 224 pixels belong to stride 16.
    """
    extent = boxes[:, 2:] - boxes[:, :2] + (convention == "detectron")
    root = extent.clamp(min=0).prod(1).sqrt()
    level = (4 + torch.log2(root / 224 + 1e-6)).floor() - math.log2(strides[0])
    return level.nan_to_num(0).clamp(0, len(strides) - 1).long()


def coverage(boxes: Tensor, regions: Tensor) -> Tensor:
    """(N,): the largest part of each box (N, 4) that lies in one of the regions (M, 4); 0 without regions."""
    if len(regions) == 0:
        return boxes.new_zeros(len(boxes))
    low = torch.maximum(boxes[:, None, :2], regions[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], regions[None, :, 2:])
    inside = (high - low).clamp(min=0).prod(-1)
    return (inside / (boxes[:, 2:] - boxes[:, :2]).prod(-1).clamp(min=1e-6)[:, None]).max(1).values


def per_worker(count: Tensor) -> Tensor:
    """Counts that losses are divided by: their means over the workers of a training, of one worker as they are.

    With these the mean of the workers' losses, and so of their gradients, is the loss of all their images together,
    however unevenly people are spread among them (as in DETR's criterion).
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return count.clamp(min=1)
    workers = torch.distributed.get_world_size()
    if workers == 1:
        return count.clamp(min=1)
    count = count.detach().float().clone()
    torch.distributed.all_reduce(count)
    return count.clamp(min=1) / workers


def _first(key: Tensor, among: Tensor, count: int | Tensor) -> Tensor:
    """Mask (B, A) of the `count` (an int, or (B,)) smallest keys of each row among those of a mask."""
    most = min(int(count.max()) if isinstance(count, Tensor) else count, key.shape[1])
    index = torch.where(among, key, torch.inf).topk(most, dim=1, largest=False).indices
    within = torch.arange(most, device=key.device) < (count[:, None] if isinstance(count, Tensor) else count)
    return torch.zeros_like(among).scatter_(1, index, within.expand_as(index)) & among
