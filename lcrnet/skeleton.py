"""Joint names, their order, left/right mirror, bones and body parts; conversion by named joints.

The one place where an index of a joint is written down. Everything else asks a `Skeleton`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property

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
        return self.indices("r_ankle", "l_ankle", "r_knee", "l_knee")

    @cached_property
    def upper(self) -> np.ndarray:
        """Joints that are not `lower`, hips included."""
        return np.setdiff1d(np.arange(len(self)), self.lower)

    @cached_property
    def sigma(self) -> np.ndarray:
        """(J,) float64 `oks_sigma`."""
        return np.array(self.oks_sigma, dtype=np.float64)


_LIMBS = (
    ("r_ankle", "r_knee"), ("r_knee", "r_hip"), ("l_ankle", "l_knee"), ("l_knee", "l_hip"),
    ("r_wrist", "r_elbow"), ("r_elbow", "r_shoulder"), ("l_wrist", "l_elbow"), ("l_elbow", "l_shoulder"),
    ("r_hip", "l_hip"), ("r_shoulder", "l_shoulder"), ("r_hip", "r_shoulder"), ("l_hip", "l_shoulder"),
)  # fmt: skip

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

SKELETONS: dict[str, Skeleton] = {s.name: s for s in (LCR13, COCO17, LSP14)}

# Rules for a joint that a source has under no name of its own: candidates in order, each a list of groups whose means
# are averaged; the first candidate whose joints are all labelled is taken. "head" is the middle of the head
# (shared/data/README.md: middle of nose and mid-ears; between neck and head top).
DERIVED: dict[str, tuple[tuple[tuple[str, ...], ...], ...]] = {
    "head": (
        (("nose",), ("l_ear", "r_ear")),
        (("neck",), ("head_top",)),
        (("l_ear", "r_ear"),),
        (("l_eye", "r_eye"),),
        (("nose",),),
    ),
}

# Other people's spelling of a joint, as it stands in the `keypoints` list of a COCO category.
_SIDES = {"left_": "l_", "right_": "r_", "left": "l_", "right": "r_"}


def joint_name(spelling: str) -> str:
    """Our spelling (`r_knee`) of a joint as COCO files spell it (`right_knee`, `RKnee`, `knee_r`, ...)."""
    name = re.sub(r"^([RL])(?=[A-Z][a-z])", r"\1_", spelling.strip())  # RKnee, as OpenPose spells it
    name = name.lower().replace(" ", "_").replace("-", "_")
    for long, short in _SIDES.items():
        if name.startswith(long):
            return short + name[len(long) :].lstrip("_")
    if name.endswith(("_r", "_l")):
        return f"{name[-1]}_{name[:-2]}"
    return name


def by_joints(names: list[str] | tuple[str, ...]) -> Skeleton:
    """The skeleton with exactly these joints in this order (any spelling); an unnamed one if we know none."""
    joints = tuple(joint_name(n) for n in names)
    return next((s for s in SKELETONS.values() if s.joints == joints), Skeleton("custom", joints))


def convert(pose: np.ndarray, seen: np.ndarray, source: Skeleton, target: Skeleton) -> tuple[np.ndarray, np.ndarray]:
    """Poses of one skeleton in the joints of another, by name and by the rules of `DERIVED`.

    pose (..., J, D) and seen (..., J) of `source` -> the same of `target`. What the source lacks, or has unlabelled,
    is unseen (0) with coordinates 0: never invented. A derived joint is as visible as the least visible it comes from.
    """
    lead = pose.shape[:-2]
    out = np.zeros((*lead, len(target), pose.shape[-1]), dtype=pose.dtype)
    out_seen = np.zeros((*lead, len(target)), dtype=seen.dtype)
    for j, name in enumerate(target.joints):
        if name in source.joints:
            i = source.index(name)
            out[..., j, :], out_seen[..., j] = pose[..., i, :], seen[..., i]
            continue
        for groups in DERIVED.get(name, ()):
            if not all(n in source.joints for group in groups for n in group):
                continue
            points = [pose[..., source.indices(*group), :].mean(-2) for group in groups]
            least = seen[..., source.indices(*(n for group in groups for n in group))].min(-1)
            take = (out_seen[..., j] == 0) & (least > 0)
            out[..., j, :] = np.where(take[..., None], np.mean(points, axis=0), out[..., j, :])
            out_seen[..., j] = np.where(take, least, out_seen[..., j])
    out[out_seen == 0] = 0
    return out, out_seen
