"""Drawn people with exact 2D and 3D truth: the embedded data set of the demo and the tests.

Bodies (body.py) stand on one ground before a pinhole camera and are painted from far to near as convex hulls of
spheres. What is painted is a map of piece numbers, at twice the resolution; colours, silhouettes and visibility are
looked up in that one map, so they cannot disagree.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from lcrnet import body, coco, pose
from lcrnet.body import Body, turn
from lcrnet.camera import Camera
from lcrnet.pose import People
from lcrnet.skeleton import LCR13

COUNTS = (0.04, 0.45, 0.36, 0.12, 0.03)
"""Share of images with 0, 1, ... people (before those who found no room)."""

MIN_VISIBLE = 0.5
"""A person of whom less than this part of the silhouette can be seen is left out of the drawing."""

NEAREST = 0.35
"""No part of a body is nearer to the camera, metres."""

APART = 0.45
"""Torsos are so far from one another on the ground, metres."""

OVERSAMPLE = 2
_SUBPIXEL = 4  # bits of the fraction in OpenCV's fixed-point corners
_NOBODY = 255  # owner of background and clutter
_CIRCLE = np.stack([np.cos(np.arange(12) * math.pi / 6), np.sin(np.arange(12) * math.pi / 6)], -1)
_LATITUDE, _LONGITUDE = np.meshgrid((-1.57, -0.9, -0.3, 0.3, 0.9, 1.57), np.arange(10) * math.pi / 5)
_SPHERE = np.stack(
    [np.cos(_LONGITUDE) * np.cos(_LATITUDE), np.sin(_LATITUDE), np.sin(_LONGITUDE) * np.cos(_LATITUDE)], -1
).reshape(-1, 3)

# On which painted parts a joint can be seen.
_TRUNK, _TRUNK_JOINTS = ("chest", "pelvis"), ("r_hip", "l_hip", "r_shoulder", "l_shoulder")
_TRUNK_BEHIND = 0.09  # metres behind the middle of the trunk from which a hip or shoulder is hidden by it
_LIMB = {
    "ankle": ("shank", "foot"), "knee": ("thigh", "shank"), "hip": ("thigh",),
    "wrist": ("forearm", "hand"), "elbow": ("upper_arm", "forearm"), "shoulder": ("upper_arm",),
}  # fmt: skip
_SEEN_ON = {f"{s}_{joint}": [f"{s}_{p}" for p in parts] for s in "rl" for joint, parts in _LIMB.items()}
_SEEN_ON["head"] = ["head"]
# Painted that much earlier than their depth says, metres: the neck under head and shirt, the trousers under the shirt.
_UNDER = {"neck": 0.06, "pelvis": 0.04, "chest": 0.02}

_SKIN = np.array([(255, 219, 184), (240, 194, 150), (224, 172, 120), (190, 135, 92), (141, 90, 58), (96, 62, 42)])
_HAIR = np.array([(30, 24, 20), (62, 42, 28), (110, 72, 40), (190, 150, 85), (150, 148, 145), (120, 50, 28)])


@dataclass
class Scene:
    """One drawing with all that is known of it.

    image (H, W, 3) uint8 RGB; root (P, 3): the torso centres in the camera's frame, metres; bodies: P, there too.
    """

    image: np.ndarray
    people: People
    camera: Camera
    root: np.ndarray
    bodies: list[Body]


@dataclass
class _Stage:
    """What all painting needs. tilt (3, 3) world -> camera; light (3,) the direction it comes from.

    The rest is the table behind a map of piece numbers: colour, owner, part and depth of each; 0 is the background.
    """

    rng: np.random.Generator
    size: int
    camera: Camera
    tilt: np.ndarray
    light: np.ndarray
    colour: list[np.ndarray] = field(default_factory=lambda: [np.zeros(3)])
    owner: list[int] = field(default_factory=lambda: [_NOBODY])
    part: list[str] = field(default_factory=lambda: [""])
    depth: list[float] = field(default_factory=lambda: [math.inf])

    def layer(self) -> np.ndarray:
        """An empty map of piece numbers."""
        return np.zeros((self.size * OVERSAMPLE,) * 2, np.uint16)

    def paint(
        self, layer: np.ndarray, corners: np.ndarray, colour: np.ndarray, owner: int, part: str, depth: float
    ) -> int:
        """Paint the convex hull of `_fixed` corners (..., 2) as a new piece; its number."""
        self.colour.append(colour)
        self.owner.append(owner)
        self.part.append(part)
        self.depth.append(depth)
        _fill(layer, corners, len(self.owner) - 1)
        return len(self.owner) - 1


@dataclass
class _Figure:
    """A body in the camera's frame, with the map of its pieces; silhouette (bool) is where it is painted."""

    body: Body
    owner: int
    layer: np.ndarray
    silhouette: np.ndarray
    depth: float


