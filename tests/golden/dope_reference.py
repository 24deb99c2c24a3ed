"""DOPE's network once more, its part for bodies, to test lcrnet.model against: torchvision's Faster R-CNN with the
whole layer4 of a ResNet-50 behind a RoIAlign of 7 bins, on one RGB image. Boxes are borders: a width is x2 - x1.

Written from the facts of DOPE and torchvision, in NumPy, with PyTorch's conv2d, linear and max_pool2d as primitives. It
shares nothing with lcrnet. Weights have DOPE's names.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from detectron_reference import LARGEST_LOG_SCALE, Result, roi_align
from torch import Tensor

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # red, green, blue
SIZES, RATIOS = (32, 64, 128, 256, 512), (0.5, 1.0, 2.0)
BODY, HEAD, SAYS = "backbone.resnet_backbone.", "roi_heads.dope_head.resnet_backbone.", "roi_heads.dope_predictor."


@dataclass
class Network:
    weights: dict[str, Tensor]
    min_size: int = 100
    max_size: int = 160
    pre_nms: int = 24
    post_nms: int = 1000  # as its program sets it, whatever the file says

    def detect(self, image: np.ndarray) -> Result:
        """Of an RGB uint8 image."""
        pixels = prepare(image, self.min_size, self.max_size)
        height, width = pixels.shape[:2]
        padded = np.zeros((-(-height // 32) * 32, -(-width // 32) * 32, 3), np.float32)
        padded[:height, :width] = pixels
        map = self.body(torch.from_numpy(padded.transpose(2, 0, 1)[None].copy()))
        boxes, _ = self.proposals(map, height, width)
        pooled = np.stack([roi_align(map[0].numpy(), box / np.float32(16), 7, 2) for box in boxes])
        x = self.layer(torch.from_numpy(pooled), HEAD + "layer4", 3, 2)
        assert x.shape[2:] == (4, 4)
        vectors = x.sum((2, 3)) / 16
        scores = F.linear(vectors, *self.named(SAYS + "body_cls_score")).softmax(1).numpy()
        said = F.linear(vectors, *self.named(SAYS + "body_pose_pred")).numpy()
        anchors = self.weights["roi_heads.body_anchor_poses"].numpy()
        poses, joints = anchors.shape[:2]
        said = said.reshape(len(boxes), poses, 5 * joints)
        flat, deep = said[..., : 2 * joints] / 5, said[..., 2 * joints :] / 5
        low, size = boxes[:, None, None, :2], (boxes[:, 2:] - boxes[:, :2])[:, None, None]
        pose2d = low + (anchors[..., :2] + flat.reshape(len(boxes), poses, joints, 2)) * size
        pose3d = anchors[..., 2:] + deep.reshape(len(boxes), poses, joints, 3)
        back = np.array([image.shape[1] / width, image.shape[0] / height], np.float32)
        return Result(boxes * np.tile(back, 2), scores, pose2d * back, pose3d)

    def named(self, name: str) -> tuple[Tensor, Tensor | None]:
        return self.weights[name + ".weight"].float(), self.weights.get(name + ".bias")

    def norm(self, x: Tensor, name: str) -> Tensor:
        scale, bias, mean, var = (
            self.weights[f"{name}.{n}"][:, None, None] for n in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / (var + 1e-5).sqrt() * scale + bias

    def block(self, x: Tensor, name: str, stride: int) -> Tensor:
        y = self.norm(F.conv2d(x, self.weights[name + ".conv1.weight"]), name + ".bn1").relu()
        y = self.norm(F.conv2d(y, self.weights[name + ".conv2.weight"], None, stride, 1), name + ".bn2").relu()
        y = self.norm(F.conv2d(y, self.weights[name + ".conv3.weight"]), name + ".bn3")
        if name + ".downsample.0.weight" in self.weights:
            x = self.norm(
                F.conv2d(x, self.weights[name + ".downsample.0.weight"], None, stride), name + ".downsample.1"
            )
        return (x + y).relu()

    def layer(self, x: Tensor, name: str, blocks: int, stride: int) -> Tensor:
        for i in range(blocks):
            x = self.block(x, f"{name}.{i}", stride if i == 0 else 1)
        return x

    def body(self, x: Tensor) -> Tensor:
        x = self.norm(F.conv2d(x, self.weights[BODY + "conv1.weight"], None, 2, 3), BODY + "bn1").relu()
        x = F.max_pool2d(x, 3, 2, 1)
        for number, blocks in ((1, 3), (2, 4), (3, 6)):
            x = self.layer(x, f"{BODY}layer{number}", blocks, 1 if number == 1 else 2)
        return x

    def proposals(self, map: Tensor, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (R, 4) of the resized image and their logits (R,), best first."""
        x = F.conv2d(map, *self.named("rpn.head.conv"), 1, 1).relu()
        score = F.conv2d(x, *self.named("rpn.head.cls_logits"))[0].numpy().transpose(1, 2, 0)
        move = F.conv2d(x, *self.named("rpn.head.bbox_pred"))[0].numpy().transpose(1, 2, 0).reshape(-1, 4)
        corners = np.array([[x * 16, y * 16] * 2 for y in range(score.shape[0]) for x in range(score.shape[1])])
        boxes = (corners[:, None] + anchors()).reshape(-1, 4).astype(np.float32)
        score = score.reshape(-1)
        order = np.argsort(-score, kind="stable")[: self.pre_nms]
        score, boxes, move = score[order], boxes[order], move[order]
        size = boxes[:, 2:] - boxes[:, :2]
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + move[:, :2] * size
        half = size * np.exp(np.minimum(move[:, 2:], LARGEST_LOG_SCALE)) / 2
        boxes = np.concatenate([centre - half, centre + half], 1)
        boxes = np.clip(boxes, 0, np.array([width, height] * 2, np.float32))
        big = (boxes[:, 2:] - boxes[:, :2] >= 1e-3).all(1)
        score, boxes = score[big], boxes[big]
        kept = nms(boxes, 0.7)[: self.post_nms]
        return boxes[kept], score[kept]


