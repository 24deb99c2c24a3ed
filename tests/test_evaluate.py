"""evaluate.py: OKS and AP against pycocotools, matching, and each figure against values worked out by hand."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.cocoeval import COCOeval

from lcrnet import config, evaluate
from lcrnet.pose import People, Person
from lcrnet.skeleton import LCR13, LSP14

SETTINGS = config.Evaluate()
J = len(LCR13)
FIGURES = ("recall", "precision", "oks_ap", "oks_ap50", "oks_ap75", "pck2d", "pck2d_all", "pckh", "pckh_all",
           "error2d_height_median", "mpjpe_mm", "n_mpjpe_mm", "pa_mpjpe_mm", "pck3d", "pck3d_all", "auc3d", "auc3d_all",
           )  # fmt: skip


def people(count: int, seed: int = 0) -> People:
    """People of 100 x 200 pixels side by side; torso 60 pixels long, all labelled in 2D and 3D."""
    rng = np.random.default_rng(seed)
    out = People.empty(count, J)
    rows = {"ankle": 200, "knee": 150, "hip": 100, "wrist": 110, "elbow": 75, "shoulder": 40, "head": 0}
    y = np.array([rows[name[2:] if name != "head" else name] for name in LCR13.joints], np.float32)
    x = np.array([{"r_": 0, "l_": 100}.get(name[:2], 50) for name in LCR13.joints], np.float32)
    out.pose2d[:] = np.stack([x, y], -1)
    out.pose2d += 300 * np.arange(count)[:, None, None] * np.array([1, 0], np.float32)
    out.pose3d[:] = rng.normal(0, 0.4, out.pose3d.shape)
    out.seen[:], out.has3d[:], out.area[:] = 2, True, 10000
    out.box = np.concatenate([out.pose2d.min(1), out.pose2d.max(1)], -1)
    return out


def person(true: People, row: int, score: float = 0.9, shift: Any = (0, 0), move: Any = (0, 0, 0)) -> Person:
    """A detection of a true person, moved in 2D and 3D."""
    pose2d, pose3d = true.pose2d[row] + np.float32(shift), true.pose3d[row] + np.float32(move)
    box = np.concatenate([pose2d.min(0), pose2d.max(0)])
    return Person(box, pose2d, pose3d, score, np.ones(J), 0, 1, np.zeros(J))


def run(truth: list[People], found: list[list[Person]], **settings: Any) -> evaluate.Metrics:
    metrics = evaluate.evaluate(truth, found, LCR13, config.Evaluate(**settings))
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    return metrics


def crowd(box: tuple[float, float, float, float]) -> People:
    out = People.empty(1, J)
    out.box[0], out.area[0], out.crowd[0] = box, (box[2] - box[0]) * (box[3] - box[1]), True
    return out


# OKS and AP ----------------------------------------------------------------------------------------------------------


def coco_eval(truth: list[People], found: list[list[Person]]) -> COCOeval:
    """pycocotools as its users run it: files, loadRes, all areas; here without the file."""
    labels, results = [], []
    for i, (true, persons) in enumerate(zip(truth, found, strict=True), 1):
        for p in range(len(true)):
            x1, y1, x2, y2 = true.box[p].tolist()
            keypoints = np.concatenate([true.pose2d[p], true.seen[p, :, None]], -1).ravel().tolist()
            labels.append({"id": len(labels) + 1, "image_id": i, "category_id": 1, "area": float(true.area[p]),
                           "bbox": [x1, y1, x2 - x1, y2 - y1], "keypoints": keypoints,
                           "num_keypoints": int((true.seen[p] > 0).sum()), "iscrowd": int(true.crowd[p])})  # fmt: skip
        for found_person in persons:
            keypoints = np.concatenate([found_person.pose2d, np.ones((J, 1))], -1).ravel().tolist()
            results.append({"image_id": i, "category_id": 1, "score": found_person.score, "keypoints": keypoints})
    coco = evaluate._coco([{"id": i} for i in range(1, len(truth) + 1)], labels)
    judge = COCOeval(coco, coco.loadRes(results), "keypoints")
    judge.params.kpt_oks_sigmas = LCR13.sigma
    judge.evaluate()
    judge.accumulate()
    return judge


def random_images(count: int, seed: int) -> tuple[list[People], list[list[Person]]]:
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for _ in range(count):
        true = people(int(rng.integers(0, 4)), seed)
        true.seen[:] = rng.integers(0, 3, true.seen.shape)
        true.seen[:, 12] = 1
        true.area[:] = rng.uniform(500, 40000, len(true))
        persons = [
            person(true, p, float(rng.uniform()), rng.normal(0, 1, (J, 2)) * rng.uniform(1, 40))
            for p in range(len(true))
            for _ in range(rng.integers(0, 3))
        ]
        truth.append(true)
        found.append(persons)
    return truth, found


def test_oks_is_that_of_pycocotools() -> None:
    truth, found = random_images(30, 1)
    judge = coco_eval(truth, found)
    compared = 0
    for i, (true, persons) in enumerate(zip(truth, found, strict=True), 1):
        if not len(true) or not persons:
            continue
        order = np.argsort([-p.score for p in persons], kind="mergesort")  # theirs: detections by score, down
        ours = evaluate.oks(true, np.array([persons[o].pose2d for o in order]), LCR13)
        np.testing.assert_allclose(ours.T, judge.ious[i, 1], rtol=1e-6, atol=1e-9)
        compared += ours.size
    assert compared > 50


def test_oks_by_hand() -> None:
    true = people(1)
    true.seen[:] = 0
    true.seen[0, [LCR13.index("head"), LCR13.index("r_knee")]] = 1, 2
    pose = true.pose2d.copy()
    pose[0, LCR13.index("head")] += (3, 4)
    pose[0, LCR13.index("l_knee")] += 1000  # unlabelled
    expected = (1 + np.exp(-25 / (2 * 10000 * (2 * 0.062) ** 2))) / 2
    np.testing.assert_allclose(evaluate.oks(true, pose, LCR13), [[expected]])


def test_oks_needs_sigmas() -> None:
    with pytest.raises(ValueError, match="lsp14 has no oks_sigma"):
        evaluate.oks(People.empty(1, 14), np.zeros((1, 14, 2)), LSP14)


def test_ap_is_that_of_pycocotools(capsys: pytest.CaptureFixture[str]) -> None:
    truth, found = random_images(60, 2)
    judge = coco_eval(truth, found)
    capsys.readouterr()
    ours = evaluate.oks_ap(truth, found, LCR13)
    assert capsys.readouterr().out == ""
    theirs = judge.eval["precision"][:, :, 0, 0, 0]
    assert ours["oks_ap"] == pytest.approx(theirs.mean()) and 0.05 < theirs.mean() < 0.9
    assert ours["oks_ap50"] == pytest.approx(theirs[0].mean())
    assert ours["oks_ap75"] == pytest.approx(theirs[5].mean())
    curve = run(truth, found)["curves"]["pr"]
    assert curve["recall"] == pytest.approx(judge.params.recThrs)
    assert curve["precision"] == {"0.50": theirs[0].tolist(), "0.75": theirs[5].tolist()}


def test_ap_takes_more_detections_than_coco() -> None:
    true = people(25)
    metrics = run([true], [[person(true, p, 0.9 - 0.01 * p) for p in range(25)]])
    assert metrics["oks_ap"] == pytest.approx(1) and metrics["found"] == 25


def test_ap_counts_weak_detections_and_figures_do_not() -> None:
    true = people(2)
    metrics = run([true], [[person(true, 0, 0.9), person(true, 1, 0.3)]])
    assert metrics["oks_ap"] == pytest.approx(1)
    assert (metrics["found"], metrics["missed"], metrics["false"], metrics["detections"]) == (1, 1, 0, 1)


def test_nan_detection_is_no_match() -> None:
    true = people(1)
    metrics = run([true], [[person(true, 0, shift=(np.nan, 0))]])
    assert metrics["found"] == 0 and metrics["false"] == 1 and metrics["oks_ap"] == 0


# Matching ------------------------------------------------------------------------------------------------------------


def test_perfect_people_perfect_figures() -> None:
    truth = [people(3, 0), people(0), people(1, 1)]
    metrics = run(truth, [[person(true, p) for p in range(len(true))] for true in truth])
    assert metrics["images"] == 3 and metrics["people"] == metrics["found"] == metrics["people3d"] == 4
    assert metrics["missed"] == metrics["false"] == metrics["ignored"] == 0
    for name in ("recall", "precision", "oks_ap", "oks_ap50", "oks_ap75", "pck2d", "pck2d_all", "pck3d"):
        assert metrics[name] == pytest.approx(1), name
    for name in ("error2d_height_median", "mpjpe_mm", "n_mpjpe_mm", "pa_mpjpe_mm"):
        assert metrics[name] == pytest.approx(0, abs=1e-3), name
    assert metrics["auc3d"] == pytest.approx(30 / 31)  # nothing is below 0 mm


def test_duplicate_missed_and_false() -> None:
    true = people(3)
    far = person(true, 2, shift=(0, 5000))
    metrics = run([true], [[person(true, 0, 0.6, (2, 0)), person(true, 0, 0.9), person(true, 1), far]])
    assert (metrics["found"], metrics["missed"], metrics["false"]) == (2, 1, 2)
    assert metrics["recall"] == pytest.approx(2 / 3) and metrics["precision"] == pytest.approx(1 / 2)
    assert metrics["pck2d"] == 1 and metrics["pck2d_all"] == pytest.approx(2 / 3)
    assert metrics["oks_ap"] < 1


def test_match_takes_the_best_assignment() -> None:
    """By score the first detection would take person 1, which it fits best, and leave the second without anybody."""
    true = people(2)
    true.pose2d[1] = true.pose2d[0] + (10, 0)
    found = [person(true, 0, shift=(6, 0)), person(true, 0, shift=(18, 0))]
    pairs = evaluate.match(true, found, LCR13, 0.3)
    assert sorted(map(tuple, pairs.tolist())) == [(0, 0), (1, 1)]
    assert evaluate.match(true, found, LCR13, 0.9999).shape == (0, 2)


def test_threshold_zero_pairs_nobody_at_random() -> None:
    true = people(1)
    assert len(evaluate.match(true, [person(true, 0, shift=(1e5, 0))], LCR13, 0)) == 0


def test_crowd_region() -> None:
    true = People.join([people(1), crowd((1000, 0, 1400, 400))])
    inside = person(people(1), 0, shift=(1100, 50))
    third_inside = person(people(1), 0, shift=(935, 50))
    two_thirds = person(people(1), 0, shift=(965, 50))
    outcome = evaluate.compare(true, [inside, person(true, 0), third_inside, two_thirds], LCR13, SETTINGS)
    assert outcome.pairs.tolist() == [[0, 1]] and outcome.missed.tolist() == []
    assert outcome.ignored.tolist() == [0, 3] and outcome.false.tolist() == [2]
    metrics = run([true], [[inside, person(true, 0)]])
    assert (metrics["people"], metrics["found"], metrics["missed"], metrics["false"]) == (1, 1, 0, 0)
    assert metrics["ignored"] == 1 and metrics["detections"] == 2 and metrics["oks_ap"] == pytest.approx(1)


def test_matched_person_in_a_crowd_is_found() -> None:
    true = People.join([people(1), crowd((-100, -100, 400, 400))])
    metrics = run([true], [[person(true, 0)]])
    assert (metrics["found"], metrics["ignored"]) == (1, 0)


def test_a_crowd_person_with_a_pose_is_a_region_too() -> None:
    """What lies on that pose is not found, and AP ignores all of the region's box, not only what fits the pose."""
    true = people(2)
    true.crowd[1] = True
    found = [person(true, 0, 0.6), person(true, 1, 0.9), person(true, 1, 0.95, (20, 60))]
    metrics = run([true], [found])
    assert (metrics["people"], metrics["found"], metrics["ignored"], metrics["false"]) == (1, 1, 2, 0)
    assert metrics["oks_ap"] == pytest.approx(1)