def draw(seed: int, size: int = 128, heading: float = 180) -> tuple[np.ndarray, People]:
    """One drawing: image (size, size, 3) uint8 RGB and its LCR13 people with exact poses; the same for the same seed.

    Torsos face within `heading` degrees of the camera.
    """
    drawn = scene(seed, size, heading)
    return drawn.image, drawn.people


def scene(seed: int, size: int = 128, heading: float = 180) -> Scene:
    """`draw` with the camera and the bodies."""
    rng = np.random.default_rng(seed)
    f = size * rng.uniform(1.1, 2.4)
    light = np.array([rng.uniform(-0.8, 0.8), rng.uniform(-1, -0.4), rng.uniform(-0.9, -0.3)])
    tilt = turn(2, rng.normal(0, 3)) @ turn(0, rng.normal(0, 5))
    stage = _Stage(rng, size, Camera((f, f), (size / 2, size / 2)), tilt, light / np.linalg.norm(light))
    figures, numbers = _stack(stage, _crowd(stage, heading), _clutter(stage))
    image = _develop(stage, numbers)

    people = People.empty(len(figures), len(LCR13))
    for i, figure in enumerate(figures):
        people.pose2d[i] = stage.camera.project(figure.body.joints)
        people.pose3d[i] = pose.centre(figure.body.joints, LCR13)
        people.seen[i] = 1 + _visible(stage, figure, people.pose2d[i], numbers)
        x, y, w, h = cv2.boundingRect(figure.silhouette.view(np.uint8))
        people.box[i] = np.array([x, y, x + w, y + h]) / OVERSAMPLE
    # Without a mask in the file, `area` is that of the box: as in the predecessor's files, and in those made of labels.
    people.area[:] = (people.box[:, 2:] - people.box[:, :2]).prod(1)
    people.has3d[:] = True
    root = np.array([f.body.joints[LCR13.torso].mean(0) for f in figures]).reshape(-1, 3)
    return Scene(image, people, stage.camera, root, [f.body for f in figures])


# People before the camera


