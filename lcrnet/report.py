"""An evaluation as one HTML file to look at: figures, curves, tables, and people over their images and in 3D.

    write(Path("report.html"), evaluate(truth, found, skeleton, settings), examples, skeleton, "Our model on LSP")

The file holds all it needs (pictures, script): it opens from a disk, without a server or a network. Its 3D views turn
with the mouse, a finger or the arrow keys. The layout is report.html, the script of the 3D views report.js.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from matplotlib.ticker import MaxNLocator
from PIL import Image
from scipy.optimize import linear_sum_assignment

from lcrnet import draw
from lcrnet.pose import People, Person, box_of, centre
from lcrnet.skeleton import Skeleton

LONGEST = 640
"""Pixels of the longer side of a picture in the page."""

SMALLEST = 320
"""A picture whose longer side is shorter is enlarged to this, so that limbs can be told apart."""

JPEG_BYTES = 90_000
"""No picture takes more: 36 of them (18 examples, truth and found), in base64, make 4.4 MB."""

NEAR = 0.5
"""Poses further apart in 2D than this part of the longer side of the true pose's box are not the same person's."""

APART = 0.35
"""Metres of room round each person in a 3D view."""

FOLD = 30
"""Longer tables are folded."""

# Rows of the first table: name, key for people found, key for all people, what it says.
_HEADLINE = (
    ("people", "found", "people", "people found; all people to be found"),
    ("people with true 3D", "people3d", "people3d_all", "those that the 3D figures are made of"),
    ("false detections", None, "false", "detections of nobody"),
    ("recall", None, "recall", "found people / all people"),
    ("precision", None, "precision", "found people / (found people + false detections)"),
    ("OKS-AP", None, "oks_ap", "COCO's keypoint AP, mean over OKS 0.50:0.95"),
    ("OKS-AP 0.50", None, "oks_ap50", "the same at OKS 0.50"),
    ("OKS-AP 0.75", None, "oks_ap75", "the same at OKS 0.75"),
    ("PCK", "pck2d", "pck2d_all", "2D joints within {} torso lengths"),
    ("PCKh", "pckh", "pckh_all", "2D joints within {} head sizes"),
    ("2D error", "error2d_height_median", None, "median distance / height of the true pose"),
    ("MPJPE, mm", "mpjpe_mm", "mpjpe_mm_all", "mean distance of 3D joints, both poses centred on the torso"),
    ("N-MPJPE, mm", "n_mpjpe_mm", "n_mpjpe_mm_all", "the same after scaling"),
    ("PA-MPJPE, mm", "pa_mpjpe_mm", "pa_mpjpe_mm_all", "the same after Procrustes alignment"),
    ("3DPCK", "pck3d", "pck3d_all", "3D joints within {} mm"),
    ("AUC", "auc3d", "auc3d_all", "mean 3DPCK over thresholds of 0 to 150 mm"),
)
_THRESHOLD = {"pck2d": "pck2d", "pckh": "pckh", "pck3d": "pck3d_mm"}
"""Figure: the setting of `evaluate` that is its threshold."""

_COLUMNS = {
    "people": "people", "found": "found", "missed": "missed", "false": "false", "recall": "recall",
    "precision": "precision", "error2d_height_median": "2D error / height", "pck2d": "PCK", "pck2d_all": "PCK, all",
    "pckh": "PCKh", "pckh_all": "PCKh, all", "mpjpe_mm": "MPJPE, mm", "n_mpjpe_mm": "N-MPJPE, mm",
    "pa_mpjpe_mm": "PA-MPJPE, mm", "pck3d": "3DPCK", "pck3d_all": "3DPCK, all", "auc3d": "AUC", "auc3d_all": "AUC, all",
}  # fmt: skip

_EVENTS = {"oks50": "OKS of at least 0.50", "mm50": "within 50 mm", "mm100": "within 100 mm"}
_OF_WHAT = {"score": "detections", "joint": "joints"}
_PLACED = {"curves", "calibration", "predecessor", "config", "command"}
"""Keys that have a place of their own in the page, as have all that begin with `per_`."""


@dataclass
class Example:
    """An image of the page.

    kind      the heading under which it stands: worst, best, random, ...
    name      its file's name; `caption` what else to say of it
    image     (H, W, 3) uint8 RGB
    truth     its true people, `found` its detections; coordinates are pixels of `image`
    pairs     (M, 2) which of `truth` is which of `found`; None: by their distance in 2D
    """

    kind: str
    name: str
    caption: str
    image: np.ndarray
    truth: People
    found: list[Person]
    pairs: Sequence[tuple[int, int]] | np.ndarray | None = None


@dataclass
class _Line:
    """A line of a chart: its pieces (points in the chart's pixels; it is broken where a value is missing), dots with
    their radius and text; `style` is its colour and dashes."""

    label: str
    pieces: list[str]
    dots: list[tuple[float, float, float, str]] = field(default_factory=list)
    style: int = 0


@dataclass
class _Chart:
    """A chart, y from 0 to 1. Ticks are (place in pixels, text)."""

    title: str
    x: str
    y: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[_Line]
    diagonal: bool = False


_Cell = tuple[str, float | None]
"""Text, and the length of its bar 0..1 or None."""


@dataclass
class _Table:
    """Rows of (name, cells). `sides` (r, l, m) colours the bars of a row."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[_Cell]]]
    sides: list[str] = field(default_factory=list)


# The plot's area in the chart's own pixels; report.html draws the frame.
PLOT = {"width": 380, "height": 280, "left": 44, "right": 368, "top": 12, "bottom": 234}


def write(file: Path, metrics: dict[str, Any], examples: Sequence[Example], skeleton: Skeleton, title: str) -> None:
    """Writes the page; one that is there is replaced in one step. The same input gives the same bytes.

    metrics   what `evaluate` returned, and what jobs add (`calibration`, `config`, `command`, ...). A key may be
              missing or None: the page names what it leaves out.
    """
    part = file.with_name(f".{file.name}.part")
    # A name of a file that is no Unicode cannot be written as it is
    part.write_bytes(page(metrics, examples, skeleton, title).encode("utf-8", "backslashreplace"))
    part.replace(file)


def page(metrics: dict[str, Any], examples: Sequence[Example], skeleton: Skeleton, title: str) -> str:
    """The HTML that `write` writes."""
    template, script = _template()
    headline = _headline(metrics)
    curves = _curves(metrics.get("curves") or {}, metrics)
    tables = [
        _table(name, rows, skeleton) for name, rows in metrics.items() if name.startswith("per_") and _filled(rows)
    ]
    reliability = _reliability(metrics.get("calibration") or {})
    pictures = [_picture(example, skeleton) for example in examples]
    kinds = dict.fromkeys(example.kind for example in examples)
    shown = {key for _, *keys, _ in _HEADLINE for key in keys} | _PLACED
    lacking = [name for name, *keys, _ in _HEADLINE if all(metrics.get(k) is None for k in keys if k)]
    for name, there in {
        "precision-recall curve": any(c.title == "Precision and recall" for c in curves),
        "PCK curve": any(c.title.startswith("PCK") for c in curves),
        "3DPCK curve": any(c.title.startswith("3DPCK") for c in curves),
        "table per joint": _filled(metrics.get("per_joint")),
        "table per size": _filled(metrics.get("per_size")),
        "table per group": _filled(metrics.get("per_group")),
        "calibration": bool(reliability),
        "images": bool(examples),
    }.items():
        lacking += [] if there else [name]
    rest = {k: v for k, v in metrics.items() if k not in shown and not k.startswith("per_") and v not in (None, {}, [])}
    return template.render(
        title=title,
        sentence=_sentence(metrics),
        headline=headline,
        lacking=lacking,
        curves=curves,
        tables=tables,
        fold=FOLD,
        reliability=reliability,
        event=_EVENTS.get(event, event) if (event := (metrics.get("calibration") or {}).get("event")) else None,
        predecessor=[(k, _text(v)) for k, v in (metrics.get("predecessor") or {}).items()],
        rest=[(k, _text(v)) for k, v in rest.items() if not isinstance(v, Mapping)],
        nested=[(k, _yaml(v)) for k, v in rest.items() if isinstance(v, Mapping)],
        config=_yaml(metrics["config"]) if metrics.get("config") else None,
        command=metrics.get("command"),
        kinds=[(kind, [(n, e, p) for n, (e, p) in enumerate(zip(examples, pictures, strict=True)) if e.kind == kind])
               for kind in kinds],
        scenes={
            "bones": [[a, b, _letter(skeleton, a, b)] for a, b in skeleton.bones.tolist()],
            "joints": [_letter(skeleton, j) for j in range(len(skeleton))],
            "scenes": [p["scene"] for p in pictures],
        },
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        colours={"r": draw.RIGHT, "l": draw.LEFT},
        plot=PLOT,
    )  # fmt: skip


@cache
def _template() -> tuple[Template, str]:
    """report.html, and report.js that goes into it."""
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False, "sort_keys": True}
    return environment.get_template("report.html"), (folder / "report.js").read_text(encoding="utf-8")


