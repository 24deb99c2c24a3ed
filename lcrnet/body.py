"""A human body: its measures, the limits of its joints, what people do with them, and where that puts every joint.

Forward kinematics from joint angles. Body frames have x to the person's left, y down and z to the back: turned by no
angle, a person faces the camera. The flesh is spheres, a few to a body part; synthetic.py paints their convex hulls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from lcrnet.skeleton import LCR13

STATURE = (1.5, 1.95)
"""Metres."""

# Segment lengths as parts of stature: Drillis & Contini 1966, as in Winter, "Biomechanics and Motor Control of Human
# Movement", fig. 4.1. The trunk is their 0.288 from hip to shoulder; breadths are between joint centres, which lie
# well inside the outer breadths (0.191, 0.259) given there. HEAD: see shared/data/README.md, 0.17-0.19 m.
THIGH, SHANK, FOOT_HEIGHT, FOOT_LENGTH = 0.245, 0.246, 0.039, 0.152
UPPER_ARM, FOREARM, HAND = 0.186, 0.146, 0.108
LUMBAR, THORAX = 0.105, 0.183
HIP_BREADTH, SHOULDER_BREADTH = 0.104, 0.212
NECK, NECK_TO_HEAD = 0.035, 0.070

# Degrees from upright with arms hanging: joint -> movement -> range. American Academy of Orthopaedic Surgeons, "Joint
# Motion", 1965, rounded. Elbows and knees only flex. Ankles: positive is toes down.
LIMITS: dict[str, tuple[float, float]] = {
    "spine_flex": (-25, 70), "spine_side": (-30, 30), "spine_twist": (-40, 40),
    "neck_flex": (-40, 45), "neck_side": (-35, 35), "neck_turn": (-70, 70),
    "hip_flex": (-25, 125), "hip_out": (-15, 45), "hip_turn": (-30, 40), "knee": (0, 145), "ankle": (-25, 50),
    "arm_flex": (-50, 178), "arm_out": (-10, 175), "arm_turn": (-60, 80), "elbow": (0, 145), "wrist": (-50, 50),
}  # fmt: skip

ACTIVITIES = {
    "stand": 0.32, "walk": 0.23, "run": 0.04, "sit": 0.17, "arms_up": 0.11, "bend": 0.06, "crouch": 0.015,
    "kneel": 0.01, "reach": 0.04, "lie": 0.005,
}  # fmt: skip
"""Share of each activity."""


@dataclass
class Body:
    """A body, metres; in its own place (the hips' middle at the origin) until `moved`.

    angles   degrees, by the names of LIMITS (those of limbs with `r_`, `l_`)
    joints   (J, 3) of LCR13
    frames   (3, 3) by segment: columns are its left, down (along a limb) and back
    parts    names of the B body parts; `seat` is what one sits on
    cloth    what each part is dressed in
    axes     (B, 3) the direction of each part
    first    (B,) the part's first sphere; its last is before the next part's first
    spheres  (S, 3) centres; radii (S,)
    """

    activity: str
    angles: dict[str, float]
    stature: float
    joints: np.ndarray
    frames: dict[str, np.ndarray]
    parts: list[str]
    cloth: list[str]
    axes: np.ndarray
    first: np.ndarray
    spheres: np.ndarray
    radii: np.ndarray

    def moved(self, rotation: np.ndarray, shift: np.ndarray) -> Body:
        """The body turned by (3, 3) and then shifted by (3,)."""
        return replace(
            self,
            joints=self.joints @ rotation.T + shift,
            frames={name: rotation @ frame for name, frame in self.frames.items()},
            axes=self.axes @ rotation.T,
            spheres=self.spheres @ rotation.T + shift,
        )


def turn(axis: int, degrees: float) -> np.ndarray:
    """Rotation about x, y or z."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    if axis == 0:
        return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    if axis == 1:
        return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def _arm(rng: np.random.Generator, style: str) -> tuple[float, float, float, float]:
    """Degrees of one arm: flex, out, turn (inward), elbow."""
    u = rng.uniform
    if style == "hips":
        return u(-25, 0), u(35, 55), u(15, 50), u(85, 115)
    if style == "folded":
        return u(15, 40), u(5, 20), u(55, 80), u(85, 110)
    if style == "hold":  # a telephone, a cup, a bag
        return u(10, 60), u(0, 25), u(0, 45), u(70, 140)
    if style == "point":
        return u(55, 120), u(-5, 60), u(-20, 30), u(0, 35)
    if style == "side":
        return u(-10, 20), u(60, 110), u(-40, 40), u(0, 70)
    if style == "up":
        return (
            (u(135, 176), u(0, 25), u(-20, 40), u(0, 60))
            if u() < 0.5
            else (u(-15, 15), u(115, 170), u(-30, 30), u(0, 80))
        )
    return u(-15, 20), u(4, 20), u(0, 50), u(3, 40)


def _sample_angles(rng: np.random.Generator, activity: str) -> tuple[dict[str, float], float]:
    """Joint angles of an activity, within LIMITS, and the forward pitch of the pelvis; degrees."""
    u, n = rng.uniform, rng.normal
    a: dict[str, float] = {
        "spine_flex": n(4, 5), "spine_side": n(0, 5), "spine_twist": n(0, 8),
        "neck_flex": n(2, 12), "neck_side": n(0, 6), "neck_turn": n(0, 22),
    }  # fmt: skip
    pitch, gait, left = n(2, 3), u(15, 35), u() < 0.5
    style = rng.choice(["hang", "hips", "folded", "hold", "point", "side"], p=[0.48, 0.12, 0.06, 0.17, 0.10, 0.07])
    other = style if u() < 0.45 or style == "folded" else rng.choice(["hang", "hold"])
    if activity == "arms_up":
        style, other = "up", "up" if u() < 0.65 else rng.choice(["hang", "side", "hips"])
    elif activity == "reach":
        style, other = "point", rng.choice(["hang", "point", "side"])
        a["spine_twist"], a["spine_side"], a["spine_flex"] = n(0, 18), n(0, 10), u(0, 30)
    elif activity == "bend":
        style = other = rng.choice(["hang", "point", "hold"])
        pitch, a["spine_flex"] = u(20, 60), u(15, 50)
    elif activity == "run":
        gait, pitch = u(35, 60), u(5, 18)
    elif activity == "sit":
        pitch, style = u(-15, 15), rng.choice(["hang", "hold", "folded", "point"], p=[0.25, 0.5, 0.15, 0.1])
        other = style
    elif activity == "crouch":
        pitch, style, a["spine_flex"] = u(15, 40), rng.choice(["hold", "point", "hang"]), u(10, 40)
    swing = gait * u(0.5, 0.9)
    for side in "rl":
        lead = (side == "l") == left
        hip, out, knee = float(n(4, 5)), u(0, 12), u(0, 14)
        if activity in ("walk", "run"):
            hip, out, knee = (gait, n(1, 2), u(5, 30)) if lead else (-0.45 * gait, n(1, 2), u(10, 35))
            if activity == "run":
                knee = u(40, 100) if lead else u(15, 80)
        elif activity == "sit":
            hip, out, knee = 85 + pitch + n(0, 9), u(0, 22), u(55, 105)
        elif activity == "crouch":
            hip, out, knee = u(95, 125), u(5, 30), u(105, 142)
        elif activity == "kneel":
            hip, out, knee = (u(70, 95), u(0, 20), u(75, 105)) if lead else (u(-5, 15), u(0, 10), u(85, 110))
        elif activity == "lie":
            hip, out, knee = u(0, 70), u(0, 12), u(0, 90)
        elif activity == "bend":
            hip, knee = pitch + n(4, 6), u(0, 35)
        elif style == "up" and u() < 0.25:
            hip, out = n(0, 8), u(10, 30)
        a |= {f"{side}_hip_flex": hip, f"{side}_hip_out": out, f"{side}_hip_turn": n(6, 7), f"{side}_knee": knee}
        # The foot lies flat where the ankle allows it.
        a[f"{side}_ankle"] = hip - pitch - knee + n(0, 4) if activity != "lie" else u(0, 40)
        arm = _arm(rng, style if lead else other)
        if activity in ("walk", "run") and style == "hang":
            arm = ((-swing if lead else swing) + n(0, 5), u(4, 14), u(0, 35), u(10, 40))
            if activity == "run":
                arm = (arm[0], arm[1], u(10, 45), u(60, 110))
        a |= {
            f"{side}_{name}": value
            for name, value in zip(("arm_flex", "arm_out", "arm_turn", "elbow"), arm, strict=True)
        }
        a[f"{side}_wrist"] = n(0, 15)
    for name, value in a.items():
        low, high = LIMITS[name.removeprefix("r_").removeprefix("l_")]
        a[name] = min(max(value, low), high)
    return a, pitch


def sample(rng: np.random.Generator, heading: float) -> Body:
    """A body of random build in a random activity; the torso faces within `heading` degrees of the camera."""
    activity = str(rng.choice(list(ACTIVITIES), p=np.array(list(ACTIVITIES.values())) / sum(ACTIVITIES.values())))
    a, pitch = _sample_angles(rng, activity)
    yaw = rng.uniform(-heading, heading)
    if activity == "lie":
        # On one side towards the camera, or (where any heading will do) on the back or the belly.
        flat = (
            turn(2, rng.choice([-90, 90])) if heading < 180 or rng.uniform() < 0.5 else turn(0, rng.choice([-90, 90]))
        )
        return build(rng, activity, a, turn(1, yaw) @ flat)
    return build(rng, activity, a, turn(1, yaw - a["spine_twist"]) @ turn(0, pitch))


def build(rng: np.random.Generator, activity: str, angles: dict[str, float], pelvis: np.ndarray) -> Body:
    """Forward kinematics: a body of random build with these joint angles, its pelvis turned by (3, 3)."""
    a, h = angles, float(np.clip(rng.normal(1.70, 0.09), *STATURE))
    chest = pelvis @ turn(0, a["spine_flex"]) @ turn(2, a["spine_side"]) @ turn(1, a["spine_twist"])
    skull = chest @ turn(0, a["neck_flex"]) @ turn(2, a["neck_side"]) @ turn(1, a["neck_turn"])
    frames = {"pelvis": pelvis, "chest": chest, "head": skull}
    legs, arms = rng.normal(1, 0.02, 2)
    hips, shoulders = rng.normal(1, 0.05, 2) * (HIP_BREADTH / 2, SHOULDER_BREADTH / 2)
    fat = h * rng.uniform(0.9, 1.2)
    bust, belly = rng.uniform(0.95, 1.1), rng.uniform(0.9, 1.25)

    def at(start: np.ndarray, frame: np.ndarray, x: float, y: float, z: float) -> np.ndarray:
        return start + frame @ (np.array((x, y, z)) * h)

    flesh: list[tuple[str, str, np.ndarray, list[tuple[np.ndarray, float]]]] = []
    groin = np.zeros(3)
    waist = at(groin, pelvis, 0, -LUMBAR, 0)
    collar = at(waist, chest, 0, -THORAX, 0)
    nape = at(collar, chest, 0, -NECK, 0)
    joints = {"head": at(nape, skull, 0, -NECK_TO_HEAD, -0.008)}
    pairs = [(0.040, 0.0, 0.058), (0.034, -0.06, 0.052)]
    spheres = [(at(groin, pelvis, s * x, y, 0), r) for s in (-1, 1) for x, y, r in pairs]
    flesh.append(("pelvis", "trousers", pelvis, spheres))
    pairs = [(0.036, 0.045, 0.054 * belly), (0.046, -0.11, 0.058 * bust), (shoulders - 0.012, 0.005 - THORAX, 0.034)]
    spheres = [(at(waist, chest, s * x, y, 0), r) for s in (-1, 1) for x, y, r in pairs]
    flesh.append(("chest", "shirt", chest, spheres))
    flesh.append(
        ("neck", "skin", chest, [(at(collar, chest, 0, 0.01, 0), 0.031), (at(nape, skull, 0, -0.03, 0), 0.028)])
    )
    flesh.append(("head", "hair", skull, [(joints["head"], 0.06)]))
    for side, s in (("r", 1), ("l", -1)):
        g = {k.removeprefix(f"{side}_"): v for k, v in a.items() if k.startswith(f"{side}_")}
        thigh = pelvis @ turn(0, -g["hip_flex"]) @ turn(2, s * g["hip_out"]) @ turn(1, s * g["hip_turn"])
        shank = thigh @ turn(0, g["knee"])
        foot = shank @ turn(0, g["ankle"])
        arm = chest @ turn(0, -g["arm_flex"]) @ turn(2, s * g["arm_out"]) @ turn(1, -s * g["arm_turn"])
        fore = arm @ turn(0, -g["elbow"])
        hand = fore @ turn(0, -g["wrist"])
        hip, shoulder = at(groin, pelvis, -s * hips, 0, 0), at(collar, chest, -s * shoulders, 0, 0)
        knee, elbow = at(hip, thigh, 0, THIGH * legs, 0), at(shoulder, arm, 0, UPPER_ARM * arms, 0)
        ankle, wrist = at(knee, shank, 0, SHANK * legs, 0), at(elbow, fore, 0, FOREARM * arms, 0)
        limb = {"hip": hip, "knee": knee, "ankle": ankle, "shoulder": shoulder, "elbow": elbow, "wrist": wrist}
        joints |= {f"{side}_{name}": point for name, point in limb.items()}
        calf, knuckles = at(knee, shank, 0, 0.075, 0.006), at(wrist, hand, 0, 0.6 * HAND, 0)
        sole, toe = FOOT_HEIGHT - 0.022, FOOT_LENGTH - 0.06
        for name, cloth, frame, spheres in (
            ("thigh", "trousers", thigh, [(hip, 0.047), (knee, 0.031)]),
            ("shank", "leg", shank, [(knee, 0.030), (calf, 0.033), (ankle, 0.021)]),
            (
                "foot",
                "shoe",
                foot,
                [(at(ankle, foot, 0, sole, 0.020), 0.022), (at(ankle, foot, 0, sole + 0.004, -toe), 0.018)],
            ),
            ("upper_arm", "sleeve", arm, [(shoulder, 0.034), (elbow, 0.024)]),
            ("forearm", "cuff", fore, [(elbow, 0.024), (wrist, 0.017)]),
            ("hand", "skin", hand, [(wrist, 0.016), (knuckles, 0.020)]),
        ):
            frames[f"{side}_{name}"] = frame
            flesh.append((f"{side}_{name}", cloth, frame, spheres))
    if activity == "sit":
        floor = max(c[1] + r * fat for *_, spheres in flesh for c, r in spheres)
        top = 0.08 * h
        left = pelvis[:, 0] * (1, 0, 1) / math.hypot(pelvis[0, 0], pelvis[2, 0]) * 0.11 * h
        back = np.array([-left[2], 0, left[0]])
        seat = [
            s * left + (k + 0.2) * back + (0, y, 0) for s in (-1, 1) for k in (-1, 1) for y in (top, max(floor, top))
        ]
        flesh.append(("seat", "seat", np.eye(3), [(corner, 0.01) for corner in seat]))
    counts = [len(spheres) for *_, spheres in flesh]
    return Body(
        activity, a, h, np.array([joints[name] for name in LCR13.joints]), frames,
        parts=[name for name, *_ in flesh], cloth=[cloth for _, cloth, *_ in flesh],
        axes=np.array([frame[:, 1] for _, _, frame, _ in flesh]), first=np.cumsum([0, *counts[:-1]]),
        spheres=np.array([c for *_, spheres in flesh for c, _ in spheres]),
        radii=np.array([r for *_, spheres in flesh for _, r in spheres]) * fat,
    )  # fmt: skip
