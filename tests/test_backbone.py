"""Bodies and box heads. Shapes are those of meta tensors: no arithmetic, whatever the depth."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from lcrnet import backbone
from lcrnet.config import Model

DEPTHS = {"tiny": 320, "resnet18": 512, "resnet34": 512, "resnet50": 2048, "resnet101": 2048, "resnet152": 2048}


@pytest.mark.parametrize("roi_size", [7, 14])
@pytest.mark.parametrize("name", DEPTHS)
def test_shapes_and_strides(name: str, roi_size: int) -> None:
    with torch.device("meta"):
        body, head, width = backbone.build(Model(backbone=name, roi_size=roi_size))
        maps = body(torch.zeros(2, 3, 96, 160))
        pooled = torch.zeros(5, body.roi_channels, roi_size, roi_size)
        assert head(pooled).shape == (5, width) and width == DEPTHS[name]
        if isinstance(head, backbone.Res5Head):  # the same 7 x 7 either way
            assert head.layer4(pooled).shape == (5, width, 7, 7)
    assert (body.rpn_stride, body.roi_stride) == ((8, 4) if name == "tiny" else (16, 16))
    for stride, channels in ((body.rpn_stride, body.rpn_channels), (body.roi_stride, body.roi_channels)):
        assert maps[stride].shape == (2, channels, 96 // stride, 160 // stride)


def test_box_head_is_the_last_stage_of_the_resnet() -> None:
    """Body and 14-bin head one after the other are the classification network up to its mean."""
    from torchvision.models import resnet

    torch.manual_seed(0)
    net = resnet.resnet18(norm_layer=FrozenBatchNorm2d).eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        net.fc = nn.Identity()
        goal = net(image)
        body, head = backbone.ResNetC4(net, 0), backbone.Res5Head(net, 14)
        torch.testing.assert_close(head(body(image)[16]), goal)


@pytest.mark.parametrize("depth", range(5))
def test_freeze(depth: int) -> None:
    """The first stages, and they alone, get no gradient."""
    torch.manual_seed(0)
    body, head, _ = backbone.build(Model(backbone="resnet18", freeze=depth))
    stages = [nn.ModuleList([body.conv1, body.bn1]), body.layer1, body.layer2, body.layer3]
    for i, stage in enumerate(stages):
        assert {p.requires_grad for p in stage.parameters()} == {i >= depth}
    assert all(p.requires_grad for p in head.parameters())


def test_frozen_stages_get_no_gradient() -> None:
    body, _, _ = backbone.build(Model(backbone="resnet18", freeze=2))
    body(torch.rand(1, 3, 32, 32))[16].sum().backward()
    has = {name: p.grad is not None for name, p in body.named_parameters()}
    assert {name.split(".")[0] for name, got in has.items() if got} == {"layer2", "layer3"}
    assert not any(got for name, got in has.items() if name.startswith(("conv1", "layer1")))


def test_norms() -> None:
    with torch.device("meta"):
        frozen = backbone.build(Model(backbone="resnet50"))[:2]
        grouped = backbone.build(Model(backbone="resnet50", norm="gn"))[:2]
    kinds = [{type(m) for part in parts for m in part.modules()} for parts in (frozen, grouped)]
    assert FrozenBatchNorm2d in kinds[0] and nn.GroupNorm not in kinds[0]
    assert nn.GroupNorm in kinds[1] and FrozenBatchNorm2d not in kinds[1]
    assert nn.BatchNorm2d not in kinds[0] | kinds[1]
    # frozen means: neither trained nor counted
    assert not any("bn" in name for part in frozen for name, _ in part.named_parameters())
    for channels in (16, 32, 48, 64, 256, 512, 2048):
        norm = backbone.group_norm(channels)
        assert norm.num_groups == (32 if channels >= 512 else channels // 16)


def test_tiny_is_as_small_as_it_says() -> None:
    body, _, _ = backbone.build(Model(backbone="tiny"))
    said = re.search(r"of ([\d.]+) M parameters", backbone.TinyBody.__doc__ or "")
    assert said and abs(sum(p.numel() for p in body.parameters()) / 1e6 - float(said[1])) < 0.05


def test_residual_starts_as_the_identity() -> None:
    x = torch.rand(1, 32, 8, 8)
    torch.testing.assert_close(backbone.Residual(32)(x), x)
