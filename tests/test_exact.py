"""Weights of the original networks: boxes, scores and poses are those of the originals, before and after PPI.

The originals are golden/detectron_reference.py and golden/dope_reference.py, written apart from lcrnet.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models import resnet50
from torchvision.models.detection.rpn import AnchorGenerator, RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from lcrnet import anchors, config, legacy, ppi
from lcrnet.anchors import AnchorPoses
from lcrnet.model import LCRNet, build
from lcrnet.pose import PoseProposals
from lcrnet.rpn import RPN, anchor_boxes

sys.path.insert(0, str(Path(__file__).parent / "golden"))
import detectron_reference
import dope_reference
import ppi_reference
from detectron_reference import Result, Setting

K, J = 6, 13
OUR_FRAME = np.array([-1, -1, 1], np.float32)  # x right, y down; all of the originals: x left, y up
PPI = {"th_pose3D": 0.3, "th_iou": 0.1, "iou_func": "bbox_torsohead", "min_mode_score": 0.1, "th_persondetect": 0.5}
MOST = {"box": 0.01, "score": 1e-4, "pose2d": 0.05, "pose3d": 1e-4}  # pixels, 1, pixels, metres


# Weights in the originals' names, such that nothing saturates


class Weights(dict[str, Tensor]):
    """Random ones by name."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)

    def even(self, *shape: int) -> Tensor:
        """Mean 0, variance 1; faster made than normal ones."""
        return (torch.rand(*shape, generator=self.random) - 0.5) * 12**0.5

    def conv(self, name: str, outputs: int, inputs: int, size: int, bias: bool = False, gain: float = 1) -> None:
        self[name + ".weight"] = self.even(outputs, inputs, size, size) * gain * (2 / inputs / size**2) ** 0.5
        if bias:
            self[name + ".bias"] = self.even(outputs) * 0.1

    def linear(self, name: str, outputs: int, inputs: int, gain: float = 1) -> None:
        self[name + ".weight"] = self.even(outputs, inputs) * gain * (2 / inputs) ** 0.5
        self[name + ".bias"] = self.even(outputs) * 0.1

    def norm(self, name: str, channels: int, gain: float = 1) -> None:
        self[name + ".weight"] = gain * (torch.rand(channels, generator=self.random) + 0.5)
        self[name + ".bias"] = self.even(channels) * 0.3

    def stage(self, name: str, inputs: int, inner: int, blocks: int) -> None:
        for i in range(blocks):
            block, before = f"{name}.{i}", inputs if i == 0 else 4 * inner
            for n, (a, b, size) in enumerate([(inner, before, 1), (inner, inner, 3), (4 * inner, inner, 1)], 1):
                self.conv(f"{block}.conv{n}", a, b, size)
                self.norm(f"{block}.bn{n}", a, 0.3 if n == 3 else 1)
        self.conv(f"{name}.0.downsample.0", 4 * inner, inputs, 1)
        self.norm(f"{name}.0.downsample.1", 4 * inner)


def anchor_poses(rng: np.random.Generator) -> np.ndarray:
    """(K, 5 J) in the old layout: three 3D poses, for boxes of the whole body and of the upper body."""
    rest = np.array([[-0.1, -0.8], [0.1, -0.8], [-0.1, -0.4], [0.1, -0.4], [-0.1, 0], [0.1, 0], [-0.3, 0.1], [0.3, 0.1],
                     [-0.25, 0.3], [0.25, 0.3], [-0.2, 0.5], [0.2, 0.5], [0, 0.7]])  # fmt: skip
    deep = np.concatenate([np.tile(rest, (3, 1, 1)), np.zeros((3, J, 1))], 2) + rng.normal(0, 0.08, (3, J, 3))
    deep -= deep[:, [4, 5, 10, 11]].mean(1, keepdims=True)
    flat = []
    for joints in (slice(None), slice(4, None)):  # in units of the box round these joints; x and y fall with X and Y
        low, high = -deep[:, joints, :2].max(1, keepdims=True), -deep[:, joints, :2].min(1, keepdims=True)
        flat.append((-deep[..., :2] - low) / (high - low))
    poses = np.concatenate([np.concatenate(flat), np.concatenate([deep, deep])], 2)
    return poses.transpose(0, 2, 1).reshape(K, 5 * J).astype(np.float32)


