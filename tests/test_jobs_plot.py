"""jobs/plot.py: reading what runs left for TensorBoard, and the picture of it."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import pytest

from jobs import plot
from lcrnet import image
from lcrnet.board import Board
from lcrnet.config import UserError


def written(run: Path, steps: range, start: int = 0, scale: float = 1, kind: str = "") -> None:
    with Board(run / "tensorboard" / kind, start) as board:
        for step in steps:
            board.step(step, {"class": scale * step, "pose3d": 0.5}, {"lr": 0.1})


def test_the_curves_of_a_run(tmp_path: Path) -> None:
    written(tmp_path, range(1, 5))
    with Board(tmp_path / "tensorboard/beside") as board:
        board.validation(4, {"oks_ap": 0.25, "per_group": {}})
    curves = plot.read(tmp_path)
    assert set(curves) == {"loss/class", "loss/pose3d", "loss/total", "train/lr", "val/oks_ap"}
    assert curves["loss/class"] == {1: 1, 2: 2, 3: 3, 4: 4} and curves["val/oks_ap"] == {4: 0.25}
    assert curves["loss/total"][4] == 4.5


def test_what_a_run_did_again_counts_once(tmp_path: Path) -> None:
    """Killed after step 6, it went on from step 3 and ended at 5."""
    written(tmp_path, range(1, 7), scale=10)
    time.sleep(1.1)  # files are named by the second
    written(tmp_path, range(4, 6), start=3)
    assert plot.read(tmp_path)["loss/class"] == {1: 10, 2: 20, 3: 30, 4: 4, 5: 5}


def test_a_file_that_is_being_written(tmp_path: Path) -> None:
    written(tmp_path, range(1, 5))
    file = next((tmp_path / "tensorboard").glob("events*"))
    whole = plot.read(tmp_path)["loss/class"]
    os.truncate(file, file.stat().st_size - 5)
    cut = plot.read(tmp_path)
    assert cut["loss/class"].items() <= whole.items() and "loss/class" in cut and "train/lr" in cut


def test_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        written(tmp_path / name, range(1, 40))
    assert plot.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "4 curves to step 39" in capsys.readouterr().out
    drawn = image.read(tmp_path / "a/curves.png")
    assert drawn.shape[1] == 1500 and (drawn.max(2) - drawn.min(2) > 60).sum() > 1000, "lines in colours"
    assert plot.main([str(tmp_path / "b"), "--out", str(tmp_path / "one.pdf"), "--smooth", "0"]) == 0
    assert (tmp_path / "one.pdf").read_bytes()[:4] == b"%PDF"


def test_a_moving_average() -> None:
    assert plot.averaged([1, 2, 4], 0) == [1, 2, 4]
    assert plot.averaged([3, 3, 3], 0.9) == pytest.approx([3, 3, 3]), "no bias to zero"
    assert plot.averaged([0, 4], 0.5) == pytest.approx([0, 8 / 3])
    assert plot.averaged([1, math.nan, 1], 0.5) == [1, 1, 1]
    assert math.isnan(plot.averaged([math.inf], 0.5)[0])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{}/none"], "none: no curves in "),
        (["{}", "--smooth", "1"], r"--smooth 1: 0 \(none\) or more, below 1"),
        (["{}", "--out", "{}/no/folder.png"], "folder.png: cannot be written"),
        (["{}", "--out", "{}/curves.txt"], "curves.txt: cannot be written"),
    ],
)
def test_mistakes(arguments: list[str], says: str, tmp_path: Path) -> None:
    written(tmp_path, range(1, 3))
    with pytest.raises(UserError, match=says):
        plot.main([a.format(tmp_path) for a in arguments])
