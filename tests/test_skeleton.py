"""Joints by name: mirror, parts, conversion between skeletons."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lcrnet import skeleton
from lcrnet.skeleton import (
    BLAZEPOSE33,
    COCO17,
    H36M17,
    H36M32,
    LCR13,
    LSP14,
    MPI_INF_3DHP17,
    MPI_INF_3DHP28,
    MPII16,
    SKELETONS,
    SMPL24,
    Skeleton,
    by_joints,
    convert,
    joint_name,
    rules,
)


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
    legs = {"r_ankle", "l_ankle", "r_knee", "l_knee"}
    feet = {j for j in of.joints if "toe" in j or "heel" in j or "foot" in j}
    assert {of.joints[i] for i in of.lower} == legs | feet
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


H36M = (
    "Hip RHip RKnee RFoot LHip LKnee LFoot Spine Thorax Neck/Nose Head LShoulder LElbow LWrist RShoulder RElbow RWrist"
)
MPII = ("r ankle,r knee,r hip,l hip,l knee,l ankle,pelvis,thorax,upper neck,head top,r wrist,r elbow,r shoulder,"
        "l shoulder,l elbow,l wrist")  # fmt: skip
MPI_3DHP = (
    "spine3 spine4 spine2 spine pelvis neck head head_top left_clavicle left_shoulder left_elbow left_wrist left_hand "
    "right_clavicle right_shoulder right_elbow right_wrist right_hand left_hip left_knee left_ankle left_foot left_toe "
    "right_hip right_knee right_ankle right_foot right_toe"
)
SMPL = ("pelvis left_hip right_hip spine1 left_knee right_knee spine2 left_ankle right_ankle spine3 left_foot "
        "right_foot neck left_collar right_collar head left_shoulder right_shoulder left_elbow right_elbow left_wrist "
        "right_wrist left_hand right_hand")  # fmt: skip
# PoseNet and its successors: mks0601's SMPL lists have other words for the spine, Human3.6M's a thorax of its own.
SMPL_MOON = (
    "Pelvis L_Hip R_Hip Torso L_Knee R_Knee Spine L_Ankle R_Ankle Chest L_Toe R_Toe Neck L_Thorax R_Thorax Head "
    "L_Shoulder R_Shoulder L_Elbow R_Elbow L_Wrist R_Wrist L_Hand R_Hand"
)
H36M_MOON = ("Pelvis R_Hip R_Knee R_Ankle L_Hip L_Knee L_Ankle Torso Neck Nose Head L_Shoulder L_Elbow L_Wrist "
             "R_Shoulder R_Elbow R_Wrist")  # fmt: skip
H36M_MMPOSE = (
    "root right_hip right_knee right_foot left_hip left_knee left_foot spine thorax neck_base head left_shoulder "
    "left_elbow left_wrist right_shoulder right_elbow right_wrist"
)
MPI_3DHP_MMPOSE = (
    "head_top neck right_shoulder right_elbow right_wrist left_shoulder left_elbow left_wrist right_hip right_knee "
    "right_ankle left_hip left_knee left_ankle root spine head"
)
BLAZEPOSE = (
    "NOSE LEFT_EYE_INNER LEFT_EYE LEFT_EYE_OUTER RIGHT_EYE_INNER RIGHT_EYE RIGHT_EYE_OUTER LEFT_EAR RIGHT_EAR "
    "MOUTH_LEFT MOUTH_RIGHT LEFT_SHOULDER RIGHT_SHOULDER LEFT_ELBOW RIGHT_ELBOW LEFT_WRIST RIGHT_WRIST LEFT_PINKY "
    "RIGHT_PINKY LEFT_INDEX RIGHT_INDEX LEFT_THUMB RIGHT_THUMB LEFT_HIP RIGHT_HIP LEFT_KNEE RIGHT_KNEE LEFT_ANKLE "
    "RIGHT_ANKLE LEFT_HEEL RIGHT_HEEL LEFT_FOOT_INDEX RIGHT_FOOT_INDEX"
)
OFFICIAL = [
    (H36M17, H36M.split()), (H36M17, H36M_MOON.split()), (H36M17, H36M_MMPOSE.split()), (MPII16, MPII.split(",")),
    (MPI_INF_3DHP28, MPI_3DHP.split()), (MPI_INF_3DHP17, MPI_3DHP_MMPOSE.split()), (SMPL24, SMPL.split()),
    (SMPL24, SMPL_MOON.split()), (BLAZEPOSE33, BLAZEPOSE.split()),
]  # fmt: skip


@pytest.mark.parametrize(("of", "names"), OFFICIAL, ids=lambda x: x.name if isinstance(x, Skeleton) else "")
def test_official_names_and_order(of: Skeleton, names: list[str]) -> None:
    """The lists of the data sets' own code, word by word: names that mean another place than they say included."""
    assert by_joints(names) is of
    assert by_joints(names[:-1] + ["tail"]).name == "custom"


