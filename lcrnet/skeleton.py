"""Joint names, their order, left/right mirror, bones and body parts; conversion by named joints.

The one place where an index of a joint is written down. Everything else asks a `Skeleton`.

A name stands for a place of the body, so that conversion by name is right: what other people call by one word though
it is two places has two names here (`SPELLINGS` has their words).

    head            the middle of the head: Human3.6M's "Neck/Nose" or "Nose", MPI-INF-3DHP's "head"
    head_top        the top of the skull: Human3.6M's "Head"
    skull_base      SMPL's "head": where the head turns on the neck
    neck            LSP's neck, MPII's "upper neck", MPI-INF-3DHP's neck and Human3.6M's "Neck", which others call its
                    "Thorax" (mmhuman3d: neck_extra for all four). Above the middle of the shoulders by 4 to 8 cm in
                    Human3.6M and 3 to 7 cm in MPI-INF-3DHP (4 frames each): they do not give it
    neck_base       SMPL's "neck", which mmhuman3d tells from the one before
    thorax          the middle of the shoulders: MPII's "thorax", OpenPose's "Neck"
    pelvis          the middle of the hips: Human3.6M, MPI-INF-3DHP, MPII, OpenPose's "MidHip"
    spine_base      SMPL's "pelvis": 9 cm above the middle of the hips (neutral model at rest)
    toe_base        the ball of the foot: "foot" of SMPL and MPI-INF-3DHP. Human3.6M's "foot" is the `ankle`

Limb joints have one name everywhere although data sets differ: hips are 0.14 m apart in SMPL, 0.15 in LCR-Net's own
anchor poses, 0.24 to 0.29 in Human3.6M and MPI-INF-3DHP.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class Skeleton:
    """Named joints in a fixed order. J joints, E bones.

    joints      J names, `r_` / `l_` being the person's own right and left
    bones       E pairs of joint names
    oks_sigma   J standard deviations of human labelling, in units of sqrt(area) (COCO's keypoint evaluation)
    """

    name: str
    joints: tuple[str, ...]
    bone_names: tuple[tuple[str, str], ...] = ()
    oks_sigma: tuple[float, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.joints)

    def index(self, joint: str) -> int:
        """Position of a joint; ValueError names the joints there are."""
        if joint not in self.joints:
            raise ValueError(f"{self.name} has no joint {joint!r}; it has {', '.join(self.joints)}")
        return self.joints.index(joint)

    def indices(self, *joints: str) -> np.ndarray:
        """(n,) int64 positions of the named joints."""
        return np.array([self.index(joint) for joint in joints], dtype=np.int64)

    @cached_property
    def mirror(self) -> np.ndarray:
        """(J,) int64: the joint that takes each joint's place in a mirrored image."""
        swap = {"r_": "l_", "l_": "r_"}
        return np.array([self.index(swap.get(j[:2], j[:2]) + j[2:]) for j in self.joints], dtype=np.int64)

    @cached_property
    def bones(self) -> np.ndarray:
        """(E, 2) int64 pairs of joints."""
        return np.array([(self.index(a), self.index(b)) for a, b in self.bone_names], dtype=np.int64).reshape(-1, 2)

    @cached_property
    def torso(self) -> np.ndarray:
        """(4,) hips and shoulders: their mean is the origin of a 3D pose."""
        return self.indices("r_hip", "l_hip", "r_shoulder", "l_shoulder")

    @cached_property
    def lower(self) -> np.ndarray:
        """Joints below the hips."""
        joints = [f"{side}_{part}" for part in _BELOW_HIPS for side in "rl"]
        return self.indices(*(joint for joint in joints if joint in self.joints))

    @cached_property
    def upper(self) -> np.ndarray:
        """Joints that are not `lower`, hips included."""
        return np.setdiff1d(np.arange(len(self)), self.lower)

    @cached_property
    def sigma(self) -> np.ndarray:
        """(J,) float64 `oks_sigma`."""
        return np.array(self.oks_sigma, dtype=np.float64)


_BELOW_HIPS = ("ankle", "knee", "heel", "toe_base", "toe_tip", "foot_index")

_LIMBS = (
    ("r_ankle", "r_knee"), ("r_knee", "r_hip"), ("l_ankle", "l_knee"), ("l_knee", "l_hip"),
    ("r_wrist", "r_elbow"), ("r_elbow", "r_shoulder"), ("l_wrist", "l_elbow"), ("l_elbow", "l_shoulder"),
    ("r_hip", "l_hip"), ("r_shoulder", "l_shoulder"), ("r_hip", "r_shoulder"), ("l_hip", "l_shoulder"),
)  # fmt: skip


def _chains(*chains: str) -> tuple[tuple[str, str], ...]:
    """Bones between neighbours in rows of joints; `?_knee` stands for r_knee in one row and l_knee in another."""
    rows = [row.replace("?", side).split() for row in chains for side in ("rl" if "?" in row else "-")]
    return tuple(bone for row in rows for bone in pairwise(row))


# Sigmas are COCO's (pycocotools Params.kpt_oks_sigmas). COCO has no middle of the head: like the wrist it is placed
# by eye, without a landmark, so it gets the wrist's.
LCR13 = Skeleton(
    "lcr13",
    ("r_ankle", "l_ankle", "r_knee", "l_knee", "r_hip", "l_hip", "r_wrist", "l_wrist",
     "r_elbow", "l_elbow", "r_shoulder", "l_shoulder", "head"),
    (*_LIMBS, ("r_shoulder", "head"), ("l_shoulder", "head")),
    (0.089, 0.089, 0.087, 0.087, 0.107, 0.107, 0.062, 0.062, 0.072, 0.072, 0.079, 0.079, 0.062),
)  # fmt: skip

COCO17 = Skeleton(
    "coco17",
    ("nose", "l_eye", "r_eye", "l_ear", "r_ear", "l_shoulder", "r_shoulder", "l_elbow", "r_elbow", "l_wrist",
     "r_wrist", "l_hip", "r_hip", "l_knee", "r_knee", "l_ankle", "r_ankle"),
    (*_LIMBS, ("nose", "l_eye"), ("nose", "r_eye"), ("l_eye", "l_ear"), ("r_eye", "r_ear"),
     ("l_ear", "l_shoulder"), ("r_ear", "r_shoulder")),
    (0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087,
     0.089, 0.089),
)  # fmt: skip

LSP14 = Skeleton(
    "lsp14",
    ("r_ankle", "r_knee", "r_hip", "l_hip", "l_knee", "l_ankle", "r_wrist", "r_elbow", "r_shoulder", "l_shoulder",
     "l_elbow", "l_wrist", "neck", "head_top"),
    (*_LIMBS, ("neck", "head_top")),
)  # fmt: skip

# Human3.6M: the widely used 17 of its 32 joints (indices 0 1 2 3 6 7 8 12 13 14 15 17 18 19 25 26 27), as in
# 3d-pose-baseline's src/data_utils.py (H36M_NAMES), mmpose's configs/_base_/datasets/h36m.py and PoseNet's Human36M.py.
H36M17 = Skeleton(
    "h36m17",
    ("pelvis", "r_hip", "r_knee", "r_ankle", "l_hip", "l_knee", "l_ankle", "spine", "neck", "head", "head_top",
     "l_shoulder", "l_elbow", "l_wrist", "r_shoulder", "r_elbow", "r_wrist"),
    _chains("pelvis ?_hip ?_knee ?_ankle", "pelvis spine neck head head_top", "neck ?_shoulder ?_elbow ?_wrist"),
)  # fmt: skip

# All 32 of Human3.6M's D3_Positions. Names and offsets from the parent: metadata.xml, as in TUM-AAS/motron-cvpr22's
# h36m_skeleton.yaml and una-dinosauria/human-motion-prediction's forward_kinematics.py: Hips, RightUpLeg, RightLeg,
# RightFoot, RightToeBase, Site, LeftUpLeg, ..., Spine, Spine1, Neck, Head, Site, LeftShoulder, LeftArm, LeftForeArm,
# LeftHand, LeftHandThumb, Site, L_Wrist_End, Site, RightShoulder, ... Some places have two joints: see `DERIVED`.
H36M32 = Skeleton(
    "h36m32",
    ("pelvis", "r_hip", "r_knee", "r_ankle", "r_toe_base", "r_toe_tip",
     "l_hip", "l_knee", "l_ankle", "l_toe_base", "l_toe_tip",
     "spine_root", "spine", "neck", "head", "head_top",
     "l_shoulder_root", "l_shoulder", "l_elbow", "l_wrist", "l_thumb_root", "l_thumb_tip", "l_hand_tip", "l_hand_end",
     "r_shoulder_root", "r_shoulder", "r_elbow", "r_wrist", "r_thumb_root", "r_thumb_tip", "r_hand_tip", "r_hand_end"),
    _chains("pelvis ?_hip ?_knee ?_ankle ?_toe_base ?_toe_tip", "pelvis spine_root spine neck head head_top",
            "spine ?_shoulder_root ?_shoulder ?_elbow ?_wrist ?_thumb_root ?_thumb_tip",
            "?_wrist ?_hand_tip ?_hand_end"),
)  # fmt: skip

# MPII Human Pose: the ids of its annopoints (README of the release, human-pose.mpi-inf.mpg.de: "0 - r ankle, ...").
MPII16 = Skeleton(
    "mpii16",
    ("r_ankle", "r_knee", "r_hip", "l_hip", "l_knee", "l_ankle", "pelvis", "thorax", "neck", "head_top",
     "r_wrist", "r_elbow", "r_shoulder", "l_shoulder", "l_elbow", "l_wrist"),
    _chains("pelvis ?_hip ?_knee ?_ankle", "pelvis thorax neck head_top", "thorax ?_shoulder ?_elbow ?_wrist"),
)  # fmt: skip

# MPI-INF-3DHP: `all_joint_names` and `joint_parents_o1` of its mpii_get_joint_set.m. spine*_3dhp, clavicle and
# *_3dhp hands have no counterpart elsewhere that could be verified (mmhuman3d keeps most of them apart too).
MPI_INF_3DHP28 = Skeleton(
    "mpi_inf_3dhp28",
    ("spine3_3dhp", "spine4_3dhp", "spine2_3dhp", "spine", "pelvis", "neck", "head", "head_top",
     "l_clavicle", "l_shoulder", "l_elbow", "l_wrist", "l_hand_3dhp",
     "r_clavicle", "r_shoulder", "r_elbow", "r_wrist", "r_hand_3dhp",
     "l_hip", "l_knee", "l_ankle", "l_toe_base", "l_toe_tip", "r_hip", "r_knee", "r_ankle", "r_toe_base", "r_toe_tip"),
    _chains("pelvis ?_hip ?_knee ?_ankle ?_toe_base ?_toe_tip",
            "pelvis spine spine2_3dhp spine3_3dhp spine4_3dhp neck head head_top",
            "neck ?_clavicle ?_shoulder ?_elbow ?_wrist ?_hand_3dhp"),
)  # fmt: skip

# The 17 of them that its test set and MuPoTS-3D have: the set 'relevant' of the same file (1-based 8 6 15 16 17 10 11
# 12 24 25 26 19 20 21 5 4 7), also mmpose's configs/_base_/datasets/mpi_inf_3dhp.py.
MPI_INF_3DHP17 = Skeleton(
    "mpi_inf_3dhp17",
    ("head_top", "neck", "r_shoulder", "r_elbow", "r_wrist", "l_shoulder", "l_elbow", "l_wrist",
     "r_hip", "r_knee", "r_ankle", "l_hip", "l_knee", "l_ankle", "pelvis", "spine", "head"),
    _chains("pelvis ?_hip ?_knee ?_ankle", "pelvis spine neck head head_top", "neck ?_shoulder ?_elbow ?_wrist"),
)  # fmt: skip

# SMPL (Loper et al. 2015): SMPL_JOINT_NAMES of vchoutas/smplx's joint_names.py and the kinematic tree of the model.
SMPL24 = Skeleton(
    "smpl24",
    ("spine_base", "l_hip", "r_hip", "spine1", "l_knee", "r_knee", "spine2", "l_ankle", "r_ankle", "spine3",
     "l_toe_base", "r_toe_base", "neck_base", "l_collar", "r_collar", "skull_base", "l_shoulder", "r_shoulder",
     "l_elbow", "r_elbow", "l_wrist", "r_wrist", "l_hand", "r_hand"),
    _chains("spine_base ?_hip ?_knee ?_ankle ?_toe_base", "spine_base spine1 spine2 spine3 neck_base skull_base",
            "spine3 ?_collar ?_shoulder ?_elbow ?_wrist ?_hand"),
)  # fmt: skip

# BlazePose GHUM: MediaPipe's PoseLandmark and POSE_CONNECTIONS (ai.google.dev/edge/mediapipe, Pose Landmarker).
BLAZEPOSE33 = Skeleton(
    "blazepose33",
    ("nose", "l_eye_inner", "l_eye", "l_eye_outer", "r_eye_inner", "r_eye", "r_eye_outer", "l_ear", "r_ear",
     "l_mouth", "r_mouth", "l_shoulder", "r_shoulder", "l_elbow", "r_elbow", "l_wrist", "r_wrist",
     "l_pinky", "r_pinky", "l_index", "r_index", "l_thumb", "r_thumb", "l_hip", "r_hip", "l_knee", "r_knee",
     "l_ankle", "r_ankle", "l_heel", "r_heel", "l_foot_index", "r_foot_index"),
    (*_LIMBS, ("l_mouth", "r_mouth"),
     *_chains("nose ?_eye_inner ?_eye ?_eye_outer ?_ear", "?_wrist ?_pinky ?_index ?_wrist ?_thumb",
              "?_ankle ?_heel ?_foot_index ?_ankle")),
)  # fmt: skip

SKELETONS: dict[str, Skeleton] = {
    s.name: s
    for s in (LCR13, COCO17, LSP14, H36M17, H36M32, MPII16, MPI_INF_3DHP28, MPI_INF_3DHP17, SMPL24, BLAZEPOSE33)
}

# Rules for a joint that a source has under no name of its own: candidates in order, each a list of groups whose means
# are averaged; the first candidate whose joints are all labelled is taken. No rule for any other joint: it is unseen.
#
# head    Its middle, as labelled here (shared/data/README.md): the middle of nose and mid-ears; between neck and head
#         top. None from SMPL's joints: the base of the skull is not it.
# pelvis  The middle of the hips by definition: 0.0 mm off in 4 frames each of Human3.6M and MPI-INF-3DHP, at most half
#         a pixel of rounding in 5 people of MPII (samples in mmpose's tests/data).
# thorax  The middle of the shoulders by definition: at most half a pixel in the same 5 people of MPII.
# *_root  Second joints of H36M32 in the place of another: their offset from it in the skeleton file is 0 (spine_root:
#         0.1 mm; a shoulder_root has the neck's parent and the neck's offset).
DERIVED: dict[str, tuple[tuple[tuple[str, ...], ...], ...]] = {
    "head": (
        (("nose",), ("l_ear", "r_ear")),
        (("neck",), ("head_top",)),
        (("l_ear", "r_ear"),),
        (("l_eye", "r_eye"),),
        (("nose",),),
    ),
    "pelvis": ((("l_hip", "r_hip"),),),
    "thorax": ((("l_shoulder", "r_shoulder"),),),
    "spine_root": ((("pelvis",),), (("l_hip", "r_hip"),)),
    "l_shoulder_root": ((("neck",),),),
    "r_shoulder_root": ((("neck",),),),
    "l_thumb_root": ((("l_wrist",),),),
    "r_thumb_root": ((("r_wrist",),),),
}

# What others mean by a word, where it is not what `joint_name` makes of it. `?` stands for r and l.
_OF_H36M = {
    "hip": "pelvis", "hips": "pelvis", "root": "pelvis", "torso": "spine", "?_foot": "?_ankle", "thorax": "neck",
    "neck_nose": "head", "neck_base": "head", "nose": "head", "jaw": "head", "head": "head_top",
}  # fmt: skip
_OF_3DHP = {
    "spine2": "spine2_3dhp", "spine3": "spine3_3dhp", "spine4": "spine4_3dhp", "?_hand": "?_hand_3dhp",
    "?_foot": "?_toe_base", "?_toe": "?_toe_tip", "root": "pelvis", "thorax": "neck",
}  # fmt: skip
SPELLINGS: dict[str, dict[str, str]] = {
    "h36m17": _OF_H36M,
    "mpi_inf_3dhp28": _OF_3DHP,
    "mpi_inf_3dhp17": _OF_3DHP,
    "smpl24": {
        "pelvis": "spine_base", "torso": "spine1", "spine": "spine2", "chest": "spine3", "spine_1": "spine1",
        "spine_2": "spine2", "spine_3": "spine3", "?_foot": "?_toe_base", "?_toe": "?_toe_base", "neck": "neck_base",
        "?_thorax": "?_collar", "head": "skull_base",
    },
    "openpose": {"neck": "thorax", "mid_hip": "pelvis"},
}  # fmt: skip
# Words by which a list of joints in another order, or of another length, is known to be spelled so.
_TELLING: tuple[tuple[str, set[str]], ...] = (
    ("smpl24", {"r_collar"}), ("smpl24", {"r_thorax"}),  # first: with a nose added it has Human3.6M's words too
    ("h36m17", {"neck_nose"}), ("h36m17", {"torso", "neck", "nose", "head"}),
    ("mpi_inf_3dhp28", {"spine4"}), ("mpi_inf_3dhp28", {"r_clavicle"}), ("openpose", {"mid_hip"}),
)  # fmt: skip

# Other people's spelling of a joint, as it stands in the `keypoints` list of a COCO category.
_SIDES = {"left": "l_", "right": "r_"}
_SAME = {"upper_neck": "neck", "headtop": "head_top", "top_of_head": "head_top"}
_PARTS = {joint[2:] for s in SKELETONS.values() for joint in s.joints if joint[:2] in ("r_", "l_")} | {"foot", "toe"}


def joint_name(spelling: str) -> str:
    """Our spelling (`r_knee`) of a joint as COCO files spell it (`right_knee`, `RKnee`, `rknee`, `knee_r`, ...).

    A word alone does not tell whose it is: "head" is taken for the middle of the head. `by_joints` knows more.
    """
    name = re.sub(r"^([RL])(?=[A-Z][a-z])", r"\1_", spelling.strip())  # RKnee, as OpenPose spells it
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)  # leftEyeInner, as MediaPipe's JavaScript does
    name = re.sub(r"[\W_]+", "_", name).strip("_").lower()
    for long, short in _SIDES.items():
        if name.startswith(long):
            return short + name[len(long) :].lstrip("_")
        if name.endswith(f"_{long}"):
            return short + name[: -len(long) - 1]
    if name.endswith(("_r", "_l")):
        return f"{name[-1]}_{name[:-2]}"
    if name[:1] in ("r", "l") and name[1:] in _PARTS:
        return f"{name[0]}_{name[1:]}"
    return _SAME.get(name, name)


