"""jobs/train.py on a local Ray: a run of two workers, going on, and what is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file

from jobs import store, train
from lcrnet import config, weights
from lcrnet.config import Config, UserError, from_dict
from lcrnet.dataset import Source


def changed(settings: Config, **fields: Any) -> Config:
    values = settings.model_dump()
    values["train"] |= fields
    return from_dict(values)


@pytest.fixture(scope="module")
def source(drawn: Path) -> Source:
    return Source(drawn / "annotations.json", drawn / "images")


def test_two_workers_train_a_model_and_go_on(
    cluster: Any, tiny: Config, source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = changed(tiny, steps=4, save_every=2, log_every=1, workers=2, batch=4, threads=1)
    metrics = train.run(settings, source, tmp_path / "run", val=source)
    assert metrics is not None and metrics["step"] == 4 and "recall" in metrics
    assert json.loads((tmp_path / "run/metrics.json").read_text())["step"] == 4
    model = weights.load(tmp_path / "run/model")
    assert model.config == settings and isinstance(model.detect_batch([]), list)
    assert list((tmp_path / "run/tensorboard").glob("events*"))

    # Finished: the same command does nothing, and says so.
    before = (tmp_path / "run/model/model.safetensors").stat().st_mtime_ns
    assert train.run(settings, source, tmp_path / "run") == metrics
    assert "finished" in capsys.readouterr().out
    assert (tmp_path / "run/model/model.safetensors").stat().st_mtime_ns == before

    # Another configuration in the same folder is refused; one that only says where it runs is not.
    with pytest.raises(UserError, match=r"train\.lr was .*another --out"):
        train.run(changed(settings, lr=0.5), source, tmp_path / "run")
    assert train.run(changed(settings, log_every=7), source, tmp_path / "run") == metrics

    # A driver that was killed before it published the model: the run's storage has it.
    weights_before = (tmp_path / "run/model/model.safetensors").read_bytes()
    (tmp_path / "run/model").rename(tmp_path / "gone")
    assert train.run(settings, source, tmp_path / "run") is not None
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == weights_before


def test_a_loss_that_is_not_finite_ends_the_run(
    cluster: Any, tiny: Config, source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = changed(tiny, steps=50, lr=1e30, workers=1, threads=1, clip=0, warmup=0)
    assert train.run(settings, source, tmp_path / "run") is None
    assert "not finite" in capsys.readouterr().out
    assert not (tmp_path / "run/model").exists()


def test_more_workers_than_the_cluster_has(cluster: Any, tiny: Config, source: Source, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lower --train\.workers to 8"):
        train.run(changed(tiny, workers=64, batch=64, threads=1), source, tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "nowhere.json"], "nowhere.json"),
        (["--images", "/nowhere"], "/nowhere: no such folder of images"),
        (["--images", "B", "--images", "C"], "1 --data, but 2 --images: give one for each"),
        (["--weight", "1", "--weight", "2"], "1 --data, but 2 --weight: give one for each"),
        (["--weight", "0"], "--weight 0: must be above 0"),
        (["--out", "/proc/run"], "/proc/run: cannot be written"),
        (["--store.checkpoints", "nowhere://bucket/run"], "store.checkpoints: nowhere://bucket/run: "),
        (["--store.checkpoints", "/proc/run"], "/proc/run: cannot be written (No such file or directory); choose "
         "another --store.checkpoints"),
        (["--store.keep_best", "oks_ap"], "store.keep_best: checkpoints have figures to choose by only with --val"),
        (["--store.min_workers", "2"], "store.min_workers 2 is above train.workers 1"),
        (["--store.min_workers", "2", "--workers", "4"], "cannot be shared among 3 workers, and 2 to 4 it may have to "
         "be: make train.batch a multiple of 12"),
    ],
)  # fmt: skip
def test_mistakes(arguments: list[str], says: str, drawn: Path, tmp_path: Path) -> None:
    given = {"--data": str(drawn / "annotations.json"), "--images": str(drawn / "images"), "--out": str(tmp_path)}
    rest = [part for option, value in given.items() if arguments[0] != option for part in (option, value)]
    with pytest.raises(UserError, match=re.escape(says)):
        train.main([*rest, *arguments])
    assert not (tmp_path / "model").exists()


def test_a_mistake_ends_with_2_and_one_line(drawn: Path, tmp_path: Path, root: Path) -> None:
    command = [sys.executable, str(root / "jobs/train.py"), "--data", str(drawn / "annotations.json")]
    command += ["--images", str(drawn / "images"), "--out", str(tmp_path), "--train.lrr", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (2, "error: unknown '--train.lrr'; did you mean '--train.lr'?\n")


def test_one_process_at_a_time(tiny: Config, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "PATIENCE", 0)
    with FileLock(tmp_path / ".lock"), pytest.raises(UserError, match="another process trains there"):
        train.run(tiny, source, tmp_path)


def checkpoint(folder: Path, step: int, torn: bool = False) -> Path:
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"step": step}))
    save_file({"a": torch.zeros(100), "b": torch.ones(3)}, folder / "training.safetensors")
    if torn:
        os.truncate(folder / "training.safetensors", 300)
    return folder


def listing(run: Path, *names: str) -> Path:
    file = run / "ray/checkpoint_manager_snapshot.json"
    file.write_text(json.dumps({"checkpoint_results": [{"checkpoint_dir_name": n, "metrics": {}} for n in names]}))
    return file


def test_checkpoints_are_fit_to_go_on_from(tmp_path: Path) -> None:
    """Uploads that were cut off go; without Ray's list, the newest whole checkpoint is found."""
    settings = config.Store(checkpoints=f"file://{tmp_path}/far")
    held = store.Store(settings, tmp_path / "run")
    assert held.mend() is None, "a new run"
    ray = tmp_path / "far/ray"
    for name, step, torn in (("checkpoint_a", 20, False), ("checkpoint_b", 10, False), ("checkpoint_c", 30, True)):
        checkpoint(ray / name, step, torn)
    whole = held.mend()
    assert whole is not None and Path(whole.path) == ray / "checkpoint_a", "none registered yet"
    listing(tmp_path / "far", "checkpoint_a", "checkpoint_b")
    assert held.mend() is None
    assert sorted(f.name for f in ray.glob("checkpoint_?")) == ["checkpoint_a", "checkpoint_b"]
    for text in ('{"checkpoint_results": [{"checkp', '{"checkpoint_results": [{"checkpoint_dir_name": "gone"}]}', "[]"):
        listing(tmp_path / "far").write_text(text)
        found = held.mend()
        assert found is not None and Path(found.path).name == "checkpoint_a", text
        assert (ray / "checkpoint_manager_snapshot.json.broken").read_text() == text


def test_the_records_of_a_run_outlive_its_folder(tiny: Config, tmp_path: Path) -> None:
    settings = config.Store(checkpoints=str(tmp_path / "far"))
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    config.save(tiny, tmp_path / "first/config.yaml")
    (tmp_path / "first/anchors.json").write_text("{}")
    store.Store(settings, tmp_path / "first").put()
    store.Store(settings, tmp_path / "second").fetch()
    assert config.load(tmp_path / "second/config.yaml") == tiny
    assert (tmp_path / "second/anchors.json").read_text() == "{}"
