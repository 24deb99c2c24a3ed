"""jobs/demo.py, shortened: every stage of the pipeline runs and leaves what the next one needs."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO

from jobs import demo
from lcrnet import labels, weights

SHORT = shlex.split(
    "--draw.train 24 --draw.val 6 --draw.unlabelled 10 --draw.finetune_steps 2 --train.steps 4 --train.batch 4"
    " --train.workers 1 --train.threads 1 --train.warmup 1 --anchors.k 4"
    " --evaluate.min_score 0 --coco.min_score 0 --ppi.th_persondetect 0.01"
)


def test_demo(cluster: Any, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(root / "configs/demo.yaml"), "--out", str(tmp_path), *SHORT]
    assert demo.main(arguments) == 0
    said = capsys.readouterr().out
    assert "trained on drawings" in said and "retrained on its own labels" in said and "tensorboard --logdir" in said
    metrics = json.loads((tmp_path / "report/metrics.json").read_text())
    names = {"people", "found", "missed", "false", "recall", "precision", "oks_ap", "pck2d", "mpjpe_mm", "pa_mpjpe_mm"}
    assert names <= set(metrics) and metrics["images"] == 6
    assert len(labels.read(tmp_path / "labels")) == 10
    for side in ("train", "val"):
        data = COCO(str(tmp_path / f"coco/annotations/{side}.json"))
        assert all((tmp_path / "coco/images" / image["file_name"]).is_file() for image in data.dataset["images"])
    assert weights.load(tmp_path / "retrained/model").config.train.init == str(tmp_path / "run/model")
    assert (tmp_path / "sheet.png").stat().st_size > 10_000

    # Again: everything is there already.
    assert demo.main(arguments) == 0
    assert "is finished" in capsys.readouterr().out