class Calibrating(detectron_reference.Network):
    """Writes the weights of the affine channels, so that activations have a variance of about 1 whatever the depth."""

    def affine(self, x: Tensor, name: str) -> Tensor:
        var, mean = torch.var_mean(x, (0, 2, 3))
        self.weights[name + ".weight"] /= (var + mean**2).sqrt()  # not by var: it would blow up rounding errors
        self.weights[name + ".bias"] -= mean * self.weights[name + ".weight"]
        return super().affine(x, name)


class CalibratingDope(dope_reference.Network):
    """Writes the running statistics."""

    def norm(self, x: Tensor, name: str) -> Tensor:
        self.weights[name + ".running_var"], self.weights[name + ".running_mean"] = torch.var_mean(x, (0, 2, 3))
        self.weights[name + ".running_var"] += self.weights[name + ".running_mean"] ** 2
        return super().norm(x, name)


def old_network(setting: Setting, image: np.ndarray, seed: int = 0) -> detectron_reference.Network:
    """A network of the predecessor, with random weights, calibrated on a BGR image."""
    w, shapes = Weights(seed), len(setting.sizes) * len(setting.ratios)
    prefix = {"c4": "Conv_Body.", "fpn": "Conv_Body.conv_body.", "vgg": ""}[setting.body]
    channels, rpn = {"c4": (1024, "RPN.RPN_"), "fpn": (256, "RPN.FPN_RPN_"), "vgg": (512, "RPN.RPN_")}[setting.body]
    if setting.body == "vgg":
        inputs = 3
        for stage, (outputs, layers) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)], 1):
            for i in range(layers):
                w.conv(f"Conv_Body.conv{stage}_{i + 1}", outputs, inputs, 3, bias=True)
                inputs = outputs
        w["Conv_Body.conv1_1.weight"] /= 60
    else:
        w.conv(prefix + "res1.conv1", 64, 3, 7)
        w.norm(prefix + "res1.bn1", 64)
        for n, blocks in enumerate(setting.blocks[: 3 if setting.body == "c4" else 4]):
            w.stage(f"{prefix}res{n + 2}", 64 if n == 0 else 128 * 2**n, 64 * 2**n, blocks)
    if setting.body == "fpn":
        shapes = len(setting.ratios)
        w.conv("Conv_Body.conv_top", 256, 2048, 1, bias=True)
        for i, inputs in enumerate((1024, 512, 256)):
            w.conv(f"Conv_Body.topdown_lateral_modules.{i}.conv_lateral", 256, inputs, 1, bias=True)
        for i in range(4):
            w.conv(f"Conv_Body.posthoc_modules.{i}", 256, 256, 3, bias=True, gain=0.5)
    w.conv(rpn + "conv", channels, channels, 3, bias=True)
    w.conv(rpn + "cls_score", shapes * (2 if setting.softmax else 1), channels, 1, bias=True)
    w.conv(rpn + "bbox_pred", 4 * shapes, channels, 1, bias=True, gain=0.1)
    width = 2048
    if setting.body == "c4":
        w.stage("Box_Head.res5", 1024, 512, 3)
    else:
        width = 96
        w.linear("Box_Head.fc1", width, channels * setting.resolution**2)
        w.linear("Box_Head.fc2", width, width)
    w.linear("Pose_Outs.cls_score", K + 1, width, gain=1.5)
    w.linear("Pose_Outs.pose_pred", (K + 1) * 5 * J, width, gain=0.3)
    poses = anchor_poses(np.random.default_rng(seed))
    Calibrating(w, poses, setting).detect(image)
    return detectron_reference.Network(w, poses, setting)


