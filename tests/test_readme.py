"""The README's commands, as printed; only names of files are filled in, and sizes made small."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lcrnet import coco, synthetic
from lcrnet.skeleton import LCR13

SMALL = {
    "train": "--train.steps 2 --train.log_every 1"
    " --train.batch 2 --anchors.k 3 --image.short_side 96 --train.threads 1",
    "tune": "--train.steps 2 --train.batch 2 --train.save_every 1 --train.workers 1 --train.threads 1 --tune.trials 2"
    " --draw.train 8 --draw.val 3 --tune.space '{train.lr: {choice: [0.001, 0.002]}}' --tune.metric step --anchors.k 3",
    "annotate": "",
    "plot": "",
    "coco": "",
    "evaluate": "",
    "anchors": "--anchors.k 3",
    "lift": "--lift.headings 4 --lift.elevations [0] --lift.neighbours 4",
}

PPI = "--tune.trials 3 --tune.metric recall"


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(text: str) -> list[list[str]]:
    lines = [line.split("#")[0].strip() for block in blocks(text, "sh") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("python jobs/")]


@pytest.fixture
def home(tmp_path: Path, root: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the README's names stand for: ANN.json, DIR, IMAGES, photo.jpg."""
    (tmp_path / "configs").symlink_to(root / "configs")
    shutil.copy(drawn / "annotations.json", tmp_path / "ANN.json")
    for name in ("DIR", "IMAGES"):
        shutil.copytree(drawn / "images", tmp_path / name)
    shutil.copy(min((drawn / "images").iterdir()), tmp_path / "photo.jpg")
    poses = np.concatenate([i.people.pose3d[i.people.has3d] for i in coco.read(drawn / "annotations.json").images])
    np.savez(tmp_path / "POSES.npz", poses=poses * [-1, -1, 1], joints=np.array(LCR13.joints))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_work_in_the_order_they_are_printed(
    cluster: Any, home: Path, root: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (root / "README.md").read_text(encoding="utf-8")
    done = []
    for _, job, *arguments in commands(text):
        name = Path(job).stem
        if name == "train" and "COCO/annotations/train.json" in arguments:
            # Two steps teach nothing: in place of what such a model finds, labels that can be trained on.
            shutil.rmtree("COCO")
            synthetic.write("COCO", 6, seed=9, size=96, processes=1)
            os.makedirs("COCO/annotations")
            shutil.move("COCO/annotations.json", "COCO/annotations/train.json")
        small = PPI if "--ppi" in arguments else SMALL[name]
        assert not importlib.import_module(f"jobs.{name}").main([*arguments, *shlex.split(small)]), arguments
        done.append(name)
    assert done == ["coco", "train", "plot", "tune", "tune", "annotate", "coco", "train", "evaluate", "anchors", "lift"]
    for made in ("RUN/model", "RUN/curves.png", "SWEEP/best", "PPI/best.yaml", "LABELS", "RUN2/model",
                 "REPORT/report.html", "ANCHORS.sheet.png", "LIFTED.json"):  # fmt: skip
        assert (home / made).exists(), made

    code = blocks(text, "python")
    assert len(code) == 1
    exec(compile(code[0], "README.md", "exec"), {})
    assert (home / "poses.png").stat().st_size > 1000


def test_the_data_the_readme_describes_is_what_is_read(drawn: Path) -> None:
    assert coco.check(drawn / "annotations.json") == []


def test_make_demo_and_make_test_are_there(root: Path) -> None:
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    text = (root / "README.md").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert f"make {target} " in text and re.search(rf"^{target}: install", makefile, flags=re.MULTILINE)
    for config in re.findall(r"configs/\w+\.yaml", text):
        assert (root / config).is_file(), config