def test_people_without_labels_are_regions() -> None:
    true = people(2)
    true.seen[1] = 0
    metrics = run([true], [[person(true, 0), person(true, 1)]])
    assert (metrics["people"], metrics["found"], metrics["ignored"]) == (1, 1, 1)


def test_outcome_counts_from_the_given_list() -> None:
    true = people(2)
    found = [person(true, 1, 0.1), person(true, 1, 0.8), person(true, 0, 0.2), person(true, 0, 0.7, (900, 0))]
    outcome = evaluate.compare(true, found, LCR13, SETTINGS)
    assert outcome.pairs.tolist() == [[1, 1]] and outcome.missed.tolist() == [0] and outcome.false.tolist() == [3]
    assert outcome.quality == pytest.approx(1 / 3)


def test_outcomes_are_those_of_each_image_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, found = random_images(40, 6)
    truth[3], found[4], truth[5], found[5] = people(0), [], people(0), []
    truth[3], found[3] = crowd((0, -100, 500, 500)), [person(people(1), 0)]
    alone = [evaluate.compare(true, own, LCR13, SETTINGS) for true, own in zip(truth, found, strict=True)]
    for chunk in (1, 7, evaluate.CHUNK):  # pairs are measured over the borders of images
        monkeypatch.setattr(evaluate, "CHUNK", chunk)
        together = evaluate.outcomes(truth, found, LCR13, SETTINGS)
        for a, b in zip(together, alone, strict=True):
            for name in ("pairs", "oks", "missed", "false", "ignored", "likeness"):
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert sum(len(o.pairs) for o in alone) > 5 and sum(len(o.ignored) for o in alone) > 0
    assert run(truth, found) == evaluate.evaluate(truth, found, LCR13, SETTINGS, outcomes=alone)
    with pytest.raises(ValueError, match="outcomes of 39"):
        evaluate.evaluate(truth, found, LCR13, SETTINGS, outcomes=alone[1:])


