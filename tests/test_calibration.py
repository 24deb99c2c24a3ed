"""Scores -> probabilities: the map, its tables, its file, and what may not be in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lcrnet import calibration, config, evaluate
from lcrnet.calibration import EVENTS, Judged, Map
from lcrnet.config import UserError
from lcrnet.pose import People, Person
from lcrnet.skeleton import LCR13


def judged(count: int = 4000, seed: int = 0) -> Judged:
    """Scores of which a pose is right with probability score squared, a joint with its square root."""
    r = np.random.default_rng(seed)
    score, joint = r.uniform(0, 1, count), r.uniform(0, 1, (count, 3))
    right = (r.random(count) < score**2).astype(float)
    joint_right = (r.random(joint.shape) < joint**0.5).astype(float)
    joint_right[r.random(joint.shape) < 0.2] = np.nan
    return Judged(
        np.arange(count) // 3, score, joint, dict.fromkeys(EVENTS, right), dict.fromkeys(EVENTS, joint_right)
    )  # fmt: skip


def person(score: float, joint: float) -> Person:
    return Person(np.zeros(4), np.zeros((3, 2)), np.zeros((3, 3)), score, np.full(3, joint), 0, 1, np.zeros(3))


def test_scores_become_shares() -> None:
    found = calibration.fit(judged(), "oks50")
    people = found.apply([person(s, s) for s in (0.2, 0.5, 0.9)])
    assert [p.score for p in people] == pytest.approx([0.04, 0.25, 0.81], abs=0.06)
    assert [p.joint_score[0] for p in people] == pytest.approx(np.sqrt([0.2, 0.5, 0.9]), abs=0.06)
    assert people[0].joint_score.dtype == np.float32 and found.apply([]) == []


def test_never_changes_the_order_and_stays_in_range() -> None:
    found = calibration.fit(judged(300), "oks50")
    scores = np.sort(np.random.default_rng(1).uniform(-1, 30, 500))
    scores = np.concatenate([np.linspace(0, 1, 500), scores[scores > 1]])
    calibrated = found.score(scores)
    assert (np.diff(calibrated) > 0).all() and (calibrated >= 0).all() and (calibrated <= 1).all()


def test_tables() -> None:
    """What was measured on other images is better than before, and the rows count what they say."""
    all_ = judged()
    tables = calibration.tables(all_, "oks50")
    rows = tables["score"]["oks50"]
    assert sum(row["count"] for row in rows) == 4000 and len(rows) == 10
    assert rows[9]["right"] == pytest.approx(0.9, abs=0.06) and rows[2]["right"] == pytest.approx(0.0625, abs=0.04)
    for what in ("score", "joint"):
        before, after = tables["error"][what]["oks50"], tables["calibrated"]["error"][what]["oks50"]
        assert after < 0.02 < 0.1 < before
    json.dumps(tables, allow_nan=False)
    assert "calibrated" not in calibration.tables(all_)


def test_error_is_guos() -> None:
    score, right = np.array([0.05, 0.05, 0.95, 0.95]), np.array([0, 1, 1, np.nan])
    rows = calibration.reliability(score, right)
    assert calibration.error(rows) == pytest.approx((2 * 0.45 + 0.05) / 3)
    assert calibration.error(calibration.reliability(score[:0], right[:0])) is None


def test_round_trip(tmp_path: Path) -> None:
    found = calibration.fit(judged(), "mm100", {"data": "human.json"})
    calibration.save(found, tmp_path / "c.json")
    assert calibration.load(tmp_path / "c.json") == found


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "x"}, "format: expected"),
        ({"event": "oks"}, "event: 'oks' is not one of oks50, mm50, mm100"),
        ({"score": {"x": [0, 1], "y": [0.5, 0.2]}}, "score: x must rise, and y"),
        ({"score": {"x": [0, 0], "y": [0, 1]}}, "score: x must rise"),
        ({"joint": {"x": [0, 1], "y": [0, 2]}}, "joint: x must rise"),
        ({"joint": {"x": [0, float("nan")], "y": [0, 1]}}, "joint: x must rise"),
        ({"joint": {"x": ["a"], "y": [0]}}, "joint: expected numbers"),
        ({"joint": None}, "joint: expected numbers"),
        ({"about": 3}, "about: expected"),
    ],
)
def test_damaged_files(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    file = tmp_path / "calibration.json"
    calibration.save(calibration.Calibration("oks50", Map((0, 1), (0, 1)), Map((0, 1), (0, 1))), file)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=f"calibration.json: {says}"):
        calibration.load(file)
    file.write_text("{")
    with pytest.raises(UserError, match=r"calibration.json: not JSON"):
        calibration.load(file)


def test_too_little_to_go_by() -> None:
    with pytest.raises(UserError, match="needs at least 100 poses, right and wrong ones, but 60 can be judged"):
        calibration.fit(judged(60), "oks50")
    same = judged()
    same.right["mm50"] = np.ones_like(same.score)
    with pytest.raises(UserError, match="all come out alike"):
        calibration.fit(same, "mm50")


def test_judge() -> None:
    """One right, one wrong by 3D only, one false, one in a crowd region, one whose truth has no 3D."""
    truth = People.empty(4, 13)
    rng = np.random.default_rng(0)
    truth.pose2d[:] = rng.uniform(0, 100, (13, 2)) + np.array([0, 300, 600, 900])[:, None, None]
    truth.pose3d[:] = rng.normal(0, 0.3, (13, 3))
    truth.seen[:3], truth.has3d[:2], truth.crowd[3] = 2, True, True
    truth.seen[0, 0] = 0
    truth.area[:] = 10_000
    truth.box[:] = np.concatenate([truth.pose2d.min(1), truth.pose2d.max(1)], 1)

    def found(i: int, score: float, shift2d: float = 0, shift3d: float = 0) -> Person:
        pose3d = truth.pose3d[i].copy()
        pose3d[0] += shift3d
        return Person(
            truth.box[i], truth.pose2d[i] + shift2d, pose3d, score, np.full(13, score / 2), 0, 1, np.zeros(13)
        )

    near, far = found(0, 0.9), found(1, 0.8, 0, 13 * 0.08 / np.sqrt(3))  # 80 mm on average, all at one joint
    off = found(2, 0.1, 30)
    off.pose2d[0] = truth.pose2d[2, 0]
    false = found(0, 0.7, 5000)
    false.box = false.box + 5000
    image = [near, far, found(2, 0.3), false, found(3, 0.6)]
    got = evaluate.judge([truth, truth[[2]]], [image, [off]], LCR13)
    assert got.image.tolist() == [0] * 5 + [1] and got.score.tolist() == [0.9, 0.8, 0.3, 0.7, 0.6, 0.1]
    np.testing.assert_array_equal(got.right["oks50"], [1, 1, 1, 0, np.nan, 0])
    # In the first image somebody has no 3D: the false detection may be them.
    np.testing.assert_array_equal(got.right["mm50"], [1, 0, np.nan, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(got.right["mm100"], [1, 1, np.nan, np.nan, np.nan, np.nan])
    assert np.isnan(got.joint_right["oks50"][0, 0]) and got.joint_right["oks50"][0, 1:].all()
    assert got.joint_right["oks50"][5, 0] == 1 and not got.joint_right["oks50"][3].any()
    assert got.joint_right["mm100"][1, 1:].all() and got.joint_right["mm100"][1, 0] == 0
    both = evaluate.judge([truth[[0, 1]]], [[near, false]], LCR13)
    assert both.right["mm50"].tolist() == [1, 0]
    nobody = evaluate.judge([truth], [[]], LCR13)
    assert nobody.score.shape == (0,) and nobody.joint_right["oks50"].shape == (0, 13)


def test_judge_agrees_with_the_figures() -> None:
    """The share of right poses is the precision at that OKS, when nobody is below the least score."""
    rng = np.random.default_rng(3)
    truth, found = [], []
    for _ in range(40):
        people = People.empty(2, 13)
        people.pose2d[:] = rng.uniform(0, 80, (2, 13, 2)) + np.array([[[0, 0]], [[200, 0]]])
        people.seen[:], people.area[:] = 2, 6000
        people.box[:] = np.concatenate([people.pose2d.min(1), people.pose2d.max(1)], 1)
        truth.append(people)
        moved = people.pose2d + rng.normal(0, 1, (2, 13, 2)) * rng.uniform(2, 40, (2, 1, 1))
        rest = 0.5, np.ones(13), 0, 1, np.zeros(13)
        found.append([Person(people.box[i], moved[i], people.pose3d[i], *rest) for i in range(2)])
    settings = config.Evaluate(oks=0.5, min_score=0)
    metrics = evaluate.evaluate(truth, found, LCR13, settings)
    right = evaluate.judge(truth, found, LCR13).right["oks50"]
    assert 0.2 < metrics["precision"] < 0.9 and right.mean() == pytest.approx(metrics["precision"])