def _crowd(stage: _Stage, heading: float) -> list[_Figure]:
    """People on one ground, apart from one another and enough of each inside the image."""
    rng, size, f, c = stage.rng, stage.size, stage.camera.f[0], stage.camera.c[0]
    count = int(rng.choice(len(COUNTS), p=COUNTS))
    figures: list[_Figure] = []
    ground = 0.0  # y in the world
    for attempt in range(8 * count):
        if len(figures) == count or (attempt >= 4 * count and figures):
            break
        human = body.sample(rng, heading)
        low = float((human.spheres[:, 1] + human.radii).max())
        high = float((human.spheres[:, 1] - human.radii).min())
        # How tall somebody would stand there, in parts of the image's height.
        tall = rng.uniform(0.55, 1.0) if count > 1 or rng.uniform() < 0.65 else rng.uniform(0.9, 1.3)
        if figures:
            tall = float(np.clip(f * 1.7 / figures[0].depth / size * rng.uniform(0.7, 1.4), 0.5, 1.3))
        depth = f * human.stature / (tall * size)
        half = f * (low - high) / depth / 2
        u, v = size * (rng.uniform(0.12, 0.88) if count > 1 else rng.normal(0.5, 0.17)), size * rng.normal(0.5, 0.08)
        if half > 0.42 * size:  # cut off, mostly below
            v = size * rng.uniform(0.03, 0.2) + half
        if figures and rng.uniform() < 0.4:  # beside somebody, so that they overlap
            beside = figures[int(rng.integers(len(figures)))]
            u = stage.camera.project(beside.body.joints)[:, 0].mean() + size * rng.normal(0, 0.2)
        ray = stage.tilt.T @ np.array([(u - c) / f, (v - c) / f, 1])
        place = ray / ray[2] * depth
        place[1] = ground - low + rng.normal(0, 0.03) if figures else place[1] - (low + high) / 2
        # Heading is towards the camera, not towards the image's plane.
        towards = turn(1, math.degrees(math.atan2(place[0], place[2])))
        figure = _figure(stage, human.moved(stage.tilt @ towards, stage.tilt @ place), len(figures))
        if figure is None:
            continue
        gaps = [(other.body.joints - figure.body.joints)[LCR13.torso].mean(0)[[0, 2]] for other in figures]
        if all(math.hypot(*gap) >= APART for gap in gaps):
            ground = ground if figures else float(place[1] + low)
            figures.append(figure)
    return figures


def _figure(stage: _Stage, human: Body, owner: int) -> _Figure | None:
    """The body painted on a layer of its own; None if it is too near or too little of it inside the image."""
    if human.spheres[:, 2].min() < NEAREST:
        return None
    slices = [slice(a, b) for a, b in zip(human.first, [*human.first[1:], len(human.radii)], strict=True)]
    discs = stage.camera.project(human.spheres)[:, None]
    radii = (stage.camera.f[0] * human.radii / human.spheres[:, 2])[:, None, None]

    # How much is inside: on a coarse canvas that reaches one image beyond every edge.
    coarse = np.zeros((96, 96), np.uint8)
    corners = _fixed(discs + radii * _CIRCLE + stage.size, 32 / stage.size)
    for name, part in zip(human.parts, slices, strict=True):
        if name != "seat":
            _fill(coarse, corners[part], 1)
    if np.count_nonzero(coarse[32:64, 32:64]) < max(1.1 * MIN_VISIBLE * np.count_nonzero(coarse), 8):
        return None

    # Three discs in one another for each sphere, the smaller the better lit, moved towards the light.
    towards = stage.light[:2] / np.linalg.norm(stage.light[:2])
    nested = [_fixed(discs + radii * (k * _CIRCLE + 0.9 * (1 - k) * towards), OVERSAMPLE) for k in (1.0, 0.74, 0.4)]
    middle = np.add.reduceat(human.spheres, human.first) / np.diff([*human.first, len(human.radii)])[:, None]
    depth = float(human.joints[LCR13.torso, 2].mean())
    shades, wear = _shades(stage, human.axes, middle, depth), _wardrobe(stage.rng)
    order = np.argsort(-(middle[:, 2] + [_UNDER.get(name, 0) for name in human.parts]), kind="stable")
    layer, seat = stage.layer(), []
    for i in order.tolist():
        name, colour, z = human.parts[i], wear[human.cloth[i]], float(middle[i, 2])
        if name == "head":
            _head(stage, layer, human, wear, float(shades[i, 1]), owner)
            continue
        for level, corners in zip(shades[i], nested, strict=True):
            number = stage.paint(
                layer, corners[slices[i]], colour * level, _NOBODY if name == "seat" else owner, name, z
            )
            if name == "seat":
                seat.append(number)
        chest = human.frames["chest"]
        if name == "chest" and chest[:, 2] @ middle[i] > 0.15 * np.linalg.norm(middle[i]):
            # The open collar tells the chest from the back.
            shoulders = human.joints[LCR13.indices("r_shoulder", "l_shoulder")].mean(0)
            deep = np.array([(-0.028, -0.02, -0.03), (0.028, -0.02, -0.03), (0, 0.08, -0.055)]) * human.stature
            corners = _fixed(stage.camera.project(shoulders + deep @ chest.T), OVERSAMPLE)
            stage.paint(layer, corners, wear["inner"] * shades[i, 1], owner, "chest", z)
    silhouette = layer > 0
    if seat:
        silhouette &= (layer < seat[0]) | (layer > seat[-1])
    return _Figure(human, owner, layer, silhouette, depth)