def test_match_by_distance() -> None:
    """Poses are 200 pixels high: up to 50 pixels off on average is found. OKS is told all the same."""
    true = people(2)
    near, far = person(true, 0, shift=(49, 0)), person(true, 1, shift=(0, 51))
    settings = config.Evaluate(match="distance")
    outcome = evaluate.compare(true, [far, near], LCR13, settings)
    assert outcome.pairs.tolist() == [[0, 1]] and outcome.missed.tolist() == [1] and outcome.false.tolist() == [0]
    assert outcome.likeness == pytest.approx([1 - 49 / 50]) and outcome.oks == pytest.approx(
        evaluate.oks(true[:1], near.pose2d[None], LCR13)[0]
    )
    assert outcome.oks[0] < 0.5 and outcome.quality == pytest.approx(0.02 / 3)
    assert (
        run([true], [[far, near]])["found"] == 0 and run([true], [[far]], match="distance", distance=0.3)["found"] == 1
    )
    true.seen[0, :12] = 0  # one label: the pose has no size, the person's box (200 pixels) has
    assert evaluate.compare(true, [near], LCR13, settings).pairs.tolist() == [[0, 0]]
    lost = person(true, 1, shift=(np.nan, 0))
    assert evaluate.compare(true, [lost], LCR13, settings).pairs.tolist() == []


