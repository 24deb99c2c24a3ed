"""jobs/train.py on a local Ray: a run of two workers, going on, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs import train
from lcrnet import weights
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
        (["--out", "/proc/run"], "/proc/run: cannot be written"),
        (["--steps", "0"], "train.steps: input should be greater than or equal to 1, not 0"),
        (["--train.lrr", "1"], "unknown '--train.lrr'; did you mean '--train.lr'?"),
    ],
)
def test_mistakes_end_with_2_and_one_line(
    arguments: list[str], says: str, drawn: Path, tmp_path: Path, root: Path
) -> None:
    command = [sys.executable, str(root / "jobs/train.py")]
    command += ["--data", str(drawn / "annotations.json"), "--images", str(drawn / "images"), "--out", str(tmp_path)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert says in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "model").exists()
