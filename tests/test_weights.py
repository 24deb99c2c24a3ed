"""The model folder: what is written is read, and what is no good is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lcrnet
from lcrnet import anchors, config, synthetic, weights
from lcrnet.anchors import AnchorPoses
from lcrnet.config import Config, UserError
from lcrnet.model import build


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A model folder to spoil."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def test_saved_and_loaded(tiny: Config, poses: AnchorPoses, tmp_path: Path) -> None:
    torch.manual_seed(1)
    net = build(tiny, poses).to(memory_format=torch.channels_last).eval()
    weights.save(net, tmp_path / "a/model", {"step": 7, "metrics": {"oks_ap": 0.5}})
    again = weights.load(tmp_path / "a/model")
    assert not again.training and again.config == tiny and again.skeleton == net.skeleton
    shot = synthetic.draw(1, 96, 75)[0]
    (a,), (b,) = net.propose([shot]), again.propose([shot])
    assert len(a) > 0 and all(np.array_equal(v, getattr(b, name)) for name, v in a.__dict__.items())
    about = weights.read_about(tmp_path / "a/model")
    assert about["step"] == 7 and about["metrics"] == {"oks_ap": 0.5} and about["skeleton"] == "lcr13"
    assert about["lcrnet"] == lcrnet.__version__ and about["id"] == weights.model_id(tmp_path / "a/model")
    assert about["parameters"] == sum(p.numel() for p in net.parameters())
    weights.save(again, tmp_path / "b", {"step": 8})
    assert weights.model_id(tmp_path / "b") == about["id"], "read and written it is the same model"


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml", "anchors.json", "model.json"])
def test_missing_file(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"not a model folder: {name} missing"):
        weights.load(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing: not a model folder: model\.safetensors, config\.yaml"):
        weights.load(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"nothing: not a model folder: model\.safetensors: No such file"):
        weights.model_id(tmp_path / "nothing")


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Spoils a folder by a change of its tensors."""

    def spoil(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors")

    return spoil


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


SPOILT = [
    (text("model.json", '{"format": 99}'), r"model\.json: format 99, this version reads 1"),
    (text("model.json", "{}"), r"model\.json: format None"),
    (text("model.json", "{"), r"model\.json: not readable"),
    (text("model.json", "[]"), r"model\.json: expected an object"),
    (text("model.safetensors", "junk"), r"model\.safetensors: not readable"),
    (text("anchors.json", "{}"), r"anchors\.json: format"),
    (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
     r"model\.safetensors: not readable"),
    (tensors(lambda t: t.update({"body.top.bias": torch.zeros(5)})),
     r"does not fit its configuration: body\.top\.bias: \(5,\) in the file, \(96,\) in the network \(1 in all\)"),
    (tensors(lambda t: t.pop("rpn.conv.bias")), r"rpn\.conv\.bias: not in the file"),
    (tensors(lambda t: t.update(extra=torch.zeros(1))), r"extra: not in the network"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "says"), SPOILT, ids=[says for _, says in SPOILT])
def test_what_is_wrong_is_named(spoil: Callable[[Path], object], says: str, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(UserError, match=says) as error:
        weights.load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_anchor_poses_of_another_model(folder: Path, poses: AnchorPoses) -> None:
    few = AnchorPoses(poses.pose2d[:2], poses.pose3d[:2], poses.upper_only[:2], poses.skeleton)
    anchors.save(few, folder / "anchors.json")
    with pytest.raises(UserError, match=r"predictor\.classes\.weight: \(7, 320\) in the file, \(3, 320\)"):
        weights.load(folder)


def test_configuration_of_another_version(folder: Path) -> None:
    (folder / "config.yaml").write_text("model: {backbone: tiny, wings: 2}")
    with pytest.raises((UserError, config.ConfigError), match=r"config\.yaml: unknown 'model\.wings'"):
        weights.load(folder)


def test_fill_takes_what_fits(tiny: Config, poses: AnchorPoses, model_folder: Path) -> None:
    few = AnchorPoses(poses.pose2d[:2], poses.pose3d[:2], poses.upper_only[:2], poses.skeleton)
    net = build(tiny, few)
    before = net.predictor.classes.weight.detach().clone()
    misfit = weights.fill(net, model_folder, strict=False)
    assert sorted(m.split(":")[0] for m in misfit) == [
        "predictor.classes.bias", "predictor.classes.weight", "predictor.refine.bias", "predictor.refine.weight",
    ]  # fmt: skip
    held = load_file(model_folder / "model.safetensors")
    assert torch.equal(net.body.top.weight, held["body.top.weight"])
    assert torch.equal(net.predictor.classes.weight, before)


def test_model_id_is_of_what_decides_the_output(folder: Path) -> None:
    first = weights.model_id(folder)
    assert len(first) == 16 and int(first, 16) >= 0
    about = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(about | {"metrics": {"oks_ap": 1}}))
    assert weights.model_id(folder) == first
    ids = {first}
    tensors(lambda t: t["rpn.conv.bias"].add_(1e-3))(folder)
    ids.add(weights.model_id(folder))
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text() + "\n# other\n")
    ids.add(weights.model_id(folder))
    (folder / "anchors.json").write_text((folder / "anchors.json").read_text() + "\n")
    ids.add(weights.model_id(folder))
    assert len(ids) == 4
