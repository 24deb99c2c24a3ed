"""What a score means: how often poses of a score are right, and a map from scores to that share.

    judged = evaluate.judge(truth, found, skeleton)        # on a human-labelled set
    calibration = fit(judged, "oks50")
    people = calibration.apply(people)                     # their scores are probabilities now

A pose is right by one of three EVENTS; a detection of nobody is wrong by all of them. The map is isotonic regression
(Zadrozny & Elkan, KDD 2002), so that it never changes which of two poses is the surer one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lcrnet.config import UserError
from lcrnet.pose import Person

Event = Literal["oks50", "mm50", "mm100"]

EVENTS: dict[str, str] = {
    "oks50": "OKS of at least 0.5 (a joint: its similarity of at least 0.5)",
    "mm50": "MPJPE below 50 mm (a joint: its error)",
    "mm100": "MPJPE below 100 mm (a joint: its error)",
}

FILE = "calibration.json"
FORMAT = "lcrnet-calibration-1"

LEAST = 100
"""Judged poses that a map needs at least: its shares would be guesses with fewer."""

STEEP = 1e-3
"""Part of the raw score, as s / (1 + s), in the calibrated one: isotonic regression is flat in places, and scores must
go on to tell which pose is surer."""

FOLDS = 5
BINS = 10


@dataclass(frozen=True)
class Judged:
    """D detections of a labelled set. `right` and `joint_right` have an entry for each of EVENTS.

    image (D,) which image it is of; score (D,); joint_score (D, J); right (D,) and joint_right (D, J): 1 right, 0
    wrong, NaN where the labels cannot tell
    """

    image: np.ndarray
    score: np.ndarray
    joint_score: np.ndarray
    right: dict[str, np.ndarray]
    joint_right: dict[str, np.ndarray]


@dataclass(frozen=True)
class Map:
    """Raw score -> share of right ones, linear between the knots (x, y), both rising."""

    x: tuple[float, ...]
    y: tuple[float, ...]

    def __call__(self, score: np.ndarray) -> np.ndarray:
        """Scores of any shape -> 0..1, strictly rising with the score."""
        score = np.maximum(np.asarray(score, np.float64), 0)
        return (1 - STEEP) * np.interp(score, self.x, self.y) + STEEP * score / (1 + score)


@dataclass(frozen=True)
class Calibration:
    """Maps of poses and of joints to the probability of an event; `about` says what they were made from."""

    event: Event
    score: Map
    joint: Map
    about: dict[str, Any] = field(default_factory=dict)

    def apply(self, people: Sequence[Person]) -> list[Person]:
        """The same people with calibrated `score` and `joint_score`."""
        if not people:
            return []
        scores = self.score(np.array([p.score for p in people]))
        joints = self.joint(np.stack([p.joint_score for p in people])).astype(np.float32)
        return [replace(p, score=float(s), joint_score=j) for p, s, j in zip(people, scores, joints, strict=True)]


def fit(judged: Judged, event: Event, about: dict[str, Any] | None = None) -> Calibration:
    """The calibration for an event. UserError: fewer than LEAST poses can be judged, or all come out alike."""
    return Calibration(
        event,
        _isotonic(judged.score, judged.right[event], event),
        _isotonic(judged.joint_score.ravel(), judged.joint_right[event].ravel(), event),
        about or {},
    )


def tables(judged: Judged, event: Event | None = None) -> dict[str, Any]:
    """For JSON: `score` and `joint`, for each event `reliability` of the scores as they are; with an event also
    `calibrated`: the same of its calibrated scores, each image's by a map made from the images of the other folds."""
    out: dict[str, Any] = {
        "event": event,
        "events": EVENTS,
        "score": {e: reliability(judged.score, judged.right[e]) for e in EVENTS},
        "joint": {e: reliability(judged.joint_score.ravel(), judged.joint_right[e].ravel()) for e in EVENTS},
    }
    out["error"] = {"score": {e: error(rows) for e, rows in out["score"].items()},
                    "joint": {e: error(rows) for e, rows in out["joint"].items()}}  # fmt: skip
    if event:
        score, joint = np.full(judged.score.shape, np.nan), np.full(judged.joint_score.shape, np.nan)
        fold = judged.image % FOLDS
        for k in range(FOLDS):
            rest = fit(_of(judged, fold != k), event)
            score[fold == k] = rest.score(judged.score[fold == k])
            joint[fold == k] = rest.joint(judged.joint_score[fold == k])
        after = {"score": {event: reliability(score, judged.right[event])},
                 "joint": {event: reliability(joint.ravel(), judged.joint_right[event].ravel())}}  # fmt: skip
        out["calibrated"] = after | {"error": {n: {event: error(rows[event])} for n, rows in after.items()}}
    return out


