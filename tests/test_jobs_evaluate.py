"""jobs/evaluate.py: a report of a perfect and of an untrained model, the model's configuration, the user's mistakes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from jobs import evaluate as job
from lcrnet import anchors, coco, config, model, synthetic, weights
from lcrnet.annotations import CocoImage
from lcrnet.config import ConfigError, UserError
from lcrnet.pose import People, Person
from lcrnet.skeleton import LCR13

TINY = {
    "model.backbone": "tiny", "model.norm": "gn", "model.freeze": 0, "image.short_side": 64, "image.max_side": 64,
    "rpn.sizes": [32], "rpn.post_nms": 20, "anchors.k": 3, "evaluate.min_score": 0.4, "ppi.th_persondetect": 0.25,
}  # fmt: skip


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[People]]:
    """(folder with annotations.json and images/ of six drawings, their people)."""
    folder = tmp_path_factory.mktemp("drawn")
    (folder / "images").mkdir()
    shots, images = [synthetic.draw(seed, 64) for seed in range(6)], []
    for i, (pixels, people) in enumerate(shots):
        cv2.imwrite(str(folder / "images" / f"{i}.png"), pixels[..., ::-1])
        images.append(CocoImage(0, f"{i}.png", 64, 64, None, people))
    coco.write(folder / "annotations.json", images, LCR13)
    return folder, [people for _, people in shots]


@pytest.fixture(scope="module")
def untrained(drawn: tuple[Path, list[People]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights."""
    folder, settings = tmp_path_factory.mktemp("model"), config.load(None, TINY)
    weights.save(model.build(settings, anchors.cluster(People.join(drawn[1]), 3)), folder)
    return folder


@pytest.fixture(autouse=True)
def small_sheets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "EXAMPLES", 1)


