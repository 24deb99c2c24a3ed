"""Joints by name: mirror, parts, conversion between skeletons."""

from __future__ import annotations

import numpy as np
import pytest

from lcrnet import skeleton
from lcrnet.skeleton import COCO17, LCR13, LSP14, SKELETONS, Skeleton, by_joints, convert, joint_name


@pytest.mark.parametrize("of", SKELETONS.values(), ids=SKELETONS)
def test_mirror(of: Skeleton) -> None:
    """An involution that exchanges the sides and leaves the middle."""
    assert (of.mirror[of.mirror] == np.arange(len(of))).all()
    for joint, partner in zip(of.joints, np.array(of.joints)[of.mirror], strict=True):
        side = joint[:2]
        assert partner == {"r_": "l_", "l_": "r_"}.get(side, side) + joint[2:]
    assert (of.mirror != np.arange(len(of))).sum() == sum(j[:2] in ("r_", "l_") for j in of.joints) > 0


@pytest.mark.parametrize("of", SKELETONS.values(), ids=SKELETONS)
def test_parts(of: Skeleton) -> None:
    assert {of.joints[i] for i in of.torso} == {"r_hip", "l_hip", "r_shoulder", "l_shoulder"}
    assert {of.joints[i] for i in of.lower} == {"r_ankle", "l_ankle", "r_knee", "l_knee"}
    assert sorted([*of.lower, *of.upper]) == list(range(len(of)))
    mirrored = {frozenset(of.mirror[bone]) for bone in of.bones}
    assert {frozenset(bone) for bone in of.bones} == mirrored, "both sides have the same bones"
    assert not of.oks_sigma or (of.sigma.shape == (len(of),) and (of.sigma == of.sigma[of.mirror]).all())


def test_lcr13_is_the_predecessors_order() -> None:
    """As shared/data/README.md gives it: no list of indices may change it unseen."""
    assert LCR13.joints == (
        "r_ankle", "l_ankle", "r_knee", "l_knee", "r_hip", "l_hip", "r_wrist", "l_wrist", "r_elbow", "l_elbow",
        "r_shoulder", "l_shoulder", "head",
    )  # fmt: skip
    with pytest.raises(ValueError, match="lcr13 has no joint 'nose'; it has r_ankle, "):
        LCR13.index("nose")


def random(of: Skeleton, people: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(people, len(of), 2)), np.full((people, len(of)), 2)


@pytest.mark.parametrize("source", [COCO17, LSP14], ids=lambda s: s.name)
def test_convert_named_joints(source: Skeleton) -> None:
    pose, seen = random(source)
    seen[:, source.index("l_knee")], seen[:, source.index("r_wrist")] = 1, 0
    got, got_seen = convert(pose, seen, source, LCR13)
    for j, name in enumerate(LCR13.joints[:-1]):
        i = source.index(name)
        assert (got_seen[:, j] == seen[:, i]).all()
        assert (got[:, j] == pose[:, i] * (name != "r_wrist")).all(), "what is unseen has no place"


HEAD = [  # (labelled joints of the head, those that it is made of)
    ("nose l_ear r_ear l_eye r_eye", "nose l_ear r_ear"),
    ("l_ear r_ear l_eye r_eye", "l_ear r_ear"),
    ("nose l_ear l_eye r_eye", "l_eye r_eye"),
    ("nose l_ear r_eye", "nose"),
    ("l_ear r_eye", ""),
    ("", ""),
]


@pytest.mark.parametrize(("labelled", "made_of"), HEAD)
def test_head_of_coco(labelled: str, made_of: str) -> None:
    """The middle of nose and mid-ears, or the next best that is labelled; as visible as the worst of them."""
    pose, seen = random(COCO17, 1)
    for name in ("nose", "l_ear", "r_ear", "l_eye", "r_eye"):
        seen[0, COCO17.index(name)] = 0 if name not in labelled.split() else 1 if name == "r_ear" else 2
    at = {name: pose[0, COCO17.index(name)] for name in COCO17.joints}
    goal = {
        "nose l_ear r_ear": (at["nose"] + (at["l_ear"] + at["r_ear"]) / 2) / 2,
        "l_ear r_ear": (at["l_ear"] + at["r_ear"]) / 2,
        "l_eye r_eye": (at["l_eye"] + at["r_eye"]) / 2,
        "nose": at["nose"],
        "": np.zeros(2),
    }[made_of]
    got, got_seen = convert(pose, seen, COCO17, LCR13)
    head = LCR13.index("head")
    np.testing.assert_allclose(got[0, head], goal, atol=1e-12)
    assert got_seen[0, head] == (0 if not made_of else 1 if "r_ear" in made_of else 2)


def test_each_person_has_a_rule_of_its_own() -> None:
    pose, seen = random(COCO17, 2)
    seen[1, COCO17.indices("l_ear", "r_ear", "l_eye", "r_eye")] = 0
    got, _ = convert(pose, seen, COCO17, LCR13)
    for i in range(2):
        alone, _ = convert(pose[i], seen[i], COCO17, LCR13)
        np.testing.assert_array_equal(got[i], alone)
    np.testing.assert_array_equal(got[1, -1], pose[1, COCO17.index("nose")])


def test_head_of_lsp() -> None:
    pose, seen = random(LSP14)
    got, _ = convert(pose, seen, LSP14, LCR13)
    np.testing.assert_allclose(got[:, -1], pose[:, LSP14.indices("neck", "head_top")].mean(1))
    seen[:, LSP14.index("neck")] = 0
    assert (convert(pose, seen, LSP14, LCR13)[1][:, -1] == 0).all()


def test_what_the_source_lacks_is_not_invented() -> None:
    got, seen = convert(*random(LCR13), LCR13, COCO17)
    absent = [i for i, name in enumerate(COCO17.joints) if name not in LCR13.joints]
    assert len(absent) == 5
    assert (seen[:, absent] == 0).all() and (got[:, absent] == 0).all()
    assert (np.delete(seen, absent, 1) == 2).all()
    same, seen = convert(*random(LCR13), LCR13, LCR13)
    assert (same == random(LCR13)[0]).all() and (seen == 2).all()


SPELLINGS = [
    ("r_knee", "r_knee"), ("right_knee", "r_knee"), ("Right Knee", "r_knee"), ("right-knee", "r_knee"),
    ("rightKnee", "r_knee"), ("RKnee", "r_knee"), ("LAnkle", "l_ankle"), ("knee_r", "r_knee"), ("Knee_L", "l_knee"),
    (" nose ", "nose"), ("left_ear", "l_ear"), ("head_top", "head_top"), ("Neck", "neck"),
]  # fmt: skip


@pytest.mark.parametrize(("spelling", "name"), SPELLINGS)
def test_spellings(spelling: str, name: str) -> None:
    assert joint_name(spelling) == name


def test_by_joints() -> None:
    long = {"r_": "right_", "l_": "left_"}
    for known in SKELETONS.values():
        assert by_joints([long.get(j[:2], j[:2]) + j[2:] for j in known.joints]) is known
    other = by_joints(["LHip", "RHip", "tail"])
    assert other.joints == ("l_hip", "r_hip", "tail") and other.name == "custom"
    assert other.mirror.tolist() == [1, 0, 2] and other.bones.shape == (0, 2)
    assert by_joints(LCR13.joints[::-1]).name == "custom", "another order is another skeleton"


def test_rules_are_of_joints_that_exist() -> None:
    everywhere = {joint for s in SKELETONS.values() for joint in s.joints}
    for candidates in skeleton.DERIVED.values():
        assert {name for groups in candidates for group in groups for name in group} <= everywhere