def test_distance_takes_the_best_assignment() -> None:
    true = people(2)
    true.pose2d[1] = true.pose2d[0] + (20, 0)
    found = [person(true, 0, shift=(12, 0)), person(true, 0, shift=(52, 0))]  # the first is nearest to both
    outcome = evaluate.compare(true, found, LCR13, config.Evaluate(match="distance"))
    assert outcome.pairs.tolist() == [[0, 0], [1, 1]]


def test_a_skeleton_without_sigmas_is_matched_by_distance() -> None:
    true = People.empty(1, len(LSP14))
    true.pose2d[0] = np.random.default_rng(0).uniform(0, 100, (14, 2))
    true.seen[:], true.area[:] = 2, 5000
    found = [person(true, 0, shift=(1, 0))]
    metrics = evaluate.evaluate([true], [found], LSP14, config.Evaluate(match="distance"))
    assert metrics["found"] == 1 and metrics["oks_ap"] is None and metrics["pckh"] == 1
    assert metrics["curves"]["pr"] == {"recall": [], "precision": {"0.50": [], "0.75": []}}
    with pytest.raises(ValueError, match=r"lsp14 has no oks_sigma.*evaluate\.match: distance"):
        evaluate.evaluate([true], [found], LSP14, SETTINGS)


# 2D figures ----------------------------------------------------------------------------------------------------------


