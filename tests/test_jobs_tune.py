"""jobs/tune.py: a sweep of two short trials, and search spaces that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs import tune
from lcrnet import weights
from lcrnet.config import Config, ConfigError, UserError, from_dict
from lcrnet.dataset import Source


def with_space(settings: Config, space: dict[str, Any], **fields: Any) -> Config:
    values = settings.model_dump()
    values["tune"] |= {"space": space, "trials": 2, "metric": "step", "mode": "max"}
    values["train"] |= fields
    return from_dict(values)


def test_a_sweep_ranks_its_trials_and_keeps_the_best_model(
    cluster: Any, tiny: Config, drawn: Path, tmp_path: Path
) -> None:
    space = {"train.lr": {"loguniform": [1e-4, 1e-3]}, "anchors.k": {"choice": [3, 4]}}
    settings = with_space(tiny, space, steps=2, save_every=1, workers=1, threads=1)
    source = Source(drawn / "annotations.json", drawn / "images")
    rows = tune.sweep(settings, tune.search_space(settings), source, source, tmp_path)
    assert len(rows) == 2 and rows[0]["metric"] == 2 and not rows[0]["error"]
    assert {row["anchors.k"] for row in rows} <= {3, 4} and all(1e-4 <= row["train.lr"] <= 1e-3 for row in rows)
    assert json.loads((tmp_path / "report.json").read_text()) == rows
    model = weights.load(tmp_path / "best")
    assert model.config.train.lr == rows[0]["train.lr"] and model.config.anchors.k == rows[0]["anchors.k"]
    assert str(rows[0]["trial"]) in tune.table(rows, "step")


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ({}, "tune.space is empty"),
        ({"train.lr": {"normal": [0, 1]}}, "train.lr: {'normal': [0, 1]} is not one of loguniform"),
        ({"train.lr": {"loguniform": [1]}}, "is not one of"),
        ({"train.lr": {"choice": []}}, "is not one of"),
        ({"train.lr": {"choice": [1, -1]}}, "train.lr: input should be greater than 0, not -1"),
    ],
)
def test_spaces_that_are_refused(tiny: Config, space: dict[str, Any], says: str) -> None:
    with pytest.raises((UserError, ConfigError)) as error:
        tune.search_space(with_space(tiny, space))
    assert says in str(error.value)


def test_unknown_fields_are_refused_with_the_nearest(tiny: Config) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'train\.lr'"):
        with_space(tiny, {"train.lrr": {"choice": [1]}})
