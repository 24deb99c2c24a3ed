"""Pictures to look at: 2D poses over the image, 3D poses from two sides, contact sheets, curves of losses.

    save(overlay(image, people, skeleton), "out.png")
    save(sheet([tile(image, {"found": people}, skeleton, caption)]), "sheet.png")

Images are (H, W, 3) uint8 RGB. A person's right is orange, the left blue, the rest pale. People are a list of `Person`
or a `People`, whose hidden joints (seen = 1) are hollow, unlabelled ones left out, crowd regions grey boxes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import cast

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d import Axes3D
from PIL import Image, ImageDraw, ImageFont

from lcrnet.pose import People, Person
from lcrnet.skeleton import Skeleton

Colour = tuple[int, int, int]

RIGHT: Colour = (255, 122, 20)
LEFT: Colour = (40, 130, 255)
MIDDLE: Colour = (235, 235, 215)
INK: Colour = (25, 25, 30)
GREY: Colour = (150, 150, 150)
PAPER: Colour = (255, 255, 255)

REACH = 1.1
"""A 3D view shows at least so many metres to each side, so that people compare from picture to picture."""

MOST = 4
"""People of one image that a tile shows in 3D."""

FINE = 4
"""Bits of the fractions of pixels that OpenCV is given."""


def overlay(image: np.ndarray, people: Sequence[Person] | People, skeleton: Skeleton, min_side: int = 0) -> np.ndarray:
    """The image with everybody's 2D pose, nearer to the reader the lower in the list; several people are numbered.

    min_side   a smaller image is enlarged until its short side has so many pixels, so that thin limbs can be seen
    """
    scale = max(1.0, min_side / max(1, min(image.shape[:2])))
    out = np.ascontiguousarray(image)
    out = out.copy() if scale == 1 else cv2.resize(out, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    pose2d, seen, region = _poses2d(people, len(skeleton))
    for x1, y1, x2, y2 in region * scale:
        cv2.rectangle(out, (round(x1), round(y1)), (round(x2) - 1, round(y2) - 1), GREY)
    seen = np.where(np.isfinite(pose2d).all(-1), seen, 0)
    for number, (pose, known) in enumerate(zip(pose2d * scale, seen, strict=True), 1):
        if known.any():
            _figure2d(out, pose, known, skeleton)
            if len(pose2d) > 1:
                _number(out, pose[known > 0], number)
    return out


def view3d(
    poses3d: np.ndarray,
    skeleton: Skeleton,
    places: np.ndarray | None = None,
    names: Sequence[str] = (),
    size: tuple[int, int] = (240, 240),
    turn: float = 35,
    rise: float = 8,
) -> np.ndarray:
    """(height, width) = `size` picture of root-centred 3D poses (P, J, 3), up being up, one scale for all axes.

    places   (P, 3) metres, where they are in the scene; without it they stand side by side, in the order given
    names    what is written over each, say their numbers in an overlay
    turn     degrees the viewer has walked from the camera to the right; 0 looks as the camera does
    rise     degrees the viewer is above
    """
    poses3d = np.asarray(poses3d, np.float64).reshape(-1, len(skeleton), 3)
    angle = np.radians(turn)
    right = np.array([np.cos(angle), 0, np.sin(angle)])  # of the viewer
    if places is None:
        places = 1.2 * np.arange(len(poses3d))[:, None] * right - poses3d.max(1, initial=-np.inf) * [0, 1, 0]
    scene = poses3d + np.asarray(places, np.float64)[:, None]
    points = scene[np.isfinite(scene).all(-1)] if np.isfinite(scene).any() else np.zeros((1, 3))
    middle = (points.min(0) + points.max(0)) / 2
    beside = np.abs((points - middle) @ right).max() * size[0] / size[1]
    reach = max(REACH, 0.25 + max(beside, np.ptp(points[:, 1]) / 2))
    # Matplotlib's third axis is up: its right, away, up are our x, z, -y
    scene, middle = (v[..., [0, 2, 1]] * [1, 1, -1] for v in (scene, middle))
    figure = Figure(figsize=(size[1] / 100, size[0] / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    shape = size[0] / size[1]  # Matplotlib fits a square into the axes: let it be as high as the picture
    axes = cast(Axes3D, figure.add_axes(((1 - shape) / 2, 0, shape, 1), projection="3d"))
    axes.set(**{f"{axis}lim": (m - reach, m + reach) for axis, m in zip("xyz", middle, strict=True)})
    axes.set_box_aspect((1, 1, 1), zoom=1.7)  # so that the limits are the edges of the picture
    axes.set_proj_type("ortho")
    axes.view_init(elev=rise, azim=turn - 90)
    axes.set_axis_off()
    if len(scene):
        _floor(axes, middle, reach, -points[:, 1].max())
    width = size[0] / 80 * REACH / reach
    for pose in scene:
        for a, b in skeleton.bones.tolist():
            axes.plot(*pose[[a, b]].T, color=_hex(side(skeleton, a, b)), linewidth=width, solid_capstyle="round")
    for pose, name in zip(scene, names, strict=False):
        axes.text(*pose[:, :2].mean(0), pose[:, 2].max() + 0.06 * reach, name, fontsize=7, ha="center")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def tile(
    image: np.ndarray,
    layers: Mapping[str, Sequence[Person] | People],
    skeleton: Skeleton,
    caption: str = "",
    height: int = 260,
) -> np.ndarray:
    """One picture of a contact sheet: for each named layer (`truth`, `found`) its overlay, and its people in 3D seen
    as the camera does and from the side, over a caption."""
    scale = height / image.shape[0]
    if image.shape[1] * scale > 2 * height:
        scale = 2 * height / image.shape[1]
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=how)
    panels = []
    for name, people in layers.items():
        flat = overlay(small, scaled(people, scale), skeleton)
        pad = max(0, height - flat.shape[0])
        flat = cv2.copyMakeBorder(flat, pad // 2, pad - pad // 2, 0, 0, cv2.BORDER_CONSTANT, value=PAPER)[:height]
        poses, names = _poses3d(people)
        size = (height, round(0.72 * height))
        views = [view3d(poses, skeleton, names=names, size=size, turn=turn) for turn in (0, 75)]
        panel = np.concatenate([flat, *views], 1)
        if len(layers) > 1:
            _write(panel, (4, 3), name, 14, PAPER, INK)
        panels.append(panel)
    body = np.concatenate(panels, 1)
    return np.concatenate([body, _line(caption, body.shape[1])]) if caption else body


def sheet(tiles: Sequence[np.ndarray], columns: int = 2, gap: int = 8) -> np.ndarray:
    """A contact sheet of tiles, row by row; columns are as wide as their widest tile. Without tiles one says so."""
    tiles = list(tiles) or [_line("nothing to show", 240)]
    columns = min(columns, len(tiles))
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    wide = [max(row[c].shape[1] for row in rows if c < len(row)) for c in range(columns)]
    high = [max(t.shape[0] for t in row) for row in rows]
    out = np.full((sum(high) + gap * (len(rows) + 1), sum(wide) + gap * (columns + 1), 3), PAPER, np.uint8)
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            y, x = gap + sum(high[:r]) + gap * r, gap + sum(wide[:c]) + gap * c
            out[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    return out


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], size: tuple[int, int] = (480, 900)
) -> np.ndarray:
    """(height, width) = `size` picture of series, name: (steps, values), a small plot each, such as losses."""
    figure = Figure(figsize=(size[1] / 100, size[0] / 100), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    columns = max(1, min(3, len(series)))
    rows = max(1, -(-len(series) // columns))
    for n, (name, (steps, values)) in enumerate(series.items(), 1):
        axes = figure.add_subplot(rows, columns, n)
        axes.plot(steps, values, color=_hex(LEFT), linewidth=1)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(color="0.9", linewidth=0.5)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def scaled(people: Sequence[Person] | People, scale: float) -> Sequence[Person] | People:
    """The same people in an image resized by `scale`."""
    if isinstance(people, People):
        return replace(people, box=people.box * scale, pose2d=people.pose2d * scale)
    return [replace(p, box=p.box * scale, pose2d=p.pose2d * scale) for p in people]


def side(skeleton: Skeleton, *joints: int) -> Colour:
    """The colour of a bone between joints or of one joint: a side's only if all are on that side."""
    sides = {skeleton.joints[j][:2] for j in joints}
    return RIGHT if sides == {"r_"} else LEFT if sides == {"l_"} else MIDDLE