def test_2d_errors_by_hand() -> None:
    """Torso 60 pixels -> limit 12; the pose is 200 pixels high."""
    true = people(1)
    found = person(true, 0)
    wrist, elbow = LCR13.index("r_wrist"), LCR13.index("l_elbow")
    found.pose2d[:] += (0, 6)
    found.pose2d[wrist] += (0, 10)  # 16 off: wrong
    metrics = run([true], [[found]])
    assert metrics["error2d_height_median"] == pytest.approx(6 / 200)
    assert metrics["pck2d"] == pytest.approx(12 / 13) == metrics["pck2d_all"]
    assert metrics["per_joint"]["r_wrist"] == pytest.approx(
        {"error2d_height_median": 16 / 200, "pck2d": 0, "pckh": 1, "mpjpe_mm": 0, "pa_mpjpe_mm": 0, "pck3d": 1},
        abs=1e-4,
    )
    assert run([true], [[found]], pck2d=0.05)["pck2d"] == 0
    true.seen[0, wrist], true.seen[0, elbow] = 0, 1  # unlabelled joints are not judged, hidden ones are
    metrics = run([true], [[found]])
    assert metrics["pck2d"] == 1
    assert metrics["per_joint"]["r_wrist"]["pck2d"] is None and metrics["per_joint"]["l_elbow"]["pck2d"] == 1


def test_tiny_torso_has_a_least_length() -> None:
    true = people(1)
    hips, shoulders = LCR13.indices("r_hip", "l_hip"), LCR13.indices("r_shoulder", "l_shoulder")
    true.pose2d[0, hips] = true.pose2d[0, shoulders]  # seen from above: limit 0.2 * 0.1 * 200 = 4
    assert run([true], [[person(true, 0, shift=(3.5, 0))]])["pck2d"] == 1
    assert run([true], [[person(true, 0, shift=(4.5, 0))]])["pck2d"] == 0


def test_person_without_hips_has_no_pck() -> None:
    true = people(2)
    true.seen[1, LCR13.index("r_hip")] = 0
    metrics = run([true], [[person(true, 1, shift=(14, 0))]])
    assert metrics["pck2d"] is None and metrics["pck2d_all"] == 0 and metrics["error2d_height_median"] is not None


def test_sizes() -> None:
    true = people(3)
    true.area[:] = 1000, 5000, 10000
    sizes = run([true], [[person(true, 1), person(true, 2)]])["per_size"]
    assert [(row["people"], row["found"]) for row in sizes.values()] == [(1, 0), (1, 1), (1, 1)]
    assert sizes["small"]["recall"] == 0 and sizes["small"]["mpjpe_mm"] is None and sizes["large"]["recall"] == 1


