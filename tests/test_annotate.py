"""Annotator and Labeller with a fake model: one row per image whatever happens, similar shapes together."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from lcrnet import config, labels
from lcrnet.annotate import Annotator, Labeller, config_id, settings
from lcrnet.config import Config, UserError
from lcrnet.pose import Person
from lcrnet.skeleton import LCR13


class Fake:
    """A model that finds in each image as many people as the red of its first pixel says, and fails at 13."""

    def __init__(self) -> None:
        self.config, self.skeleton, self.rpn = Config(), LCR13, SimpleNamespace(config=None)
        self.calibration, self.dropped = None, 0
        self.calls: list[list[tuple[int, int]]] = []
        self.broken = False

    def detect_batch(self, images: list[np.ndarray]) -> list[list[Person]]:
        self.calls.append([shot.shape[:2] for shot in images])
        if self.broken or any(shot[0, 0, 0] == 13 for shot in images):
            raise RuntimeError("no luck\nwith this one")
        return [[person() for _ in range(shot[0, 0, 0] if shot[0, 0, 0] < 10 else 0)] for shot in images]


def person() -> Person:
    joints = np.ones((13, 3), np.float32)
    return Person(np.arange(4.0), joints[:, :2], joints, 0.9, joints[:, 0], 3, 5, joints[:, 0])


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """What a model's id is made of."""
    folder = tmp_path / "model"
    folder.mkdir()
    config.save(Config(), folder / "config.yaml")
    (folder / "anchors.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def png(red: int, width: int = 40, height: int = 30) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (red, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def batch(*data: bytes) -> dict[str, list[Any]]:
    return {"uri": [f"/d/{i}.png" for i in range(len(data))], "bytes": list(data), "error": [""] * len(data)}


def annotator(folder: Path, fake: Fake, **options: Any) -> Annotator:
    return Annotator(folder, "cpu", load=lambda where, device: fake, **options)


def test_rows_are_in_order_and_complete(model_folder: Path) -> None:
    given = batch(png(2), b"no image", b"", png(0, 20, 50), png(1), png(1)[:60])
    given["error"][2] = "permission denied"
    out = annotator(model_folder, Fake(), root="/d")(given)
    assert out.schema.equals(labels.SCHEMA, check_metadata=True)
    rows = out.to_pylist()
    assert [r["uri"] for r in rows] == given["uri"]
    assert [r["status"] for r in rows] == ["ok", "unreadable", "unreadable", "ok", "ok", "unreadable"]
    assert [len(r["people"]) for r in rows] == [2, 0, 0, 0, 1, 0]
    assert [(r["width"], r["height"]) for r in rows] == [
        (40, 30),
        (None, None),
        (None, None),
        (20, 50),
        (40, 30),
        (None, None),
    ]
    assert rows[2]["error"] == "permission denied" and rows[2]["sha256"] is None
    assert rows[0]["sha256"] == hashlib.sha256(given["bytes"][0]).hexdigest() and rows[0]["error"] is None
    assert all(len(r["model"]) == 16 and len(r["config"]) == 16 and r["skeleton"] == "lcr13" for r in rows)
    assert {r["group"] for r in rows} == {labels.group_of("/d/0.png", "/d")}
    np.testing.assert_array_equal(labels.person_of(rows[0]["people"][0]).box, [0, 1, 2, 3])


def test_an_empty_batch_and_one_without_an_image(model_folder: Path) -> None:
    fake = Fake()
    assert annotator(model_folder, fake)(batch()).num_rows == 0
    assert annotator(model_folder, fake)(batch(b"x", b"y"))["status"].to_pylist() == ["unreadable"] * 2
    assert fake.calls == []


def test_similar_shapes_go_together(model_folder: Path) -> None:
    wide, tall = png(1, 60, 30), png(2, 30, 60)
    fake = Fake()
    out = annotator(model_folder, fake, batch=3)(batch(*[wide, tall] * 4))
    assert [len(set(call)) for call in fake.calls].count(1) == 2 and max(map(len, fake.calls)) == 3
    assert sum(map(len, fake.calls)) == 8
    assert [len(people) for people in out["people"].to_pylist()] == [1, 2] * 4


def test_large_images_go_in_smaller_batches(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcrnet.annotate._PIXELS", 2 * 40 * 30)
    fake = Fake()
    annotator(model_folder, fake)(batch(*[png(0)] * 4, png(0, 100, 100)))
    assert sorted(map(len, fake.calls)) == [1, 2, 2]


def test_an_image_the_model_fails_at_costs_only_itself(model_folder: Path) -> None:
    out = annotator(model_folder, Fake())(batch(png(1), png(13), png(2))).to_pylist()
    assert [r["status"] for r in out] == ["ok", "unreadable", "ok"]
    assert [len(r["people"]) for r in out] == [1, 0, 2]
    assert out[1]["error"] == "the model failed: RuntimeError: no luck with this one" and out[1]["sha256"]


def test_a_broken_model_is_no_broken_image(model_folder: Path) -> None:
    fake = Fake()
    fake.broken = True
    with pytest.raises(RuntimeError, match="no luck"):
        annotator(model_folder, fake)(batch(png(1)))


def test_settings_take_what_is_said_and_nothing_else() -> None:
    own = config.from_dict({"image": {"short_side": 128}, "ppi": {"th_iou": 0.3}, "train": {"lr": 1}})
    asked = config.load(None, {"ppi.th_persondetect": "0.7", "head.samples": "7", "train.lr": "0.5"})
    got = settings(own, asked)
    assert (got.ppi.th_persondetect, got.ppi.th_iou, got.image.short_side) == (0.7, 0.3, 128)
    assert got.train.lr == 1 and got.head.samples == own.head.samples
    assert settings(own, Config()) == own


def test_ids_tell_what_decides_the_labels(model_folder: Path) -> None:
    def ids(**options: Any) -> tuple[str, str]:
        made = annotator(model_folder, Fake(), **options)
        return made.model_id, made.config_id

    plain = ids()
    assert ids(batch=4, threads=1) == plain
    assert ids(max_pixels=99)[1] != plain[1]
    other = ids(asked=config.load(None, {"head.passes": "2"}))
    assert other[0] == plain[0] and other[1] != plain[1]
    assert config_id(config.from_dict({"train": {"lr": 3}})) == config_id(Config()) == plain[1]


def test_asked_settings_reach_the_model(model_folder: Path) -> None:
    fake = Fake()
    annotator(model_folder, fake, asked=config.load(None, {"rpn.post_nms": "5"}))
    assert fake.config.rpn.post_nms == fake.rpn.config.post_nms == 5


def test_hostile_files(shared: Path, model_folder: Path) -> None:
    root = shared / "hostile" / "images"
    files = json.loads((shared / "hostile" / "expected.json").read_text())["files"]
    given = {"uri": [str(root / f["file"]) for f in files], "bytes": [(root / f["file"]).read_bytes() for f in files],
             "error": [""] * len(files)}  # fmt: skip
    rows = annotator(model_folder, Fake(), root=str(root))(given).to_pylist()
    for file, row in zip(files, rows, strict=True):
        if file["outcome"] == "skipped":
            assert row["status"] == "unreadable" and row["error"], file["file"]
        else:
            assert [row["width"], row["height"]] == file["upright_size"], file["file"]
    assert rows[0]["group"] != rows[1]["group"]  # same base name, two folders


def labeller(out: Path, model: Path, root: Path, fake: Fake | None = None) -> Labeller:
    arguments = {"model": model, "device": "cpu", "max_pixels": 10_000, "batch": 2, "root": str(root)}
    return Labeller(out, arguments, annotator=lambda **given: Annotator(**given, load=lambda *_: fake or Fake()))


def block(*paths: Path) -> pa.Table:
    return pa.table({"uri": [str(p) for p in paths], "error": [""] * len(paths)})


def test_labeller_commits_one_file_per_block_however_often(tmp_path: Path, model_folder: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "labels"
    images.mkdir(), out.mkdir()
    for i in range(11):  # more than one part of 4 * batch
        (images / f"{i}.png").write_bytes(png(1))
    (images / "folder.png").mkdir()
    given = block(*images.iterdir())
    work = labeller(out, model_folder, images)
    counts = {"images": 12, "people": 11, "unreadable": 1, "dropped": 0}
    assert work(given).to_pylist() == work(given).to_pylist() == [counts]
    assert [f.suffix for f in out.iterdir()] == [".parquet"]
    table = labels.read(out)
    assert table["uri"].to_pylist() == sorted(given["uri"].to_pylist())
    assert table.filter(pa.compute.equal(table["status"], "unreadable"))["error"].to_pylist() == ["a folder"]


def test_labeller_leaves_nothing_under_the_final_name_when_it_fails(tmp_path: Path, model_folder: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "labels"
    images.mkdir(), out.mkdir()
    (images / "a.png").write_bytes(png(1))
    fake = Fake()
    fake.broken = True
    with pytest.raises(RuntimeError):
        labeller(out, model_folder, images, fake)(block(images / "a.png"))
    assert list(out.iterdir()) == []


def test_labeller_refuses_a_machine_without_the_folders(tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(UserError, match="elsewhere: not on"):
        labeller(tmp_path, model_folder, tmp_path / "elsewhere")