def anchor(
    poses2d: np.ndarray, pose3d: np.ndarray, titles: Sequence[str], skeleton: Skeleton, caption: str, height: int = 200
) -> np.ndarray:
    """One picture of a sheet of anchor poses: 2D poses (n, J, 2) in units of their boxes, each with its box and title,
    then the 3D pose (J, 3) they share, as the camera sees it and from 75 degrees to its right, over a caption."""
    panels = []
    for pose, title in zip(poses2d, titles, strict=True):
        # A box in its own units is a square. Its sides in metres are those that make its pose fit the 3D pose best.
        spread, flat = pose - pose.mean(0), pose3d[:, :2] - pose3d[:, :2].mean(0)
        metres = np.maximum((spread * flat).sum(0), 0) / np.maximum((spread**2).sum(0), 1e-9)
        metres = np.maximum(metres, metres.max() / 4) if metres.any() else np.ones(2)  # a line could not be read
        points = np.concatenate([pose, [[0, 0], [1, 1]]]) * metres
        low, high = points.min(0), points.max(0)
        size = np.array([round(0.72 * height), height - 20])
        scale = 0.92 * (size / np.maximum(high - low, 1e-6)).min()
        points = (points - (low + high) / 2) * scale + size / 2 + (0, 20)
        panel = np.full((height, size[0], 3), PAPER, np.uint8)
        (x1, y1), (x2, y2) = np.rint(points[-2:]).astype(int).tolist()
        cv2.rectangle(panel, (x1, y1), (x2, y2), GREY)
        _figure2d(panel, points[:-2], np.full(len(pose), 2), skeleton)
        _write(panel, (4, 3), title, 12, INK, PAPER)
        panels.append(panel)
    views = [view3d(pose3d[None], skeleton, size=(height, round(0.6 * height)), turn=turn) for turn in (0, 75)]
    body = np.concatenate([*panels, *views], 1)
    return np.concatenate([body, _line(caption, body.shape[1])])