def test_subsets_of_human36m_and_mpi_inf_3dhp() -> None:
    """By index: the usual 17 of 32 joints, and 3DHP's 'relevant' set (1-based in mpii_get_joint_set.m)."""
    used = [0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 15, 17, 18, 19, 25, 26, 27]
    assert tuple(H36M32.joints[i] for i in used) == H36M17.joints
    relevant = [8, 6, 15, 16, 17, 10, 11, 12, 24, 25, 26, 19, 20, 21, 5, 4, 7]
    assert tuple(MPI_INF_3DHP28.joints[i - 1] for i in relevant) == MPI_INF_3DHP17.joints


# Index of each joint's parent, -1 the root: H36M32 as in forward_kinematics.py, 3DHP as `joint_parents_o1` minus 1,
# SMPL as in the model's kintree_table, MPII as in HRNet's mpii.py.
PARENTS = [
    (H36M32, [-1, 0, 1, 2, 3, 4, 0, 6, 7, 8, 9, 0, 11, 12, 13, 14, 12, 16, 17, 18, 19, 20, 19, 22, 12, 24, 25, 26, 27,
              28, 27, 30]),
    (MPI_INF_3DHP28, [2, 0, 3, 4, -1, 1, 5, 6, 5, 8, 9, 10, 11, 5, 13, 14, 15, 16, 4, 18, 19, 20, 21, 4, 23, 24,
                      25, 26]),
    (SMPL24, [-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21]),
    (H36M17, [-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 9, 8, 11, 12, 8, 14, 15]),
    (MPII16, [1, 2, 6, 6, 3, 4, -1, 6, 7, 8, 11, 12, 7, 7, 13, 14]),
]  # fmt: skip


@pytest.mark.parametrize(("of", "parents"), PARENTS, ids=lambda x: x.name if isinstance(x, Skeleton) else "")
def test_bones_are_the_kinematic_tree(of: Skeleton, parents: list[int]) -> None:
    assert {frozenset(b) for b in of.bones.tolist()} == {frozenset((i, p)) for i, p in enumerate(parents) if p >= 0}


def random(of: Skeleton, people: int = 5, dims: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(people, len(of), dims)), np.full((people, len(of)), 2)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("of", SKELETONS.values(), ids=SKELETONS)
def test_round_trip(of: Skeleton, dims: int) -> None:
    """X -> LCR13 -> X gives back exactly what both name, what a rule makes of that, and nothing else."""
    pose, seen = random(of, dims=dims)
    rng = np.random.default_rng(1)
    seen = rng.integers(0, 3, seen.shape)
    there, there_seen = convert(pose, seen, of, LCR13)
    back, back_seen = convert(there, there_seen, LCR13, of)
    for j, name in enumerate(of.joints):
        if name in LCR13.joints:
            assert (back_seen[:, j] == seen[:, j]).all(), name
            assert (back[:, j] == pose[:, j] * (seen[:, j] > 0)[:, None]).all(), name
            continue
        from_ = {"pelvis": "?_hip", "spine_root": "?_hip", "thorax": "?_shoulder"}.get(name)
        if from_ is None and name in ("r_thumb_root", "l_thumb_root"):
            from_ = name[0] + "_wrist"
        if from_ is None:
            assert (back_seen[:, j] == 0).all() and (back[:, j] == 0).all(), f"{name} is invented"
            continue
        two = of.indices(from_.replace("?", "l"), from_.replace("?", "r"))
        assert (back_seen[:, j] == seen[:, two].min(1)).all(), name
        known = back_seen[:, j] > 0
        np.testing.assert_allclose(back[known, j], pose[known][:, two].mean(1), atol=1e-12)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("of", SKELETONS.values(), ids=SKELETONS)
