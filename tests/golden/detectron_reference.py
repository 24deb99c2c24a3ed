"""The predecessor's networks once more, to test lcrnet.model against: Detectron's ResNet and VGG16 with the pose head
of LCR-Net, on one BGR image. Boxes include their last row and column, so that a width is x2 - x1 + 1.

Written from the facts of Detectron, Detectron.pytorch, the predecessor and LCR-Net v2, in NumPy, with PyTorch's conv2d,
linear and max_pool2d as primitives. It shares nothing with lcrnet. Weights have Detectron.pytorch's names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MEANS = np.array([102.9801, 115.9465, 122.7717], np.float32)  # blue, green, red
LARGEST_LOG_SCALE = np.float32(np.log(1000 / 16))


@dataclass
class Setting:
    """What the old configuration files say, in a few words."""

    body: str = "c4"  # c4, fpn, vgg
    scale: int = 96
    max_size: int = 160
    stride_1x1: bool = True
    sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    ratios: tuple[float, ...] = (0.5, 1, 2)
    softmax: bool = False
    pre_nms: int = 200
    post_nms: int = 12
    nms: float = 0.7
    min_size: float = 0
    method: str = "RoIAlign"
    resolution: int = 14
    sampling_ratio: int = 0
    blocks: tuple[int, ...] = (3, 4, 6, 3)


@dataclass
class Result:
    """boxes (R, 4) and pose2d (R, K, J, 2) in pixels of the image, scores (R, K + 1), pose3d (R, K, J, 3) in metres."""

    boxes: np.ndarray
    scores: np.ndarray
    pose2d: np.ndarray
    pose3d: np.ndarray


@dataclass
class Network:
    weights: dict[str, Tensor]
    anchor_poses: np.ndarray  # (K, 5 J): x, y, X, Y, Z of all joints
    setting: Setting = field(default_factory=Setting)

    def detect(self, image: np.ndarray) -> Result:
        """Of a BGR uint8 image."""
        setting = self.setting
        pixels, scale = prepare(image, setting.scale, setting.max_size, 32 if setting.body == "fpn" else 1)
        x = torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy())
        size = pixels.shape[:2]
        if setting.body == "fpn":
            maps = self.pyramid(x)
            rois = self.proposals_of_levels(maps, size, scale)
        else:
            maps = [self.vgg(x) if setting.body == "vgg" else self.stages("Conv_Body.", x)[-1]]
            rois, _ = self.proposals(maps[0], "RPN.RPN_", 16, setting.sizes, size, scale)
        vectors = self.head(maps, rois)
        scores = F.linear(vectors, *self.layer("Pose_Outs.cls_score")).softmax(1).numpy()
        said = F.linear(vectors, *self.layer("Pose_Outs.pose_pred")).numpy() / 5
        return self.place(rois / np.float32(scale), scores, said)

    def place(self, boxes: np.ndarray, scores: np.ndarray, said: np.ndarray) -> Result:
        """Anchor poses put into the boxes and moved by what was said of them; the background's row is not used."""
        poses, (regions, classes) = len(self.anchor_poses), scores.shape
        assert classes == poses + 1
        pose = self.anchor_poses.reshape(1, poses, 5, -1).repeat(regions, 0).astype(np.float32)
        pose = pose + said.reshape(regions, classes, 5, -1)[:, 1:]
        for axis in (0, 1):
            low, high = boxes[:, axis, None, None], boxes[:, axis + 2, None, None]
            pose[:, :, axis] = low + pose[:, :, axis] * (high - low)
        pose = pose.transpose(0, 1, 3, 2)
        return Result(boxes, scores, pose[..., :2], pose[..., 2:])

    # Bodies

    def layer(self, name: str) -> tuple[Tensor, Tensor | None]:
        return self.weights[name + ".weight"], self.weights.get(name + ".bias")

    def conv(self, x: Tensor, name: str, stride: int = 1, pad: int = 0) -> Tensor:
        return F.conv2d(x, *self.layer(name), stride, pad)

    def affine(self, x: Tensor, name: str) -> Tensor:
        scale, bias = self.layer(name)
        assert bias is not None
        return x * scale[None, :, None, None] + bias[None, :, None, None]

    def bottleneck(self, x: Tensor, name: str, stride: int) -> Tensor:
        first, second = (stride, 1) if self.setting.stride_1x1 else (1, stride)
        y = self.affine(self.conv(x, name + ".conv1", first), name + ".bn1").relu()
        y = self.affine(self.conv(y, name + ".conv2", second, 1), name + ".bn2").relu()
        y = self.affine(self.conv(y, name + ".conv3"), name + ".bn3")
        if name + ".downsample.0.weight" in self.weights:
            x = self.affine(self.conv(x, name + ".downsample.0", stride), name + ".downsample.1")
        return (x + y).relu()

    def stage(self, x: Tensor, name: str, blocks: int, stride: int) -> Tensor:
        for i in range(blocks):
            x = self.bottleneck(x, f"{name}.{i}", stride if i == 0 else 1)
        return x

    def stages(self, prefix: str, x: Tensor) -> list[Tensor]:
        """conv2 to conv4, and conv5 where the body has it: strides 4, 8, 16, 32."""
        x = self.affine(self.conv(x, prefix + "res1.conv1", 2, 3), prefix + "res1.bn1").relu()
        out = [F.max_pool2d(x, 3, 2, 1)]
        for number, blocks in enumerate(self.setting.blocks, 2):
            if f"{prefix}res{number}.0.conv1.weight" in self.weights:
                out.append(self.stage(out[-1], f"{prefix}res{number}", blocks, 1 if number == 2 else 2))
        return out[1:]

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """P2 to P6."""
        c2, c3, c4, c5 = self.stages("Conv_Body.conv_body.", x)
        inner = [self.conv(c5, "Conv_Body.conv_top")]
        for i, lateral in enumerate((c4, c3, c2)):
            top = inner[-1].repeat_interleave(2, 2).repeat_interleave(2, 3)
            inner.append(self.conv(lateral, f"Conv_Body.topdown_lateral_modules.{i}.conv_lateral") + top)
        maps = [self.conv(m, f"Conv_Body.posthoc_modules.{i}", 1, 1) for i, m in enumerate(inner)]
        return [*maps[::-1], maps[0][:, :, ::2, ::2]]

    def vgg(self, x: Tensor) -> Tensor:
        for stage, layers in enumerate((2, 2, 3, 3, 3), 1):
            for i in range(layers):
                x = self.conv(x, f"Conv_Body.conv{stage}_{i + 1}", 1, 1).relu()
            if stage < 5:
                x = F.max_pool2d(x, 2, 2)
        return x

    # Region proposals

    def proposals(
        self, x: Tensor, name: str, stride: int, sizes: tuple[int, ...], size: tuple[int, ...], scale: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (R, 4) of the resized image and their probabilities (R,), best first."""
        setting = self.setting
        x = self.conv(x, name + "conv", 1, 1).relu()
        said, moves = self.conv(x, name + "cls_score")[0], self.conv(x, name + "bbox_pred")[0]
        if setting.softmax:
            half = len(said) // 2
            score = torch.stack([said[:half], said[half:]]).softmax(0)[1].numpy()
        else:
            score = said.sigmoid().numpy()
        shapes = anchors(stride, sizes, setting.ratios)
        rows, columns = score.shape[1:]
        score = score.transpose(1, 2, 0).reshape(-1)
        move = moves.numpy().transpose(1, 2, 0).reshape(-1, 4)
        places = [[x * stride, y * stride] * 2 for y in range(rows) for x in range(columns)]
        boxes = (np.array(places)[:, None] + shapes[None]).reshape(-1, 4).astype(np.float32)
        order = np.argsort(-score, kind="stable")[: setting.pre_nms]
        score, boxes = score[order], moved(boxes[order], move[order])
        boxes = np.minimum(np.maximum(boxes, 0), np.array([size[1] - 1, size[0] - 1] * 2, np.float32))
        width, height = boxes[:, 2] - boxes[:, 0] + 1, boxes[:, 3] - boxes[:, 1] + 1
        big = np.minimum(width, height) >= setting.min_size * scale
        inside = (boxes[:, 0] + width / 2 < size[1]) & (boxes[:, 1] + height / 2 < size[0])
        score, boxes = score[big & inside], boxes[big & inside]
        kept = nms(boxes, setting.nms)[: setting.post_nms]
        return boxes[kept], score[kept]

    def proposals_of_levels(self, maps: list[Tensor], size: tuple[int, ...], scale: float) -> np.ndarray:
        """The best of what every level gave."""
        found = [
            self.proposals(map, "RPN.FPN_RPN_", 4 * 2**i, (self.setting.sizes[0] * 2**i,), size, scale)
            for i, map in enumerate(maps)
        ]
        boxes, score = (np.concatenate(part) for part in zip(*found, strict=True))
        return boxes[np.argsort(-score, kind="stable")[: self.setting.post_nms]]

    # Regions

    def head(self, maps: list[Tensor], rois: np.ndarray) -> Tensor:
        setting = self.setting
        if setting.body == "fpn":
            area = (rois[:, 2] - rois[:, 0] + 1) * (rois[:, 3] - rois[:, 1] + 1)
            levels = np.clip(np.floor(4 + np.log2(np.sqrt(np.maximum(area, 0)) / 224 + 1e-6)), 2, 5).astype(int)
        else:
            levels = np.full(len(rois), 4)
        pooled = []
        for roi, level in zip(rois, levels, strict=True):
            map = maps[level - 2 if setting.body == "fpn" else 0][0].numpy()
            if setting.method == "RoIAlign":
                one = roi_align(map, roi * np.float32(0.5**level), setting.resolution, setting.sampling_ratio)
            elif setting.method == "RoIPoolF":
                one = roi_pool(map, roi * np.float32(0.5**level), setting.resolution)
            else:
                one = roi_crop(map, roi / np.float32(16), setting.resolution)
            pooled.append(torch.from_numpy(one))
        x = torch.stack(pooled)
        if "Box_Head.fc1.weight" in self.weights:
            x = F.linear(x.flatten(1), *self.layer("Box_Head.fc1")).relu()
            return F.linear(x, *self.layer("Box_Head.fc2")).relu()
        x = self.stage(x, "Box_Head.res5", 3, setting.resolution // 7)
        assert x.shape[2:] == (7, 7)
        return x.sum((2, 3)) / 49


def prepare(image: np.ndarray, scale: int, max_size: int, stride: int) -> tuple[np.ndarray, float]:
    """Means off, resized (bilinear, edges repeated), padded with zeros to multiples of the stride."""
    short, long = min(image.shape[:2]), max(image.shape[:2])
    factor = scale / short
    if np.round(factor * long) > max_size:
        factor = max_size / long
    out = image.astype(np.float64) - MEANS
    for axis in (0, 1):
        old = out.shape[axis]
        at = np.clip((np.arange(round(old * factor)) + 0.5) / factor - 0.5, 0, old - 1)
        low = np.minimum(at.astype(int), old - 2)
        part = (at - low).reshape([-1, 1, 1] if axis == 0 else [1, -1, 1])
        out = out.take(low, axis) * (1 - part) + out.take(low + 1, axis) * part
    padding = [(0, -side % stride) for side in out.shape[:2]]
    return np.pad(out, [*padding, (0, 0)]).astype(np.float32), factor


def anchors(stride: int, sizes: tuple[int, ...], ratios: tuple[float, ...]) -> np.ndarray:
    """(A, 4) of the first cell, all sizes of the first ratio first."""
    centre, out = (stride - 1) / 2, []
    for ratio in ratios:
        width = np.round(np.sqrt(stride * stride / ratio))
        height = np.round(width * ratio)
        for size in sizes:
            x, y = (width * size / stride - 1) / 2, (height * size / stride - 1) / 2
            out.append([centre - x, centre - y, centre + x, centre + y])
    return np.array(out)


def moved(boxes: np.ndarray, by: np.ndarray) -> np.ndarray:
    size = boxes[:, 2:] - boxes[:, :2] + 1
    centre = boxes[:, :2] + size / 2 + by[:, :2] * size
    size = np.exp(np.minimum(by[:, 2:], LARGEST_LOG_SCALE)) * size
    return np.concatenate([centre - size / 2, centre + size / 2 - 1], 1)


def nms(boxes: np.ndarray, threshold: float) -> list[int]:
    """Boxes come best first."""
    x1, y1, x2, y2 = boxes.T
    area = (x2 - x1 + 1) * (y2 - y1 + 1)
    gone, kept = np.zeros(len(boxes), bool), []
    for i in range(len(boxes)):
        if gone[i]:
            continue
        kept.append(i)
        width = np.maximum(np.minimum(x2, x2[i]) - np.maximum(x1, x1[i]) + 1, 0)
        height = np.maximum(np.minimum(y2, y2[i]) - np.maximum(y1, y1[i]) + 1, 0)
        both = width * height
        gone |= both / (area + area[i] - both) >= np.float32(threshold)
    return kept


def roi_align(map: np.ndarray, roi: Any, bins: int, ratio: int) -> np.ndarray:
    """(C, H, W) -> (C, bins, bins): means of bilinear samples; no half cell is taken off."""
    x1, y1, x2, y2 = (np.float32(v) for v in roi)
    sides = []
    for low, high, cells in ((y1, y2, map.shape[1]), (x1, x2, map.shape[2])):
        bin = np.float32(max(high - low, 1)) / np.float32(bins)
        count = ratio or int(np.ceil(bin))
        at = np.array([low + b * bin + (i + np.float32(0.5)) * bin / count for b in range(bins) for i in range(count)])
        outside = (at < -1) | (at > cells)
        at = np.clip(at, 0, cells - 1)
        first = at.astype(int)
        sides.append((count, outside, first, np.minimum(first + 1, cells - 1), (at - first).astype(np.float32)))
    (rows, out_y, top, bottom, v), (columns, out_x, left, right, u) = sides
    v = v[:, None]
    value = (1 - v) * (1 - u) * map[:, top][:, :, left] + (1 - v) * u * map[:, top][:, :, right]
    value += v * (1 - u) * map[:, bottom][:, :, left] + v * u * map[:, bottom][:, :, right]
    value[:, out_y] = 0
    value[:, :, out_x] = 0
    return value.reshape(len(map), bins, rows, bins, columns).mean((2, 4), dtype=np.float32)


def roi_pool(map: np.ndarray, roi: Any, bins: int) -> np.ndarray:
    """(C, H, W) -> (C, bins, bins): the largest of the whole cells of a bin; bins overlap, an empty one is 0."""
    x1, y1, x2, y2 = (int(np.floor(v + 0.5)) for v in roi)
    out = np.zeros((len(map), bins, bins), np.float32)
    for i in range(bins):
        for j in range(bins):
            cells = []
            for k, low, high, most in ((i, y1, y2, map.shape[1]), (j, x1, x2, map.shape[2])):
                bin = np.float32(max(high - low + 1, 1)) / np.float32(bins)
                ends = int(np.floor(k * bin)) + low, int(np.ceil((k + 1) * bin)) + low
                cells.append(slice(*(min(max(e, 0), most) for e in ends)))
            part = map[:, cells[0], cells[1]]
            if part.size:
                out[:, i, j] = part.max((1, 2))
    return out


def roi_crop(map: np.ndarray, roi: Any, bins: int) -> np.ndarray:
    """(C, H, W) -> (C, bins, bins): twice as many bilinear samples from border to border, the largest of four each."""
    x1, y1, x2, y2 = roi
    padded = np.pad(map, [(0, 0), (1, 2), (1, 2)])
    places = []
    for low, high, cells in ((y1, y2, map.shape[1]), (x1, x2, map.shape[2])):
        at = np.clip(np.linspace(low, high, 2 * bins), -1, cells) + 1
        places.append((at.astype(int), (at % 1).astype(np.float32)))
    (top, v), (left, u) = places
    v = v[:, None]
    value = (1 - v) * (1 - u) * padded[:, top][:, :, left] + (1 - v) * u * padded[:, top][:, :, left + 1]
    value += v * (1 - u) * padded[:, top + 1][:, :, left] + v * u * padded[:, top + 1][:, :, left + 1]
    return value.reshape(len(map), bins, 2, bins, 2).max((2, 4))