def prepare(image: np.ndarray, min_size: int, max_size: int) -> np.ndarray:
    """Normalised, then resized bilinearly to whole pixels, rounded down, with a factor for each axis."""
    factor = min(min_size / min(image.shape[:2]), max_size / max(image.shape[:2]))
    out = (image / 255 - MEAN) / STD
    for axis in (0, 1):
        old = out.shape[axis]
        new = int(np.floor(old * factor))
        at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.minimum(at.astype(int), old - 2)
        part = (at - low).reshape([-1, 1, 1] if axis == 0 else [1, -1, 1])
        out = out.take(low, axis) * (1 - part) + out.take(low + 1, axis) * part
    return out.astype(np.float32)


def anchors() -> np.ndarray:
    """(15, 4) of the first cell, round its corner, all sizes of the first ratio first."""
    out = []
    for ratio in RATIOS:
        for size in SIZES:
            height, width = size * np.sqrt(ratio), size / np.sqrt(ratio)
            out.append(np.round(np.array([-width, -height, width, height]) / 2))
    return np.stack(out)


def nms(boxes: np.ndarray, threshold: float) -> list[int]:
    """Boxes come best first."""
    x1, y1, x2, y2 = boxes.T
    area = (x2 - x1) * (y2 - y1)
    gone, kept = np.zeros(len(boxes), bool), []
    for i in range(len(boxes)):
        if gone[i]:
            continue
        kept.append(i)
        both = np.maximum(np.minimum(x2, x2[i]) - np.maximum(x1, x1[i]), 0)
        both = both * np.maximum(np.minimum(y2, y2[i]) - np.maximum(y1, y1[i]), 0)
        gone |= both / (area + area[i] - both) > threshold
    return kept
