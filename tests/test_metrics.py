"""metrics.py: every figure against golden/metrics_reference.py, which was written apart from it, and by hand."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lcrnet import config, evaluate, metrics
from lcrnet.pose import People, Person
from lcrnet.skeleton import COCO17, LCR13, LSP14, SKELETONS, Skeleton

sys.path.insert(0, str(Path(__file__).parent / "golden"))
import metrics_reference as slow

J = len(LCR13)
# A person of 1.7 m from the front, metres, x right, y down from the torso's middle; right and left as LCR13 has them.
BODY = np.array([(-0.1, 1.12, 0), (0.1, 1.12, 0), (-0.1, 0.7, 0), (0.1, 0.7, 0), (-0.09, 0.25, 0), (0.09, 0.25, 0),
                 (-0.3, 0.27, 0), (0.3, 0.27, 0), (-0.27, 0.02, 0), (0.27, 0.02, 0), (-0.18, -0.25, 0),
                 (0.18, -0.25, 0), (0, -0.43, 0)])  # fmt: skip


def draw(images: int, seed: int) -> tuple[list[People], list[list[Person]]]:
    """Images of 0 to 3 true people, some partly labelled, and of found people: near, far, doubled, weak, nobody's."""
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for _ in range(images):
        count = int(rng.integers(0, 4))
        true, persons = People.empty(count, J), []
        for p in range(count):
            pose = BODY + rng.normal(0, 0.08, (J, 3))
            size, place = rng.uniform(40, 200), rng.uniform(0, 600, 2)
            true.pose2d[p], true.pose3d[p] = pose[:, :2] * size + place, pose
            true.seen[p] = rng.choice([0, 1, 2], J, p=[0.1, 0.2, 0.7])
            true.seen[p, [0, 6, 10]] = 2
            if rng.uniform() < 0.5:
                true.seen[p] = 2
            true.has3d[p], true.area[p] = rng.uniform() < 0.7, (0.6 * size) ** 2
            for _ in range(rng.choice([0, 1, 2], p=[0.2, 0.6, 0.2])):
                noise = rng.choice([0.01, 0.05, 0.12])
                pose2d = true.pose2d[p] + rng.normal(0, noise * size, (J, 2))
                pose3d = rng.uniform(0.7, 1.3) * (pose + rng.normal(0, noise, (J, 3))) + rng.normal(0, 1, 3)
                persons.append(detection(pose2d, pose3d, rng.uniform(0.3, 1)))
        if rng.uniform() < 0.3:
            persons.append(detection(BODY[:, :2] * 90 + rng.uniform(0, 600, 2), BODY, rng.uniform(0.3, 1)))
        true.box = np.concatenate([true.pose2d.min(1), true.pose2d.max(1)], -1)
        truth.append(true)
        found.append(persons)
    return truth, found


def detection(pose2d: np.ndarray, pose3d: np.ndarray, score: float) -> Person:
    box = np.concatenate([pose2d.min(0), pose2d.max(0)])
    return Person(
        box, pose2d.astype(np.float32), pose3d.astype(np.float32), float(score), np.ones(J), 0, 1, np.zeros(J)
    )


def plain(truth: list[People], found: list[list[Person]]) -> tuple[list[list[Any]], list[list[Any]]]:
    """The same for the reference."""
    names = ("pose2d", "pose3d", "seen", "area", "has3d")
    trues = [[{n: getattr(t, n)[p].tolist() for n in names} for p in range(len(t))] for t in truth]
    return trues, [
        [{"pose2d": f.pose2d.tolist(), "pose3d": f.pose3d.tolist(), "score": f.score} for f in own] for own in found
    ]