def test_mirror_and_convert_commute(of: Skeleton, dims: int) -> None:
    flip = np.array([-1, 1, 1])[:dims]
    for source, target in ((of, LCR13), (LCR13, of), (of, H36M32), (H36M32, of)):
        pose, seen = random(source, dims=dims)
        seen = np.random.default_rng(2).integers(0, 3, seen.shape)
        one, one_seen = convert(pose[:, source.mirror] * flip, seen[:, source.mirror], source, target)
        two, two_seen = convert(pose, seen, source, target)
        np.testing.assert_array_equal(one, two[:, target.mirror] * flip)
        np.testing.assert_array_equal(one_seen, two_seen[:, target.mirror])


# Where each joint of LCR13 comes from beside the twelve limb joints, which every skeleton has.
HEAD_RULE = {
    "lcr13": "head", "h36m17": "head", "h36m32": "head", "mpi_inf_3dhp28": "head", "mpi_inf_3dhp17": "head",
    "mpii16": "middle of neck and head_top", "lsp14": "middle of neck and head_top", "smpl24": "unseen",
    "coco17": "middle of nose and (middle of l_ear and r_ear), else middle of l_ear and r_ear, "
              "else middle of l_eye and r_eye, else nose",
}  # fmt: skip
HEAD_RULE["blazepose33"] = HEAD_RULE["coco17"]


@pytest.mark.parametrize("of", SKELETONS.values(), ids=SKELETONS)
def test_rules_say_what_convert_does(of: Skeleton) -> None:
    assert rules(of, LCR13) == [(j, j) for j in LCR13.joints[:-1]] + [("head", HEAD_RULE[of.name])]
    for target in SKELETONS.values():
        told = rules(of, target)
        assert [joint for joint, _ in told] == list(target.joints)
        seen = convert(*random(of, 1), of, target)[1][0]
        assert [how == "unseen" for _, how in told] == (seen == 0).tolist()


def test_rules_of_middles() -> None:
    assert dict(rules(LCR13, MPII16))["pelvis"] == "middle of l_hip and r_hip"
    assert dict(rules(LCR13, MPII16))["thorax"] == "middle of l_shoulder and r_shoulder"
    assert dict(rules(H36M17, H36M32))["spine_root"] == "pelvis, else middle of l_hip and r_hip"
    assert {
        dict(rules(LCR13, of))[j] for of in (H36M17, LSP14, MPII16, MPI_INF_3DHP28) for j in ("neck", "head_top")
    } == {"unseen"}, "no shoulders and no middle of the head tell where the neck or the top of the head are"
    assert dict(rules(SMPL24, H36M17))["pelvis"] == "middle of l_hip and r_hip", "not SMPL's own, 9 cm higher"
    assert dict(rules(SMPL24, H36M17))["neck"] == dict(rules(H36M17, SMPL24))["neck_base"] == "unseen"
    assert dict(rules(MPII16, H36M17))["neck"] == "neck"


def test_pelvis_of_smpl_is_not_taken_for_the_middle_of_the_hips() -> None:
    pose, seen = random(SMPL24, dims=3)
    got, _ = convert(pose, seen, by_joints(SMPL.split()), MPII16)
    hips = pose[:, SMPL24.indices("r_hip", "l_hip")].mean(1)
    np.testing.assert_allclose(got[:, MPII16.index("pelvis")], hips, atol=1e-12)