@pytest.fixture
def perfect(drawn: tuple[Path, list[People]], monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A model that gives the truth, image by image, in the order of the file."""
    queue = [
        [Person(p.box[i], p.pose2d[i], p.pose3d[i], 0.9, np.ones(13), 0, 1, np.zeros(13)) for i in range(len(p))]
        for p in drawn[1]
    ]
    stub = SimpleNamespace(skeleton=LCR13, config=config.load(None, TINY), seen=[])

    def detect_batch(images: list[np.ndarray]) -> list[list[Person]]:
        stub.seen.append(len(images))
        return [queue.pop(0) for _ in images]

    stub.detect_batch = detect_batch
    monkeypatch.setattr(weights, "load", lambda folder, device: stub)
    monkeypatch.setattr(weights, "model_id", lambda folder: "0123")
    yield stub


def command(folder: Path, out: Path, *more: str, model: Path | str = "M") -> list[str]:
    return ["--model", str(model), "--data", str(folder / "annotations.json"), "--images", str(folder / "images"),
            "--out", str(out), *more]  # fmt: skip


def read(out: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return metrics


def test_report_of_a_perfect_model(
    drawn: tuple[Path, list[People]], perfect: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, truth = drawn
    out = tmp_path / "a" / "report"
    assert job.main(command(folder, out, "--annotate.batch", "4")) == 0
    metrics, people = read(out), sum(len(p) for p in truth)
    assert (metrics["images"], metrics["people"], metrics["found"]) == (6, people, people)
    assert metrics["missed"] == metrics["false"] == metrics["unreadable"] == 0
    assert metrics["oks_ap"] == pytest.approx(1) and metrics["mpjpe_mm"] < 0.1 and metrics["pck2d_all"] == 1
    assert metrics["model_id"] == "0123" and metrics["data"] == str(folder / "annotations.json")
    assert metrics["config"]["annotate"]["batch"] == 4 and perfect.seen == [4, 2]
    assert "mpjpe_mm" in capsys.readouterr().out
    sheet = cv2.imread(str(out / "sheet.png"))
    assert sheet is not None and min(sheet.shape[:2]) > 250
    assert sorted(p.name for p in out.iterdir()) == ["metrics.json", "sheet.png"]


def test_report_of_an_untrained_model(drawn: tuple[Path, list[People]], untrained: Path, tmp_path: Path) -> None:
    job.main(command(drawn[0], tmp_path, model=untrained))
    metrics = read(tmp_path)
    assert metrics["found"] + metrics["missed"] == metrics["people"] > 0
    assert metrics["model_id"] == weights.model_id(untrained)
    assert metrics["config"]["evaluate"]["min_score"] == 0.4  # the model's, not the default


def test_unreadable_images_have_nobody_in_them(
    drawn: tuple[Path, list[People]], untrained: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations.json").write_bytes((drawn[0] / "annotations.json").read_bytes())
    for i in range(6):
        (folder / "images" / f"{i}.png").write_bytes(b"" if i == 2 else (drawn[0] / f"images/{i}.png").read_bytes())
    job.main(command(folder, tmp_path / "out", model=untrained))
    metrics = read(tmp_path / "out")
    assert metrics["images"] == 6 and metrics["unreadable"] == 1 and metrics["people"] == sum(map(len, drawn[1]))
    assert metrics["unreadable_files"] == {str(folder / "images" / "2.png"): "empty file"}


def test_configuration_is_the_models_with_what_was_given_on_top(tmp_path: Path) -> None:
    base = config.load(None, TINY)
    assert job.merged(base, None) == base == job.merged(base, config.Config())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("ppi: {th_iou: 0.2}\ntrain: {steps: 7}\n")
    merged = job.merged(base, config.load(recipe, {"evaluate.oks": "0.6"}))
    assert (merged.ppi.th_iou, merged.ppi.th_persondetect) == (0.2, 0.25)
    assert (merged.evaluate.oks, merged.evaluate.min_score) == (0.6, 0.4)
    assert merged.train == base.train and merged.model == base.model


def test_given_settings_decide(drawn: tuple[Path, list[People]], perfect: SimpleNamespace, tmp_path: Path) -> None:
    job.main(command(drawn[0], tmp_path, "--evaluate.min_score", "0.95", "--ppi.min_mode_score", "0.3"))
    assert read(tmp_path)["found"] == 0 and read(tmp_path)["mpjpe_mm"] is None
    assert perfect.config.ppi.min_mode_score == 0.3  # what detect reads


def test_mistakes(drawn: tuple[Path, list[People]], untrained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"--train.lr is fixed by the model"):
        job.main(command(drawn[0], out, "--train.lr", "1", model=untrained))
    with pytest.raises(UserError, match=r"nowhere: not a model folder"):
        job.main(command(drawn[0], out, model=tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"ann\.json: .*[Nn]o such file"):
        job.main([*command(drawn[0], out, model=untrained), "--data", str(tmp_path / "ann.json")])
    with pytest.raises(UserError, match=r"6 of 6 images .* are missing: 0\.png, 1\.png"):
        job.main([*command(drawn[0], out, model=untrained), "--images", str(tmp_path)])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"^--annotate.gpu: "):
            job.main(command(drawn[0], out, "--annotate.gpu", "true", model=untrained))
    assert not (out / "metrics.json").exists()


def test_unwritable_report_is_refused_before_the_work(
    drawn: tuple[Path, list[People]], perfect: SimpleNamespace, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        job.main(command(drawn[0], tmp_path / "file" / "report"))
    if os.geteuid():
        tmp_path.chmod(0o500)
        with pytest.raises(UserError, match="cannot be written"):
            job.main(command(drawn[0], tmp_path / "report"))
    assert perfect.seen == []


def test_unknown_option_ends_with_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        job.main(command(tmp_path, tmp_path, "--evaluate.min_scor", "1"))
    assert end.value.code == 2 and "did you mean '--evaluate.min_score'" in capsys.readouterr().err