@pytest.mark.parametrize("match", ["oks", "distance"])
def test_every_figure_against_the_slow_reference(match: str) -> None:
    truth, found = draw(80, 5)
    ours = evaluate.evaluate(truth, found, LCR13, config.Evaluate(match=match))
    theirs = slow.figures(*plain(truth, found), match)
    curves, per_joint = ours["curves"], list(ours["per_joint"].values())
    compared = {
        **{name: ours[name] for name in theirs if name in ours},
        "curve2d": curves["pck2d"]["matched"], "curve2d_all": curves["pck2d"]["all"],
        "curve3d": curves["pck3d"]["matched"], "curve3d_all": curves["pck3d"]["all"],
        "per_joint_pa": [row["pa_mpjpe_mm"] for row in per_joint],
        "per_joint_pckh": [row["pckh"] for row in per_joint],
    }  # fmt: skip
    assert set(compared) == set(theirs)
    for name, value in theirs.items():
        # poses and boxes are float32 here, not there; what is exactly 0 there is 0 to their rounding here
        assert compared[name] == pytest.approx(value, rel=2e-5, abs=1e-9), name
    assert 30 < ours["found"] < ours["people"] and 0.3 < ours["pck2d"] < 0.98  # something was at stake
    assert ours["pck2d_all"] < ours["pck2d"] and ours["auc3d_all"] < ours["auc3d"] and ours["pckh_all"] < ours["pckh"]


def test_a_mirrored_pose_is_wrong_for_both_procrustes() -> None:
    """The reference's rotation cannot reflect; neither may ours, whose SVD could."""
    rng = np.random.default_rng(2)
    goal = BODY + rng.normal(0, 0.1, (J, 3))
    for pose in (goal * (-1, 1, 1), goal * (1, 1, 0), -goal, np.zeros_like(goal) + goal[:1] + np.eye(J, 3)):
        ours = metrics.errors3d(pose[None], goal[None], LCR13).procrustes[0]
        np.testing.assert_allclose(ours, slow.pa_mpjpe(pose.tolist(), goal.tolist()), rtol=1e-6)
        assert ours.mean() > 20


def test_errors3d_by_hand() -> None:
    goal = np.stack([BODY, BODY])
    pose = goal.copy()
    pose[0, LCR13.index("head")] += (0, 0.3, 0.4)
    pose[1] = 2 * pose[1] + (3, 0, 0)
    errors = metrics.errors3d(pose, goal, LCR13)
    assert errors.plain[0].sum() == pytest.approx(500) and errors.plain[0, -1] == pytest.approx(500)
    assert errors.plain[1] == pytest.approx(1000 * np.linalg.norm(BODY - BODY[LCR13.torso].mean(0), axis=-1))
    assert errors.scaled[1].max() < 1e-9 and errors.procrustes[1].max() < 1e-9
    assert (errors.procrustes[0] ** 2).sum() < (errors.scaled[0] ** 2).sum()  # least squares, not least mean


def turn(seed: int = 0) -> np.ndarray:
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return q * np.sign(np.linalg.det(q))


@pytest.mark.parametrize(
    ("move", "blind"),
    [
        (lambda pose: pose + (1, -2, 30), "plain scaled procrustes"),
        (lambda pose: 1.7 * (pose + (0, 0, 3)), "scaled procrustes"),
        (lambda pose: 0.6 * pose @ turn().T + (0, 1, 3), "procrustes"),
        (lambda pose: pose * (-1, 1, 1), ""),
    ],
    ids=["translation", "scale", "similarity", "reflection"],
)
def test_what_each_error_does_not_see(move: Any, blind: str) -> None:
    goal = BODY + np.random.default_rng(4).normal(0, 0.1, (6, J, 3))
    errors = metrics.errors3d(move(goal), goal, LCR13)
    for name in ("plain", "scaled", "procrustes"):
        error = getattr(errors, name).mean()
        assert error < 1e-6 if name in blind.split() else error > 50, name