def _reworded(names: tuple[str, ...], words: dict[str, str]) -> tuple[str, ...]:
    """Names with others' words (an entry of `SPELLINGS`) put right, unless the list has that joint under its own name:
    a list with a "neck" and a "thorax" tells the two apart."""

    def put(name: str) -> str:
        sided = name[:2] in ("r_", "l_")
        word = words.get("?" + name[1:] if sided else name, name)
        return word.replace("?", name[:1])

    new = [put(name) for name in names]
    kept = {name for name, other in zip(names, new, strict=True) if name == other}
    return tuple(name if other in kept else other for name, other in zip(names, new, strict=True))


def by_joints(names: list[str] | tuple[str, ...]) -> Skeleton:
    """The skeleton with exactly these joints in this order (any spelling); an unnamed one if we know none.

    Data sets that mean another place by the same word are told apart by their other words (`SPELLINGS`).
    """
    joints = tuple(joint_name(n) for n in names)
    for s in SKELETONS.values():
        if s.joints == joints or s.joints == _reworded(joints, SPELLINGS.get(s.name, {})):
            return s
    for name, words in _TELLING:
        if words <= set(joints):
            return Skeleton("custom", _reworded(joints, SPELLINGS[name]))
    return Skeleton("custom", joints)


_Rule = tuple[tuple[str, ...], ...]


