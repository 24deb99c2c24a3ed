"""jobs/evaluate.py: a report of a perfect and of an untrained model, the model's configuration, the user's mistakes."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from jobs import evaluate as job
from lcrnet import anchors, calibration, coco, config, evaluate, model, synthetic, weights
from lcrnet.annotate import Annotator
from lcrnet.annotations import CocoImage
from lcrnet.calibration import Calibration, Judged, Map
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
def perfect(
    drawn: tuple[Path, list[People]], untrained: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SimpleNamespace]:
    """A model that gives the truth, image by image, in the order of the file."""
    queue = [
        [Person(p.box[i], p.pose2d[i], p.pose3d[i], 0.9, np.ones(13), 0, 1, np.zeros(13)) for i in range(len(p))]
        for p in drawn[1]
    ]
    stub = SimpleNamespace(
        skeleton=LCR13, config=config.load(None, TINY), seen=[], rpn=SimpleNamespace(), calibration=None, dropped=0
    )

    def detect_batch(images: list[np.ndarray]) -> list[list[Person]]:
        stub.seen.append(len(images))
        return [queue.pop(0) for _ in images]

    def load(folder: Path, device: str) -> SimpleNamespace:
        stub.config = config.load(Path(folder) / "config.yaml")
        return stub

    stub.detect_batch, stub.folder = detect_batch, untrained
    monkeypatch.setattr(job, "run", functools.partial(job.run, annotator=functools.partial(Annotator, load=load)))
    yield stub


def command(folder: Path, out: Path, *more: str, model: Path | str) -> list[str]:
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
    assert job.main(command(folder, out, "--annotate.batch", "4", model=perfect.folder)) == 0
    metrics, people = read(out), sum(len(p) for p in truth)
    assert (metrics["images"], metrics["people"], metrics["found"]) == (6, people, people)
    assert metrics["missed"] == metrics["false"] == metrics["unreadable"] == 0
    assert metrics["oks_ap"] == pytest.approx(1) and metrics["mpjpe_mm"] < 0.1 and metrics["pck2d_all"] == 1
    assert metrics["model_id"] == weights.model_id(perfect.folder) and metrics["data"] == str(
        folder / "annotations.json"
    )
    assert metrics["config"]["annotate"]["batch"] == 4 and perfect.seen == [4, 2]
    assert "mpjpe_mm" in capsys.readouterr().out
    page = (out / "report.html").read_text()
    assert ".png" in page and page.count("data:image/jpeg") >= 3
    assert sorted(p.name for p in out.iterdir()) == ["metrics.json", "report.html"]
    assert metrics["calibration"]["error"]["score"]["oks50"] == pytest.approx(0.1, abs=1e-6)


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


def test_configuration_is_the_models_with_what_was_given_on_top(
    drawn: tuple[Path, list[People]], untrained: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("ppi: {th_iou: 0.2}\ntrain: {steps: 7}\n")
    job.main(command(drawn[0], tmp_path, "--config", str(recipe), "--evaluate.oks", "0.6", model=untrained))
    base, used = config.load(untrained / "config.yaml"), config.from_dict(read(tmp_path)["config"])
    assert (used.ppi.th_iou, used.ppi.th_persondetect) == (0.2, 0.25)
    assert (used.evaluate.oks, used.evaluate.min_score) == (0.6, 0.4)
    assert used.train == base.train and used.model == base.model


def test_given_settings_decide(drawn: tuple[Path, list[People]], perfect: SimpleNamespace, tmp_path: Path) -> None:
    given = ("--evaluate.min_score", "0.95", "--ppi.min_mode_score", "0.3")
    job.main(command(drawn[0], tmp_path, *given, model=perfect.folder))
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
        job.main(command(drawn[0], tmp_path / "file" / "report", model=perfect.folder))
    if os.geteuid():
        tmp_path.chmod(0o500)
        with pytest.raises(UserError, match="cannot be written"):
            job.main(command(drawn[0], tmp_path / "report", model=perfect.folder))
    assert perfect.seen == []


def test_unknown_option_ends_with_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        job.main(command(tmp_path, tmp_path, "--evaluate.min_scor", "1", model="M"))
    assert end.value.code == 2 and "did you mean '--evaluate.min_score'" in capsys.readouterr().err


def figures(out: Path) -> dict[str, Any]:
    """What is measured, without how."""
    how = ("config", "command", "images_per_second")
    return {name: value for name, value in read(out).items() if name not in how}


def test_workers_give_the_same_figures(
    drawn: tuple[Path, list[People]], untrained: Path, tmp_path: Path, cluster: Any
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(4)  # what each of the two workers gets of the test cluster's eight
    try:
        for workers in ("1", "2"):
            more = ("--annotate.workers", workers, "--annotate.batch", "1", "--evaluate.min_score", "0")
            job.main(command(drawn[0], tmp_path / workers, *more, model=untrained))
    finally:
        torch.set_num_threads(threads)
    assert figures(tmp_path / "1") == figures(tmp_path / "2") and figures(tmp_path / "1")["detections"] > 0
    with pytest.raises(UserError, match="its calibration is of other settings"):
        model = shutil.copytree(untrained, tmp_path / "model")
        weights.calibrate(model, Calibration("oks50", Map((0, 1), (0, 1)), Map((0, 1), (0, 1)), {"detector": "other"}))
        more = ("--annotate.workers", "2", "--annotate.batch", "1")
        job.main(command(drawn[0], tmp_path / "3", *more, model=model))


def test_calibrate(
    drawn: tuple[Path, list[People]], untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of the report, and of what detects from then on, are those of the map; without it they are as before."""
    monkeypatch.setattr(calibration, "LEAST", 4)
    monkeypatch.setattr(calibration, "FOLDS", 1)
    monkeypatch.setattr(calibration, "tables", lambda judged, event=None: {"error": {}, "calibrated": {"error": {}}})
    model = shutil.copytree(untrained, tmp_path / "model")
    given = ("--ppi.th_persondetect", "0.01", "--head.score_floor", "0.001", "--evaluate.min_score", "0")
    seen: list[list[list[Person]]] = []
    judge = evaluate.judge
    monkeypatch.setattr(
        evaluate, "judge", lambda truth, found, skeleton: (seen.append(found), judge(truth, found, skeleton))[1]
    )
    outcomes = evaluate.outcomes
    monkeypatch.setattr(
        evaluate, "outcomes", lambda truth, found, *rest: (seen.append(found), outcomes(truth, found, *rest))[1]
    )

    def scores(people: list[list[Person]]) -> list[float]:
        return [p.score for image in people for p in image]

    # An untrained model is never right: let it be, half of the time.
    real = calibration.fit

    def fit(judged: Judged, event: Any, about: Any = None) -> Calibration:
        for of in (judged.right[event], judged.joint_right[event]):
            of.ravel()[::2], of.ravel()[1::2] = 1, 0
        return real(judged, event, about)

    monkeypatch.setattr(calibration, "fit", fit)
    before = weights.model_id(model)
    job.main(command(drawn[0], tmp_path / "a", *given, "--calibrate", "oks50", model=model))
    assert weights.model_id(model) != before == weights.model_id(untrained)
    assert read(tmp_path / "a")["model_id"] == weights.model_id(model) == weights.read_about(model)["id"]
    raw, calibrated = scores(seen[0]), scores(seen[1])
    made = weights.load(model).calibration
    assert made is not None and len(raw) > 4
    assert calibrated == pytest.approx(made.score(np.array(raw)).tolist()) and calibrated != raw
    seen.clear()
    job.main(command(drawn[0], tmp_path / "b", *given, model=model))
    assert scores(seen[0]) == pytest.approx(calibrated, rel=1e-4)  # read from the model folder, applied by the worker
    seen.clear()
    job.main(command(drawn[0], tmp_path / "c", *given, "--annotate.calibrated", "false", model=model))
    assert scores(seen[0]) == raw
    with pytest.raises(UserError, match="calibration is of other settings of image, rpn, head, ppi"):
        job.main(command(drawn[0], tmp_path / "d", model=model))


def test_protocol(drawn: tuple[Path, list[People]], untrained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere"):
        out = command(drawn[0], tmp_path, "--protocol", "mupots", model=untrained)
        job.main([*out, "--data", str(tmp_path / "nowhere")])
