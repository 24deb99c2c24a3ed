"""Region proposal network (Ren et al., Faster R-CNN, NIPS 2015): anchor boxes, proposals, loss.

B images, A anchor boxes an image. Boxes are (x1, y1, x2, y2) in pixels of the resized image.
"""

from __future__ import annotations

import math

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

    def __init__(self, channels: int, stride: int, config: Rpn):
        super().__init__()
        self.config, self.stride = config, stride
        shapes = len(config.sizes) * len(config.ratios)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, shapes, 1)
        self.offsets = nn.Conv2d(channels, 4 * shapes, 1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.01 if parameter.ndim > 1 else 0)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, h, w) -> logits (B, A), offsets (B, A, 4), anchor boxes (A, 4); A = h * w * shapes, in that order."""
        x = F.relu(self.conv(features))
        logits = self.objectness(x).permute(0, 2, 3, 1).flatten(1).float()
        offsets = self.offsets(x).permute(0, 2, 3, 1).reshape(len(x), -1, 4).float()
        boxes = anchor_boxes(features.shape[-2:], self.stride, self.config.sizes, self.config.ratios)
        return logits, offsets, boxes.to(features.device)

    @torch.no_grad()
    def propose(self, logits: Tensor, offsets: Tensor, anchors: Tensor, sizes: Tensor, train: bool) -> list[Tensor]:
        """The best proposals of each image after NMS: B tensors (r, 4), clipped to `sizes` (B, 2) = (height, width)."""
        config = self.config
        pre = config.train_pre_nms if train else config.pre_nms
        post = config.train_post_nms if train else config.post_nms
        top, index = logits.topk(min(pre, logits.shape[1]), dim=1)
        boxes = decode(offsets.gather(1, index[..., None].expand(-1, -1, 4)), anchors[index])
        limit = sizes.to(boxes)[:, None, [1, 0, 1, 0]]
        boxes = torch.minimum(boxes.clamp(min=0), limit)
        big = ((boxes[..., 2:] - boxes[..., :2]) >= config.min_size).all(-1)
        keep, count = ops.batched_nms(boxes, top.masked_fill(~big, -torch.inf), config.nms_iou, max_keep=post)
        boxes = boxes.gather(1, keep.clamp(min=0)[..., None].expand(-1, -1, 4))
        return [box[:kept] for box, kept in zip(boxes, count.tolist(), strict=True)]

    def loss(self, logits: Tensor, offsets: Tensor, anchors: Tensor, people: list[People]) -> dict[str, Tensor]:
        """Losses `rpn_class` and `rpn_box`. People with `crowd` are regions where nothing is learnt."""
        config = self.config
        label = torch.full_like(logits, -1)
        goal = torch.zeros_like(offsets)
        for b, who in enumerate(people):
            label[b], goal[b] = self._targets(anchors, who)
        # At most `samples` an image, at most `positive_share` of them positive, chosen by random keys.
        key = torch.rand_like(logits)
        positive = _first(key, label == 1, round(config.samples * config.positive_share))
        negative = _first(key, label == 0, config.samples - positive.sum(1))
        use = positive | negative
        count = use.sum().clamp(min=1)
        classes = F.binary_cross_entropy_with_logits(logits[use], label[use], reduction="sum") / count
        boxes = F.smooth_l1_loss(offsets[positive], goal[positive], beta=1 / 9, reduction="sum") / count
        return {"rpn_class": classes, "rpn_box": boxes}

    @torch.no_grad()
    def _targets(self, anchors: Tensor, people: People) -> tuple[Tensor, Tensor]:
        """label (A,): 1 person, 0 background, -1 neither; offsets (A, 4) to the person of largest overlap."""
        label = anchors.new_zeros(len(anchors))
        goal = torch.zeros_like(anchors)
        label[coverage(anchors, people.box[people.crowd]) > 0.5] = -1
        box = people.box[~people.crowd]
        if len(box) == 0:
            return label, goal
        overlap = box_iou(anchors, box)
        best, who = overlap.max(1)
        label[best >= self.config.negative_iou] = -1
        best_of_person = overlap.max(0).values
        # Every person has an anchor box, however small the overlap (and all that tie for it).
        forced = ((overlap == best_of_person) & (best_of_person > 0)).any(1)
        label[(best >= self.config.positive_iou) | forced] = 1
        return label, encode(box[who], anchors)


def anchor_boxes(shape: torch.Size, stride: int, sizes: tuple[float, ...], ratios: tuple[float, ...]) -> Tensor:
    """(h * w * shapes, 4): boxes of area size^2 and the ratios (height / width) round the centre of every cell."""
    size = torch.tensor(sizes, dtype=torch.float32)[:, None]
    root = torch.tensor(ratios, dtype=torch.float32).sqrt()[None]
    half = torch.stack([size / root, size * root], -1).flatten(0, 1) / 2
    y, x = torch.meshgrid(*(stride * (torch.arange(n) + 0.5) for n in shape), indexing="ij")
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


def coverage(boxes: Tensor, regions: Tensor) -> Tensor:
    """(N,): the largest part of each box (N, 4) that lies in one of the regions (M, 4); 0 without regions."""
    if len(regions) == 0:
        return boxes.new_zeros(len(boxes))
    low = torch.maximum(boxes[:, None, :2], regions[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], regions[None, :, 2:])
    inside = (high - low).clamp(min=0).prod(-1)
    return (inside / (boxes[:, 2:] - boxes[:, :2]).prod(-1).clamp(min=1e-6)[:, None]).max(1).values


def _first(key: Tensor, among: Tensor, count: int | Tensor) -> Tensor:
    """Mask (B, A) of the `count` (an int, or (B,)) smallest keys of each row among those of a mask."""
    most = min(int(count.max()) if isinstance(count, Tensor) else count, key.shape[1])
    index = torch.where(among, key, torch.inf).topk(most, dim=1, largest=False).indices
    within = torch.arange(most, device=key.device) < (count[:, None] if isinstance(count, Tensor) else count)
    return torch.zeros_like(among).scatter_(1, index, within.expand_as(index)) & among
