"""Bodies (image -> feature maps) and box heads (pooled region -> vector), on torchvision's networks.

A body maps (B, 3, H, W) normalised images to {stride: (B, C, H / stride, W / stride)}; `rpn_strides` and `roi_strides`
name the maps that the region proposal network and the pooling of regions read, finest first. A head maps (R, C, S, S)
to (R, D).

    c4      conv1 to conv4 of a ResNet or ResNeXt, stride 16; VGG16 to conv5_3, stride 16
    c5      conv1 to conv5, stride 32, or 16 where conv5 is dilated (`dilate_c5`)
    fpn     feature pyramid (Lin et al., CVPR 2017): P2 to P5 for regions, P2 to P6 for proposals
    fpn_p2  the same pyramid, of which only P2 is used
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet, vgg
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.misc import FrozenBatchNorm2d

from lcrnet.config import Model

Norm = Callable[[int], nn.Module]

RESNETS: dict[str, tuple[type[resnet.BasicBlock | resnet.Bottleneck], tuple[int, ...], int, int]] = {
    "resnet18": (resnet.BasicBlock, (2, 2, 2, 2), 1, 64),
    "resnet34": (resnet.BasicBlock, (3, 4, 6, 3), 1, 64),
    "resnet50": (resnet.Bottleneck, (3, 4, 6, 3), 1, 64),
    "resnet101": (resnet.Bottleneck, (3, 4, 23, 3), 1, 64),
    "resnet152": (resnet.Bottleneck, (3, 8, 36, 3), 1, 64),
    "resnext101_32x8d": (resnet.Bottleneck, (3, 4, 23, 3), 32, 8),
    "resnext101_64x4d": (resnet.Bottleneck, (3, 4, 23, 3), 64, 4),
    "resnext152_32x8d": (resnet.Bottleneck, (3, 8, 36, 3), 32, 8),
}
"""Block, blocks of each stage, groups, width of a group."""

PYRAMID = 256
"""Channels of the maps of a feature pyramid."""


def build(config: Model) -> tuple[Body, nn.Module, int]:
    """(body, box head, D) of the configuration, with random weights."""
    if config.backbone == "tiny":
        body: Body = TinyBody()
        return body, TinyHead(body.roi_channels, config.roi_size), TinyHead.width
    if config.backbone == "vgg16":
        body = VGG16Body(config.freeze)
    else:
        net = _resnet(config)
        body = ResNetBody(net, config)
    if config.head == "res5":
        return body, Res5Head(net.layer4, config), net.fc.in_features
    if config.head == "2mlp":
        return body, MLPHead(body.roi_channels, config.roi_size, config.head_width), config.head_width
    return body, ConvHead(body.roi_channels, config), config.head_width


def _resnet(config: Model) -> resnet.ResNet:
    block, blocks, groups, width = RESNETS[config.backbone]
    norm: Norm = group_norm32 if config.norm == "gn" else FrozenBatchNorm2d
    net = resnet.ResNet(
        block, list(blocks), groups=groups, width_per_group=width, norm_layer=norm,
        replace_stride_with_dilation=[False, False, config.dilate_c5],
    )  # fmt: skip
    if config.stride_in_1x1:
        for module in net.modules():
            if isinstance(module, resnet.Bottleneck):
                module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
        if config.dilate_c5:  # the first 3x3 as well: it would have come after the stride
            first = cast(resnet.Bottleneck, net.layer4[0]).conv2
            first.dilation = first.padding = (2, 2)
    return net


class Body(nn.Module):
    """What all bodies have."""

    rpn_strides: tuple[int, ...]
    roi_strides: tuple[int, ...]
    rpn_channels: int
    roi_channels: int


class ResNetBody(Body):
    """conv1 to conv4 or conv5 of a ResNet, with or without a feature pyramid on top."""

    def __init__(self, net: resnet.ResNet, config: Model):
        super().__init__()
        self.conv1, self.bn1 = net.conv1, net.bn1
        self.layer1, self.layer2, self.layer3 = net.layer1, net.layer2, net.layer3
        stages = [nn.ModuleList([net.conv1, net.bn1]), net.layer1, net.layer2, net.layer3]
        width = net.fc.in_features  # of conv5; half of it of conv4, and so on
        if config.body == "c4":
            self.roi_strides = self.rpn_strides = (16,)
            width //= 2
        else:
            self.layer4 = net.layer4
            stages.append(net.layer4)
            self.roi_strides = self.rpn_strides = (16 if config.dilate_c5 else 32,)
        if config.body in ("fpn", "fpn_p2"):
            inputs = [width // 8, width // 4, width // 2, width]
            norm = group_norm32 if config.norm == "gn" else None
            self.fpn = FeaturePyramidNetwork(inputs, PYRAMID, LastLevelMaxPool(), norm)
            self.roi_strides, self.rpn_strides = (4, 8, 16, 32), (4, 8, 16, 32, 64)
            if config.body == "fpn_p2":
                self.roi_strides = self.rpn_strides = (4,)
                self.fpn.layer_blocks[1:].requires_grad_(False)  # of P3 to P5, which nobody reads
            width = PYRAMID
        self.rpn_channels = self.roi_channels = width
        for part in stages[: config.freeze]:
            part.requires_grad_(False)

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        x = F.max_pool2d(F.relu_(_normed(self.conv1, self.bn1, images)), 3, stride=2, padding=1)
        c2 = _stage(self.layer1, x)
        c3 = _stage(self.layer2, c2)
        c4 = _stage(self.layer3, c3)
        if not hasattr(self, "layer4"):
            return {16: c4}
        c5 = _stage(self.layer4, c4)
        if not hasattr(self, "fpn"):
            return {self.roi_strides[0]: c5}
        if self.rpn_strides == (4,):
            return {4: self._finest([c2, c3, c4, c5])}
        maps = self.fpn({"4": c2, "8": c3, "16": c4, "32": c5})
        maps["64"] = maps.pop("pool")
        return {int(stride): map for stride, map in maps.items()}

    def _finest(self, maps: list[Tensor]) -> Tensor:
        """P2 of the pyramid, without the convolutions that end P3 to P5."""
        top = self.fpn.inner_blocks[3](maps[3])
        for inner, map in reversed(list(zip(self.fpn.inner_blocks[:3], maps[:3], strict=True))):
            top = inner(map) + F.interpolate(top, size=map.shape[-2:], mode="nearest")
        return cast(Tensor, self.fpn.layer_blocks[0](top))


class VGG16Body(Body):
    """The convolutions of VGG16 but for the last pooling (Simonyan and Zisserman, ICLR 2015): stride 16."""

    rpn_strides = roi_strides = (16,)
    rpn_channels = roi_channels = 512
    STAGES = (5, 10, 17, 24)  # where the poolings end: a stage is what lies between

    def __init__(self, freeze: int):
        super().__init__()
        self.features = vgg.make_layers(vgg.cfgs["D"])[:-1]
        self.features.apply(_initialise)
        for layer in self.features[: (0, *self.STAGES, len(self.features))[freeze]]:
            layer.requires_grad_(False)

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        return {16: self.features(images)}


class Res5Head(nn.Module):
    """conv5 of a ResNet on the pooled region, then its mean.

    From 14 bins it goes with stride 2. Where that stride is in the first 1x1 convolutions (`stride_in_1x1`), these
    read every other bin only: `step` 2 tells RoIAlign to make no others, and the stride is gone from here.

    What a region goes through first is linear: RoIAlign, then the first block's two 1x1 convolutions, in that order or
    the other (a bin is a weighted sum of cells, whatever the weights sum to). So `project` and `from_projections` do
    the convolutions once a cell of the map, and pool their results; norm and ReLU stay where they were.
    """

    def __init__(self, layer4: nn.Sequential, config: Model):
        super().__init__()
        self.layer4 = layer4
        stride = config.res5_stride or (2 if config.roi_size >= 14 else 1)
        self.step = stride if config.stride_in_1x1 else 1
        if stride == 1 or self.step == 2:
            for module in self.layer4[0].modules():
                if isinstance(module, nn.Conv2d):
                    module.stride = (1, 1)

    def forward(self, pooled: Tensor) -> Tensor:
        return _stage(self.layer4, pooled).mean((-2, -1))

    @property
    def strides(self) -> tuple[int, int]:
        """Of the first block's first convolution and its shortcut, both 1x1: the bins of each that are read."""
        first = cast(Any, self.layer4[0])
        return first.conv1.stride[0], first.downsample[0].stride[0]

    def projects(self, cells: int, regions: int, bins: int) -> bool:
        """Whether `project` saves time on maps of so many cells in all, `bins` a side of a region.

        It needs 1x1 convolutions (no BasicBlock) and norms that are fixed: GroupNorm is not linear. It costs a
        multiplication by each weight a cell, and saves one a bin that is read; pooled vectors are of more channels,
        and memory counts: so fewer than half as many cells as bins, weighted by the outputs that read them.
        """
        first = self.layer4[0]
        if not isinstance(first, resnet.Bottleneck) or not isinstance(first.bn1, FrozenBatchNorm2d):
            return False
        outputs = [first.conv1.out_channels, first.conv3.out_channels]
        read = sum(n * (-(-bins // stride)) ** 2 for n, stride in zip(outputs, self.strides, strict=True))
        return 2 * cells * sum(outputs) <= regions * read

    def project(self, map: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> what the first convolution and the shortcut make of every cell, scaled as by their norms."""
        first = cast(Any, self.layer4[0])
        pairs = ((first.conv1, first.bn1), tuple(first.downsample))
        weights = [conv.weight * _affine(norm)[0].view(-1, 1, 1, 1) for conv, norm in pairs]
        return F.conv2d(map, weights[0]), F.conv2d(map, weights[1])

    def from_projections(self, pooled: Tensor, shortcut: Tensor) -> Tensor:
        """`forward` of the regions pooled from the maps of `project`, at the strides of `strides`."""
        first = cast(Any, self.layer4[0])
        x = F.relu_(pooled + _affine(first.bn1)[1].view(1, -1, 1, 1).to(pooled))
        x = F.relu_(_normed(first.conv2, first.bn2, x))
        shift = _affine(first.downsample[1])[1].view(1, -1, 1, 1).to(shortcut)
        x = F.relu_(_normed(first.conv3, first.bn3, x) + (shortcut + shift))
        return _stage(self.layer4[1:], x).mean((-2, -1))


def _affine(norm: FrozenBatchNorm2d) -> tuple[Tensor, Tensor]:
    """(C,) factor and shift of a frozen norm."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


def _normed(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(conv(x)). A frozen norm is multiplied into the weights: it costs nothing a pixel, forward or backward, and
    under autocast does not turn the result to float32. Gradients of the weights are the same."""
    if not isinstance(norm, FrozenBatchNorm2d):
        return cast(Tensor, norm(conv(x)))
    scale, shift = _affine(norm)
    return F.conv2d(x, conv.weight * scale.view(-1, 1, 1, 1), shift, conv.stride, conv.padding, conv.dilation,
                    conv.groups)  # fmt: skip


def _stage(blocks: nn.Module, x: Tensor) -> Tensor:
    """The blocks of a stage, one after the other, as torchvision's forward passes have them."""
    for block in cast(Any, blocks):
        same = x if block.downsample is None else _normed(block.downsample[0], block.downsample[1], x)
        x = F.relu_(_normed(block.conv1, block.bn1, x))
        x = _normed(block.conv2, block.bn2, x)
        if isinstance(block, resnet.Bottleneck):
            x = _normed(block.conv3, block.bn3, F.relu_(x))
        x = F.relu_(x + same)
    return x


class MLPHead(nn.Module):
    """Two fully connected layers."""

    def __init__(self, channels: int, roi_size: int, width: int):
        super().__init__()
        self.fc1 = nn.Linear(channels * roi_size**2, width)
        self.fc2 = nn.Linear(width, width)
        self.apply(_initialise)

    def forward(self, pooled: Tensor) -> Tensor:
        return F.relu(self.fc2(F.relu(self.fc1(pooled.flatten(1)))))


class ConvHead(nn.Module):
    """`head_convs` 3x3 convolutions and a fully connected layer (Wu and He, Group Normalization, ECCV 2018)."""

    def __init__(self, channels: int, config: Model):
        super().__init__()
        grouped = config.norm == "gn"
        layers: list[nn.Module] = []
        for _ in range(config.head_convs):
            layers.append(nn.Conv2d(channels, PYRAMID, 3, padding=1, bias=not grouped))
            layers += [group_norm32(PYRAMID), nn.ReLU()] if grouped else [nn.ReLU()]
            channels = PYRAMID
        self.convs = nn.Sequential(*layers)
        self.fc = nn.Linear(channels * config.roi_size**2, config.head_width)
        self.apply(_initialise)

    def forward(self, pooled: Tensor) -> Tensor:
        return F.relu(self.fc(self.convs(pooled).flatten(1)))


class TinyBody(Body):
    """A body of 2.0 M parameters for drawings and tests: proposals at stride 8, regions at stride 4 after a merge."""

    rpn_strides, roi_strides = (8,), (4,)
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


def group_norm32(channels: int) -> nn.GroupNorm:
    """GroupNorm in 32 groups, whatever the channels (Wu and He, ECCV 2018)."""
    return nn.GroupNorm(32, channels)


def _initialise(layer: nn.Module) -> None:
    """Detectron's MSRAFill for convolutions, its XavierFill for layers (uniform of variance 1 / inputs), biases 0.

    The bodies of torchvision start like that; its nn.Linear, of a third of that variance, does not.
    """
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(layer, nn.Linear):
        nn.init.kaiming_uniform_(layer.weight, a=1)
    if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _to_size_of(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="nearest")
