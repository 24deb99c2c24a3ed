"""Other people's weight files: known by content, their conventions as ours, every tensor accounted for.

Real files cannot be had: these have the originals' names, shapes, types and pickle structure (legacy_files.py).
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import legacy_files as files
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from legacy_files import DETECTRON
from safetensors.torch import save_file

from lcrnet import anchors, config, legacy, unpickle, weights
from lcrnet.backbone import RESNETS
from lcrnet.config import UserError
from lcrnet.imports import BODY
from lcrnet.model import build


@pytest.fixture(scope="module")
def flat(shared: Path) -> np.ndarray:
    """INRIA's own anchor poses (20, 65)."""
    file = shared / "legacy/DEMO_ECCV18_anchor_cfg.pkl"
    return unpickle.load(file.read_bytes())["anchor_poses"]


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(data: bytes, name: str = "file.bin") -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


def whole(found: legacy.Imported, left_over: int = 0) -> None:
    """No tensor is missing; so many are left over; each is accounted for once."""
    assert not found.report.missing
    assert len(found.report.left_over) == left_over, found.report.left_over
    assert len(set(found.report.matched.values())) == len(found.report.matched)
    assert not set(found.report.matched) & set(found.report.left_over)


@pytest.mark.parametrize("variance, kind, new", [(3000.0, "resnet_caffe", False), (1.0, "resnet_torchvision", True)])
def test_imagenet_resnet(variance: float, kind: str, new: bool, write: Any) -> None:
    net = files.resnet("50", files.Draw(), variance=variance)
    file = write(files.torch_file(files.tensors(net), new), "anything.txt")
    found = legacy.load(file)
    assert legacy.recognise(file) == kind == found.report.kind
    whole(found, left_over=2)  # fc
    caffe = kind == "resnet_caffe"
    assert found.config.model.stride_in_1x1 is caffe and found.config.model.backbone == "resnet50"
    first = found.tensors["body.conv1.weight"].numpy()
    np.testing.assert_array_equal(first, net["conv1.weight"][:, ::-1] if caffe else net["conv1.weight"])
    np.testing.assert_array_equal(found.tensors["box_head.layer4.2.bn3.running_var"], net["layer4.2.bn3.running_var"])
    if caffe:  # RGB, of 0 .. 1
        np.testing.assert_allclose(255 * np.array(found.config.image.mean), [122.7717, 115.9465, 102.9801], atol=1e-6)
        np.testing.assert_allclose(255 * np.array(found.config.image.std), 1, atol=1e-6)
    assert set(found.needs) == set(BODY)