def _candidates(joint: str, source: Skeleton) -> list[_Rule]:
    """The rules that give a joint from joints of `source`, best first: itself, or those of `DERIVED`."""
    if joint in source.joints:
        return [((joint,),)]
    has = set(source.joints)
    return [groups for groups in DERIVED.get(joint, ()) if all(has.issuperset(group) for group in groups)]


def rules(source: Skeleton, target: Skeleton) -> list[tuple[str, str]]:
    """How `convert` gets each joint of `target`: (joint, rule) in the target's order.

    The rule of a joint is its name, "middle of ...", several of them where the first needs labels that a person may
    lack, or "unseen".
    """

    def told(groups: _Rule) -> str:
        if len(groups) == 1 or all(len(group) == 1 for group in groups):
            names = [name for group in groups for name in group]
            return names[0] if len(names) == 1 else f"middle of {' and '.join(names)}"
        return f"middle of {' and '.join(g[0] if len(g) == 1 else f'({told((g,))})' for g in groups)}"

    return [(j, ", else ".join(told(groups) for groups in _candidates(j, source)) or "unseen") for j in target.joints]


def convert(pose: np.ndarray, seen: np.ndarray, source: Skeleton, target: Skeleton) -> tuple[np.ndarray, np.ndarray]:
    """Poses of one skeleton in the joints of another, by name and by the rules of `DERIVED` (`rules` prints them).

    pose (..., J, D) and seen (..., J) of `source` -> the same of `target`. What the source lacks, or has unlabelled,
    is unseen (0) with coordinates 0: never invented. A derived joint is as visible as the least visible it comes from.
    """
    lead = pose.shape[:-2]
    out = np.zeros((*lead, len(target), pose.shape[-1]), dtype=pose.dtype)
    out_seen = np.zeros((*lead, len(target)), dtype=seen.dtype)
    for j, name in enumerate(target.joints):
        for groups in _candidates(name, source):
            points = [pose[..., source.indices(*group), :].mean(-2) for group in groups]
            least = seen[..., source.indices(*(n for group in groups for n in group))].min(-1)
            take = (out_seen[..., j] == 0) & (least > 0)
            out[..., j, :] = np.where(take[..., None], np.mean(points, axis=0), out[..., j, :])
            out_seen[..., j] = np.where(take, least, out_seen[..., j])
    return out, out_seen