def test_words_that_mean_another_place() -> None:
    """Lists of another length or order are still known by their other words; what was put right stays."""
    moon = by_joints([*H36M_MOON.split(), "Thorax"])
    assert moon.joints == (*H36M17.joints, "thorax"), "its authors' own thorax, the middle of the shoulders"
    body22 = by_joints(SMPL.split()[:22])
    assert body22.joints == SMPL24.joints[:22]
    extra = by_joints([*SMPL_MOON.split(), "Nose", "L_Eye", "R_Eye", "L_Ear", "R_Ear"])
    assert extra.joints == (*SMPL24.joints, "nose", "l_eye", "r_eye", "l_ear", "r_ear")
    assert rules(extra, LCR13)[-1] == ("head", HEAD_RULE["coco17"])
    few = by_joints(["Head", "Neck/Nose", "RFoot", "RKnee"])
    assert few.joints == ("head_top", "head", "r_ankle", "r_knee")
    open_pose = by_joints("Nose Neck RShoulder RElbow RWrist LShoulder LElbow LWrist MidHip RHip RBigToe".split())
    assert open_pose.joints[:3] == ("nose", "thorax", "r_shoulder")
    assert open_pose.joints[8:] == ("pelvis", "r_hip", "r_big_toe")
    for s in (moon, body22, extra, few, open_pose):
        assert by_joints(s.joints).joints == s.joints, "our own names are read as they are"


@pytest.mark.parametrize("folder", ["h36m", "mpi-inf-3dhp"])
def test_real_frames(shared: Path, folder: str) -> None:
    """Their 13 joints, as LCR13 has them, in the data set's own order and back."""
    of = H36M17 if folder == "h36m" else MPI_INF_3DHP17
    annotations = json.loads((shared / folder / "annotations" / "lcrnet_pose.json").read_text())["annotations"]
    flat = np.array([a["pose"] for a in annotations])
    for pose in (flat[:, :26].reshape(-1, 2, 13), flat[:, 26:].reshape(-1, 3, 13)):
        pose = pose.transpose(0, 2, 1)
        seen = np.full(pose.shape[:2], 2)
        there, there_seen = convert(pose, seen, LCR13, of)
        back, back_seen = convert(there, there_seen, of, LCR13)
        assert (back == pose).all() and (back_seen == 2).all()
        assert {of.joints[j] for j in np.flatnonzero(there_seen[0] == 0)} == {"spine", "neck", "head_top"}
        hips = pose[:, LCR13.indices("r_hip", "l_hip")].mean(1)
        np.testing.assert_allclose(there[:, of.index("pelvis")], hips, atol=1e-9)


def test_head_of_people_in_lspet(shared: Path) -> None:
    """The rule is the one by which the heads of the shared data were made."""
    folder = shared / "lspet" / "annotations"
    human, ours = (json.loads((folder / f"{n}.json").read_text()) for n in ("person_keypoints", "lcrnet_pose"))
    assert by_joints(human["categories"][0]["keypoints"]) is LSP14
    labelled = {a["image_id"]: a["keypoints"] for a in human["annotations"]}
    mine = [a for a in ours["annotations"] if a["pose_2d_source"][-1] == "human_derived"]
    points = np.array([labelled[a["image_id"]] for a in mine], float).reshape(-1, 14, 3)
    got, seen = convert(points[..., :2], points[..., 2], LSP14, LCR13)
    assert len(mine) > 1000 and (seen[:, -1] > 0).all()
    goal = np.array([[a["pose"][12], a["pose"][25]] for a in mine])
    np.testing.assert_allclose(got[:, -1], goal, atol=0.011, err_msg="both files are rounded to 0.01 px")


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
    (" nose ", "nose"), ("left_ear", "l_ear"), ("head_top", "head_top"), ("Neck", "neck"), ("RHip", "r_hip"),
    ("rhip", "r_hip"), ("lshoulder", "l_shoulder"), ("r shoulder", "r_shoulder"), ("upper neck", "neck"),
    ("head top", "head_top"), ("L_Hip", "l_hip"), ("left_hip", "l_hip"), ("R.Hip", "r_hip"), ("kneeR", "r_knee"),
    ("left_foot_index", "l_foot_index"), ("leftFootIndex", "l_foot_index"), ("LEFT_EYE_INNER", "l_eye_inner"),
    ("left eye (inner)", "l_eye_inner"), ("mouth (right)", "r_mouth"), ("MOUTH_LEFT", "l_mouth"),
    ("LBigToe", "l_big_toe"), ("Neck/Nose", "neck_nose"), ("rib", "rib"), ("lowerback", "lowerback"), ("", ""),
    ("голова", "голова"),
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