def test_newer_torchvision_and_safetensors(tmp_path: Path) -> None:
    net = files.tensors(files.resnet("50", files.Draw(), variance=1e5))
    net["bn1.num_batches_tracked"] = torch.tensor(3)
    save_file(net, tmp_path / "x")
    found = legacy.load(tmp_path / "x")
    assert found.report.kind == "resnet_torchvision" and "bn1.num_batches_tracked" in found.report.left_over


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("first, kind", [((0.73017, 0.06494), "vgg16_caffe"), ((0.4034, 0.3778), "vgg16_torchvision")])
def test_vgg16(first: tuple[float, float], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state = files.vgg16(files.Draw(), first)
    monkeypatch.setattr(legacy, "_read", lambda path: state)  # half a gigabyte of layers: not through a file
    found = legacy.load("vgg16")
    whole(found, left_over=2)  # classifier.6
    assert (
        found.report.kind == kind and found.config.model.backbone == "vgg16" and found.config.model.head_width == 4096
    )
    turned = state["features.0.weight"][:, ::-1] if kind == "vgg16_caffe" else state["features.0.weight"]
    np.testing.assert_array_equal(found.tensors["body.features.0.weight"].numpy(), turned)
    assert found.report.matched["classifier.3.bias"] == "box_head.fc2.bias"


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_vgg16_that_nobody_published(monkeypatch: pytest.MonkeyPatch) -> None:
    state = files.vgg16(files.Draw(), None)
    monkeypatch.setattr(legacy, "_read", lambda path: state)
    with pytest.raises(UserError, match="#kind=vgg16_caffe or"):
        legacy.load("x.pth")
    assert legacy.load("x.pth#kind=vgg16_caffe").report.kind == "vgg16_caffe"
    with pytest.raises(UserError, match="kind 'vgg' is none of"):
        legacy.load("x.pth#kind=vgg")


@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_detectron_imagenet(norm: str, write: Any) -> None:
    blobs = files.blobs("50", files.Draw(), norm=norm)
    found = legacy.load(write(files.caffe2_pickle({"blobs": blobs})))
    whole(found, left_over=3 if norm == "bn" else 2)
    assert found.report.kind == "detectron_imagenet"
    assert (found.config.model.norm, found.config.model.stride_in_1x1) == (
        ("frozen_bn", True) if norm == "bn" else ("gn", False)
    )
    own = build(found.config, stand_in(1)).box_head
    own.load_state_dict({k.removeprefix("box_head."): v for k, v in found.tensors.items() if k.startswith("box_head.")})
    if norm == "bn":  # x * s + b, to the last digit but one
        x = torch.randn(2, 512, 3, 3)
        want = x * torch.from_numpy(blobs["res5_0_branch2a_bn_s"])[:, None, None] + torch.from_numpy(
            blobs["res5_0_branch2a_bn_b"]
        ).view(-1, 1, 1)
        torch.testing.assert_close(own.layer4[0].bn1(x), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "depth, groups, width, norm, backbone",
    [
        ("50", 1, 64, "bn", "resnet50"), ("101", 1, 64, "bn", "resnet101"), ("152", 1, 64, "bn", "resnet152"),
        ("50", 1, 64, "gn", "resnet50"), ("101", 1, 64, "gn", "resnet101"), ("101", 32, 8, "bn", "resnext101_32x8d"),
        ("101", 64, 4, "bn", "resnext101_64x4d"), ("152", 32, 8, "bn", "resnext152_32x8d"),
    ],
)  # fmt: skip
def test_names_and_shapes_of_every_depth(
    depth: str, groups: int, width: int, norm: str, backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of blobs and of torchvision's names; the numbers are views of one each."""
    blobs = files.blobs(depth, files.Draw(tiny=True), groups, width, norm)
    kinds: list[tuple[Any, str, int]] = [
        ({"blobs": blobs}, "detectron_imagenet", 3 if norm + str(groups) == "bn1" else 2)
    ]
    if norm == "bn":
        for variance, kind in ((3000.0, "resnet_caffe"), (1.0, "resnet_torchvision")):
            draw = files.Draw(tiny=True)
            state = files.resnet(depth, draw, groups, width, variance)
            state["conv1.weight"] = np.full((64, 3, 7, 7), 0.05, np.float32)
            kinds.append((state, kind, 2))
    for value, kind, left_over in kinds:
        monkeypatch.setattr(legacy, "_read", lambda path, value=value: value)
        monkeypatch.setattr(torch, "from_numpy", views(torch.from_numpy))
        found = legacy.load("x")
        assert (found.report.kind, found.config.model.backbone) == (kind, backbone)
        whole(found, left_over)
        caffe = kind == "resnet_caffe" or (kind == "detectron_imagenet" and groups == 1 and norm == "bn")
        assert found.config.model.stride_in_1x1 is caffe
        monkeypatch.undo()


def views(real: Any) -> Any:
    """Tensors of shape and no numbers of their own: 60 M zeros would only cost time."""
    return lambda array: torch.zeros(1).expand(array.shape)


def stand_in(count: int) -> anchors.AnchorPoses:
    return anchors.AnchorPoses(
        np.zeros((count, 13, 2), np.float32), np.zeros((count, 13, 3), np.float32), np.zeros(count, bool)
    )


@pytest.mark.parametrize("pyramid, norm, cfg", [(True, "bn", DETECTRON), (True, "gn", None), (False, "bn", None)])
def test_detectron_detector(pyramid: bool, norm: str, cfg: str | None, write: Any) -> None:
    blobs = files.detector(files.Draw(), pyramid, norm)
    found = legacy.load(write(files.caffe2_pickle({"blobs": blobs, "cfg": cfg} if cfg else {"blobs": blobs})))
    whole(found, left_over=6)
    assert set(found.report.left_over) == {"cls_score_w", "cls_score_b", "bbox_pred_w", "bbox_pred_b", "lr",
                                           "conv1_w_momentum"}  # fmt: skip
    assert found.report.kind == "detectron_detector" and found.model is None
    model, image, rpn = found.config.model, found.config.image, found.config.rpn
    assert (model.body, model.head, model.aligned) == (
        ("fpn", "conv" if norm == "gn" else "2mlp", False) if pyramid else ("c4", "res5", False)
    )
    assert (model.roi_size, model.sampling_ratio, image.multiple) == ((7, 2, 32) if pyramid else (14, 0, 1))
    assert (rpn.convention, rpn.min_size, image.resize) == ("detectron", 0, "detectron")
    if pyramid:
        for level, blob in enumerate(("res2_2_sum", "res3_3_sum", "res4_5_sum", "res5_2_sum")):
            inner = f"fpn_inner_{blob}{'' if level == 3 else '_lateral'}_w"
            np.testing.assert_array_equal(found.tensors[f"body.fpn.inner_blocks.{level}.0.weight"], blobs[inner])
            np.testing.assert_array_equal(
                found.tensors[f"body.fpn.layer_blocks.{level}.0.weight"], blobs[f"fpn_{blob}_w"]
            )
        np.testing.assert_array_equal(found.tensors["rpn.offsets.weight"], blobs["rpn_bbox_pred_fpn2_w"])
    if norm == "gn":
        np.testing.assert_array_equal(found.tensors["box_head.convs.4.bias"], blobs["head_conv2_gn_b"])
        np.testing.assert_array_equal(found.tensors["box_head.fc.weight"], blobs["fc6_w"])


def test_inria(flat: np.ndarray, write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A whole detector, with the bundle's own settings; its model folder reads back to the same."""
    file = write(files.inria(files.Draw(1), flat, poses=20), "x.jpg")
    found = legacy.load(file)
    whole(found)
    assert found.report.kind == "lcrnet_inria" and found.model is not None and found.anchors is not None
    settings = found.config
    assert settings.ppi == config.Ppi(**files.PPI)
    assert (settings.image.short_side, settings.rpn.pre_nms, settings.rpn.post_nms) == (320, 50, 500)
    assert (settings.image.multiple, settings.model.roi_size, settings.model.sampling_ratio) == (1, 14, 0)
    assert settings.model.stride_in_1x1 and not settings.model.aligned and settings.head.score_floor == 0.005
    assert found.anchors.upper_only.tolist() == [False] * 10 + [True] * 10
    assert weights.main([str(file), "--out", str(tmp_path / "model")]) == 0
    said = capsys.readouterr().out
    assert "lcrnet_inria: an LCR-Net of INRIA" in said and "ppi.iou_func: shoulderhead" in said
    assert weights.read_about(tmp_path / "model")["from"] == {"file": "x.jpg", "kind": "lcrnet_inria"}
    with pytest.raises(UserError, match="is there already"):
        weights.main([str(file), "--out", str(tmp_path / "model")])
    again = weights.load(tmp_path / "model")
    for name, value in again.state_dict().items():
        assert torch.equal(value, found.tensors[name]), name
    assert again.config == settings


@pytest.mark.parametrize("softmax, norm", [(False, "bn"), (True, "gn")])
def test_predecessor(softmax: bool, norm: str, flat: np.ndarray, shared: Path, write: Any) -> None:
    """Its checkpoints know no anchor poses; every number of RPN and head against its own arithmetic."""
    draw = files.Draw(2)
    file = write(files.checkpoint(draw, softmax=softmax, norm=norm))
    state = files.seed(files.Draw(2), softmax=softmax, norm=norm)
    found = legacy.load(file)
    whole(found)
    assert found.report.kind == "lcrnet_checkpoint" and found.model is None
    assert any("no anchor poses" in note for note in found.report.notes)
    bundle = shared / "legacy/DEMO_ECCV18_anchor_cfg.pkl"
    if norm == "bn":
        with_poses = legacy.load(file, anchors=bundle)
        assert with_poses.model is not None and with_poses.config.image.short_side == 320
        assert legacy.load(file, anchors=anchors.load(bundle)).config.image.short_side == 800
    # Its RPN: box by box, ratio-major. Ours: size-major, and one logit a box.
    theirs = {name: torch.from_numpy(value) for name, value in state.items()}
    ours, x = found.tensors, torch.randn(3, 1024)
    scores = F.linear(x, theirs["RPN.RPN_cls_score.weight"][..., 0, 0], theirs["RPN.RPN_cls_score.bias"])
    probability = scores.view(3, 2, 15).softmax(1)[:, 1] if softmax else scores.sigmoid()
    said = F.linear(x, ours["rpn.objectness.weight"][..., 0, 0], ours["rpn.objectness.bias"]).sigmoid()
    for ratio in range(3):
        for size in range(5):
            torch.testing.assert_close(said[:, size * 3 + ratio], probability[:, ratio * 5 + size], rtol=0, atol=1e-6)
            np.testing.assert_array_equal(
                found.tensors["rpn.offsets.bias"].view(15, 4)[size * 3 + ratio],
                state["RPN.RPN_bbox_pred.bias"].reshape(15, 4)[ratio * 5 + size],
            )
    # Its poses: (class, coordinate, joint), / 5; class 0 is background; X to the left, Y up.
    x = torch.randn(3, 2048)
    want = F.linear(x, theirs["Pose_Outs.pose_pred.weight"], theirs["Pose_Outs.pose_pred.bias"]).view(3, 21, 5, 13) / 5
    got = F.linear(x, ours["predictor.refine.weight"], ours["predictor.refine.bias"]).view(3, 20, 13, 5)
    for column, sign in enumerate((1, 1, -1, -1, 1)):
        torch.testing.assert_close(got[..., column], sign * want[:, 1:, column], rtol=0, atol=1e-6)


def test_inria_in_parts(flat: np.ndarray, write: Any, tmp_path: Path) -> None:
    """NAME_model.pth.tgz, NAME_anchor_poses.pkl, NAME_ppi_params.pkl, NAME_cfg.pkl: in any order, under any name."""
    state = files.tensors(files.seed(files.Draw()))
    with files.predecessor() as attrdict:
        parts = [write(pickle.dumps(value, 2), name) for name, value in
                 (("a", flat), ("b", dict(files.PPI)), ("c", files.inria_cfg(attrdict)))]  # fmt: skip
    kinds = [legacy.recognise(part) for part in parts]
    assert kinds == ["lcrnet_anchors", "lcrnet_ppi", "lcrnet_cfg"]
    file = write(files.torch_file(state), "x_model.pth.tgz")
    found = legacy.load(file, parts=parts)
    whole(found)
    assert found.report.kind == "lcrnet_state" and found.model is not None
    assert found.config.ppi == config.Ppi(**files.PPI) and found.config.image.short_side == 320
    with pytest.raises(UserError, match="parameters of PPI, not weights"):
        legacy.load(parts[1])
    with pytest.raises(UserError, match="20 classes, but 7 anchor poses"):
        legacy.load(file, anchors=stand_in(7))
    with pytest.raises(UserError, match="expected one of anchor poses"):
        legacy.load(file, parts=[file])


@pytest.mark.parametrize("half", [True, False])
def test_dope(half: bool, flat: np.ndarray, write: Any) -> None:
    poses = flat.reshape(20, 5, 13).transpose(0, 2, 1)
    given = files.dope(files.Draw(3), half=half, flat=poses)
    data = files.torch_file(given)
    found = legacy.load(write(files.tgz(data) if half else data))
    whole(found, left_over=len(given["state_dict"]) - len(found.report.matched) - 1)  # one is the anchor poses
    assert found.report.kind == "dope" and found.model is not None and found.anchors is not None
    model, image, rpn = found.config.model, found.config.image, found.config.rpn
    assert (model.roi_size, model.res5_stride, model.sampling_ratio, model.aligned) == (7, 2, 2, False)
    assert not model.stride_in_1x1 and (rpn.pre_nms, rpn.post_nms, rpn.min_size) == (1000, 1000, 0.001)
    assert (image.short_side, image.max_side, image.multiple, image.resize) == (400, 1000, 32, "torchvision")
    assert (found.config.ppi.iou_func, found.config.ppi.th_persondetect) == ("bbox_torsohead", 0.4)
    assert found.anchors.upper_only.tolist() == [False] * 10 + [True] * 10
    np.testing.assert_allclose(found.anchors.pose3d, poses[..., 2:] * [-1, -1, 1], atol=1e-3 if half else 0)
    state = given["state_dict"]
    theirs = state["roi_heads.dope_predictor.body_pose_pred.bias"].float().view(20, 65) / 5
    ours = found.tensors["predictor.refine.bias"].view(20, 13, 5)
    torch.testing.assert_close(ours[..., :2], theirs[:, :26].view(20, 13, 2), rtol=0, atol=1e-7)
    torch.testing.assert_close(
        ours[..., 2:], theirs[:, 26:].view(20, 13, 3) * torch.tensor([-1.0, -1, 1]), rtol=0, atol=1e-7
    )
    assert {"roi_heads.dope_predictor.hand_cls_score.weight", "roi_heads.face_anchor_poses"} <= set(
        found.report.left_over
    )


# train.init


def test_start(write: Any) -> None:
    """A body trained on ImageNet goes into networks of its kind, and into no other."""
    state = files.resnet("50", files.Draw())
    file = str(write(files.torch_file(files.tensors(state))))
    for model in ({"head": "res5"}, {"body": "fpn", "head": "2mlp"}):
        net = build(config.from_dict({"model": model}), stand_in(3))
        lines = weights.start(net, file)
        own = net.state_dict()
        stage5 = "box_head" if model["head"] == "res5" else "body"
        assert torch.equal(
            own[f"{stage5}.layer4.0.conv1.weight"], legacy.load(file).tensors["box_head.layer4.0.conv1.weight"]
        )
        assert "fc.weight: left over" in lines and "rpn.conv.weight: not in the file" in lines
        assert not any(line.startswith(("body.layer1", f"{stage5}.layer4")) for line in lines)
    caffe = build(config.from_dict({"model": {"stride_in_1x1": True}, "image": {"std": legacy.CAFFE_STD}}), stand_in(3))
    with pytest.raises(UserError, match=r"needs --model.stride_in_1x1 false --image.std '\[0.229, 0.224, 0.225\]'"):
        weights.start(caffe, file)
    assert weights.anchors_of(file) is None


def test_another_frame_is_told(flat: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a file's Y to grow down, its people would stand on their heads: by the anchor poses that can be seen."""
    state = files.seed(files.Draw())
    for sign, count in ((1, 0), (-1, 1)):
        turned = flat.copy()
        turned[:, 39:52] *= sign
        monkeypatch.setattr(legacy, "_read", lambda path, poses=turned: {"model": state, "anchor_poses": poses})
        notes = legacy.load("x").report.notes
        assert sum("Y of its anchor poses" in note for note in notes) == count
        assert not any("X of its anchor poses" in note for note in notes)


def test_released_anchor_files(shared: Path) -> None:
    for name in ("DEMO_ECCV18", "InTheWild-ResNet50"):
        assert legacy.recognise(shared / f"legacy/{name}_anchor_cfg.pkl") == "lcrnet_anchors"


def test_every_backbone_has_a_row() -> None:
    assert set(RESNETS) >= {"resnet50", "resnext101_32x8d", "resnext101_64x4d", "resnext152_32x8d"}
