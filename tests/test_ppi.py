"""Pose proposals -> people, against a slow twin that was written apart from it (golden/ppi_reference.py)."""

from __future__ import annotations

import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from lcrnet import config, pose, ppi
from lcrnet.pose import PoseProposals
from lcrnet.skeleton import COCO17, LCR13, Skeleton

sys.path.insert(0, str(Path(__file__).parent / "golden"))
import ppi_reference

SIZE = (240, 320)
K = 6
UPPER_ONLY = np.arange(K) >= K // 2
FUNCTIONS = get_args(config.Ppi.model_fields["iou_func"].annotation)
STRICT = config.Ppi(th_pose3D=0.12, th_iou=0.14, min_mode_score=0.05, th_persondetect=0.5)


def scene(seed: int, people: int, each: int = 12) -> PoseProposals:
    """Proposals round drawn-at-random people: overlapping, cut off, some mirrored, several 3D modes a person."""
    rng = np.random.default_rng(seed)
    count = people * each
    who = rng.integers(0, max(people, 1), count)
    shape = rng.uniform(-1, 1, (people, 13, 2)) * [0.5, 1.0]
    size = rng.uniform(30, 90, (people, 1, 1))
    place = rng.uniform(-0.1, 1.1, (people, 1, 2)) * [SIZE[1], SIZE[0]]
    anchor = rng.integers(0, K, count)
    base3d = rng.normal(0, 0.3, (K // 2, 13, 3))
    pose2d = (shape * size + place)[who] + rng.normal(0, 4, (count, 13, 2))
    pose3d = base3d[anchor % (K // 2)] + rng.normal(0, 0.05, (count, 13, 3))
    mirrored = rng.random(count) < 0.3
    pose2d[mirrored] = pose2d[mirrored][:, LCR13.mirror]
    score = rng.uniform(0.005, 1, count) ** 2
    return PoseProposals(
        box=pose.box_of(pose2d).astype(np.float32),
        score=score.astype(np.float32),
        anchor=anchor,
        pose2d=pose2d.astype(np.float32),
        pose3d=pose3d.astype(np.float32),
    )


def rows(proposals: PoseProposals, index: Any) -> PoseProposals:
    return PoseProposals(*(v[index] for v in proposals.__dict__.values()))


def reference(proposals: PoseProposals, params: config.Ppi, upper_only: np.ndarray) -> list[ppi_reference.Found]:
    named = ("th_pose3D", "th_iou", "iou_func", "min_mode_score", "th_persondetect")
    return ppi_reference.integrate(
        proposals.score, proposals.anchor, proposals.pose2d, proposals.pose3d, *SIZE, upper_only,
        **{name: getattr(params, name) for name in named}, rois=proposals.box, faults=params.wrong,
    )  # fmt: skip


@pytest.mark.parametrize("wrong", ["corrected", "lcrnet", "improved", *get_args(config.PpiFault)])
@pytest.mark.parametrize("iou_func", FUNCTIONS)
def test_equals_the_slow_twin(iou_func: str, wrong: str) -> None:
    if (iou_func, wrong) == ("mje", "lcrnet"):
        pytest.skip("the lcrnet variant has no mje")
    whose = {"variant": wrong} if wrong in ("corrected", "lcrnet", "improved") else {"faults": (wrong,)}
    found_any = merged = 0
    for seed in range(11 if wrong == "corrected" else 6):
        proposals = scene(seed, people=seed)
        th_iou = 0.3 if "bbox" in iou_func else 0.1
        params = config.Ppi(**STRICT.model_dump() | {"iou_func": iou_func, "th_iou": th_iou} | whose)
        truth = reference(proposals, params, UPPER_ONLY)
        found = ppi.integrate(proposals, SIZE, params, LCR13, UPPER_ONLY)
        assert len(found) == len(truth)
        for person, true in zip(found, truth, strict=True):
            np.testing.assert_allclose(person.pose2d, true.pose2d, rtol=0, atol=0.01)
            np.testing.assert_allclose(person.pose3d, true.pose3d, rtol=0, atol=1e-5)
            np.testing.assert_allclose(person.spread, true.spread, rtol=0, atol=1e-5)
            score = true.mass if "score_sum" in params.wrong else true.mass / (1 + true.mass)
            assert person.score == pytest.approx(score, abs=1e-5)
            assert person.support == len(true.members)
            assert person.anchor == true.anchor
            agreement = person.score * np.exp(-np.array(true.spread) / params.th_pose3D)
            np.testing.assert_allclose(person.joint_score, agreement, atol=1e-4)
        found_any += len(found)
        merged += sum(p.support > 1 for p in found)
    assert found_any > 10 and merged > 5, "the scenes test nothing"


def test_iou_funcs_differ() -> None:
    """Not all of them are the same one by mistake."""
    groupings = set()
    for iou_func in FUNCTIONS:
        params = STRICT.model_copy(update={"iou_func": iou_func, "th_iou": 0.04})
        found = [ppi.modes(scene(seed, people=8, each=20), SIZE, params) for seed in range(4)]
        groupings.add(str([[sorted(map(int, m)) for m in modes] for modes in found]))
    assert len(groupings) == len(FUNCTIONS)


def test_left_right_variants_see_through_a_swap() -> None:
    """A proposal that confuses the sides of the person is another person for `torso`, the same for `torsoLR`."""
    one = rows(scene(1, people=1), [0, 0])
    one.pose2d[1] = one.pose2d[0][LCR13.mirror]
    one.score[:] = [0.9, 0.8]
    params = STRICT.model_copy(update={"th_iou": 0.02, "th_persondetect": 0.1})
    assert len(ppi.integrate(one, SIZE, params.model_copy(update={"iou_func": "torso"}))) == 2
    assert len(ppi.integrate(one, SIZE, params.model_copy(update={"iou_func": "torsoLR"}))) == 1


def test_order_of_proposals_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    for seed in range(20):
        proposals = scene(seed, people=4)
        shuffled = rows(proposals, rng.permutation(len(proposals)))
        a, b = (ppi.integrate(p, SIZE, STRICT, LCR13, UPPER_ONLY) for p in (proposals, shuffled))
        assert len(a) == len(b)
        for p, q in zip(a, b, strict=True):
            np.testing.assert_array_equal(p.pose3d, q.pose3d)
            np.testing.assert_array_equal(p.pose2d, q.pose2d)
            assert p.score == q.score


def test_of_equal_scores_the_first_leads() -> None:
    twins = rows(scene(1, people=1), [0] * 200)
    twins.anchor = np.arange(200)
    twins.score = np.where(np.arange(200) % 3 == 1, 0.9, 0.2).astype(np.float32)
    assert [(p.anchor, p.support) for p in ppi.integrate(twins, SIZE, STRICT)] == [(1, 200)]
    assert ppi.modes(twins, SIZE, STRICT)[0].tolist() == [*range(1, 200, 3), *(i for i in range(200) if i % 3 != 1)]


def test_legs_of_upper_body_anchors_count_a_tenth() -> None:
    pair = rows(scene(1, people=1), [0, 0])
    pair.score = np.array([0.6, 0.6], np.float32)
    pair.anchor = np.array([0, K - 1])
    pair.pose2d[1] += 11
    person = ppi.integrate(pair, SIZE, STRICT, LCR13, UPPER_ONLY)[0]
    moved = person.pose2d - pair.pose2d[0]
    np.testing.assert_allclose(moved[LCR13.lower], 11 * 0.1 / 1.1, atol=1e-3)
    np.testing.assert_allclose(moved[LCR13.upper], 5.5, atol=1e-3)
    assert person.score == pytest.approx(1.2 / 2.2, abs=1e-6)  # the score is of the whole weight


def test_a_group_is_one_person_and_its_heaviest_mode() -> None:
    """Two modes at one place: the sum of scores decides, not the best single score."""
    base = rows(scene(1, people=1), [0, 0, 0])
    base.score = np.array([0.7, 0.5, 0.5], np.float32)
    base.pose3d[1:] += 1
    found = ppi.integrate(base, SIZE, STRICT)
    assert len(found) == 1
    assert found[0].support == 2 and found[0].score == pytest.approx(0.5, abs=1e-6)
    # Centres below min_mode_score make no second mode.
    found = ppi.integrate(base, SIZE, STRICT.model_copy(update={"min_mode_score": 0.6}))
    assert found[0].support == 1
    assert ppi.integrate(base, SIZE, STRICT.model_copy(update={"th_persondetect": 1.01})) == []


def test_pose_cut_off_by_the_border_is_one_person() -> None:
    """Torso and head above the image leave a box without height; proposals still find each other."""
    cut = rows(scene(1, people=1), [0] * 4)
    cut.pose2d -= cut.pose2d[:, LCR13.upper, 1].max() + 20
    cut.pose2d[..., 0] += 160 - cut.pose2d[..., 0].mean()
    cut.score[:] = 0.5
    assert len(ppi.integrate(cut, SIZE, STRICT)) == 1


def test_not_finite_proposals_are_left_out() -> None:
    """A NaN in the best proposal is an endless loop in the released code."""
    proposals = scene(2, people=2)
    best = np.argsort(-proposals.score)[:4]
    expected = ppi.integrate(rows(proposals, np.setdiff1d(np.arange(len(proposals)), best)), SIZE, STRICT)
    proposals.pose3d[best[0], 5, 2] = np.nan
    proposals.pose2d[best[1], 0, 0] = np.inf
    proposals.score[best[2:]] = [np.nan, -np.inf]
    assert (~ppi.usable(proposals)).sum() == 4
    assert ppi.integrate_batch([proposals, scene(1, 1)], [SIZE] * 2, STRICT)[1] == [4, 0]
    assert ppi.integrate_batch([proposals], [SIZE], config.Ppi(postprocess="nms"))[1] == [4]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ppi.integrate(proposals, SIZE, STRICT)
    assert len(found) == len(expected) > 0
    for p, q in zip(found, expected, strict=True):
        np.testing.assert_array_equal(p.pose3d, q.pose3d)
    proposals.score[:] = np.nan
    assert ppi.integrate(proposals, SIZE, STRICT) == []


def test_empty_and_single() -> None:
    assert ppi.integrate(scene(0, people=0), SIZE, STRICT) == []
    one = rows(scene(1, people=1), [0])
    one.score[:] = 0.8
    (person,) = ppi.integrate(one, SIZE, STRICT, LCR13, UPPER_ONLY)
    np.testing.assert_allclose(person.pose2d, one.pose2d[0], rtol=1e-6)
    assert person.support == 1 and person.score == pytest.approx(0.8 / 1.8)
    np.testing.assert_allclose(person.spread, 0, atol=1e-7)
    np.testing.assert_allclose(person.joint_score, person.score, atol=1e-6)
    assert person.place is None


def test_persons_are_sorted_and_in_range() -> None:
    for seed in range(10):
        many = scene(seed, people=6, each=60)
        found = ppi.integrate(many, SIZE, STRICT, LCR13, UPPER_ONLY)
        scores = [p.score for p in found]
        assert scores == sorted(scores, reverse=True)
        for person in found:
            assert 0 < person.score <= 1
            assert (person.joint_score >= 0).all() and (person.joint_score <= person.score + 1e-6).all()
            assert (person.box[:2] >= 0).all() and person.box[2] <= SIZE[1] and person.box[3] <= SIZE[0]
            assert person.pose2d.dtype == person.pose3d.dtype == np.float32
    crowd = replace(many, score=np.full(len(many), 1e6, np.float32))
    assert max(p.score for p in ppi.integrate(crowd, SIZE, STRICT)) <= 1


def test_tensors_and_other_skeletons() -> None:
    proposals = scene(4, people=3)
    tensors = PoseProposals(*(torch.from_numpy(v) for v in proposals.__dict__.values()))
    a, b = (ppi.integrate(p, SIZE, STRICT, LCR13, UPPER_ONLY) for p in (proposals, tensors))
    assert [p.score for p in a] == [p.score for p in b]
    wide = replace(
        proposals,
        pose2d=np.concatenate([proposals.pose2d, proposals.pose2d[:, :4]], 1),
        pose3d=np.concatenate([proposals.pose3d, proposals.pose3d[:, :4]], 1),
    )
    for iou_func in FUNCTIONS:
        found = ppi.integrate(wide, SIZE, STRICT.model_copy(update={"iou_func": iou_func}), COCO17)
        assert found and found[0].pose2d.shape == (17, 2)


@pytest.mark.parametrize("seed", range(4))
def test_a_late_mode_equals_the_slow_twin(seed: int) -> None:
    """The best mode comes after ten of one proposal each; the poses lie on a line."""
    rng = np.random.default_rng(seed)
    proposals = scene(5, people=1, each=80)
    alone = np.arange(80) < 10
    proposals.score = np.where(alone, 0.9, rng.uniform(0.1, 0.2, 80)).astype(np.float32)
    along = np.where(alone, 10 * np.arange(80), rng.uniform(0, 2, 80) - 20).astype(np.float32)
    proposals.pose3d[:] = proposals.pose3d[0] + np.float32([0, 0.6, 0.8]) * along[:, None, None]
    params = STRICT.model_copy(update={"th_pose3D": 0.4, "th_iou": 0.0})
    (truth,) = reference(proposals, params, UPPER_ONLY)
    (found,) = ppi.modes(proposals, SIZE, params)
    assert sorted(found) == sorted(truth.members) and len(found) > 5


def test_twenty_thousand_proposals() -> None:
    """What an untrained network proposes takes well under a second (the released code: 1.8 to 3.2 s)."""
    proposals = scene(6, people=30, each=667)
    start = time.process_time()
    assert ppi.integrate(proposals, SIZE, config.Ppi(), LCR13, UPPER_ONLY)
    assert time.process_time() - start < 1


def same(a: list[pose.Person], b: list[pose.Person]) -> None:
    assert len(a) == len(b)
    for p, q in zip(a, b, strict=True):
        for name, value in p.__dict__.items():
            np.testing.assert_array_equal(value, getattr(q, name))


@pytest.mark.parametrize("iou_func", ["bbox_torsohead", "torsoLR"])
def test_a_batch_is_its_images(iou_func: str) -> None:
    """Whatever their sizes and numbers of proposals, as arrays or tensors."""
    params = STRICT.model_copy(update={"iou_func": iou_func})
    scenes = [
        scene(seed, people, each) for seed, people, each in ((0, 3, 20), (1, 0, 12), (2, 5, 9), (3, 1, 1), (4, 9, 30))
    ]
    sizes = [(240, 320), (10, 20), (100, 100), (480, 640), (320, 240)]
    alone = [ppi.integrate(s, size, params, LCR13, UPPER_ONLY) for s, size in zip(scenes, sizes, strict=True)]
    assert sum(map(len, alone)) > 5
    tensors = [PoseProposals(*(torch.from_numpy(v) for v in s.__dict__.values())) for s in scenes]
    for batch in (scenes, tensors):
        for one, together in zip(alone, ppi.integrate_batch(batch, sizes, params, LCR13, UPPER_ONLY)[0], strict=True):
            same(one, together)
    assert ppi.integrate_batch([], [], params) == ([], [])
    assert ppi.integrate_batch([scenes[1]] * 2, sizes[:2], params) == ([[], []], [0, 0])


def test_a_crowd(monkeypatch: pytest.MonkeyPatch) -> None:
    """More people than room is made for at first."""
    crowd = scene(8, 12)
    every = ppi.integrate(crowd, SIZE, STRICT, LCR13, UPPER_ONLY)
    assert len(every) > 3
    monkeypatch.setattr(ppi, "MAX_PEOPLE", 3)
    same(ppi.integrate(crowd, SIZE, STRICT, LCR13, UPPER_ONLY), every)


def test_faults_show() -> None:
    """Each of them changes something: a switch that does nothing would pass the comparison with the twin too."""
    for fault in get_args(config.PpiFault):
        changed = False
        for seed in range(30):
            proposals = scene(seed, people=6, each=30)
            wide = {"iou_func": "torsoheadLR", "th_iou": 0.06} | ({"iou_func": "bbox"} if fault == "roi_boxes" else {})
            proposals.box += np.float32([20, 20, -10, -10])
            people = [
                ppi.integrate(
                    proposals, SIZE, config.Ppi(**STRICT.model_dump() | wide | {"faults": f}), LCR13, UPPER_ONLY
                )
                for f in ((), (fault,))
            ]
            key = [[(p.score, p.anchor, p.support, p.pose3d.tobytes()) for p in each] for each in people]
            changed = changed or key[0] != key[1]
        assert changed, fault


def test_released_sets() -> None:
    """By name, as the released bundles have them; what is said beside the name wins."""
    params = config.Ppi(released="DEMO_ECCV18")
    assert (params.th_pose3D, params.th_iou, params.iou_func) == (0.3, 0.1, "shoulderhead")
    assert config.Ppi(released="DEMO_ECCV18", th_iou=0.2).th_iou == 0.2
    assert config.load(None, {"ppi.released": "InTheWild-ResNet50"}).ppi.th_pose3D == 0.04
    assert config.Ppi(**params.model_dump()) == params
    with pytest.raises(config.ConfigError, match="mje came with the improved code"):
        config.load(None, {"ppi.variant": "lcrnet", "ppi.iou_func": "mje"})


def test_released_sets_are_those_of_the_files(shared: Path) -> None:
    from lcrnet import unpickle

    for name, own in config.PPI_RELEASED.items():
        bundle = unpickle.load((shared / "legacy" / f"{name}_anchor_cfg.pkl").read_bytes(), name)
        assert {k: v if isinstance(v, str) else pytest.approx(v) for k, v in own.items()} == bundle["ppi_params"]


def test_nms_equals_the_slow_twin() -> None:
    people = 0
    for seed in range(12):
        proposals = scene(seed, people=seed % 5, each=15)
        params = config.Ppi(postprocess="nms", th_iou=0.2, th_persondetect=0.3)
        kept = ppi_reference.suppress(proposals.score, proposals.pose2d, 0.3, 0.2)
        found = ppi.integrate(proposals, SIZE, params)
        assert [p.score for p in found] == proposals.score[kept].tolist()
        for person, row in zip(found, kept, strict=True):
            np.testing.assert_array_equal(person.pose3d, proposals.pose3d[row])
            np.testing.assert_array_equal(person.pose2d, proposals.pose2d[row])
            assert person.anchor == proposals.anchor[row] and person.support == 1 and not person.spread.any()
        people += len(found)
    assert people > 20


def test_poses_without_a_body() -> None:
    """Hands (21 joints) and faces (84), which the improved code takes too: bbox and mje need no torso."""
    hand = Skeleton("hand", tuple(f"point{i}" for i in range(21)))
    proposals = scene(1, people=3, each=20)
    proposals.pose2d, proposals.pose3d = (
        np.concatenate([v, v[:, :8]], 1) for v in (proposals.pose2d, proposals.pose3d)
    )  # fmt: skip
    for iou_func in ("bbox", "mje"):
        for variant in ("corrected", "improved"):
            params = config.Ppi(variant=variant, iou_func=iou_func, th_persondetect=0.1)
            assert ppi.integrate(proposals, SIZE, params, hand)[0].pose3d.shape == (21, 3)
    with pytest.raises(config.UserError, match="no joints of the head"):
        torso = Skeleton("torso", ("r_hip", "l_hip", "r_shoulder", "l_shoulder"))
        four = PoseProposals(*(v[:, :4] if v.ndim == 3 else v for v in proposals.__dict__.values()))
        ppi.integrate(four, SIZE, config.Ppi(iou_func="head"), torso)
