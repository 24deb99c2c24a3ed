"""Bodies (image -> feature maps) and their box heads (pooled region -> vector): ResNet C4, and a tiny one for CPUs.

A body maps (B, 3, H, W) normalised images to {stride: (B, C, H / stride, W / stride)}; `rpn_stride` and `roi_stride`
name the maps that the region proposal network and the pooling of regions read. A head maps (R, C, S, S) to (R, D).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops.misc import FrozenBatchNorm2d

from lcrnet.config import Model

Norm = Callable[[int], nn.Module]


def build(config: Model) -> tuple[Body, nn.Module, int]:
    """(body, box head, D) of the configuration, with random weights."""
    if config.backbone == "tiny":
        body: Body = TinyBody()
        return body, TinyHead(body.roi_channels, config.roi_size), TinyHead.width
    norm = group_norm if config.norm == "gn" else FrozenBatchNorm2d
    net = getattr(resnet, config.backbone)(norm_layer=norm)
    return ResNetC4(net, config.freeze), Res5Head(net, config.roi_size), net.fc.in_features


class Body(nn.Module):
    """What all bodies have."""

    rpn_stride: int
    roi_stride: int
    rpn_channels: int
    roi_channels: int


class ResNetC4(Body):
    """conv1 to conv4 of a ResNet: one map of stride 16 for proposals and regions alike."""

    rpn_stride = roi_stride = 16

    def __init__(self, net: resnet.ResNet, freeze: int):
        super().__init__()
        self.conv1, self.bn1 = net.conv1, net.bn1
        self.layer1, self.layer2, self.layer3 = net.layer1, net.layer2, net.layer3
        self.rpn_channels = self.roi_channels = net.layer4[0].conv1.in_channels
        stem = nn.ModuleList([net.conv1, net.bn1])
        for part in [stem, net.layer1, net.layer2, net.layer3][:freeze]:
            part.requires_grad_(False)

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, stride=2, padding=1)
        return {self.roi_stride: self.layer3(self.layer2(self.layer1(x)))}


class Res5Head(nn.Module):
    """conv5 of a ResNet on the pooled region, then its mean. The stride goes with the pooling: 14 bins 2, 7 bins 1."""

    def __init__(self, net: resnet.ResNet, roi_size: int):
        super().__init__()
        self.layer4 = net.layer4
        if roi_size < 14:
            for module in self.layer4[0].modules():
                if isinstance(module, nn.Conv2d):
                    module.stride = (1, 1)

    def forward(self, pooled: Tensor) -> Tensor:
        return cast(Tensor, self.layer4(pooled).mean((-2, -1)))


class TinyBody(Body):
    """A body of 2.0 M parameters for drawings and tests: proposals at stride 8, regions at stride 4 after a merge."""

    rpn_stride, roi_stride = 8, 4
    rpn_channels, roi_channels = 96, 64

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 32, stride=2)
        self.stage4 = nn.Sequential(ConvNorm(32, 48, stride=2), Residual(48))
        self.stage8 = nn.Sequential(ConvNorm(48, 96, stride=2), Residual(96), Residual(96))
        self.stage16 = nn.Sequential(ConvNorm(96, 160, stride=2), Residual(160), Residual(160), Residual(160))
        self.top = nn.Conv2d(160, 96, 1)
        self.down = nn.Conv2d(96, 64, 1)
        self.side = nn.Conv2d(48, 64, 1)

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        c4 = self.stage4(self.stem(images))
        c8 = self.stage8(c4)
        c16 = self.stage16(c8)
        p8 = c8 + _to_size_of(self.top(c16), c8)
        p4 = self.side(c4) + _to_size_of(self.down(p8), c4)
        return {8: p8, 4: p4}


class TinyHead(nn.Module):
    """One convolution and two layers of `width`."""

    width = 320

    def __init__(self, channels: int, roi_size: int):
        super().__init__()
        self.conv = ConvNorm(channels, 64)
        self.fc1 = nn.Linear(64 * roi_size**2, self.width)
        self.fc2 = nn.Linear(self.width, self.width)

    def forward(self, pooled: Tensor) -> Tensor:
        return F.relu(self.fc2(F.relu(self.fc1(self.conv(pooled).flatten(1)))))


class ConvNorm(nn.Module):
    """3x3 convolution, GroupNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm = group_norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class Residual(nn.Module):
    """Two 3x3 convolutions beside the identity; starts as the identity (Goyal et al. 2017, zero-initialised)."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = ConvNorm(channels, channels)
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm = group_norm(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.conv(self.first(x))))


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm in 32 groups (Wu and He, ECCV 2018), in groups of 16 where there are fewer than 512 channels."""
    return nn.GroupNorm(32 if channels >= 512 else max(channels // 16, 1), channels)


def _to_size_of(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="nearest")
