"""Bodies and box heads. Shapes are those of meta tensors: no arithmetic, whatever the depth."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torchvision.models import resnet
from torchvision.ops.misc import FrozenBatchNorm2d

from lcrnet import backbone, ops
from lcrnet.backbone import ConvHead, MLPHead, Res5Head, ResNetBody, VGG16Body
from lcrnet.config import Model

STAGE5 = {name: 512 if name in ("resnet18", "resnet34") else 2048 for name in backbone.RESNETS}
BODIES = {  # of a ResNet with w channels in stage 5: strides and channels for proposals, the same for regions
    "c4": lambda w: ((16,), w // 2, (16,), w // 2),
    "c5": lambda w: ((32,), w, (32,), w),
    "fpn": lambda w: ((4, 8, 16, 32, 64), 256, (4, 8, 16, 32), 256),
    "fpn_p2": lambda w: ((4,), 256, (4,), 256),
}
HEADS = {"c4": ["res5", "2mlp", "conv"], "c5": ["2mlp", "conv"], "fpn": ["2mlp", "conv"], "fpn_p2": ["conv", "2mlp"]}
KINDS = {"res5": Res5Head, "2mlp": MLPHead, "conv": ConvHead}


def build(**model: Any) -> tuple[Any, Any, int]:
    with torch.device("meta"):
        return backbone.build(Model(**model))


def check(body: Any, head: Any, width: int, roi_size: int) -> None:
    """Maps of the strides and channels that the body tells, and vectors of the head's width."""
    with torch.device("meta"):
        maps = body(torch.zeros(2, 3, 96, 160))
        assert set(maps) == {*body.rpn_strides, *body.roi_strides}
        for strides, channels in ((body.rpn_strides, body.rpn_channels), (body.roi_strides, body.roi_channels)):
            for s in strides:
                assert maps[s].shape == (2, channels, -(-96 // s), -(-160 // s))
        bins = -(-roi_size // getattr(head, "step", 1))
        assert head(torch.zeros(5, body.roi_channels, bins, bins)).shape == (5, width)


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("name", sorted(STAGE5))
def test_shapes_and_strides(name: str, kind: str) -> None:
    """Every ResNet and ResNeXt, every body; the heads that go with it, and the other norm, on ResNet-18 and 50."""
    small = name in ("resnet18", "resnet50")
    for norm in ("frozen_bn", "gn") if small else ("gn",):
        for given in HEADS[kind] if small else HEADS[kind][:1]:
            body, head, width = build(backbone=name, body=kind, head=given, norm=norm, head_width=96, head_convs=2)
            found = (body.rpn_strides, body.rpn_channels, body.roi_strides, body.roi_channels)
            assert found == BODIES[kind](STAGE5[name])
            assert isinstance(head, KINDS[given]) and width == (STAGE5[name] if given == "res5" else 96)
            check(body, head, width, 7)


@pytest.mark.parametrize("head", ["2mlp", "conv"])
def test_vgg16(head: str) -> None:
    body, box_head, width = build(backbone="vgg16", head=head, head_width=4096, freeze=2)
    assert isinstance(body, VGG16Body) and width == 4096
    check(body, box_head, width, 7)
    convolutions = [layer for layer in body.features if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    # pool2 is where Detectron stops the gradient
    assert [layer.weight.requires_grad for layer in convolutions] == [False] * 4 + [True] * 9
    for freeze, trained in enumerate([13, 11, 9, 6, 3, 0]):
        body = build(backbone="vgg16", head=head, freeze=freeze)[0]
        assert sum(p.requires_grad for p in body.parameters()) == 2 * trained


def test_tiny() -> None:
    body, head, width = build(backbone="tiny")
    assert (body.rpn_strides, body.roi_strides, width) == ((8,), (4,), 320)
    check(body, head, width, 7)
    said = re.search(r"of ([\d.]+) M parameters", backbone.TinyBody.__doc__ or "")
    assert said and abs(sum(p.numel() for p in body.parameters()) / 1e6 - float(said[1])) < 0.05


REFUSED = [
    ({"backbone": "vgg16"}, "vgg16 goes with body: c4, head: 2mlp or conv"),
    ({"backbone": "vgg16", "body": "fpn", "head": "2mlp"}, "vgg16 goes with body: c4"),
    ({"backbone": "vgg16", "head": "2mlp", "norm": "gn"}, "norm: frozen_bn"),
    ({"body": "c5"}, "head res5 is stage 5 again, so body c5 needs head: 2mlp or conv"),
    ({"body": "fpn"}, "body fpn needs head"),
    ({"backbone": "resnet34", "stride_in_1x1": True}, "resnet34 has no 1x1"),
    ({"dilate_c5": True}, "dilate_c5 is for body: c5"),
    ({"backbone": "resnet18", "body": "c5", "head": "2mlp", "dilate_c5": True}, "ResNet-50 or larger"),
    ({"body": "fpn", "head": "2mlp", "pool": "crop"}, "pooled with pool: align"),
    ({"backbone": "resnet51"}, "backbone"),
    ({"freeze": 6}, "freeze"),
]


@pytest.mark.parametrize(("model", "says"), REFUSED, ids=[str(m) for m, _ in REFUSED])
def test_what_does_not_go_together(model: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(says)):
        Model(**model)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_names_are_torchvisions(name: str) -> None:
    """Body and res5 head hold the names and shapes of torchvision's network, all but its last layer."""
    with torch.device("meta"):
        net = getattr(resnet, name)(norm_layer=FrozenBatchNorm2d)
    goal = {k: v.shape for k, v in net.state_dict().items() if not k.startswith("fc.")}
    body, head, _ = build(backbone=name)
    assert {k: v.shape for part in (body, head) for k, v in part.state_dict().items()} == goal
    whole = build(backbone=name, body="c5", head="2mlp")[0]
    assert {k: v.shape for k, v in whole.state_dict().items()} == goal


def test_names_of_pyramid_and_heads() -> None:
    body, head, _ = build(backbone="resnet50", body="fpn", head="2mlp")
    names = {k for k in body.state_dict() if k.startswith("fpn.")}
    parts = ("inner_blocks", "layer_blocks")
    assert names == {f"fpn.{b}.{n}.0.{p}" for b in parts for n in range(4) for p in ("weight", "bias")}
    assert [body.fpn.inner_blocks[n][0].in_channels for n in range(4)] == [256, 512, 1024, 2048]  # finest first
    assert set(head.state_dict()) == {f"{layer}.{p}" for layer in ("fc1", "fc2") for p in ("weight", "bias")}
    body, head, _ = build(backbone="resnet50", body="fpn", head="conv", norm="gn")
    names = {k for k in body.state_dict() if k.startswith("fpn.")}
    kinds = ("0.weight", "1.weight", "1.bias")
    assert names == {f"fpn.{b}.{n}.{k}" for b in parts for n in range(4) for k in kinds}
    layers = {f"convs.{3 * n}.weight" for n in range(4)} | {f"convs.{3 * n + 1}.{p}" for n in range(4)
                                                          for p in ("weight", "bias")}  # fmt: skip
    assert set(head.state_dict()) == layers | {"fc.weight", "fc.bias"}
    plain = build(backbone="resnet50", body="fpn", head="conv")[1]
    assert set(plain.state_dict()) == {f"{layer}.{p}" for layer in ("convs.0", "convs.2", "convs.4", "convs.6", "fc")
                                       for p in ("weight", "bias")}  # fmt: skip


def test_p2_is_that_of_the_pyramid() -> None:
    torch.manual_seed(0)
    pyramid = ResNetBody(*_net(backbone="resnet18", body="fpn", head="2mlp"))
    finest = ResNetBody(*_net(backbone="resnet18", body="fpn_p2", head="2mlp"))
    finest.load_state_dict(pyramid.state_dict())
    image = torch.rand(1, 3, 72, 104)  # no multiple of 32
    with torch.no_grad():
        assert set(finest(image)) == {4}
        torch.testing.assert_close(finest(image)[4], pyramid(image)[4])
    finest(image)[4].sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in finest.parameters())


def _net(**model: Any) -> tuple[Any, Model]:
    config = Model(**model)
    return backbone._resnet(config), config


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("stride_in_1x1", [False, True])
def test_box_head_is_the_last_stage_of_the_resnet(name: str, stride_in_1x1: bool) -> None:
    """Body and 14-bin head one after the other are the classification network up to its mean."""
    if name == "resnet18" and stride_in_1x1:
        return  # refused
    torch.manual_seed(0)
    net, config = _net(backbone=name, roi_size=14, stride_in_1x1=stride_in_1x1)
    net = net.double()  # ours multiplies the norms into the weights, which rounds otherwise
    image = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        net.fc = nn.Identity()
        goal = net.eval()(image)
        net.fc = nn.Linear(goal.shape[1], 1)
        body, head = ResNetBody(net, config), Res5Head(net.layer4, config)
        assert head.step == (2 if stride_in_1x1 else 1)
        torch.testing.assert_close(head(body(image)[16][..., :: head.step, :: head.step]), goal)


STRIDES = [  # (res5_stride, roi_size, stride_in_1x1) -> (step, strides of conv1, conv2 and the shortcut)
    ((0, 7, False), (1, 1, 1, 1)),
    ((0, 7, True), (1, 1, 1, 1)),
    ((0, 14, False), (1, 1, 2, 2)),
    ((0, 14, True), (2, 1, 1, 1)),
    ((2, 7, False), (1, 1, 2, 2)),
    ((2, 7, True), (2, 1, 1, 1)),
    ((1, 14, False), (1, 1, 1, 1)),
]


@pytest.mark.parametrize(("given", "goal"), STRIDES)
def test_stride_of_the_res5_head(given: tuple[int, int, bool], goal: tuple[int, ...]) -> None:
    stride, size, in_1x1 = given
    _, head, _ = build(backbone="resnet50", res5_stride=stride, roi_size=size, stride_in_1x1=in_1x1)
    first = head.layer4[0]
    found = (head.step, first.conv1.stride[0], first.conv2.stride[0], first.downsample[0].stride[0])
    assert found == goal
    check(*build(backbone="resnet50", res5_stride=stride, roi_size=size, stride_in_1x1=in_1x1), size)


def _fixed(net: nn.Module) -> nn.Module:
    """Frozen norms as of pretrained weights: no two channels alike, activations that stay of one size."""
    for name, module in net.named_modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.uniform_(0.5, 1.5).mul_(0.3 if name.endswith("bn3") else 1)
            module.bias.uniform_(-0.3, 0.3)
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 2)
    return net


def _apart(found: torch.Tensor, goal: torch.Tensor) -> float:
    return float((found.detach() - goal.detach()).abs().max() / goal.detach().abs().max())


@pytest.mark.parametrize("body", ["c4", "c5"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_frozen_norms_in_the_weights(name: str, body: str) -> None:
    """The body is torchvision's ResNet, values and gradients, with frozen norms multiplied into the weights or GN."""
    for norm in ("frozen_bn", "gn"):
        torch.manual_seed(0)
        head = {"head": "res5" if body == "c4" else "2mlp"}
        net, config = _net(backbone=name, body=body, norm=norm, freeze=0, **head)
        net, image = _fixed(net).double(), torch.rand(1, 3, 64, 96, dtype=torch.float64)
        x = net.maxpool(net.relu(net.bn1(net.conv1(image))))
        goal = net.layer3(net.layer2(net.layer1(x)))
        goal = net.layer4(goal) if body == "c5" else goal
        mine = ResNetBody(net, config)
        found = mine(image)[mine.roi_strides[0]]
        assert _apart(found, goal) < 1e-12
        weights = [p for p in mine.parameters() if p.ndim == 4]
        upstream = torch.randn_like(goal)
        for one, other in zip(*(torch.autograd.grad(y, weights, upstream) for y in (found, goal)), strict=True):
            assert _apart(one, other) < 1e-12


EDGES = torch.tensor([
    [0, 3, 5, 60, 70], [0, 0, 0, 96, 96], [0, -40, -30, 20, 20], [0, 80, 70, 200, 150], [0, 300, 300, 400, 400],
    [0, 10, 10, 11, 90], [0, torch.nan, 0, 5, 5], [7, 0, 0, 50, 50],
])  # fmt: skip
"""Regions within the image, of its size, over its borders, outside, thin, not finite, of no image."""


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(("given", "goal"), STRIDES)
def test_projecting_before_pooling_is_exact(
    given: tuple[int, int, bool], goal: tuple[int, ...], aligned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients of all weights and of the map; regions at the border too.

    In float64 nothing is left of a difference. In float32 rounding decides the sign of a few activations near 0, and
    with it whether they pass a gradient, so gradients are compared by their norm.
    """
    stride, size, in_1x1 = given
    torch.manual_seed(0)
    monkeypatch.setitem(backbone.RESNETS, "resnet50", (resnet.Bottleneck, (1, 1, 1, 2), 1, 8))  # a small one
    net, config = _net(backbone="resnet50", res5_stride=stride, roi_size=size, stride_in_1x1=in_1x1)
    head = Res5Head(_fixed(net).layer4, config)
    cells = torch.rand(1, 1024, 6, 6).to(memory_format=torch.channels_last)

    def pool(map: torch.Tensor, step: int) -> torch.Tensor:
        return ops.roi_align(map, EDGES, size, 1 / 16, 2, aligned, step=step)

    for kind, of_value, of_gradient in ((torch.float32, 1e-5, 1e-3), (torch.float64, 1e-12, 1e-12)):
        head, map = head.to(kind), cells.to(kind).requires_grad_()
        usual = head(pool(map, head.step))
        parts = [pool(part, head.step * s) for part, s in zip(head.project(map), head.strides, strict=True)]
        fast = head.from_projections(*parts)
        assert _apart(fast, usual) <= of_value
        upstream = torch.randn_like(usual)
        wanted = [map, *head.parameters()]
        every = [torch.autograd.grad(y, wanted, upstream) for y in (fast, usual)]
        assert len(every[0]) == 8
        for one, other in zip(*every, strict=True):
            assert other.any() and (one - other).norm() <= of_gradient * other.norm()


def test_where_projecting_pays() -> None:
    """By cells against bins that are read; never with GroupNorm or without 1x1 convolutions."""
    head = build(backbone="resnet50")[1]
    assert head.projects(1200, 256, 7) and not head.projects(1200, 10, 7)
    assert head.projects(600, 25, 7) and not head.projects(600, 24, 7)  # 49 bins a region, 2 x 600 cells
    strided = build(backbone="resnet50", res5_stride=2)[1]  # the shortcut reads 16 bins, the first convolution 49
    bins = (512 * 49 + 2048 * 16) / 2560
    assert [strided.projects(600, n, 7) for n in (int(1200 / bins), int(1200 / bins) + 1)] == [False, True]
    for other in ({"backbone": "resnet50", "norm": "gn"}, {"backbone": "resnet34"}):
        assert not build(**other)[1].projects(1, 1000, 7)


def test_stride_in_1x1() -> None:
    for in_1x1 in (False, True):
        body = build(backbone="resnet50", body="c5", head="2mlp", stride_in_1x1=in_1x1)[0]
        for n, layer in enumerate((body.layer1, body.layer2, body.layer3, body.layer4)):
            strides = [(block.conv1.stride[0], block.conv2.stride[0]) for block in layer]
            halves = [(2, 1) if in_1x1 else (1, 2)] if n else [(1, 1)]
            assert strides == halves + [(1, 1)] * (len(layer) - 1)


@pytest.mark.parametrize("in_1x1", [False, True])
def test_dilated_stage5_is_the_strided_one_at_four_times_the_places(in_1x1: bool) -> None:
    """Every other cell of the dilated map is the map with the stride: the same weights, read more densely."""
    torch.manual_seed(0)
    given = {"backbone": "resnet50", "body": "c5", "head": "2mlp", "stride_in_1x1": in_1x1}
    strided, dilated = ResNetBody(*_net(**given)), ResNetBody(*_net(**given, dilate_c5=True))
    dilated.load_state_dict(strided.state_dict())
    strided, dilated = strided.double(), dilated.double()  # the two convolutions add up in different orders
    assert (strided.roi_strides, dilated.roi_strides, dilated.rpn_strides) == ((32,), (16,), (16,))
    image = torch.rand(1, 3, 128, 128, dtype=torch.float64)
    with torch.no_grad():
        coarse, fine = strided(image)[32], dilated(image)[16]
    assert fine.shape[-2:] == (8, 8)
    torch.testing.assert_close(fine[..., ::2, ::2], coarse)
    check(*build(**given, dilate_c5=True), 7)


@pytest.mark.parametrize("kind", ["c4", "c5", "fpn"])
@pytest.mark.parametrize("depth", range(6))
def test_freeze(kind: str, depth: int) -> None:
    """The first stages, and they alone, get no gradient."""
    body, head, _ = build(backbone="resnet18", body=kind, head="2mlp", norm="gn", freeze=depth)
    stages = [nn.ModuleList([body.conv1, body.bn1]), body.layer1, body.layer2, body.layer3]
    stages += [body.layer4] if kind != "c4" else []
    for i, stage in enumerate(stages):
        assert {p.requires_grad for p in stage.parameters()} == {i >= depth}
    rest = [*head.parameters(), *(body.fpn.parameters() if kind == "fpn" else [])]
    assert all(p.requires_grad for p in rest)


def test_frozen_stages_get_no_gradient() -> None:
    body, _, _ = backbone.build(Model(backbone="resnet18", freeze=2))
    body(torch.rand(1, 3, 32, 32))[16].sum().backward()
    has = {name: p.grad is not None for name, p in body.named_parameters()}
    assert {name.split(".")[0] for name, got in has.items() if got} == {"layer2", "layer3"}
    assert not any(got for name, got in has.items() if name.startswith(("conv1", "layer1")))


@pytest.mark.parametrize("kind", ["c4", "fpn"])
def test_norms(kind: str) -> None:
    head = {"head": "res5" if kind == "c4" else "conv"}
    frozen = build(backbone="resnet50", body=kind, **head)[:2]
    grouped = build(backbone="resnet50", body=kind, norm="gn", **head)[:2]
    kinds = [{type(m) for part in parts for m in part.modules()} for parts in (frozen, grouped)]
    assert FrozenBatchNorm2d in kinds[0] and nn.GroupNorm not in kinds[0]
    assert nn.GroupNorm in kinds[1] and FrozenBatchNorm2d not in kinds[1]
    assert nn.BatchNorm2d not in kinds[0] | kinds[1]
    assert {m.num_groups for part in grouped for m in part.modules() if isinstance(m, nn.GroupNorm)} == {32}
    # frozen means: neither trained nor counted
    assert not any("bn" in name for part in frozen for name, _ in part.named_parameters())
    for channels in (16, 32, 48, 64, 256, 512, 2048):
        norm = backbone.group_norm(channels)
        assert norm.num_groups == (32 if channels >= 512 else channels // 16)


def test_weights_start_as_detectrons() -> None:
    """MSRAFill: deviation (2 / (outputs * 9))^1/2; XavierFill: uniform, variance 1 / inputs; biases 0."""
    torch.manual_seed(0)
    body, head, _ = backbone.build(Model(backbone="resnet18", body="fpn", head="conv", head_width=64, head_convs=1))
    convolution, layer = head.convs[0], head.fc
    assert abs(convolution.weight.std() / (2 / (256 * 9)) ** 0.5 - 1) < 0.01
    assert abs(layer.weight.std() * (256 * 49) ** 0.5 - 1) < 0.01
    assert abs(layer.weight).max() <= (3 / (256 * 49)) ** 0.5 and not layer.bias.any() and not convolution.bias.any()
    inner = body.fpn.inner_blocks[0][0]
    assert abs(inner.weight.std() * 64**0.5 - 1) < 0.02 and not inner.bias.any()
    mlp = backbone.build(Model(backbone="resnet18", body="fpn", head="2mlp", head_width=64))[1]
    assert abs(mlp.fc1.weight.std() * (256 * 49) ** 0.5 - 1) < 0.01 and not mlp.fc1.bias.any()
    first = VGG16Body(0).features[2]
    assert abs(first.weight.std() / (2 / (64 * 9)) ** 0.5 - 1) < 0.02 and not first.bias.any()


def test_residual_starts_as_the_identity() -> None:
    x = torch.rand(1, 32, 8, 8)
    torch.testing.assert_close(backbone.Residual(32)(x), x)
