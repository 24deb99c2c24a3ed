"""LCR-Net: images -> pose proposals -> people.

model = weights.load("run/model")
people = model.detect(image)        # (H, W, 3) RGB uint8 -> list[Person], in pixels of that image
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from lcrnet import backbone, image, ops, ppi
from lcrnet.anchors import AnchorPoses
from lcrnet.calibration import Calibration
from lcrnet.config import Config
from lcrnet.heads import PosePredictor
from lcrnet.pose import People, Person, PoseProposals, box_of
from lcrnet.rpn import RPN, levels
from lcrnet.skeleton import Skeleton


def build(config: Config, anchors: AnchorPoses) -> LCRNet:
    """The network of a configuration and its anchor poses, with random weights."""
    return LCRNet(config, anchors)


class LCRNet(nn.Module):
    """Localization (body, RPN), classification and regression (head, predictor) of anchor poses.

    calibration  makes scores of `detect` probabilities; None: they are PPI's
    dropped      pose proposals that `detect` has left out so far, because a number of theirs is not finite
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: Config, anchors: AnchorPoses):
        super().__init__()
        self.config, self.anchors = config, anchors
        self.calibration: Calibration | None = None
        self.dropped = 0
        self.body, self.box_head, width = backbone.build(config.model)
        self.rpn = RPN(self.body.rpn_channels, self.body.rpn_strides, config.rpn)
        self.predictor = PosePredictor(width, anchors, config.model.shared_regressor)
        self.register_buffer("mean", torch.tensor(config.image.mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(config.image.std).view(1, 3, 1, 1) * 255, persistent=False)

    @property
    def skeleton(self) -> Skeleton:
        return self.anchors.skeleton

    def forward(
        self, images: Tensor, sizes: Tensor, people: list[People] | None = None
    ) -> dict[str, Tensor] | list[PoseProposals]:
        """images (B, 3, H, W) uint8 RGB, padded; sizes (B, 2) their (height, width) without the padding.

        With people (tensors, pixels of these images): the losses, a dict of scalars. Without: B pose proposals.
        """
        features = self.body(self._normalise(images, sizes))
        logits, offsets, anchors, counts = self.rpn([features[s] for s in self.body.rpn_strides])
        # Detectron clips to the padded image.
        within = torch.full_like(sizes, 0) + sizes.new_tensor(images.shape[-2:]) if self._detectron else sizes
        proposals = self.rpn.propose(logits, offsets, anchors, counts, within, train=people is not None)
        pooled_from = [features[s] for s in self.body.roi_strides]
        head = self.config.head
        if people is not None:
            losses = self.rpn.loss(logits, offsets, anchors, people)
            regions = self.predictor.sample(proposals, people, head)
            return losses | self.predictor.loss(*self._regions(pooled_from, regions.roi), regions, head)
        roi = ops.rois(proposals)
        found: list[PoseProposals] = []
        for _ in range(head.passes):
            said = self._regions(pooled_from, roi)
            new = self.predictor.decode(*said, roi, len(images), head.score_floor, head.at_least)
            found = [_join(a, b) for a, b in zip(found, new, strict=True)] if found else new
            roi = self._again(*said, roi, sizes)
        return found

    @property
    def _detectron(self) -> bool:
        return self.config.rpn.convention == "detectron"

    def _regions(self, maps: list[Tensor], roi: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits and refinements of regions (R, 5), from the maps of `roi_strides`."""
        model, strides = self.config.model, self.body.roi_strides
        scales = [1 / stride for stride in strides]
        step = getattr(self.box_head, "step", 1)
        head, ratio = self.box_head, model.sampling_ratio or -1
        if model.pool == "align" and isinstance(head, backbone.Res5Head):
            if head.projects(maps[0][:, 0].numel(), len(roi), -(-model.roi_size // step)):
                parts = []
                for part, stride in zip(head.project(maps[0]), head.strides, strict=True):
                    every = step * stride  # bins that are read
                    parts.append(ops.roi_align(part, roi, model.roi_size, scales, ratio, model.aligned, None, every))
                return self.predictor(head.from_projections(*parts))
        if model.pool == "align":
            level = levels(roi[:, 1:], strides, self.config.rpn.convention) if len(maps) > 1 else None
            pooled = ops.roi_align(maps, roi, model.roi_size, scales, ratio, model.aligned, level, step)
        elif model.pool == "pool":
            pooled = ops.roi_pool(maps[0], roi, model.roi_size, scales[0])[..., ::step, ::step]
        else:
            crop = ops.roi_crop(maps[0], roi, model.roi_size, scales[0], max_pool=model.pool == "crop_max")
            pooled = crop[..., ::step, ::step]
        return self.predictor(self.box_head(pooled))

    @torch.no_grad()
    def _again(self, logits: Tensor, refined: Tensor, roi: Tensor, sizes: Tensor) -> Tensor:
        """Regions of the next pass: the boxes, cut to the image, of the poses that are likely."""
        score, anchor = logits.softmax(-1)[:, 1:].max(-1)
        sure = score > 0.3
        roi, anchor, refined = roi[sure], anchor[sure], refined[sure]
        delta = refined[torch.arange(len(roi), device=roi.device), anchor, :, :2]
        box = roi[:, 1:]
        pose = (self.predictor.anchor2d[anchor] + delta) * (box[:, None, 2:] - box[:, None, :2]) + box[:, None, :2]
        new = torch.from_numpy(box_of(pose.cpu().numpy())).to(roi)
        limit = sizes.to(roi)[roi[:, 0].long()][:, [1, 0, 1, 0]]
        new = torch.minimum(new.clamp(min=0), limit)
        whole = (new[:, 2:] - new[:, :2] > 1).all(1)
        return torch.cat([roi[whole, :1], new[whole]], 1)

    def _normalise(self, images: Tensor, sizes: Tensor) -> Tensor:
        """uint8 -> zero mean, unit variance; the padding becomes 0."""
        x = (images.to(self.mean.dtype) - self.mean) / self.std
        height, width = x.shape[-2:]
        if (sizes != sizes.new_tensor([height, width])).any():
            rows = torch.arange(height, device=x.device)[None, :, None] < sizes[:, :1, None]
            columns = torch.arange(width, device=x.device)[None, None] < sizes[:, 1:, None]
            x = x * (rows & columns)[:, None]
        return x.contiguous(memory_format=torch.channels_last)

    def detect(self, image: np.ndarray) -> list[Person]:
        """The people of one image (H, W, 3) uint8 RGB, best first, in its pixels and in metres."""
        return self.detect_batch([image])[0]

    def detect_batch(self, images: Sequence[np.ndarray]) -> list[list[Person]]:
        """`detect` of several images; fastest where they have the same shape."""
        sizes = [shot.shape[:2] for shot in images]
        people, dropped = ppi.integrate_batch(
            self._propose(images), sizes, self.config.ppi, self.skeleton, self.anchors.upper_only
        )
        self.dropped += sum(dropped)
        return [self.calibration.apply(p) for p in people] if self.calibration else people

    def propose(self, images: Sequence[np.ndarray]) -> list[PoseProposals]:
        """The pose proposals of several images (H, W, 3) uint8 RGB, in their pixels; NumPy."""
        return [found.numpy() for found in self._propose(images)]

    @torch.inference_mode()
    def _propose(self, images: Sequence[np.ndarray]) -> list[PoseProposals]:
        """`propose`, but tensors, on the network's device."""
        for shot in images:
            if shot.ndim != 3 or shot.shape[2] != 3 or shot.dtype != np.uint8:
                raise ValueError(f"an image is (H, W, 3) uint8 RGB, not {shot.shape} {shot.dtype}")
        if not images:
            return []
        setting = self.config.image
        resized = [image.resize(shot, setting.short_side, setting.max_side, setting.resize) for shot in images]
        # One call a padded shape: what is found in an image must not depend on its neighbours (GroupNorm sees padding).
        shapes: dict[tuple[int, ...], list[int]] = {}
        for i, (shot, _) in enumerate(resized):
            shapes.setdefault(image.padded(shot.shape[:2], setting.multiple), []).append(i)
        out: dict[int, PoseProposals] = {}
        for rows in shapes.values():
            pixels, sizes = image.stack([resized[i][0] for i in rows], setting.multiple)
            found = self(pixels.to(self.mean.device), sizes.to(self.mean.device))
            for i, one in zip(rows, found, strict=True):
                scale = torch.from_numpy(resized[i][1]).to(one.box)
                out[i] = replace(one, box=one.box / scale.repeat(2), pose2d=one.pose2d / scale)
        return [out[i] for i in range(len(images))]


def _join(a: PoseProposals, b: PoseProposals) -> PoseProposals:
    return PoseProposals(*(torch.cat([x, y]) for x, y in zip(a.__dict__.values(), b.__dict__.values(), strict=True)))