def test_pckh_by_hand() -> None:
    """Head 40 pixels above the shoulders: its size is 44, the limit 22."""
    true = people(2)
    found = person(true, 0, shift=(0, 3))
    found.pose2d[LCR13.index("r_wrist")] += (0, 20)
    metrics = run([true], [[found]])
    assert metrics["pckh"] == pytest.approx(12 / 13) and metrics["pckh_all"] == pytest.approx(6 / 13)
    assert metrics["per_joint"]["r_wrist"]["pckh"] == 0 and metrics["per_joint"]["head"]["pckh"] == 1
    assert run([true], [[found]], pckh=0.6)["pckh"] == 1
    true.seen[:, LCR13.index("head")] = 0
    metrics = run([true], [[found]])
    assert metrics["pckh"] is None is metrics["pckh_all"] and metrics["per_joint"]["l_hip"]["pckh"] is None


# 3D figures ----------------------------------------------------------------------------------------------------------


def test_mpjpe_by_hand() -> None:
    """One limb joint 130 mm off: the torso, and with it the alignment, stays."""
    true = people(1, 3)
    found = person(true, 0, move=(1, -2, 30))
    found.pose3d[LCR13.index("head")] += (0.03, 0.04, 0.12)
    metrics = run([true], [[found]])
    assert metrics["mpjpe_mm"] == pytest.approx(130 / 13, abs=1e-3)
    assert metrics["pck3d"] == 1 and metrics["pa_mpjpe_mm"] > 5
    # at 0 mm nothing counts, at 5 .. 130 mm 12 of 13 joints, at 135 .. 150 mm all
    assert metrics["auc3d"] == pytest.approx((26 * 12 / 13 + 4) / 31, abs=1e-6)
    assert run([true], [[found]], pck3d_mm=125)["pck3d"] == pytest.approx(12 / 13)


def test_people_without_3d_take_no_part() -> None:
    true = people(2)
    true.has3d[1] = False
    metrics = run([true], [[person(true, 0), person(true, 1, move=np.random.default_rng(0).normal(size=(J, 3)))]])
    assert metrics["found"] == 2 and metrics["people3d"] == 1 and metrics["mpjpe_mm"] == pytest.approx(0, abs=1e-3)


def test_missed_people_are_wrong_in_all() -> None:
    """Four with 3D, of whom two are found, one 0.2 m off at the head; a fifth has none, a sixth is a crowd."""
    true = people(6)
    true.has3d[4], true.crowd[5] = False, True
    bent = person(true, 1)
    bent.pose3d[LCR13.index("head")] += (0, 0, 0.2)
    metrics = run([true], [[person(true, 0), bent, person(true, 4)]])
    assert (metrics["people3d"], metrics["people3d_all"], metrics["found"]) == (2, 4, 3)
    assert metrics["pck3d"] == pytest.approx(25 / 26) and metrics["pck3d_all"] == pytest.approx(25 / 52)
    assert metrics["auc3d"] == pytest.approx(30 / 31 * 25 / 26) == pytest.approx(2 * metrics["auc3d_all"])
    assert metrics["per_joint"]["head"]["pck3d"] == 0.5 and metrics["per_joint"]["head"]["mpjpe_mm"] == pytest.approx(
        100
    )
    assert 5 < metrics["per_joint"]["r_knee"]["pa_mpjpe_mm"] + metrics["per_joint"]["head"]["pa_mpjpe_mm"] < 100


# Tables and curves ---------------------------------------------------------------------------------------------------


