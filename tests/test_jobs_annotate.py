"""jobs/annotate.py and jobs/session.py on a local Ray: every image once, resuming, and the user's mistakes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs.annotate import annotate, main
from jobs.session import connect, writable
from lcrnet import config, labels
from lcrnet.config import Config, UserError


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A folder with an id; nobody loads it."""
    folder = tmp_path / "model"
    folder.mkdir()
    config.save(Config(), folder / "config.yaml")
    (folder / "anchors.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def fake(**given: Any) -> Any:
    """An Annotator with a model that finds one person in each image, and says which process it ran in.

    All its names are inside and it is sent by value: the workers cannot import this file.
    """
    import os
    from types import SimpleNamespace

    import numpy as np

    from lcrnet.annotate import Annotator
    from lcrnet.config import Config, UserError
    from lcrnet.pose import Person
    from lcrnet.skeleton import LCR13

    if given["asked"].ppi.th_iou == 0.99:
        raise UserError("this model cannot be loaded")
    joints = np.ones((13, 3), np.float32)
    who = Person(np.zeros(4), joints[:, :2], joints, 0.9, joints[:, 0], 0, os.getpid() % 10_000, joints[:, 0])
    model = SimpleNamespace(
        config=Config(),
        skeleton=LCR13,
        rpn=SimpleNamespace(),
        calibration=None,
        dropped=0,
        detect_batch=lambda images: [[who] for _ in images],
    )
    return Annotator(**given, load=lambda folder, device: model)


@pytest.fixture
def cluster(cluster: Any) -> Any:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield cluster
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def asked(**values: Any) -> Config:
    return config.from_dict({"annotate": {"batch": 2, "block": 4, **values}})


def test_hostile_folder_resume_and_more_images(
    cluster: Any, shared: Path, tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = tmp_path / "images", tmp_path / "labels"
    shutil.copytree(shared / "hostile" / "images", images)
    (images / "notes.txt").write_text("no image")
    about = annotate([str(images)], model_folder, out, asked(workers=2), fake)
    files = json.loads((shared / "hostile" / "expected.json").read_text())["files"]
    table = labels.read(out)
    rows = {row["uri"]: row for row in table.to_pylist()}
    assert set(rows) == {str(images / f["file"]) for f in files} and len(table) == len(files)
    for file in files:
        row = rows[str(images / file["file"])]
        assert row["status"] == ("unreadable" if file["outcome"] == "skipped" else "ok"), file["file"]
        assert (row["error"] is None) == (row["status"] == "ok")
        assert len(row["people"]) == (row["status"] == "ok")
    assert {row["group"] for row in rows.values()} == {"", "cam1", "cam2"}
    parts = sorted(out.glob("*.parquet"))
    assert [len(pq.read_table(part)) for part in parts] == [2] * 6
    assert about == json.loads((out / "run.json").read_text())
    assert about["finished"] and about["ignored"] == {".txt": 1}
    assert (about["images"], about["unreadable"], about["people"]) == (12, 4, 8)
    said = capsys.readouterr().out
    assert "12 images, 1 other files ignored" in said and "csv_named.jpg: not an image" in said

    # Nothing to do: nothing is done. A file lost, an image added: only those.
    untouched = {part.name: part.stat().st_mtime_ns for part in parts[1:]}
    again = annotate([str(images)], model_folder, out, asked(), fake)
    assert again["run"]["images"] == 0 and again["images"] == 12 and again["people"] == 8
    lost = set(pq.read_table(parts[0])["uri"].to_pylist())
    parts[0].unlink()
    (out / ".0123.99.part").write_bytes(b"of a killed run")
    shutil.copy(images / "grey.png", images / "cam1" / "new.png")
    again = annotate([str(images)], model_folder, out, asked(), fake)
    assert again["run"]["images"] == len(lost) + 1 and again["labelled_before"] == 10
    assert len(labels.read(out)) == sum(len(pq.read_table(p)) for p in out.glob("*.parquet")) == 13
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("*.parquet") if p.name in untouched} == untouched
    assert not list(out.glob(".*"))

    with pytest.raises(UserError, match=r"another config .* choose another --out"):
        annotate([str(images)], model_folder, out, config.from_dict({"ppi": {"th_iou": 0.5}}), fake)
    (model_folder / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(UserError, match=r"another model .* choose another --out"):
        annotate([str(images)], model_folder, out, asked(), fake)
    assert len(labels.read(out)) == 13


def test_a_worker_that_cannot_load_the_model_is_the_users_mistake(
    cluster: Any, tmp_path: Path, model_folder: Path
) -> None:
    (tmp_path / "a.jpg").touch()
    with pytest.raises(UserError, match="cannot be loaded"):
        annotate([str(tmp_path)], model_folder, tmp_path / "out", config.from_dict({"ppi": {"th_iou": 0.99}}), fake)


def test_more_workers_than_the_cluster_has(cluster: Any) -> None:
    connect(8)
    with pytest.raises(UserError, match=r"asked for 9 workers x 1 CPU; .* 8 CPUs.* lower --train.workers to 8"):
        connect(9)
    with pytest.raises(UserError, match=r"0 GPUs.*--annotate.gpu false"):
        connect(1, gpu=True, field="annotate")


def test_no_cluster_at_ray_address() -> None:
    code = "from jobs.session import connect; from lcrnet import config; config.run(lambda: connect(1))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"RAY_ADDRESS": "127.0.0.1:9"}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: RAY_ADDRESS=127.0.0.1:9: no cluster there") and done.stderr.count("\n") == 1


def test_writable(tmp_path: Path) -> None:
    assert writable(tmp_path / "a" / "b").is_dir() and not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nothing"):
        with pytest.raises(UserError, match=r"cannot be written .* choose another --out"):
            writable(path)


def test_mistakes_end_before_any_work(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, out = tmp_path / "empty", tmp_path / "out"
    empty.mkdir()
    (tmp_path / "a.jpg").touch()
    (tmp_path / "file").touch()
    monkeypatch.setattr("jobs.annotate.connect", lambda *_, **__: pytest.fail("Ray was started"))
    mistakes = {
        (str(tmp_path / "missing"), str(model_folder), str(out)): "missing: no such file or folder",
        (str(empty), str(model_folder), str(out)): "empty: no image there",
        (str(tmp_path / "file"), str(model_folder), str(out)): "no image there (but 1 no suffix)",
        (str(tmp_path / "a.jpg"), str(tmp_path / "nowhere"), str(out)): "nowhere: not a model folder",
        (str(tmp_path / "a.jpg"), str(empty), str(out)): "empty: not a model folder",
        (str(tmp_path / "a.jpg"), str(model_folder), str(tmp_path / "file")): "file: cannot be written",
    }
    for (images, model, labels_out), message in mistakes.items():
        with pytest.raises(SystemExit) as end:
            config.run(lambda given=(images, "--model", model, "--out", labels_out): main(given))
        said = capsys.readouterr()
        assert end.value.code == 2 and message in said.err and said.err.count("\n") == 1, said.err
        assert not out.exists()
    out.mkdir()
    (out / "x.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match=r"x\.parquet: not a label table"):
        annotate([str(tmp_path / "a.jpg")], model_folder, out, Config())


def test_the_groups_root() -> None:
    from jobs.annotate import _root

    assert _root(["/a/b/*.jpg"]) == _root(["/a/b/c*/x.jpg"]) == "/a/b"
    assert _root(["/proc", "/proc/self"]) == "/proc"
    assert _root([__file__]) == str(Path(__file__).parent)