def test_a_pose_that_is_not_finite_has_no_error() -> None:
    pose = np.stack([BODY, BODY])
    pose[1, 3, 0] = np.nan
    errors = metrics.errors3d(pose, np.stack([BODY, BODY]), LCR13)
    assert np.isfinite(errors.procrustes[0]).all() and np.isnan(errors.plain[1]).all()
    truth, found = draw(20, 1)
    for own in found:
        for person in own:
            person.pose3d[:] = np.inf
    figures = evaluate.evaluate(truth, found, LCR13, config.Evaluate())
    assert figures["people3d"] > 5 and figures["mpjpe_mm"] is None and figures["pck3d"] == 0 == figures["auc3d"]


# Units ---------------------------------------------------------------------------------------------------------------


def labelled(skeleton: Skeleton, **joints: tuple[float, float]) -> People:
    """One person with these joints labelled."""
    out = People.empty(1, len(skeleton))
    for name, place in joints.items():
        out.pose2d[0, skeleton.index(name)], out.seen[0, skeleton.index(name)] = place, 2
    return out


def test_head_size() -> None:
    shoulders = {"r_shoulder": (0.0, 20.0), "l_shoulder": (40.0, 20.0)}
    assert metrics.head_size(labelled(LCR13, head=(20, 0), **shoulders), LCR13) == pytest.approx(22)
    assert np.isnan(metrics.head_size(labelled(LCR13, head=(20, 0), r_shoulder=(0, 20)), LCR13))
    assert metrics.head_size(labelled(LSP14, neck=(20, 16), head_top=(20, -14), r_ankle=(0, 99)), LSP14) == 30
    assert np.isnan(metrics.head_size(labelled(LSP14, neck=(20, 16), r_ankle=(0, 99)), LSP14))
    # COCO has no head: middle of nose and mid-ears, by skeleton.py's rule
    ears = {"nose": (20.0, 2.0), "l_ear": (30.0, -2.0), "r_ear": (10.0, -2.0)}
    assert metrics.head_size(labelled(COCO17, **ears, **shoulders), COCO17) == pytest.approx(22)
    assert np.isnan(metrics.head_size(labelled(COCO17, **shoulders), COCO17))
    # seen from above: the head lies between the shoulders, the person is 100 pixels long
    above = labelled(LCR13, head=(20, 20), r_ankle=(20, 120), **shoulders)
    assert metrics.head_size(above, LCR13) == pytest.approx(4)


@pytest.mark.parametrize("name", SKELETONS)
def test_every_skeleton_has_units_or_says_so(name: str) -> None:
    skeleton = SKELETONS[name]
    people = People.empty(2, len(skeleton))
    people.pose2d[:] = np.random.default_rng(0).uniform(0, 100, people.pose2d.shape)
    people.seen[1] = 2
    head, torso = metrics.head_size(people, skeleton), metrics.torso_size(people, skeleton)
    assert np.isnan([head[0], torso[0]]).all() and torso[1] > 0 and (head[1] > 0 or np.isnan(head[1]))


# Curves --------------------------------------------------------------------------------------------------------------


def test_shares_at_a_limit() -> None:
    values = np.array([[0.0, 1.0, np.nan], [2.0, np.inf, 2.0]])
    assert metrics.shares(values, [0, 1, 2, 3], 6, closed=True) == pytest.approx([1 / 6, 2 / 6, 4 / 6, 4 / 6])
    assert metrics.shares(values, [0, 1, 2, 3], 6, closed=False) == pytest.approx([0, 1 / 6, 2 / 6, 4 / 6])
    assert metrics.shares(values[:0], [0, 1], 0, closed=True) == []


def test_auc_of_a_perfect_and_of_a_lost_pose() -> None:
    assert metrics.auc(np.zeros((1, J)), J) == pytest.approx(30 / 31)  # nothing is below 0 mm
    assert metrics.auc(np.zeros((1, J)), 2 * J) == pytest.approx(15 / 31)
    assert metrics.auc(np.full((1, J), np.nan), J) == 0 and metrics.auc(np.zeros((0, J)), 0) is None


# The predecessor -----------------------------------------------------------------------------------------------------