def _fixed(points: np.ndarray, scale: float) -> np.ndarray:
    """Pixels of the image (..., 2) -> OpenCV's fixed-point corners on a canvas of `scale` times its resolution."""
    return np.rint((points * scale - 0.5) * 2**_SUBPIXEL).astype(np.int32)


def _fill(canvas: np.ndarray, corners: np.ndarray, number: int) -> None:
    cv2.fillConvexPoly(canvas, cv2.convexHull(corners.reshape(-1, 2)), number, cv2.LINE_8, _SUBPIXEL)


def _shades(stage: _Stage, axes: np.ndarray, middle: np.ndarray, depth: float) -> np.ndarray:
    """(B, 3) brightness of the unlit side, the middle and the lit side of cylinders along `axes` (B, 3) at `middle`.

    So a limb's brightness tells its direction; those nearer than `depth` are a little brighter too.
    """

    def across(v: np.ndarray, n: np.ndarray) -> np.ndarray:
        v = v - (v * n).sum(1, keepdims=True) * n
        return v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-6)

    facing = across(-middle, axes)
    lit = across(across(np.broadcast_to(stage.light, axes.shape), axes), facing)
    normal = facing[:, None] * np.array([[0.55], [1], [0.6]]) + lit[:, None] * np.array([[-0.83], [0], [0.8]])
    shade = 0.5 + 0.6 * np.maximum(normal @ stage.light, 0)
    shade[:, 0] *= 0.8  # sets a limb off from what is behind it
    return shade * np.clip(1 - 0.4 * (middle[:, 2:] - depth), 0.75, 1.25)


def _wardrobe(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """RGB of each cloth."""

    def dye(low: float, high: float) -> np.ndarray:
        hsv = np.array([[[rng.integers(180), rng.integers(20, 220), rng.uniform(low, high)]]], np.uint8)
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0].astype(float)

    skin = np.clip(_SKIN[rng.integers(len(_SKIN))] * rng.uniform(0.92, 1.08), 0, 255)
    shirt, trousers, sleeves = dye(70, 250), dye(40, 200), rng.uniform()
    return {
        "skin": skin, "hair": _HAIR[rng.integers(len(_HAIR))] * rng.uniform(0.8, 1.1), "shirt": shirt,
        "trousers": trousers, "leg": skin if rng.uniform() < 0.25 else trousers, "shoe": dye(25, 230),
        "sleeve": skin if sleeves < 0.15 else shirt, "cuff": skin if sleeves < 0.55 else shirt,
        "inner": skin if rng.uniform() < 0.6 else dye(120, 255), "seat": dye(50, 180),
    }  # fmt: skip