def with_softmax(old: detectron_reference.Network, setting: Setting) -> detectron_reference.Network:
    """The same network with another RPN, which has two logits a box."""
    weights, shapes = dict(old.weights), len(setting.sizes) * len(setting.ratios)
    for leaf in ("weight", "bias"):
        logits, offsets = weights["RPN.RPN_cls_score." + leaf], weights["RPN.RPN_bbox_pred." + leaf]
        weights["RPN.RPN_cls_score." + leaf] = torch.cat([logits.flip(0), logits])[: 2 * shapes]
        weights["RPN.RPN_bbox_pred." + leaf] = offsets[: 4 * shapes].clone()
    return replace(old, weights=weights, setting=setting)


def dope_network(image: np.ndarray, seed: int = 0, **settings: int) -> dope_reference.Network:
    """DOPE's, of half precision as the released ones, calibrated on an RGB image."""
    w = Weights(seed)
    body, head, says = dope_reference.BODY, dope_reference.HEAD, dope_reference.SAYS
    w.conv(body + "conv1", 64, 3, 7)
    w.norm(body + "bn1", 64)
    for n, blocks in enumerate((3, 4, 6)):
        w.stage(f"{body}layer{n + 1}", 64 if n == 0 else 128 * 2**n, 64 * 2**n, blocks)
    w.stage(head + "layer4", 1024, 512, 3)
    w.conv("rpn.head.conv", 1024, 1024, 3, bias=True)
    w.conv("rpn.head.cls_logits", 15, 1024, 1, bias=True)
    w.conv("rpn.head.bbox_pred", 60, 1024, 1, bias=True, gain=0.1)
    w.linear(says + "body_cls_score", K + 1, 2048, gain=1.5)
    w.linear(says + "body_pose_pred", K * 5 * J, 2048, gain=0.3)
    poses = anchor_poses(np.random.default_rng(seed)).reshape(K, 5, J).transpose(0, 2, 1)
    w["roi_heads.body_anchor_poses"] = torch.from_numpy(poses.copy())
    CalibratingDope(w, **settings).detect(image)
    return dope_reference.Network({name: t.half().float() for name, t in w.items()}, **settings)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Blots of several sizes and noise, uint8."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for cell in (1, 4, 16, 40):
        small = rng.normal(0, 30, (-(-height // cell), -(-width // cell), 3))
        total += small.repeat(cell, 0).repeat(cell, 1)[:height, :width]
    return np.clip(total + 120, 0, 255).astype(np.uint8)


# The same weights in our network


def written(old: Any, folder: Path) -> Path:
    """A file such as the original programs wrote or read."""
    file = folder / "original.pth"
    if isinstance(old, dope_reference.Network):
        kwargs = {"min_size": old.min_size, "max_size": old.max_size, "rpn_pre_nms_top_n_test": old.pre_nms,
                  "num_anchor_poses": {"body": K, "hand": 0, "face": 0}}  # fmt: skip
        state = {name: tensor.half() for name, tensor in old.weights.items()}
        # Body and head are one ResNet there, which the file has twice.
        body, head = dope_reference.BODY, dope_reference.HEAD
        state |= {name.replace(head, body): t for name, t in state.items() if name.startswith(head)}
        state |= {name.replace(body, head): t for name, t in state.items() if name.startswith(body)}
        torch.save({"state_dict": state, "dope_kwargs": kwargs, "half": True, "body_ppi_kwargs": {"K": K // 2}}, file)
        return file
    s = old.setting
    boxes = {"c4": "ResNet.ResNet_roi_conv5_head", "fpn": "lcrnet_heads.roi_2mlp_head"}
    cfg = {
        "MODEL": {"CONV_BODY": {"c4": "ResNet.ResNet50_conv4_body", "fpn": "FPN.fpn_ResNet50_conv5_body"}[s.body],
                  "TYPE": "generalized_rcnn", "FASTER_RCNN": True, "NUM_CLASSES": K + 1},
        "RESNETS": {"STRIDE_1X1": s.stride_1x1},
        "RPN": {"SIZES": s.sizes, "ASPECT_RATIOS": s.ratios, "CLS_ACTIVATION": "softmax" if s.softmax else "sigmoid"},
        "FAST_RCNN": {"ROI_BOX_HEAD": boxes[s.body], "ROI_XFORM_METHOD": s.method, "MLP_HEAD_DIM": 96,
                      "ROI_XFORM_RESOLUTION": s.resolution, "ROI_XFORM_SAMPLING_RATIO": s.sampling_ratio},
        "FPN": {"FPN_ON": s.body == "fpn", "MULTILEVEL_RPN": s.body == "fpn", "MULTILEVEL_ROIS": s.body == "fpn"},
        "TEST": {"SCALE": s.scale, "MAX_SIZE": s.max_size, "NMS": 0.5, "RPN_NMS_THRESH": s.nms, "BBOX_REG": False,
                 "RPN_PRE_NMS_TOP_N": s.pre_nms, "RPN_POST_NMS_TOP_N": s.post_nms},
    }  # fmt: skip
    torch.save({"model": dict(old.weights), "anchor_poses": old.anchor_poses, "cfg": cfg, "ppi_params": PPI}, file)
    return file


def imported(old: Any, folder: Path) -> LCRNet:
    net = legacy.load(file := written(old, folder)).model
    assert net is not None
    file.unlink()  # large
    return net


def ours_of_vgg(old: detectron_reference.Network) -> LCRNet:
    """Nobody had a detector of poses with a VGG16, and so there is no file to import."""
    layers = [f"{stage}_{i + 1}" for stage, count in enumerate((2, 2, 3, 3, 3), 1) for i in range(count)]
    places = dict(zip(layers, (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), strict=True))
    s, state = old.setting, dict[str, Tensor]()
    order = torch.arange(len(s.sizes) * len(s.ratios)).view(len(s.ratios), -1).T.flatten()
    for name, tensor in old.weights.items():
        part, kind, leaf = name.split(".")
        if part == "Conv_Body":
            state[f"body.features.{places[kind[4:]]}.{leaf}"] = tensor.flip(1) if tensor.shape[1:2] == (3,) else tensor
        elif part == "Box_Head":
            state[f"box_head.{kind}.{leaf}"] = tensor
        elif kind == "RPN_conv":
            state[f"rpn.conv.{leaf}"] = tensor
        elif kind == "RPN_cls_score":
            state[f"rpn.objectness.{leaf}"] = tensor[order]
        elif kind == "RPN_bbox_pred":
            state[f"rpn.offsets.{leaf}"] = tensor.unflatten(0, (-1, 4))[order].flatten(0, 1)
        elif kind == "cls_score":
            state[f"predictor.classes.{leaf}"] = tensor
        else:
            tensor = tensor.view(K + 1, 5, J, -1)[1:].transpose(1, 2) * torch.tensor([1, 1, -1, -1, 1])[:, None] / 5
            state[f"predictor.refine.{leaf}"] = tensor.reshape(K * J * 5, -1).squeeze(1)
    values = {
        "image": {"short_side": s.scale, "max_side": s.max_size, "resize": "detectron", "std": [1 / 255] * 3,
                  "mean": (detectron_reference.MEANS[::-1] / 255).tolist(), "multiple": 1},
        "model": {"backbone": "vgg16", "head": "2mlp", "head_width": 96, "aligned": False, "roi_size": 7,
                  "sampling_ratio": 0},
        "rpn": {"convention": "detectron", "pre_nms": s.pre_nms, "post_nms": s.post_nms, "min_size": 0},
        "head": {"at_least": 500}, "ppi": PPI,
    }  # fmt: skip
    return filled(values, anchors.from_flat(old.anchor_poses, "here"), state)


def filled(values: dict[str, Any], poses: AnchorPoses, state: dict[str, Tensor]) -> LCRNet:
    net = build(config.from_dict(values), poses)
    net.load_state_dict(state)
    return net.to(memory_format=torch.channels_last).eval()


# Comparisons


def kept(golden: Result, net: LCRNet) -> tuple[np.ndarray, ...]:
    """(region, anchor pose) pairs above the floor, or so many of the best, as LCR-Net keeps them for PPI."""
    score = golden.scores[:, 1:]
    least = min(net.config.head.at_least, score.size)
    floor = min(net.config.head.score_floor, np.sort(score.flatten())[-least] - 1e-9) if least else 0
    return np.nonzero(score > (floor or net.config.head.score_floor))


def apart(net: LCRNet, found: PoseProposals, golden: Result) -> dict[str, float]:
    """The largest differences of the proposals; infinite where they are not as many."""
    pairs = kept(golden, net)
    if len(found) != len(pairs[0]):
        return dict.fromkeys(MOST, float("inf"))
    said = {
        "box": (found.box, golden.boxes[pairs[0]]),
        "score": (found.score, golden.scores[:, 1:][pairs]),
        "pose2d": (found.pose2d, golden.pose2d[pairs]),
        "pose3d": (found.pose3d, golden.pose3d[pairs] * OUR_FRAME),
    }
    return {name: float(np.abs(a - b).max()) for name, (a, b) in said.items()}


def people_apart(net: LCRNet, found: PoseProposals, golden: Result) -> dict[str, float]:
    """The same of the people that PPI makes of them in LANDSCAPE."""
    pairs = kept(golden, net)
    goal = ppi_reference.integrate(
        golden.scores[:, 1:][pairs], pairs[1], golden.pose2d[pairs], golden.pose3d[pairs], *LANDSCAPE.shape[:2],
        np.arange(K) >= K // 2, **{name: getattr(net.config.ppi, name) for name in PPI},
    )  # fmt: skip
    people = ppi.integrate(found, LANDSCAPE.shape[:2], net.config.ppi, net.skeleton, net.anchors.upper_only)
    if [p.support for p in people] != [len(p.members) for p in goal]:
        return dict.fromkeys(MOST, float("inf"))
    assert goal
    both = list(zip(people, goal, strict=True))
    return {
        "score": max(abs(p.score - g.mass / (1 + g.mass)) for p, g in both),
        "pose2d": max(float(np.abs(p.pose2d - g.pose2d).max()) for p, g in both),
        "pose3d": max(float(np.abs(p.pose3d - g.pose3d * OUR_FRAME).max()) for p, g in both),
    }


def check(differences: dict[str, float]) -> None:
    assert all(value <= MOST[name] for name, value in differences.items()), differences


def changed(net: LCRNet, **fields: Any) -> LCRNet:
    """The same weights under another convention; `section__field=value`."""
    values = net.config.model_dump()
    for name, value in fields.items():
        section, _, key = name.partition("__")
        values[section][key] = value
    return filled(values, net.anchors, net.state_dict())


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """One thread, no gradients, and no random weights for networks whose weights come from elsewhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        for name in ("normal_", "uniform_", "kaiming_normal_", "kaiming_uniform_"):
            patch.setattr(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor)
        yield
    torch.set_num_threads(before)


SETTINGS = {
    "c4": Setting(scale=100),
    "softmax": Setting(scale=112, softmax=True, sizes=(32, 64, 128), ratios=(0.4, 1, 2.5), sampling_ratio=2, nms=0.5),
    "fpn": Setting(body="fpn", scale=230, max_size=320, resolution=7, sampling_ratio=2, pre_nms=12, post_nms=40),
    "vgg": Setting(body="vgg", resolution=7),
    "pool": Setting(scale=100, method="RoIPoolF"),
    "crop": Setting(scale=100, method="RoICrop"),
}
POOLS = {"pool": "pool", "crop": "crop_max"}
LANDSCAPE, PORTRAIT, LONG = picture(120, 160), picture(150, 111, 1), picture(90, 200, 2)
Made = tuple[Any, LCRNet, Result]


def bgr(rgb: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rgb[..., ::-1])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """name -> the original, ours, what the original finds in LANDSCAPE."""

    @functools.cache
    def make(name: str) -> Made:
        if name in ("pool", "crop"):  # the weights of another, pooled otherwise
            old, net, _ = make("c4")
            old, net = replace(old, setting=SETTINGS[name]), changed(net, model__pool=POOLS[name])
        elif name == "softmax":
            old = with_softmax(make("c4")[0], SETTINGS[name])
        elif name == "dope":
            old = dope_network(LANDSCAPE)
        else:
            old = old_network(SETTINGS[name], bgr(LANDSCAPE))
        if name == "vgg":
            net = ours_of_vgg(old)
        elif name not in ("pool", "crop"):
            net = imported(old, tmp_path_factory.mktemp(name))
        return old, net, old.detect(LANDSCAPE if name == "dope" else bgr(LANDSCAPE))

    return make


@pytest.mark.parametrize("name", [*SETTINGS, "dope"])
def test_equals_the_original(made: Callable[[str], Made], name: str) -> None:
    _, net, golden = made(name)
    found = net.propose([LANDSCAPE])[0]
    check(apart(net, found, golden))
    check(people_apart(net, found, golden))


@pytest.mark.parametrize("image", [PORTRAIT, LONG], ids=["portrait", "long"])
@pytest.mark.parametrize("name", ["c4", "dope"])
def test_equals_the_original_in_other_shapes(made: Callable[[str], Made], name: str, image: np.ndarray) -> None:
    old, net, _ = made(name)
    check(apart(net, net.propose([image])[0], old.detect(image if name == "dope" else bgr(image))))


WRONG = [
    ("c4", "model__aligned", True),
    ("c4", "model__stride_in_1x1", False),
    ("c4", "model__sampling_ratio", 2),
    ("c4", "rpn__convention", "exact"),
    ("c4", "rpn__nms_iou", 0.65),
    ("c4", "rpn__post_nms", 11),
    ("c4", "image__resize", "area"),
    ("c4", "image__resize", "torchvision"),
    ("c4", "image__multiple", 16),
    ("c4", "image__mean", (0.485, 0.456, 0.406)),
    ("fpn", "rpn__convention", "exact"),
    ("fpn", "image__multiple", 16),
    ("pool", "model__pool", "align"),
    ("crop", "model__pool", "align"),
    ("dope", "model__res5_stride", 1),
    ("dope", "model__stride_in_1x1", True),
    ("dope", "model__aligned", True),
    ("dope", "rpn__convention", "exact"),
    ("dope", "image__resize", "area"),
    ("dope", "image__multiple", 64),
]


@pytest.mark.parametrize(("name", "field", "value"), WRONG, ids=[f"{n}-{f}-{v}" for n, f, v in WRONG])
def test_wrong_convention_shows(made: Callable[[str], Made], name: str, field: str, value: Any) -> None:
    """What the tests above compare does depend on each of the conventions."""
    _, net, golden = made(name)
    other = changed(net, **{field: value})
    differences = apart(other, other.propose([LANDSCAPE])[0], golden)
    assert any(value > 2 * MOST[name] for name, value in differences.items()), differences


def test_golden_dope_is_torchvision(made: Callable[[str], Made]) -> None:
    """DOPE's reference against the parts of torchvision that DOPE is made of."""
    old, _, golden = made("dope")
    shot = torch.from_numpy(LANDSCAPE).permute(2, 0, 1) / 255
    mean, std = dope_reference.MEAN.tolist(), dope_reference.STD.tolist()
    images, _ = GeneralizedRCNNTransform(old.min_size, old.max_size, mean, std)([shot])
    net = resnet50(norm_layer=FrozenBatchNorm2d)
    parts = (dope_reference.BODY, dope_reference.HEAD)
    state = {name.removeprefix(p): t for p in parts for name, t in old.weights.items() if name.startswith(p)}
    assert all(name.startswith("fc.") for name in net.load_state_dict(state, strict=False).missing_keys)
    map = torch.nn.Sequential(*list(net.children())[:7])(images.tensors)
    head = RPNHead(1024, 15)
    head.load_state_dict({
        name.removeprefix("rpn.head.").replace("conv.", "conv.0.0."): tensor
        for name, tensor in old.weights.items() if name.startswith("rpn.")
    })  # fmt: skip
    generator = AnchorGenerator((dope_reference.SIZES,), (dope_reference.RATIOS,))
    most = [{"training": n, "testing": n} for n in (old.pre_nms, old.post_nms)]
    boxes, _ = RegionProposalNetwork(generator, head, 0.7, 0.3, 256, 0.5, *most, 0.7).eval()(images, {"0": map})
    pooled = MultiScaleRoIAlign(["0"], 7, 2)({"0": map}, boxes, images.image_sizes)
    vectors = net.avgpool(net.layer4(pooled)).flatten(1)
    says = [old.weights[f"{dope_reference.SAYS}body_cls_score.{leaf}"] for leaf in ("weight", "bias")]
    (height, width), (rows, columns) = LANDSCAPE.shape[:2], images.image_sizes[0]
    back = np.array([width / columns, height / rows] * 2)
    assert np.abs(boxes[0].numpy() * back - golden.boxes).max() < MOST["box"]
    scores = torch.nn.functional.linear(vectors, *says).softmax(1).numpy()
    assert np.abs(scores - golden.scores).max() < MOST["score"]


@pytest.mark.parametrize(("convention", "left"), [("detectron", [0]), ("exact", [0, 1]), ("torchvision", [0, 1])])
def test_overlap_of_exactly_the_threshold(convention: str, left: list[int]) -> None:
    """Detectron's NMS drops a box from the threshold on, torchvision's above it."""
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 7.0]])
    assert len(detectron_reference.nms(boxes.numpy() - [0, 0, 1, 1], 0.7)) == 1
    assert len(dope_reference.nms(boxes.numpy(), 0.7)) == 2
    net = RPN(8, (16,), config.from_dict({"rpn": {"convention": convention, "min_size": 0}}).rpn)
    size = torch.tensor([[64, 64]])
    found = net.propose(torch.tensor([[2.0, 1]]), torch.zeros(1, 2, 4), boxes, [2], size, train=False)[0]
    last = torch.tensor([0, 0, 1, 1]) * (convention == "detectron")
    torch.testing.assert_close(found, boxes[left] - last)


@pytest.mark.parametrize("stride", [4, 8, 16, 32, 64])
def test_anchor_boxes(stride: int) -> None:
    sizes, ratios = (24, 32, 100, 512), (0.2, 0.5, 1, 2, 3)
    by_size = detectron_reference.anchors(stride, sizes, ratios).reshape(5, 4, 4).swapaxes(0, 1).reshape(20, 4)
    ours = anchor_boxes(torch.Size((1, 2)), stride, sizes, ratios, "detectron")
    np.testing.assert_allclose(ours[:20], by_size + [0, 0, 1, 1], atol=1e-4)
    np.testing.assert_allclose(ours[20:], by_size + [stride, 0, stride + 1, 1], atol=1e-4)


@pytest.mark.parametrize("at_least", [0, 1, 7, 500])
@pytest.mark.parametrize("floor", [0.01, 0.3])
def test_at_least_so_many(made: Callable[[str], Made], at_least: int, floor: float) -> None:
    """LCR-Net hands the best 500 (region, anchor pose) pairs of an image to PPI, even where few are above its floor."""
    _, net, _ = made("c4")
    random = torch.Generator().manual_seed(1)
    roi = torch.rand(9, 5, generator=random)
    roi[:, 0] = torch.tensor([0, 2, 2, 0, 3, 0, 2, 2, 2])  # of four images the second has none
    logits = torch.randn(9, K + 1, generator=random)
    found = net.predictor.decode(logits, torch.zeros(9, K, J, 5), roi, 4, floor, at_least)
    for image, some in enumerate(found):
        score = logits[roi[:, 0] == image].softmax(1)[:, 1:].numpy()
        best = np.sort(score.flatten())[::-1]
        count = max((best > floor).sum(), min(at_least, len(best)))
        np.testing.assert_allclose(np.sort(some.score)[::-1], best[:count])
        rows, anchor = np.nonzero(np.isin(score, best[:count]))
        np.testing.assert_array_equal(some.anchor, anchor)
        np.testing.assert_array_equal(some.box, roi[roi[:, 0] == image, 1:][rows])
    assert [len(f) for f in net.predictor.decode(logits[:0], torch.zeros(0, K, J, 5), roi[:0], 2, floor, 5)] == [0, 0]
