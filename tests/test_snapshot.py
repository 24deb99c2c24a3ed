"""Losses and gradients that are not finite: the run stops, and what it leaves does the same step again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_run import LocalRun, changed
from safetensors.torch import load_file, save_file

from lcrnet import train
from lcrnet.anchors import AnchorPoses
from lcrnet.config import Config, UserError
from lcrnet.dataset import Source
from lcrnet.model import LCRNet


@pytest.fixture
def data(drawn: Path) -> Source:
    return Source(drawn / "annotations.json", drawn / "images")


def test_a_loss_that_is_not_finite_stops_the_run(
    tiny: Config, data: Source, poses: AnchorPoses, tmp_path: Path
) -> None:
    run = LocalRun(tmp_path / "run")
    says = r"step \d+: the loss is not finite: \{'rpn_class': .*'pose3d'.*images \["
    with pytest.raises(train.NonFinite, match=says):
        train.fit(changed(tiny, lr=1e18, clip=0, warmup=0, steps=20), run, data, poses)
    assert run.reported == [], "nothing of it is kept"


def test_weights_that_are_not_finite_stop_the_run(
    tiny: Config, data: Source, poses: AnchorPoses, model_folder: Path, tmp_path: Path
) -> None:
    spoilt = Path(shutil.copytree(model_folder, tmp_path / "model"))
    held = load_file(spoilt / "model.safetensors")
    save_file({k: torch.full_like(v, torch.nan) for k, v in held.items()}, spoilt / "model.safetensors")
    with pytest.raises(train.NonFinite, match=r"^step 0: .*nan"):
        train.fit(changed(tiny, init=str(spoilt)), LocalRun(tmp_path / "run"), data, poses)


def test_snapshot_of_a_loss_that_is_not_finite(tiny: Config, data: Source, poses: AnchorPoses, tmp_path: Path) -> None:
    """The step before it is what is kept, and the step again gives the same."""
    run = LocalRun(tmp_path / "run")
    with pytest.raises(train.NonFinite) as caught:
        train.fit(changed(tiny, lr=1e18, clip=0, warmup=0, steps=20, accumulate=2), run, data, poses)
    (folder,) = (run.folder / "nonfinite").iterdir()
    about = json.loads((folder / "snapshot.json").read_text())
    assert folder.name == f"step_{about['step']}-rank_0" and about["step"] > 0
    assert [Path(name).is_file() for name in about["files"]] == [True, True]
    assert str(caught.value).endswith(f"python -m lcrnet.train {folder}") and str(about["ids"]) in str(caught.value)
    again = train.replay(folder)
    norm = again.pop("gradient_norm")
    assert np.array_equal(list(again.values()), list(about["losses"].values()), equal_nan=True)
    assert list(again) == list(about["losses"]) and not np.isfinite(sum(again.values())) and not np.isfinite(norm)
    with pytest.raises(UserError, match="not a snapshot"):
        train.replay(tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gradient_that_is_not_finite_stops_the_run(
    precision: str, tiny: Config, data: Source, poses: AnchorPoses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Where the losses are finite: the weights have not moved, and the losses come again to the bit.

    With fp16 only once its scale cannot be the reason any more.
    """
    forward = LCRNet.forward

    def spoilt(self: LCRNet, *args: Any) -> Any:
        out = forward(self, *args)
        if isinstance(out, dict):  # 0, whose derivative is infinite
            out["class"] = out["class"] + (self.predictor.classes.bias.sum() * 0).abs().sqrt()
        return out

    monkeypatch.setattr(LCRNet, "forward", spoilt)
    monkeypatch.setattr(train, "LEAST_SCALE", 2.0**15)
    run = LocalRun(tmp_path)
    step = 1 if precision == "fp16" else 0
    with pytest.raises(train.NonFinite, match=rf"^step {step}: the gradient is not finite: .*images \["):
        train.fit(changed(tiny, precision=precision, init=None), run, data, poses)
    folder = tmp_path / f"nonfinite/step_{step}-rank_0"
    about = json.loads((folder / "snapshot.json").read_text())
    again = train.replay(folder)
    assert not np.isfinite(again.pop("gradient_norm")) and again == about["losses"]
    assert train.main([str(folder)]) == 0 and "'" not in capsys.readouterr().out
    assert all(v.isfinite().all() for v in load_file(folder / "model/model.safetensors").values())


def test_replayed_gradient(tiny: Config, data: Source, poses: AnchorPoses, tmp_path: Path) -> None:
    """Of a finite step: its norm is the one that the run told TensorBoard."""
    run = LocalRun(tmp_path)
    kept: list[Any] = []
    unspoilt = train._agree

    def spoilt(*args: Any) -> Any:
        kept.append(unspoilt(*args))
        return kept[0][0], False, float("nan")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_agree", spoilt)
        with pytest.raises(train.NonFinite):
            train.fit(changed(tiny, accumulate=2), run, data, poses)
    again = train.replay(tmp_path / "nonfinite/step_0-rank_0")
    means, _, norm = kept[0]
    assert again.pop("gradient_norm") == norm > 0 and list(again.values()) == means