def flat(pose2d: np.ndarray, pose3d: np.ndarray) -> list[float]:
    """The seed's row: 13 x, 13 y, 13 X, 13 Y, 13 Z, in its frame (x left, y up), which no distance sees."""
    return np.concatenate([pose2d.T.ravel(), (pose3d * (-1, -1, 1)).T.ravel()]).tolist()


def test_predecessor_against_its_loop() -> None:
    truth, found = draw(40, 3)
    for true in truth:
        true.seen[:], true.has3d[:] = 2, True
    found = [own if len(true) else [] for own, true in zip(found, truth, strict=True)]
    rows = [
        (
            [flat(t.pose2d[p], t.pose3d[p]) for p in range(len(t))],
            [(flat(f.pose2d, f.pose3d)[:26], flat(f.pose2d, f.pose3d)[26:]) for f in own],
        )
        for t, own in zip(truth, found, strict=True)
    ]
    ours = metrics.predecessor(truth, found, LCR13)
    assert ours == pytest.approx(slow.predecessor(rows), rel=1e-5)
    assert 0.05 < ours["PCK3d"] < 0.95 and 0.05 < ours["PCK2d"] < 0.95  # type: ignore[operator]


def test_predecessor_faults_by_hand() -> None:
    """Shoulders 20 px apart. The second person's detection counts as wrong, a third's, missed, does not count."""
    true = People.empty(3, J)
    true.pose2d[:] = BODY[:, :2] * 100 + np.array([[0], [500], [900]])[:, None] * (1, 0)
    true.pose2d[:, LCR13.indices("r_shoulder", "l_shoulder"), 0] = np.array([[0], [500], [900]]) + (-10, 10)
    true.pose3d[:], true.seen[:], true.has3d[:] = BODY, 2, True
    second = detection(true.pose2d[1], true.pose3d[1] + (0, 0, 0.4), 0.01)  # of whatever score
    figures = metrics.predecessor([true, People.empty(0, J)], [[second], []], LCR13)
    assert figures == pytest.approx({
        "Err2d": 13 * 500 / 20, "Err3d": 13 * 400, "Err2d_avg": 13 * 500 / 20 / 2, "Err3d_avg": 13 * 0.4 / 2,
        "PCK2d": 0, "PCK3d": 0,
    })  # fmt: skip
    full = [detection(true.pose2d[1], true.pose3d[1], 1)]
    true.seen[0, 3] = 0  # the first with a full label is then the second
    assert metrics.predecessor([true], [full], LCR13)["Err2d"] == 0


def test_predecessor_divides_by_zero() -> None:
    true = People.empty(1, J)
    true.seen[:], true.has3d[:] = 2, True  # shoulders 0 px apart
    one = [detection(BODY[:, :2], BODY, 1)]
    figures = metrics.predecessor([true], [one], LCR13)
    assert figures["Err2d"] is None is figures["Err2d_avg"] and figures["PCK2d"] == 0
    assert figures["Err3d"] == pytest.approx(1000 * np.linalg.norm(BODY, axis=-1).sum(), rel=1e-6)
    nothing = metrics.predecessor([true], [[]], LCR13)
    assert nothing["PCK2d"] is None is nothing["PCK3d"] and nothing["Err2d"] == 0 == nothing["Err3d_avg"]
    assert metrics.predecessor([], [], LCR13)["Err2d_avg"] is None
    assert metrics.predecessor([People.empty(0, J)], [one], LCR13)["PCK3d"] is None  # there the seed stops


def test_mean_median_share_of_nothing() -> None:
    assert metrics.mean([np.nan, 1, 3, math.inf]) == 2 and metrics.mean([np.nan]) is None
    assert metrics.median(np.array([np.nan, 1, 2, 9])) == 2 and metrics.median(np.zeros(0)) is None
    assert metrics.share(1, 4) == 0.25 and metrics.share(0, 0) is None
