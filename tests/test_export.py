"""Export: the graph, the files made of it and what runs them, against the model itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lcrnet import config, export, image, ops, ppi, synthetic, weights
from lcrnet.anchors import AnchorPoses
from lcrnet.config import Config, UserError
from lcrnet.model import LCRNet, build

SMALL = {"post_nms": 12, "pre_nms": 60}


def net_of(
    tiny: Config, poses: AnchorPoses, head: dict[str, Any], rpn: dict[str, Any], model: dict[str, Any]
) -> LCRNet:
    """An untrained network that is surer of some things than of others."""
    values = tiny.model_dump()
    values["rpn"] |= {"sizes": [16, 32, 56], **SMALL, **rpn}
    values["head"] |= head
    values["model"] |= {"backbone": "resnet18", "norm": "frozen_bn", "freeze": 2, **model}
    torch.manual_seed(0)
    net = build(config.from_dict(values), poses).eval()
    with torch.no_grad():
        net.predictor.classes.weight.mul_(20)
    return net


def noise(batch: int = 1, height: int = 50, width: int = 70) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (batch, 3, height, width), dtype=np.uint8)


def eager(net: LCRNet, size: tuple[int, int], batch: int = 1, proposals: int = 1000) -> export.Run:
    graph = export.Graph(net, size, batch, proposals)

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            return dict(zip(export.OUTPUTS, (t.numpy() for t in graph(torch.from_numpy(images))), strict=True))

    return run


DETECTRON = {"convention": "detectron", "min_size": 0}
FAMILIES = [
    ({}, {}, {}),
    ({"passes": 2, "at_least": 50}, DETECTRON, {"roi_size": 14, "aligned": False, "sampling_ratio": 0}),
    ({"score_floor": 0.3}, {"convention": "torchvision"}, {"shared_regressor": True}),
    ({"at_least": 10_000}, {}, {"pool": "pool"}),
    ({}, {}, {"pool": "crop"}),
    ({"passes": 3}, {}, {"pool": "crop_max", "roi_size": 1}),
    ({}, {"sizes": [8, 16, 32, 64, 128]}, {"body": "fpn", "head": "2mlp", "head_width": 32, "norm": "gn"}),
    ({}, {}, {"backbone": "resnet50", "roi_size": 14, "stride_in_1x1": True, "sampling_ratio": 0}),
    ({}, {}, {"backbone": "tiny", "norm": "gn", "freeze": 0}),
]


@pytest.mark.parametrize(("head", "rpn", "model"), FAMILIES, ids=[str(i) for i in range(len(FAMILIES))])
def test_the_graph_is_the_model(
    head: dict[str, Any], rpn: dict[str, Any], model: dict[str, Any], tiny: Config, poses: AnchorPoses
) -> None:
    """Before anything is exported: every pooling, convention and pass, two images with a padding."""
    net = net_of(tiny, poses, head, rpn, model)
    run = eager(net, (50, 70), batch=2)
    assert export.difference(net, run, noise(2)) < 1e-4
    assert all(run(noise(2).astype(np.float32))["count"] > 0)


def test_nms_and_crop_are_those_of_ops() -> None:
    """Groups, equal boxes, boxes that are none, and fewer kept than asked for."""
    rng = torch.Generator().manual_seed(0)
    low = torch.rand(2, 60, 2, generator=rng) * 40
    boxes = torch.cat([low, low + torch.rand(2, 60, 2, generator=rng) * 30], -1)
    boxes[:, 5], boxes[:, 6, 2:] = boxes[:, 4], boxes[:, 6, :2]
    scores = torch.rand(2, 60, generator=rng)
    scores[0, 10:15], scores[1, 40:] = -torch.inf, -torch.inf
    parts = [25, 34, 1]
    group = torch.repeat_interleave(torch.arange(3), torch.tensor(parts)).expand(2, -1).contiguous()
    for most in (3, 20, 60):
        keep, count = export._nms(boxes, scores, 0.4, most, None, parts)
        goal, goal_count = ops.batched_nms(boxes, scores, 0.4, most, group)
        assert count.tolist() == goal_count.tolist()
        for mine, theirs, n in zip(keep, goal, count, strict=True):
            assert mine[:n].tolist() == theirs[:n].tolist()
    map = torch.rand(2, 3, 7, 9, generator=rng)
    roi = ops.rois(list(boxes))
    for size in (1, 2, 5):
        for max_pool in (False, True):
            goal = ops.roi_crop(map, roi, size, 0.2, max_pool)
            torch.testing.assert_close(export._crop(map, boxes * 0.2, size, max_pool), goal, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_resnet(format: str, tiny: Config, poses: AnchorPoses, tmp_path: Path) -> None:
    """In Detectron's conventions, a batch of two; fewer places than proposals."""
    net = net_of(tiny, poses, {"at_least": 50}, DETECTRON, {"roi_size": 14, "aligned": False, "sampling_ratio": 0})
    file = tmp_path / f"net.{format}"
    export.export(net, file, (50, 70), batch=2, proposals=40)
    run = export.opened(file)
    assert export.difference(net, run, noise(2)) < 1e-4
    outputs = run(noise(2).astype(np.float32))
    joints = len(net.skeleton.joints)
    assert {k: v.shape for k, v in outputs.items()} == {
        "score": (2, 40), "box": (2, 40, 4), "anchor": (2, 40), "pose2d": (2, 40, joints, 2),
        "pose3d": (2, 40, joints, 3), "count": (2,),
    }  # fmt: skip
    assert (outputs["count"] > 40).all() and (np.diff(outputs["score"]) <= 0).all()


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_command_line(format: str, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Writes the file, says how far it is from the model, and what PPI makes of it is what the model detects."""
    file = tmp_path / f"net.{format}"
    assert export.main([str(model_folder), "--out", str(file), "--size", "64", "64"]) == 0
    said = capsys.readouterr().out
    assert str(file) in said and float(said.split()[-1]) < 1e-4
    net = weights.load(model_folder)
    shot = synthetic.draw(1, 64, 75)[0]
    outputs = export.opened(file)(image.stack([shot], 16)[0].numpy().astype(np.float32))
    found = export.proposals(outputs)
    people = ppi.integrate(found[0], (64, 64), net.config.ppi, net.skeleton, net.anchors.upper_only)
    goal = net.detect(shot)
    assert len(people) == len(goal) > 0
    for a, b in zip(people, goal, strict=True):
        np.testing.assert_allclose(a.pose3d, b.pose3d, atol=1e-4)
        np.testing.assert_allclose(a.pose2d, b.pose2d, atol=1e-2)
    if format == "onnx":
        import onnx

        text = {p.key: p.value for p in onnx.load(file).metadata_props}["lcrnet.json"]
    else:
        more = {"lcrnet.json": ""}
        torch.export.load(file, extra_files=more)
        text = more["lcrnet.json"]
    assert json.loads(text)["joints"] == list(net.skeleton.joints)
    assert json.loads(text)["upper_only"] == net.anchors.upper_only.tolist()


def test_nothing_found(tiny: Config, poses: AnchorPoses) -> None:
    """All places are empty: zeros."""
    net = net_of(tiny, poses, {"score_floor": 1}, {}, {})
    outputs = eager(net, (50, 70))(noise().astype(np.float32))
    assert all(not value.any() for value in outputs.values())
    assert [len(found) for found in export.proposals(outputs)] == [0]


def test_refused(tiny: Config, poses: AnchorPoses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = net_of(tiny, poses, {}, {}, {})
    with pytest.raises(UserError, match="format 'onx' is neither pt2 nor onnx"):
        export.export(net, tmp_path / "net.onx", (64, 64))
    with pytest.raises(UserError, match="there is no folder"):
        export.export(net, tmp_path / "none" / "net.pt2", (64, 64))
    with pytest.raises(UserError, match="must be 1 or more"):
        export.export(net, tmp_path / "net.pt2", (64, 0))
    with pytest.raises(UserError, match="not a model folder"):
        export.main([str(tmp_path / "none"), "--out", "x.pt2", "--size", "64", "64"])
    (tmp_path / "net.onnx").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'lcrnet\[export\]'"):
        export.opened(tmp_path / "net.onnx")