def _headline(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(Name, figure of people found, figure of all people, what it says) of the figures there are."""
    settings = (metrics.get("config") or {}).get("evaluate") or {}
    out = []
    for name, matched, everybody, meaning in _HEADLINE:
        pair = [metrics.get(key) if key else None for key in (matched, everybody)]
        limit = _number(settings.get(_THRESHOLD.get(matched or "")))
        meaning = meaning.format("so many" if limit is None else f"{limit:g}")
        if any(value is not None for value in pair):
            out.append((name, _text(pair[0]), _text(pair[1]), meaning))
    return out


def _sentence(metrics: Mapping[str, Any]) -> str:
    """What was found, in words."""
    if metrics.get("found") is None or metrics.get("people") is None:
        return ""
    text = f"{_text(metrics['found'])} of {_text(metrics['people'])} people found"
    if metrics.get("images") is not None:
        text += f" in {_text(metrics['images'])} images"
    if metrics.get("false") is not None:
        text += f"; {_text(metrics['false'])} false detection{'' if metrics['false'] == 1 else 's'}"
    return text + "."


def _curves(curves: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[_Chart]:
    """Charts of `evaluate`'s curves; none of those without values."""
    out = []
    pr = curves.get("pr") or {}
    lines = {f"OKS {name}": values for name, values in (pr.get("precision") or {}).items()}
    out.append(_chart("Precision and recall", "recall", "precision", pr.get("recall"), lines))
    for key, title, axis, x in (
        ("pck2d", "PCK: 2D joints within a distance", "distance, torso lengths", "threshold"),
        ("pck3d", "3DPCK: 3D joints within a distance", "distance, mm", "threshold_mm"),
    ):
        curve = curves.get(key) or {}
        lines = {"people found": curve.get("matched"), "all people": curve.get("all")}
        out.append(_chart(title, axis, "share of joints", curve.get(x), lines))
    return [chart for chart in out if chart]


def _chart(title: str, x: str, y: str, places: Any, series: Mapping[str, Any]) -> _Chart | None:
    """A chart of series of values 0..1 over the same places; None without any."""
    if not places:
        return None
    high = max(places) or 1
    lines: list[_Line] = []
    for label, values in series.items():
        pieces: list[list[str]] = [[]]
        for at, value in zip(places, values or (), strict=False):
            if (number := _number(value)) is None or number < 0:  # COCO's -1: no such recall
                pieces.append([])
            else:
                pieces[-1].append("{:.1f},{:.1f}".format(*_place(at / high, number)))
        if any(pieces):
            lines.append(_Line(label, [" ".join(piece) for piece in pieces if piece], style=len(lines)))
    return _Chart(title, x, y, *_ticks(high), lines) if lines else None


def _place(x: float, y: float) -> tuple[float, float]:
    """Values 0..1 -> pixels of a chart."""
    wide, high = PLOT["right"] - PLOT["left"], PLOT["bottom"] - PLOT["top"]
    return PLOT["left"] + wide * min(max(x, 0), 1), PLOT["bottom"] - high * min(max(y, 0), 1)


def _ticks(high: float) -> tuple[list[tuple[float, str]], list[tuple[float, str]]]:
    """Ticks of x from 0 to `high` and of y from 0 to 1."""
    steps = [t for t in MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(0, high) if -1e-9 <= t <= high * 1.0001]
    x = [(_place(t / high, 0)[0], f"{t:.3g}") for t in steps]
    return x, [(_place(0, t)[1], f"{t:.1f}") for t in (0, 0.2, 0.4, 0.6, 0.8, 1)]


def _reliability(calibration: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of detections' and of joints' scores, as they are and calibrated: a chart, and a table of each event."""
    out = []
    stages = (("", calibration), (", calibrated", calibration.get("calibrated") or {}))
    order = {event: n for n, event in enumerate(dict.fromkeys([*_EVENTS, *(calibration.get("score") or {})]))}
    for key, noun in _OF_WHAT.items():
        for when, tables in stages:
            errors = (tables.get("error") or {}).get(key) or {}
            lines: list[_Line] = []
            details: list[_Table] = []
            for event, rows in (tables.get(key) or {}).items():
                rows = [row for row in rows or () if row.get("count")]
                if not rows:
                    continue
                label, total = _EVENTS.get(event, event), sum(row["count"] for row in rows)
                dots = [
                    (*_place(row["mean"], row["right"]), 2 + 5 * math.sqrt(row["count"] / total),
                     f"score {row['mean']:.3f}: right {row['right']:.3f} of {row['count']}")
                    for row in rows
                ]  # fmt: skip
                pieces = [" ".join(f"{x:.1f},{y:.1f}" for x, y, *_ in dots)]
                lines.append(_Line(label, pieces, dots, order.get(event, len(lines))))
                cells: list[tuple[str, list[_Cell]]] = [
                    (f"{row['low']:.2f} to {row['high']:.2f}",
                     [(_text(row["count"]), None), (_text(row["mean"]), _number(row["mean"])),
                      (_text(row["right"]), _number(row["right"]))])
                    for row in rows
                ]  # fmt: skip
                title = f"{label}: {_text(total)} {noun}"
                if _number(errors.get(event)) is not None:
                    title += f", expected calibration error {_text(errors[event])}"
                details.append(_Table(title, [noun, "mean score", "share right"], cells))
            if lines:
                title = f"Scores of {noun}{when}"
                chart = _Chart(title, "mean score", "share right", *_ticks(1), lines, diagonal=True)
                out.append({"chart": chart, "tables": details})
    return out


def _table(name: str, rows: Mapping[str, Mapping[str, Any]], skeleton: Skeleton) -> _Table:
    """A table with a bar in each cell that is no count, as long as its part of 1, or of the largest of the column."""
    rows = {label: row for label, row in rows.items() if isinstance(row, Mapping)}
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    keys = [key for key in keys if any(row.get(key) is not None for row in rows.values())]
    largest = {key: max((_number(row.get(key)) or 0 for row in rows.values()), default=0) for key in keys}
    body = []
    for label, row in rows.items():
        cells: list[_Cell] = []
        for key in keys:
            value = _number(row.get(key))
            whole = largest[key] if key.startswith("error2d") or key.endswith("_mm") else 1
            bar = value is not None and not isinstance(row[key], int) and whole > 0
            cells.append((_text(row.get(key)), min(max((value or 0) / whole, 0), 1) if bar else None))
        body.append((str(label), cells))
    sides = []
    if name == "per_joint":
        sides = [_letter(skeleton, skeleton.index(j)) if j in skeleton.joints else "m" for j in rows]
    title = name.replace("_", " ").capitalize()
    return _Table(title, [_COLUMNS.get(key, key.replace("_", " ")) for key in keys], body, sides)


def _picture(example: Example, skeleton: Skeleton) -> dict[str, Any]:
    """The two overlays as data URIs, how many people each has, and the 3D scene."""
    side = max(example.image.shape[:2])
    scale = min(LONGEST / side, max(1, SMALLEST / side))
    size = (max(1, round(example.image.shape[1] * scale)), max(1, round(example.image.shape[0] * scale)))
    small = np.asarray(Image.fromarray(example.image).resize(size, Image.Resampling.LANCZOS))
    layers: dict[str, Sequence[Person] | People] = {"truth": example.truth, "found": example.found}
    return {
        "layers": [
            (name, _jpeg(draw.overlay(small, draw.scaled(people, scale), skeleton)), count)
            for (name, people), count in zip(
                layers.items(), (int((~example.truth.crowd.astype(bool)).sum()), len(example.found)), strict=True
            )
        ],
        "size": size,
        "scene": _scene(example, skeleton),
    }


def _jpeg(image: np.ndarray) -> str:
    """A data URI of at most about JPEG_BYTES."""
    picture, quality = Image.fromarray(image), 85
    while True:
        held = io.BytesIO()
        picture.save(held, "JPEG", quality=quality, optimize=True)
        if held.tell() <= JPEG_BYTES or quality <= 25:
            return "data:image/jpeg;base64," + base64.b64encode(held.getvalue()).decode()
        quality -= 15


def _scene(example: Example, skeleton: Skeleton) -> list[dict[str, Any]]:
    """The people with a 3D pose, side by side from left to right as in the image, their feet on the floor (y = 0).

    A person's truth and estimate stand in the same place, both centred on the torso, as MPJPE compares them. Each has a
    `label`, its numbers in the overlays, and `truth` and `found`: J points in metres, or None.
    """
    number = np.cumsum(~example.truth.crowd.astype(bool))  # as draw.overlay numbers them: without crowd regions
    pairs = _pairs(example) if example.pairs is None else np.asarray(example.pairs, np.int64).reshape(-1, 2)
    partner: dict[int, int] = {int(t): int(f) for t, f in pairs}
    alone = [(None, n) for n in range(len(example.found)) if n not in partner.values()]
    several = [len(example.found) > 1, number[-1:].sum() > 1]
    people: list[tuple[float, str, dict[str, np.ndarray]]] = []
    for t, f in [*((t, partner.get(t)) for t in range(len(example.truth)) if not example.truth.crowd[t]), *alone]:
        poses, labels, left = {}, [], math.inf
        if t is not None:
            labels.append(f"truth {number[t]}" if several[1] else "truth")
            if example.truth.has3d[t]:
                poses["truth"] = example.truth.pose3d[t]
            known = example.truth.pose2d[t][example.truth.seen[t] > 0, 0]
            left = float(known.mean()) if len(known) else float(example.truth.box[t, 0])
        if f is not None:
            labels.append(f"found {f + 1}" if several[0] else "found")
            poses["found"] = example.found[f].pose3d
            left = left if t is not None else float(example.found[f].pose2d[:, 0].mean())
        poses = {k: centre(np.asarray(p, np.float64), skeleton) for k, p in poses.items() if np.isfinite(p).all()}
        if not poses:
            continue
        label = " + ".join(labels)
        if len(poses) == 2:
            label += f": {1000 * np.linalg.norm(poses['truth'] - poses['found'], axis=-1).mean():.0f} mm apart"
        people.append((left if math.isfinite(left) else 0.0, label, poses))
    out, edge = [], 0.0
    for _, label, poses in sorted(people, key=lambda person: person[0]):
        every = np.concatenate(list(poses.values()))
        room = np.abs(every[:, [0, 2]]).max() + APART  # so that they pass each other when turned
        shift = np.array([edge + room, -every[:, 1].max(), 0])
        edge += 2 * room - APART
        out.append({"label": label, **{
            key: (poses[key] + shift).round(3).tolist() if key in poses else None for key in ("truth", "found")
        }})  # fmt: skip
    return out


def _pairs(example: Example) -> np.ndarray:
    """(M, 2) the assignment of the least 2D distance, of people no further apart than NEAR."""
    truth = example.truth
    known = (truth.seen > 0) & ~truth.crowd.astype(bool)[:, None]
    pose2d = np.array([p.pose2d for p in example.found], np.float64).reshape(-1, *truth.pose2d.shape[1:])
    box = box_of(truth.pose2d.astype(np.float64), known, margin=0)
    side = np.maximum((box[:, 2:] - box[:, :2]).max(-1, initial=0), 1)
    distance = np.linalg.norm(truth.pose2d[:, None] - pose2d[None], axis=-1)
    mean = np.where(known[:, None], distance, 0).sum(-1) / np.maximum(known.sum(-1), 1)[:, None] / side[:, None]
    mean = np.where(known.any(-1)[:, None] & np.isfinite(mean), mean, 2 * NEAR)
    rows = np.stack(linear_sum_assignment(np.minimum(mean, 2 * NEAR)), 1)
    return rows[mean[rows[:, 0], rows[:, 1]] < NEAR]


def _letter(skeleton: Skeleton, *joints: int) -> str:
    """r, l or m(iddle)."""
    return {draw.RIGHT: "r", draw.LEFT: "l"}.get(draw.side(skeleton, *joints), "m")


def _filled(rows: Any) -> bool:
    return isinstance(rows, Mapping) and any(
        value is not None for row in rows.values() if isinstance(row, Mapping) for value in row.values()
    )


def _number(value: Any) -> float | None:
    """A finite number, None for all else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _text(value: Any) -> str:
    """A figure for the reader."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ")
    if isinstance(value, float):
        return (f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}") if math.isfinite(value) else "–"
    if isinstance(value, Iterable) and not isinstance(value, str | Mapping):
        return ", ".join(_text(v) for v in value)
    return "–" if value is None else str(value)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110)