def test_groups() -> None:
    truth = [people(2), people(1, 1), people(0), people(1, 2)]
    far = person(truth[0], 0, move=(0, 0, 0))
    far.pose3d[LCR13.index("head")] += (0, 0, 0.13)
    found = [[far], [person(truth[1], 0, shift=(0, 10))], [], []]
    metrics = evaluate.evaluate(truth, found, LCR13, SETTINGS, ["walk", "sit", "empty", "walk"])
    groups = metrics["per_group"]
    assert list(groups) == ["empty", "sit", "walk"] and list(groups["sit"]) == list(metrics["per_size"]["small"])
    assert [(g["people"], g["found"], g["recall"]) for g in groups.values()] == [(0, 0, None), (1, 1, 1), (3, 1, 1 / 3)]
    assert groups["walk"]["mpjpe_mm"] == pytest.approx(10, abs=1e-3) and groups["sit"]["mpjpe_mm"] < 1e-3
    assert groups["sit"]["error2d_height_median"] == pytest.approx(10 / 200) and groups["empty"]["pck3d"] is None
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics and "walk" in evaluate.table(metrics)
    assert "per_group" not in run(truth, found)
    with pytest.raises(ValueError, match="4 images of truth, but groups of 1"):
        evaluate.evaluate(truth, found, LCR13, SETTINGS, ["walk"])


def test_curves() -> None:
    """One person of two is found, 6 pixels (a tenth of the torso) and, at the head, 100 mm off."""
    true = people(2)
    found = person(true, 0, shift=(6, 0))
    found.pose3d[LCR13.index("head")] += (0, 0, 0.1)
    curves = run([true], [[found]])["curves"]
    pck2d, pck3d = curves["pck2d"], curves["pck3d"]
    assert pck2d["threshold"][10] == 0.1 and len(pck2d["threshold"]) == 51
    assert pck2d["matched"] == [0] * 10 + [1] * 41 and pck2d["all"] == [0] * 10 + [0.5] * 41
    assert pck3d["threshold_mm"][20] == 100 and len(pck3d["threshold_mm"]) == len(pck3d["matched"]) == 61
    assert pck3d["matched"][19] == pytest.approx(12 / 13) and pck3d["matched"][21] == 1 and pck3d["all"][21] == 0.5
    assert len(curves["pr"]["recall"]) == 101 and curves["pr"]["precision"]["0.50"][:50] == pytest.approx([1] * 50)
    curves = run([true], [[]])["curves"]  # nobody is found, two are to be
    assert curves["pck2d"]["matched"] == [] and curves["pck2d"]["all"] == [0] * 51
    empty = {"pr": {"recall": [], "precision": {"0.50": [], "0.75": []}},
             "pck2d": {"threshold": [], "matched": [], "all": []},
             "pck3d": {"threshold_mm": [], "matched": [], "all": []}}  # fmt: skip
    assert run([people(0)], [[]])["curves"] == empty


def test_curves_pass_through_the_figures() -> None:
    truth, found = random_images(40, 3)
    metrics = run(truth, found)
    curves = metrics["curves"]
    for key, name, at in (("pck2d", "pck2d", 20), ("pck3d", "pck3d", 30)):
        assert curves[key]["matched"][at] == pytest.approx(metrics[name])
        assert curves[key]["all"][at] == pytest.approx(metrics[f"{name}_all"])
    for kind, figure in (("matched", "auc3d"), ("all", "auc3d_all")):
        assert np.mean(curves["pck3d"][kind][:31]) == pytest.approx(metrics[figure])


def test_the_predecessor_on_request() -> None:
    true = people(1)
    metrics = run([true], [[person(true, 0, shift=(30, 0))]], predecessor=True)
    assert metrics["predecessor"]["Err2d"] == pytest.approx(13 * 30 / 100)
    assert "Err2d_avg               3.9" in evaluate.table(metrics) and "predecessor" not in run([true], [[]])
    nothing = run([true], [[]], predecessor=True)
    assert nothing["predecessor"]["PCK2d"] is None and "PCK2d                   -" in evaluate.table(nothing)


# Nothing to measure, and much of it ----------------------------------------------------------------------------------