def reliability(score: np.ndarray, right: np.ndarray) -> list[dict[str, Any]]:
    """Rows of a reliability table: of scores in [low, high) how many, their mean, and the share that is right.

    score, right (D,); NaN in `right` takes no part; scores above 1 are in the last row
    """
    known = ~np.isnan(right)
    score, right = np.clip(score[known], 0, 1), right[known]
    place = np.minimum((score * BINS).astype(int), BINS - 1)
    rows = []
    for i in range(BINS):
        here = place == i
        rows.append({
            "low": i / BINS, "high": (i + 1) / BINS, "count": int(here.sum()),
            "mean": float(score[here].mean()) if here.any() else None,
            "right": float(right[here].mean()) if here.any() else None,
        })  # fmt: skip
    return rows


def error(rows: Sequence[dict[str, Any]]) -> float | None:
    """Expected calibration error: |mean score - share right| of the rows, weighted by their counts (Guo et al., ICML
    2017); None where there is nothing to count."""
    total = sum(row["count"] for row in rows)
    return (
        sum(row["count"] * abs(row["mean"] - row["right"]) for row in rows if row["count"]) / total if total else None
    )


def save(calibration: Calibration, file: str | os.PathLike[str]) -> None:
    """Writes it as JSON that `load` reads back to an equal one; the file is replaced in one step."""
    value = {
        "format": FORMAT, "event": calibration.event, "score": calibration.score.__dict__,
        "joint": calibration.joint.__dict__, "about": calibration.about,
    }  # fmt: skip
    part = Path(file).with_name(f".{Path(file).name}.part")
    part.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, file)


def load(file: str | os.PathLike[str]) -> Calibration:
    """UserError names the file, the field and what is wrong with it."""
    try:
        value = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as fault:
        raise UserError(f"{file}: {fault.strerror or fault}") from None
    except (ValueError, RecursionError) as fault:
        raise UserError(f"{file}: not JSON: {fault}") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise UserError(f"{file}: format: expected {FORMAT!r}; calibrate anew with jobs/evaluate.py --calibrate")
    if value.get("event") not in EVENTS:
        raise UserError(f"{file}: event: {value.get('event')!r} is not one of {', '.join(EVENTS)}")
    about = value.get("about")
    if not isinstance(about, dict):
        raise UserError(f"{file}: about: expected fields below it")
    return Calibration(value["event"], _map(value, "score", file), _map(value, "joint", file), about)


def _map(value: dict[str, Any], name: str, file: str | os.PathLike[str]) -> Map:
    knots = value.get(name)
    try:
        x, y = (np.array(knots[axis], np.float64) for axis in "xy")  # type: ignore[index]
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{file}: {name}: expected numbers x and y") from None
    rising = x.ndim == 1 and x.shape == y.shape and len(x) > 0 and np.isfinite(x).all() and (np.diff(x) > 0).all()
    if not rising or not ((y >= 0) & (y <= 1)).all() or not (np.diff(y) >= 0).all():
        raise UserError(f"{file}: {name}: x must rise, and y rise from at least 0 to at most 1")
    return Map(tuple(x.tolist()), tuple(y.tolist()))


def _isotonic(score: np.ndarray, right: np.ndarray, event: str) -> Map:
    from sklearn.isotonic import IsotonicRegression

    known = ~np.isnan(right)
    score, right = score[known].astype(np.float64), right[known]
    if len(score) < LEAST or right.min() == right.max():
        what = f"{len(score)} can be judged" if len(score) < LEAST else "all come out alike"
        raise UserError(
            f"calibration by {event} ({EVENTS[event]}) needs at least {LEAST} poses, right and wrong ones, but {what}: "
            "evaluate on more images, or by an event that their labels can tell"
        )
    found = IsotonicRegression(y_min=0, y_max=1, increasing=True, out_of_bounds="clip").fit(score, right)
    x, first = np.unique(found.X_thresholds_, return_index=True)
    return Map(tuple(x.tolist()), tuple(np.clip(found.y_thresholds_[first], 0, 1).tolist()))


def _of(judged: Judged, rows: np.ndarray) -> Judged:
    return Judged(
        judged.image[rows], judged.score[rows], judged.joint_score[rows],
        {e: v[rows] for e, v in judged.right.items()}, {e: v[rows] for e, v in judged.joint_right.items()},
    )  # fmt: skip