def _head(stage: _Stage, layer: np.ndarray, human: Body, wear: dict[str, np.ndarray], shade: float, owner: int) -> None:
    """An ellipsoid of hair with a face: a patch of skin with eyes and mouth, and a nose that shows in profile."""
    middle, frame = human.joints[LCR13.index("head")], human.frames["head"]
    radii = np.array([0.045, 0.066, 0.054]) * human.stature
    away = frame.T @ middle / radii
    away /= np.linalg.norm(away)

    def spot(directions: np.ndarray, colour: np.ndarray) -> None:
        points = stage.camera.project(middle + (directions * radii) @ frame.T)
        stage.paint(layer, _fixed(points, OVERSAMPLE), colour, owner, "head", float(middle[2]))

    def disc(direction: np.ndarray, radius: float) -> np.ndarray:
        """Directions on a circle round a direction, those beyond the horizon drawn back to it."""
        side = np.array([-direction[2], 0, direction[0]]) / math.hypot(direction[0], direction[2])
        points = direction + math.tan(radius) * (_CIRCLE @ np.stack([side, np.cross(side, direction)]))
        points /= np.linalg.norm(points, axis=1, keepdims=True)
        points -= np.maximum(points @ away, 0)[:, None] * away
        return points / np.linalg.norm(points, axis=1, keepdims=True)

    spot(_SPHERE, wear["hair"] * shade)
    averted = -float(frame[:, 2] @ middle) / np.linalg.norm(middle)  # -1: facing the camera, 1: turned away
    skin = wear["skin"] * shade
    if averted < 0.75:
        spot(disc(np.array([0, 0.32, -0.947]), 1.02), skin)
    for eye in np.array([(-0.38, -0.05, -0.924), (0.38, -0.05, -0.924)]):
        if eye @ away < -0.2:
            spot(disc(eye, 0.13), wear["hair"] * 0.25)
    if averted < 0.3:
        spot(np.array([(0, -0.02, -1), (0, 0.27, -1.28), (-0.17, 0.3, -0.95), (0.17, 0.3, -0.95)]), skin * 0.78)
        mouth = np.array([(-0.2, 0.56, -0.84), (0.2, 0.56, -0.84), (0, 0.62, -0.8)])
        if (mouth @ away).max() < -0.15:
            spot(mouth, skin * np.array([0.75, 0.5, 0.5]))


def _clutter(stage: _Stage) -> list[tuple[float, np.ndarray]]:
    """Boxes and poles: (depth, layer) each."""
    out, rng, size = [], stage.rng, stage.size
    for _ in range(int(rng.choice(3, p=(0.6, 0.27, 0.13)))):
        x, half, top = rng.uniform(0, size), rng.uniform(0.06, 0.2) * size, rng.uniform(0.45, 0.9) * size
        bottom = top + rng.uniform(0.15, 0.6) * size
        if rng.uniform() < 0.45:
            half, top, bottom = rng.uniform(0.01, 0.03) * size, rng.uniform(-0.2, 0.4) * size, 1.2 * size
        lean, colour, edge = rng.normal(0, 0.03) * size, rng.uniform(40, 220, 3), x + rng.uniform(-0.9, 0.9) * half
        depth, layer = rng.uniform(1.5, 8), stage.layer()
        for left, right, tone in ((x - half, edge, 1.0), (edge, x + half, 0.75)):  # two sides of it
            corners = np.array([(left + lean, top), (right + lean, top), (right, bottom), (left, bottom)])
            stage.paint(layer, _fixed(corners, OVERSAMPLE), colour * tone, _NOBODY, "clutter", depth)
        out.append((depth, layer))
    return out


def _stack(
    stage: _Stage, figures: list[_Figure], clutter: list[tuple[float, np.ndarray]]
) -> tuple[list[_Figure], np.ndarray]:
    """The figures that can be seen well enough, and the map of piece numbers of all layers, from far to near."""
    while True:
        numbers = stage.layer()
        for _, layer in sorted([(f.depth, f.layer) for f in figures] + clutter, key=lambda item: -item[0]):
            cv2.copyTo(layer, (layer > 0).view(np.uint8), numbers)
        shown = [
            np.count_nonzero(f.silhouette & (numbers == f.layer)) / np.count_nonzero(f.silhouette) for f in figures
        ]
        if min(shown, default=1) >= MIN_VISIBLE:
            return figures, numbers
        figures = [f for i, f in enumerate(figures) if i != int(np.argmin(shown))]