def coverage(rows: Sequence[Mapping[str, float]], k: int, size: tuple[int, int] = (480, 720)) -> np.ndarray:
    """(height, width) = `size` picture of a coverage curve, rows of k, mean, p95, worst (metres), `k` marked."""
    figure = Figure(figsize=(size[1] / 100, size[0] / 100), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ks = [row["k"] for row in rows]
    for name, text, mark, colour in (("worst", "worst", "^", GREY), ("p95", "95th percentile", "s", RIGHT),
                                     ("mean", "mean", "o", LEFT)):  # fmt: skip
        values = [1000 * row[name] for row in rows]
        axes.plot(ks, values, marker=mark, markersize=4, linewidth=1.4, color=_hex(colour), label=text)
    axes.axvline(k, color=_hex(INK), linewidth=1, linestyle="--", label=f"chosen: {k}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(int(one)) for one in ks], fontsize=8)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set(xlabel="anchor poses (K)", ylabel="mean joint distance to the nearest, mm")
    axes.set_title("how well anchor poses cover people that they were not clustered from", fontsize=10)
    axes.grid(color="0.9", linewidth=0.5)
    axes.legend(fontsize=9, frameon=False)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save(image: np.ndarray, file: str | os.PathLike[str]) -> None:
    """Writes a PNG or JPEG (by the suffix); a picture that is there is replaced in one step."""
    file = Path(file)
    part = file.with_name(f".{file.name}.part{file.suffix}")
    Image.fromarray(image).save(part)
    part.replace(file)


def _poses2d(people: Sequence[Person] | People, joints: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(pose2d (P, J, 2), seen (P, J), boxes of crowd regions (R, 4))."""
    if isinstance(people, People):
        one = ~people.crowd.astype(bool)
        return people.pose2d[one].astype(np.float64), people.seen[one], people.box[~one].astype(np.float64)
    pose = np.array([p.pose2d for p in people], np.float64).reshape(-1, joints, 2)
    return pose, np.full(pose.shape[:2], 2), np.zeros((0, 4))


def _poses3d(people: Sequence[Person] | People) -> tuple[np.ndarray, list[str]]:
    """(3D poses of the MOST largest people, from left to right, their numbers in the overlay)."""
    if isinstance(people, People):
        people = people[~people.crowd.astype(bool)]
        pose2d, pose3d, known = people.pose2d, people.pose3d, people.has3d.astype(bool)
    else:
        pose2d, pose3d = np.array([p.pose2d for p in people]), np.array([p.pose3d for p in people])
        known = np.ones(len(people), bool)
    rows = np.flatnonzero(known).tolist()
    if not rows:
        return pose3d[:0], []
    rows = sorted(rows, key=lambda p: -np.ptp(pose2d[p], axis=0).max())[:MOST]
    rows = sorted(rows, key=lambda p: pose2d[p, :, 0].mean())
    return pose3d[rows], [str(p + 1) for p in rows] if len(pose2d) > 1 else []


def _figure2d(out: np.ndarray, pose: np.ndarray, seen: np.ndarray, skeleton: Skeleton) -> None:
    """Draws one pose (J, 2): bones with a dark rim, thin towards hidden joints; discs, or rings for hidden joints."""
    stroke = int(np.clip(np.ptp(pose[seen > 0], axis=0).max() / 60, 1, 6))
    for rim in (1, 0):
        for a, b in skeleton.bones.tolist():
            if seen[a] and seen[b]:
                thick = stroke if min(seen[a], seen[b]) == 2 else max(1, stroke // 2)
                colour = INK if rim else side(skeleton, a, b)
                cv2.line(out, _fine(pose[a]), _fine(pose[b]), colour, thick + 2 * rim, cv2.LINE_AA, FINE)
    one = 2**FINE
    for j in np.flatnonzero(seen).tolist():
        at, colour = _fine(pose[j]), side(skeleton, j)
        if seen[j] == 1:
            cv2.circle(out, at, (stroke + 2) * one, INK, 1, cv2.LINE_AA, FINE)
            cv2.circle(out, at, (stroke + 1) * one, colour, max(1, stroke // 2), cv2.LINE_AA, FINE)
        else:
            cv2.circle(out, at, round((stroke + 0.6) * one), INK, 2, cv2.LINE_AA, FINE)
            cv2.circle(out, at, round((stroke + 0.6) * one), colour, -1, cv2.LINE_AA, FINE)


def _fine(point: np.ndarray) -> tuple[int, int]:
    """Continuous pixels (the first pixel's centre is 0.5) as OpenCV wants them (0), with FINE bits of fraction."""
    x, y = np.clip((point - 0.5) * 2**FINE, -(2**20), 2**20)  # far outside the image, where OpenCV overflows
    return int(np.rint(x)), int(np.rint(y))


def _number(out: np.ndarray, points: np.ndarray, number: int) -> None:
    """Writes a person's number over its topmost joint inside the image."""
    inside = points[((points > 0) & (points < out.shape[1::-1])).all(-1)]
    if len(inside):
        size = max(10, min(out.shape[:2]) // 18)
        x, y = np.clip(inside[inside[:, 1].argmin()] - (0, 1.7 * size), 0, np.array(out.shape[1::-1]) - size)
        _write(out, (x, y), str(number), size, PAPER, INK)


def _write(out: np.ndarray, at: tuple[float, float], text: str, size: int, colour: Colour, rim: Colour) -> None:
    """Text with a rim, its top left corner `at`, into an image."""
    picture = Image.fromarray(out)
    ImageDraw.Draw(picture).text(at, text, colour, _font(size), stroke_width=max(1, size // 9), stroke_fill=rim)
    out[:] = np.asarray(picture)


def _line(text: str, width: int, size: int = 13) -> np.ndarray:
    """A white strip with one line of text, shortened in the middle to what fits."""
    font = _font(size)
    if font.getlength(text) > width - 6:
        keep = len(text)
        while keep > 2 and font.getlength(text[: keep // 2] + "…" + text[-(keep // 2) :]) > width - 6:
            keep -= 2
        text = text[: keep // 2] + "…" + text[-(keep // 2) :]
    picture = Image.new("RGB", (width, round(1.7 * size)), PAPER)
    ImageDraw.Draw(picture).text((3, 2), text, INK, font)
    return np.asarray(picture)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _floor(axes: Axes3D, middle: np.ndarray, reach: float, height: float) -> None:
    """A grid of half metres under the people; the edge towards the camera is a thick line."""
    ticks = np.arange(-np.floor(2 * reach), np.floor(2 * reach) + 1) / 2
    x, y = middle[0] + ticks, middle[1] + ticks
    for at in x:
        axes.plot([at, at], y[[0, -1]], [height, height], color="0.85", linewidth=0.6)
    for at in y:
        axes.plot(x[[0, -1]], [at, at], [height, height], color="0.85", linewidth=0.6)
    axes.plot(x[[0, -1]], y[[0, 0]], [height, height], color="0.45", linewidth=1.4)
    if abs(axes.azim + 90) < 45:  # else the edge is at a side of the picture
        axes.text(middle[0], y[0], height - 0.13 * reach, "camera", fontsize=6, color="0.45", ha="center")


def _hex(colour: Colour) -> str:
    """For Matplotlib, on white: the pale colour of the middle is dark there."""
    return "#{:02x}{:02x}{:02x}".format(*((110, 110, 110) if colour == MIDDLE else colour))
