"""lcrnet/sweep.py: spaces and draws, PPI on cached proposals against the model itself, populations."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lcrnet import dataset, image, sweep, weights
from lcrnet.annotate import settings as detecting
from lcrnet.config import Config, ConfigError, UserError, from_dict
from lcrnet.dataset import Source
from lcrnet.sweep import Member, Range

SPACE = {
    "ppi.th_pose3D": {"loguniform": [0.02, 2]},
    "head.score_floor": {"uniform": [0.05, 0.2]},
    "ppi.iou_func": {"choice": ["bbox", "torsoLR", "mje"]},
}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def asked(space: dict[str, Any], metric: str = "mpjpe_mm", mode: str = "min", **ppi: Any) -> Config:
    return from_dict(
        {"tune": {"space": space, "metric": metric, "mode": mode}, "ppi": {"th_persondetect": 0.01, **ppi}}
    )


@pytest.fixture(scope="module")
def source(drawn: Path) -> Source:
    return Source(drawn / "annotations.json", drawn / "images")


@pytest.fixture(scope="module")
def plan(model_folder: Path, source: Source, tmp_path_factory: pytest.TempPathFactory) -> sweep.Plan:
    """Ready to judge: its proposals are cached."""
    made = sweep.plan(model_folder, source, asked(SPACE), tmp_path_factory.mktemp("proposals"))
    for chunk in made.missing():
        assert made.propose(chunk) == 0
    assert not made.missing()
    return made


def test_a_range_has_its_ends_and_its_kind() -> None:
    assert [Range("uniform", (1, 3)).at(u) for u in (0, 0.5, 1)] == [1, 2, 3]
    assert [Range("loguniform", (0.01, 1)).at(u) for u in (0, 0.5, 1)] == pytest.approx([0.01, 0.1, 1])
    assert [Range("choice", ("a", "b", "c")).at(u) for u in (0, 0.34, 0.999)] == ["a", "b", "c"]


def test_draws_are_a_function_of_seed_and_number_and_fill_the_space() -> None:
    space = sweep.space_of(asked(SPACE))
    some = [sweep.draw(space, 0, i) for i in range(1, 31)]
    assert some[11] == sweep.draw(space, 0, 12) != sweep.draw(space, 1, 12)
    assert sweep.draw(space, 0, 0) == {}
    floors = np.array([s["head.score_floor"] for s in some])
    assert ((floors >= 0.05) & (floors <= 0.2)).all()
    assert (np.histogram(floors, 5, (0.05, 0.2))[0] >= 4).all()  # of 30 independent draws a fifth may have one
    counts = [sum(s["ppi.iou_func"] == f for s in some) for f in ("bbox", "torsoLR", "mje")]
    assert min(counts) >= 8


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ({"train.lr": {"loguniform": [0, 1]}}, "needs 0 < a < b"),
        ({"train.lr": {"uniform": [2, 1]}}, "needs a < b"),
        ({"anchors.k": {"uniform": [4, 16]}}, "take choice"),
        ({"train.lr": {"uniform": [1e-4, 1e-3], "choice": [1]}}, "is not one of"),
        ({"data.flip": {"uniform": [0, 2]}}, "less than or equal to 1"),
    ],
)
def test_spaces_that_are_refused(space: dict[str, Any], says: str) -> None:
    with pytest.raises((UserError, ConfigError)) as error:
        sweep.space_of(asked(space))
    assert says in str(error.value)


def test_cached_proposals_give_what_the_model_gives(plan: sweep.Plan, model_folder: Path) -> None:
    """With the settings of several trials, to the bit: an own floor, two kinds of overlap."""
    entries = dataset.read(plan.data, weights.skeleton(model_folder))
    shots = [image.read(plan.data.images / entry.file_name) for entry in entries]
    model = weights.load(model_folder)
    cached, (skeleton, upper) = sweep._cached(plan.folder, 1), sweep._anchors(plan.model)
    counts = set()
    for index in (0, 1, 2, 3):
        values = sweep.draw(sweep.space_of(plan.settings), 0, index)
        model.config = sweep.with_override(plan.settings, values)
        direct, mine = model.detect_batch(shots), sweep.integrate(cached, model.config, skeleton, upper)
        counts.add(sum(map(len, direct)))
        assert [len(own) for own in direct] == [len(own) for own in mine]
        for a, b in zip(chain(*direct), chain(*mine), strict=True):
            assert a.score == b.score and a.anchor == b.anchor and a.support == b.support
            np.testing.assert_array_equal(a.pose3d, b.pose3d)
            np.testing.assert_array_equal(a.pose2d, b.pose2d)
    assert max(counts) > 0 and len(counts) > 1


def test_a_higher_floor_is_a_prefix_and_at_least_keeps_equals() -> None:
    score = torch.tensor([0.9, 0.5, 0.5, 0.5, 0.1])
    every = sweep.PoseProposals(*(score if name == "score" else torch.zeros(5, 4) for name in sweep._FIELDS))
    assert [len(sweep._above(every, floor, 0)) for floor in (0.0, 0.1, 0.5, 0.95)] == [5, 4, 1, 0]
    assert [len(sweep._above(every, 0.95, n)) for n in (1, 2, 5, 9)] == [1, 4, 5, 5]


def test_trials_do_not_depend_on_which_are_judged_together(plan: sweep.Plan) -> None:
    rows = plan.trials(range(6))
    assert plan.trials([4]) == [rows[4]] and rows[0]["ppi.iou_func"] == "bbox_torsohead" and not rows[0]["error"]
    assert len({row["metric"] for row in rows}) > 1
    best = sweep.ranked(rows, "min")[0]
    assert best["metric"] == min(row["metric"] for row in rows if row["metric"] is not None)


def test_the_best_settings_are_a_configuration_for_detection(plan: sweep.Plan, model_folder: Path) -> None:
    row = plan.trials([5])[0]
    best = from_dict(copy.deepcopy(plan.best(row)))
    own = detecting(weights.load(model_folder).config, best)
    assert own.ppi.th_pose3D == row["ppi.th_pose3D"] and own.head.score_floor == row["head.score_floor"]
    assert own.ppi.th_persondetect == 0.01 and own.model == weights.load(model_folder).config.model


def test_settings_that_cannot_be_together_are_a_row_with_an_error(
    model_folder: Path, source: Source, plan: sweep.Plan
) -> None:
    space = {"ppi.iou_func": {"choice": ["bbox", "mje"]}, "ppi.variant": {"choice": ["lcrnet", "corrected"]}}
    rows = sweep.plan(model_folder, source, asked(space), Path(plan.folder)).trials(range(1, 9))
    wrong = [row["ppi.iou_func"] == "mje" and row["ppi.variant"] == "lcrnet" for row in rows]
    assert any(wrong) and not all(wrong)
    assert [bool(row["error"]) for row in rows] == wrong
    assert all(row["metric"] is None for row, bad in zip(rows, wrong, strict=True) if bad)
    assert "mje came with the improved code" in rows[wrong.index(True)]["error"]
    assert sweep.ranked(rows, "min")[-1]["error"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tune": {"space": {"train.lr": {"choice": [1e-3]}}}}, "train.lr: not with --ppi"),
        ({"tune": {"space": {"ppi.released": {"choice": ["DEMO_ECCV18"]}}}}, "not with --ppi"),
        ({"tune": {"space": SPACE, "metric": "oks_app"}}, "no figure is called 'oks_app'"),
        ({"tune": {"space": SPACE, "metric": "mpjpe_m", "mode": "min"}}, "there are images, people"),
        ({"tune": {"space": SPACE, "metric": "mpjpe_mm"}}, "set tune.mode: min"),
        ({"tune": {"space": SPACE}, "head": {"at_least": 9, "passes": 2}}, "add --head.at_least 0"),
    ],
)
def test_sweeps_that_are_refused(
    model_folder: Path, source: Source, tmp_path: Path, fields: dict[str, Any], says: str
) -> None:
    with pytest.raises((UserError, ConfigError)) as error:
        sweep.plan(model_folder, source, from_dict(fields), tmp_path)
    assert says in str(error.value)


def test_the_weakest_goes_on_from_the_strongest_with_other_settings() -> None:
    space = {"train.lr": Range("loguniform", (1e-4, 1e-2)), "head.soft": Range("choice", (0, 0.05, 0.1))}
    members = sweep.founders(space, 0, 5)
    metrics = [0.3, None, 0.5, 0.1, 0.2]
    after = sweep.successors(space, 0, 1, members, metrics, "max")
    assert after == sweep.successors(space, 0, 1, members, metrics, "max")
    assert [member.parent for member in after] == [0, 2, 2, 3, 4]
    assert all(after[i].values == members[i].values for i in (0, 2, 3, 4))
    assert after[1].values != members[2].values and 1e-4 <= after[1].values["train.lr"] <= 1e-2
    lowest = sweep.successors(space, 0, 1, members, metrics, "min")
    assert [member.parent for member in lowest] == [0, 3, 2, 3, 4]
    alike = sweep.successors(space, 0, 1, members, [None] * 5, "max")
    assert alike == [Member(i, member.values) for i, member in enumerate(members)]


def test_steps_of_a_population_stay_within_the_range() -> None:
    rng, limits, options = np.random.default_rng(0), Range("uniform", (1, 2)), Range("choice", ("a", "b", "c"))
    near = [limits.near(1.5, rng) for _ in range(200)]
    assert {1.2, 1.8} <= {round(v, 9) for v in near} and 1 <= min(near) <= max(near) <= 2
    assert limits.near(1.9, np.random.default_rng(3)) <= 2
    assert {options.near("a", rng) for _ in range(100)} == {"a", "b", "c"}  # c only by a new draw


def test_populations_that_are_refused() -> None:
    with pytest.raises(UserError, match=r"anchors\.k, train\.batch cannot change"):
        sweep.founders({n: Range("choice", (1,)) for n in ("train.lr", "train.batch", "anchors.k")}, 0, 4)
    with pytest.raises(UserError, match="needs two or more"):
        sweep.founders({"train.lr": Range("choice", (1,))}, 0, 1)


def test_the_picture_shows_every_field(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    space = sweep.space_of(asked(SPACE))
    rows: list[dict[str, Any]] = [
        {"trial": i, "metric": float(rng.random()), **sweep.draw(space, 0, i)} for i in range(1, 40)
    ]
    rows.append({"trial": 99, "metric": None, "ppi.iou_func": "bbox", "ppi.th_pose3D": 1, "head.score_floor": 0.1})
    sweep.picture(sweep.ranked(rows, "max"), list(SPACE), asked(SPACE), tmp_path / "report.png")
    picture = image.read(tmp_path / "report.png")
    assert picture.shape[1] > 900 and picture.std() > 5