def _visible(stage: _Stage, figure: _Figure, pose2d: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """(J,) 1 where a joint is inside the image and what is painted there is the flesh round that joint, else 0."""
    out = np.zeros(len(LCR13), np.int64)
    at = np.floor(pose2d * OVERSAMPLE).astype(int)
    for j, (name, (x, y)) in enumerate(zip(LCR13.joints, at.tolist(), strict=True)):
        if 0 <= x < numbers.shape[1] and 0 <= y < numbers.shape[0]:
            number = int(numbers[y, x])
            if stage.owner[number] == figure.owner:
                part = stage.part[number]
                near = figure.body.joints[j, 2] < stage.depth[number] + _TRUNK_BEHIND
                out[j] = part in _SEEN_ON[name] or (part in _TRUNK and name in _TRUNK_JOINTS and near)
    return out


# Backgrounds and the finished picture


def _background(stage: _Stage) -> np.ndarray:
    """(size, size, 3) float32, 0..255: soft, so that people stay legible."""
    rng, size = stage.rng, stage.size
    kind = rng.choice(["gradient", "shapes", "stripes", "bricks", "floor", "noise"])
    corners = rng.uniform(40, 225, (2, 2, 3)).astype(np.float32)
    image = cv2.resize(corners.mean() + (corners - corners.mean()) * 0.6, (size, size), interpolation=cv2.INTER_LINEAR)
    blur = rng.uniform(0.6, 2.0)
    tone, thick = rng.uniform(30, 235, 3).tolist(), max(size // 64, 1)
    if kind == "shapes":
        blur = rng.uniform(1, 4)
        for _ in range(int(rng.integers(4, 12))):
            x, y, w, h = (int(v) for v in rng.uniform((0, 0, 4, 4), (size, size, size / 3, size / 3)))
            tone = rng.uniform(30, 230, 3).tolist()
            if rng.uniform() < 0.5:
                cv2.ellipse(image, (x, y), (w, h), rng.uniform(0, 180), 0, 360, tone, -1)
            else:
                cv2.rectangle(image, (x, y), (x + w, y + h), tone, -1)
    elif kind in ("stripes", "bricks"):
        step = int(rng.integers(max(size // 16, 3), max(size // 5, 5)))
        for row, y in enumerate(range(0, size, step)):
            cv2.line(image, (0, y), (size, y), tone, thick)
            for x in range(-(row % 2) * step, size, 2 * step) if kind == "bricks" else ():
                cv2.line(image, (x, y), (x, y + step), tone, thick)
        if rng.uniform() < 0.4:
            image = np.ascontiguousarray(image.transpose(1, 0, 2))
    elif kind == "floor":  # up to the horizon
        (xa, ya), (xb, yb) = stage.camera.project(np.array([[-1, 0, 3], [1, 0, 3]]) @ stage.tilt.T)
        left, right = (ya + (x - xa) * (yb - ya) / (xb - xa) for x in (0, size))
        corners = np.array([(0, left), (size, right), (size, 9 * size), (0, 9 * size)])
        cv2.fillConvexPoly(image, corners.astype(np.int32), tone)
    cells = int(rng.integers(3, 12))
    soft = rng.uniform(-1, 1, (cells, cells, 3)).astype(np.float32)
    image += cv2.resize(soft, (size, size), interpolation=cv2.INTER_CUBIC) * rng.uniform(
        4, 45 if kind == "noise" else 18
    )
    image = cv2.GaussianBlur(image, (0, 0), blur * size / 128)
    return image.mean((0, 1)) + (image - image.mean((0, 1))) * np.float32(0.7)


def _develop(stage: _Stage, numbers: np.ndarray) -> np.ndarray:
    """(size, size, 3) uint8: the colours of a map of piece numbers on a background, as a camera would deliver them."""
    rng, size = stage.rng, stage.size
    image: np.ndarray = np.clip(_background(stage), 0, 255)
    # One look-up a pixel: RGBA in one word; alpha 255 is paint.
    table = np.full((len(stage.colour), 4), 255, np.uint8)
    table[:, :3] = np.clip(np.array(stage.colour), 0, 255)
    table[0] = 0
    paint: np.ndarray = table.view(np.uint32)[:, 0].take(numbers).view(np.uint8).reshape(*numbers.shape, 4)
    paint = cv2.resize(paint, (size, size), interpolation=cv2.INTER_AREA)
    # OpenCV spreads one channel over three many times faster than NumPy broadcasts.
    image *= cv2.merge([1 - paint[..., 3] * np.float32(1 / 255)] * 3)
    image += cv2.cvtColor(paint, cv2.COLOR_RGBA2RGB)
    if rng.uniform() < 0.6:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.8) * size / 128)
    gain, cast, grain = rng.uniform(0.8, 1.2), rng.uniform(-16, 16) + rng.normal(0, 4, 3), rng.uniform(1, 6)
    image = cv2.transform(image, np.column_stack([np.eye(3) * gain, 128 * (1 - gain) + cast]))
    image = cv2.add(image, cv2.merge([rng.standard_normal((size, size), np.float32) * np.float32(grain)] * 3))
    return np.clip(image, 0, 255).astype(np.uint8)


# A data set


def write(
    folder: str | os.PathLike[str],
    count: int,
    seed: int,
    size: int = 128,
    heading: float = 180,
    labelled: bool = True,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """`count` drawings as folder/images/000000.jpg, ... and, if `labelled`, folder/annotations.json.

    The same files for the same seed, however many processes draw them (None: one a CPU). An image's field `camera` has
    f and c in pixels; an annotation's `root_camera` is the torso centre in the camera's frame, metres.
    `progress` is called with (drawings done, count).
    """
    images = Path(folder) / "images"
    images.mkdir(parents=True, exist_ok=True)
    step = 100
    jobs = [(images, range(i, min(i + step, count)), seed, size, heading) for i in range(0, count, step)]
    processes = min(processes or len(os.sched_getaffinity(0)), len(jobs))
    done: list[coco.CocoImage] = []
    with ExitStack() as stack:
        results: Iterable[list[coco.CocoImage]] = map(_write_some, jobs)
        if processes > 1:
            # Not forked: the parent may have threads (Ray's, torch's), whose locks a fork copies as they are.
            spawn = multiprocessing.get_context("spawn")
            results = stack.enter_context(ProcessPoolExecutor(processes, spawn)).map(_write_some, jobs)
        for some in results:
            done += some
            if progress:
                progress(len(done), count)
    if labelled:
        info = {"description": f"drawn people (lcrnet.synthetic), seed {seed}"}
        coco.write(Path(folder) / "annotations.json", done, LCR13, info)


def _write_some(job: tuple[Path, range, int, int, float]) -> list[coco.CocoImage]:
    """Draws and writes some images of a set; returns their annotations."""
    folder, numbers, seed, size, heading = job
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    out = []
    for i in numbers:
        drawn = scene(int(np.random.SeedSequence([seed, i]).generate_state(1)[0]), size, heading)
        jpeg = cv2.imencode(".jpg", drawn.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
        (folder / f"{i:06d}.jpg").write_bytes(jpeg.tobytes())
        extra = {"camera": {"f": list(drawn.camera.f), "c": list(drawn.camera.c)}}
        extras = [
            {"root_camera": np.round(root, 5).tolist(), "activity": human.activity}
            for root, human in zip(drawn.root, drawn.bodies, strict=True)
        ]
        out.append(coco.CocoImage(i + 1, f"{i:06d}.jpg", size, size, None, drawn.people, [], extra, extras))
    cv2.setNumThreads(threads)
    return out