def test_nothing_to_measure() -> None:
    nobody, somebody, stranger = People.empty(0, J), people(1), person(people(1), 0)
    for truth, found, missing in (
        ([], [], FIGURES),
        ([nobody], [[]], FIGURES),
        ([nobody], [[stranger]], [f for f in FIGURES if f != "precision"]),
        ([crowd((0, 0, 900, 900))], [[stranger]], FIGURES),
        (
            [somebody],
            [[]],
            [f for f in FIGURES if f != "recall" and not f.startswith("oks") and not f.endswith("_all")],
        ),
    ):
        metrics = run(truth, found)
        assert [f for f in FIGURES if metrics[f] is None] == list(missing)
        assert all(len(line) > 10 for line in evaluate.table(metrics).splitlines() if line)
    assert run([somebody], [[]])["recall"] == 0 == run([somebody], [[]])["oks_ap"]
    assert run([nobody], [[stranger]])["precision"] == 0
    somebody.has3d[:] = False
    metrics = run([somebody], [[stranger]])
    assert metrics["mpjpe_mm"] is None and metrics["auc3d"] is None and metrics["pck2d"] == 1


def test_as_many_images_as_detections() -> None:
    with pytest.raises(ValueError, match="1 images of truth, but detections of 2"):
        run([people(1)], [[], []])


def test_table_names_every_figure() -> None:
    true = people(1)
    text = evaluate.table(run([true], [[person(true, 0, shift=(1, 0))]]))
    assert "mpjpe_mm" in text and "r_wrist" in text and "medium" in text and "None" not in text
    assert "recall                  1\n" in text
    others = {"curves": {"pr": {}}, "calibration": {"score": {}}, "unreadable_files": {"a": "b"}, "list": [1]}
    assert evaluate.table(run([true], [[person(true, 0, shift=(1, 0))]]) | others) == text


def test_fast() -> None:
    """1000 images x 3 people; 10,000 of them take 10 times as long, which is to stay under 20 s."""
    true = people(3)
    found = [person(true, p, 0.9, (p, 1)) for p in range(3)]
    start = time.perf_counter()
    assert run([true] * 1000, [found] * 1000)["found"] == 3000
    assert time.perf_counter() - start < 2


# The loop over files -------------------------------------------------------------------------------------------------


def test_detect_in_batches_and_over_unreadable_files(tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.png" for i in range(5)]
    for i in (0, 1, 3, 4):
        Image.new("RGB", (10 + i, 8), (i, 0, 0)).save(files[i])
    files[2].write_text("no image")
    sizes, steps = [], []

    def detect_batch(images: list[np.ndarray]) -> list[list[Person]]:
        sizes.append(len(images))
        return [[person(people(1), 0, score=image[0, 0, 0] / 10)] for image in images]

    found, unreadable = evaluate.detect(detect_batch, files, 2, progress=lambda *step: steps.append(step))
    assert [[p.score for p in persons] for persons in found] == [[0.0], [0.1], [], [0.3], [0.4]]
    assert list(unreadable) == [str(files[2])] and "not an image" in unreadable[str(files[2])]
    assert sizes == [2, 1, 1] and steps == [(2, 5), (4, 5), (5, 5)]
    assert evaluate.detect(detect_batch, []) == ([], {})


def test_examples() -> None:
    true = people(1)
    shifts = [12, 0, 4, 8, 2, 6, 10]
    outcomes = [evaluate.compare(true, [person(true, 0, shift=(s, 0))], LCR13, SETTINGS) for s in shifts]
    outcomes.append(evaluate.compare(People.empty(0, J), [], LCR13, SETTINGS))
    chosen = evaluate.examples(outcomes, 2)
    assert chosen["worst"] == [0, 6] and chosen["best"] == [1, 4]
    assert len(chosen["random"]) == 2 and set(chosen["random"]) <= {2, 3, 5, 7}
    assert evaluate.examples(outcomes[:1], 2) == {"worst": [0], "best": [], "random": []}
    assert evaluate.examples([], 2) == {"worst": [], "best": [], "random": []}
