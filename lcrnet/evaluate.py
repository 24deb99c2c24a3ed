"""How good are people found in images: who is found, missed or false, and how far off their 2D and 3D poses are.

    metrics = evaluate(truth, found, skeleton, config.evaluate)    # a dict for JSON
    print(table(metrics))

A person is found if OKS, COCO's similarity of keypoints, or the distance of 2D joints (settings.match) pairs it with a
detection; each belongs to one pair at most. Errors of joints are measured on those pairs, and again over all people,
where the joints of a missed person are wrong. Shares are 0..1. Crowd people, and people without a labelled joint, are
regions: not to be found, and what is found there is not false. The formulas are in metrics.py.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.optimize import linear_sum_assignment

from lcrnet import config, image
from lcrnet.calibration import EVENTS, Judged
from lcrnet.metrics import (
    CURVE_2D,
    CURVE_3D_MM,
    auc,
    distance_of_pairs,
    errors3d,
    head_size,
    mean,
    median,
    oks,
    oks_of_pairs,
    predecessor,
    share,
    shares,
    torso_size,
)
from lcrnet.pose import People, Person, box_of
from lcrnet.skeleton import Skeleton

Metrics = dict[str, Any]

REGION_SHARE = 0.5
"""A detection with more than this part of its box in a crowd region belongs to the region."""

SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, np.inf)}
"""COCO's sizes of people: `area`, pixels of the image."""

PR_AT = {0: 0.5, 5: 0.75}
"""Rows of COCOeval's precision that have a curve: their OKS."""

CHUNK = 1 << 15
"""Pairs of a true and a found person that are measured at a time, over many images: a few MB."""


def detect(
    detect_batch: Callable[[list[np.ndarray]], list[list[Person]]],
    files: Sequence[Path],
    batch: int = 16,
    max_pixels: int = image.MAX_PIXELS,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[list[Person]], dict[str, str]]:
    """(The people found in each image file, {unreadable file: reason}); an unreadable file has nobody.

    detect_batch   `LCRNet.detect_batch`: RGB uint8 images -> their people, `batch` images at a time
    progress       called with (images done, all images) after each batch
    """
    found: list[list[Person]] = [[] for _ in files]
    unreadable: dict[str, str] = {}
    for start in range(0, len(files), batch):
        pixels = {}
        for i in range(start, min(start + batch, len(files))):
            try:
                pixels[i] = image.read(files[i], max_pixels)
            except image.Unreadable as reason:
                unreadable[str(files[i])] = str(reason)
        if pixels:
            for i, people in zip(pixels, detect_batch(list(pixels.values())), strict=True):
                found[i] = people
        if progress:
            progress(min(start + batch, len(files)), len(files))
    return found, unreadable


def examples(outcomes: Sequence[Outcome], count: int, seed: int = 0) -> dict[str, list[int]]:
    """Images to look at: the `worst`, the `best` and `random` others, at most `count` of each, by `Outcome.quality`.

    Images with nobody in them and nobody found are only among the random ones.
    """
    busy = [i for i, o in enumerate(outcomes) if len(o.pairs) + len(o.missed) + len(o.false)]
    order = sorted(busy, key=lambda i: outcomes[i].quality)
    half = min(count, len(order) // 2)
    worst, best = order[: max(half, 1)], order[::-1][:half]
    rest = np.setdiff1d(np.arange(len(outcomes)), worst + best)
    drawn = np.random.default_rng(seed).permutation(rest)[:count]
    return {"worst": worst, "best": best, "random": sorted(drawn.tolist())}


def match(true: People, found: Sequence[Person], skeleton: Skeleton, threshold: float) -> np.ndarray:
    """(M, 2) pairs (index of the true, index of the found person), the assignment of the largest sum of OKS.

    Only pairs with OKS of at least `threshold` (and above 0) count. Regions are never matched.
    """
    similar = oks(true, _poses2d(found, len(skeleton)), skeleton)
    return _assign(np.where((similar >= threshold) & ~_regions(true)[:, None], similar, 0))


@dataclass
class Outcome:
    """What became of the people of one image; indices into its `People` and its list of found persons.

    pairs (M, 2), oks (M,) (NaN if the skeleton has no sigmas), missed: true people without a pair, false: found without
    a pair, ignored: the same, but inside a crowd region, likeness (M,): what the pairs were made by, 0..1: OKS, or
    1 - distance / settings.distance.
    """

    pairs: np.ndarray
    oks: np.ndarray
    missed: np.ndarray
    false: np.ndarray
    ignored: np.ndarray
    likeness: np.ndarray

    @property
    def quality(self) -> float:
        """Likeness summed over pairs / (pairs + missed + false); 1 for an image without people where none is found."""
        count = len(self.pairs) + len(self.missed) + len(self.false)
        return float(self.likeness.sum() / count) if count else 1.0

    def __str__(self) -> str:
        counts = f"{len(self.pairs)} found, {len(self.missed)} missed, {len(self.false)} false"
        return f"quality {self.quality:.2f}: {counts}"


def compare(true: People, found: Sequence[Person], skeleton: Skeleton, settings: config.Evaluate) -> Outcome:
    """True and found people of one image; those found below `settings.min_score` take no part."""
    return outcomes([true], [found], skeleton, settings)[0]


def outcomes(
    truth: Sequence[People], found: Sequence[Sequence[Person]], skeleton: Skeleton, settings: config.Evaluate
) -> list[Outcome]:
    """`compare` of each image. ValueError: not as many images of truth as of detections."""
    return list(_outcomes(truth, found, skeleton, settings))


def _outcomes(
    truth: Sequence[People], found: Sequence[Sequence[Person]], skeleton: Skeleton, settings: config.Evaluate
) -> Iterator[Outcome]:
    if len(truth) != len(found):
        raise ValueError(f"{len(truth)} images of truth, but detections of {len(found)}")
    if settings.match == "oks" and len(skeleton.oks_sigma) != len(skeleton):
        raise ValueError(f"{skeleton.name} has no oks_sigma, which OKS needs; evaluate.match: distance does not")
    rows = [np.array([n for n, p in enumerate(own) if p.score >= settings.min_score], np.int64) for own in found]
    pairs = np.cumsum([len(people) * len(own) for people, own in zip(truth, rows, strict=True)])
    for block in np.split(np.arange(len(truth)), np.flatnonzero(np.diff(pairs // CHUNK)) + 1):
        kept = [[found[i][n] for n in rows[i]] for i in block]
        parts = _block([truth[i] for i in block], kept, skeleton, settings)
        for i, (pair, near, missed, false, ignored, likeness) in zip(block, parts, strict=True):
            pair[:, 1] = rows[i][pair[:, 1]]
            yield Outcome(pair, near, missed, rows[i][false], rows[i][ignored], likeness)


def _block(
    truth: Sequence[People], found: Sequence[Sequence[Person]], skeleton: Skeleton, settings: config.Evaluate
) -> Iterator[tuple[np.ndarray, ...]]:
    """The fields of each image's Outcome. The images' pairs are measured at once; only the assignment goes by image."""
    people = People.join([People.empty(0, len(skeleton)), *truth])
    region = _regions(people)
    pose2d = _poses2d([person for own in found for person in own], len(skeleton))
    # all pairs within an image, true person by true person: t and d are their rows in `people` and `pose2d`
    trues, founds = [len(own) for own in truth], [len(own) for own in found]
    rivals = np.repeat(np.array(founds, int), trues)
    first = np.repeat(np.cumsum([0, *founds])[:-1], trues)
    t = np.repeat(np.arange(len(people)), rivals)
    d = np.arange(len(t)) + np.repeat(first - np.cumsum(rivals) + rivals, rivals)

    near = np.full(len(t), np.nan)
    if len(skeleton.oks_sigma) == len(skeleton):
        near = oks_of_pairs(people, t, pose2d, d, skeleton)
    likeness, enough = near, near >= settings.oks
    if settings.match == "distance":
        likeness = 1 - distance_of_pairs(people, t, pose2d, d) / settings.distance
        enough = likeness > 0
    gain = np.where(enough & ~region[t], likeness, 0)

    person = pair = 0
    for true, own, count, kept in zip(truth, found, trues, founds, strict=True):
        pairs = _assign(gain[pair : pair + count * kept].reshape(count, kept))
        at = pair + pairs[:, 0] * kept + pairs[:, 1]
        missed, single, inside = ~region[person : person + count], np.ones(kept, bool), np.zeros(kept, bool)
        if own and not missed.all():
            box = np.array([p.box for p in own], np.float64)
            inside = _share_inside(box, true.box[~missed].astype(np.float64)) > REGION_SHARE
        missed[pairs[:, 0]], single[pairs[:, 1]] = False, False
        false, ignored = np.flatnonzero(single & ~inside), np.flatnonzero(single & inside)
        yield pairs, near[at], np.flatnonzero(missed), false, ignored, likeness[at]
        person, pair = person + count, pair + count * kept


def evaluate(
    truth: Sequence[People],
    found: Sequence[Sequence[Person]],
    skeleton: Skeleton,
    settings: config.Evaluate,
    groups: Sequence[str] | None = None,
    outcomes: Sequence[Outcome] | None = None,
) -> Metrics:
    """Figures of a data set: truth and detections of each image, in the same order. ValueError: their lengths differ.

    groups    a name for each image (action, sequence, ...), for the table `per_group`
    outcomes  those of the same people and settings, where the caller has them

    Counts: `images`, `people` (true), `people3d` (found ones with a true 3D pose), `people3d_all` (true ones with it),
        `detections` (of at least min_score) = `found` + `false` + `ignored` (in crowd regions); `missed`.
    `recall` found / people, `precision` found / (found + false).
    `oks_ap`, `oks_ap50`, `oks_ap75`: pycocotools' COCOeval, all detections with their scores.
    A figure that ends in `_all` is over all true people, the joints of missed ones being wrong (as MuPoTS-3D has it);
    without, over found ones.
    2D, on the labelled joints, hidden ones included:
    `pck2d`, `pck2d_all` share of joints within settings.pck2d times the torso (middle of the shoulders to middle of the
        hips in the true pose, at least MIN_TORSO of its box), `pckh`, `pckh_all` within settings.pckh times the head
        (`metrics.head_size`); people without the joints that the unit takes are left out; `error2d_height_median`
        median distance / height of the box of the true pose.
    3D, both poses centred on the torso, on all joints: `mpjpe_mm` mean distance, `n_mpjpe_mm` after scaling,
        `pa_mpjpe_mm` after Procrustes (`metrics.Errors3d`), `pck3d`, `pck3d_all` share under settings.pck3d_mm,
        `auc3d`, `auc3d_all` mean share under 0, 5 .. 150 mm (`metrics.auc`).
    Tables: `per_joint` by joint name, `per_size` by COCO's sizes, `per_group` if there are groups, by name.
    `curves`, lists to plot, empty where there is nobody: `pr` (precision at 101 recalls, COCOeval's, at OKS 0.50 and
        0.75), `pck2d` (`threshold` in torsos; `matched`, `all`), `pck3d` (`threshold_mm`; `matched`, `all`).
    `predecessor` if settings.predecessor: `metrics.predecessor`.
    Figures of nobody are None. A found 3D pose that is not finite is wrong in `pck3d` and `auc3d`, and in no mean.
    """
    if groups is not None and len(groups) != len(truth):
        raise ValueError(f"{len(truth)} images of truth, but groups of {len(groups)}")
    if outcomes is None:
        outcomes = list(_outcomes(truth, found, skeleton, settings))
    elif not len(truth) == len(found) == len(outcomes):
        raise ValueError(f"{len(truth)} images of truth, but detections of {len(found)}, outcomes of {len(outcomes)}")
    joints = len(skeleton)
    people = People.join([People.empty(0, joints), *truth])
    picture = np.repeat(np.arange(len(truth)), [len(t) for t in truth])
    start = np.cumsum([0, *(len(t) for t in truth)])
    row = np.concatenate([np.zeros(0, np.int64), *(s + o.pairs[:, 0] for s, o in zip(start, outcomes, strict=False))])
    persons = [found[i][n] for i, o in enumerate(outcomes) for n in o.pairs[:, 1]]
    hit = people[row]
    wanted = ~_regions(people)
    false, ignored = sum(len(o.false) for o in outcomes), sum(len(o.ignored) for o in outcomes)

    # 2D: distances (M, J), NaN where there is no label
    pose2d = _poses2d(persons, joints)
    error = np.where(hit.seen > 0, np.linalg.norm(pose2d - hit.pose2d, axis=-1), np.nan)
    box = box_of(hit.pose2d.astype(np.float64), hit.seen, margin=0)
    relative = error / _positive(box[:, 3] - box[:, 1])[:, None]
    torso, head = torso_size(people, skeleton), head_size(people, skeleton)
    torsos, heads = error / torso[row, None], error / head[row, None]
    right, right_h = _within(torsos, settings.pck2d), _within(heads, settings.pckh)
    due, due_h = ((people.seen[wanted] > 0)[np.isfinite(unit[wanted])].sum() for unit in (torso, head))

    # 3D: distances (M3, J) in millimetres
    has3d = hit.has3d.astype(bool)
    pose = np.array([p.pose3d for p in persons], np.float64).reshape(-1, joints, 3)[has3d]
    error3d = errors3d(pose, hit.pose3d[has3d].astype(np.float64), skeleton)
    right3d = error3d.plain < settings.pck3d_mm
    people3d = int((wanted & people.has3d.astype(bool)).sum())
    due3d = people3d * joints

    def rows(of: np.ndarray) -> dict[str, float | int | None]:
        """A table's figures of some of the people, (P,) bool."""
        some = of[row]
        return {
            "people": int((of & wanted).sum()),
            "found": int(some.sum()),
            "recall": share(some.sum(), (of & wanted).sum()),
            "error2d_height_median": median(relative[some]),
            "pck2d": mean(right[some]),
            "mpjpe_mm": mean(error3d.plain[some[has3d]]),
            "pa_mpjpe_mm": mean(error3d.procrustes[some[has3d]]),
            "pck3d": mean(right3d[some[has3d]]),
        }

    precision = _precision(truth, found, skeleton)
    metrics: Metrics = {
        "images": len(truth),
        "people": int(wanted.sum()),
        "people3d": int(has3d.sum()),
        "people3d_all": people3d,
        "detections": len(persons) + false + ignored,
        "found": len(persons),
        "missed": int(wanted.sum()) - len(persons),
        "false": false,
        "ignored": ignored,
        "recall": share(len(persons), wanted.sum()),
        "precision": share(len(persons), len(persons) + false),
        **_ap(precision),
        "pck2d": mean(right),
        "pck2d_all": share(np.nansum(right), due),
        "pckh": mean(right_h),
        "pckh_all": share(np.nansum(right_h), due_h),
        "error2d_height_median": median(relative),
        "mpjpe_mm": mean(error3d.plain),
        "n_mpjpe_mm": mean(error3d.scaled),
        "pa_mpjpe_mm": mean(error3d.procrustes),
        "pck3d": mean(right3d),
        "pck3d_all": share(right3d.sum(), due3d),
        "auc3d": auc(error3d.plain, error3d.plain.size),
        "auc3d_all": auc(error3d.plain, due3d),
        "per_joint": {
            name: {
                "error2d_height_median": median(relative[:, j]),
                "pck2d": mean(right[:, j]),
                "pckh": mean(right_h[:, j]),
                "mpjpe_mm": mean(error3d.plain[:, j]),
                "pa_mpjpe_mm": mean(error3d.procrustes[:, j]),
                "pck3d": mean(right3d[:, j]),
            }
            for j, name in enumerate(skeleton.joints)
        },
        "per_size": {name: rows((people.area >= low) & (people.area < high)) for name, (low, high) in SIZES.items()},
    }
    if groups is not None:
        names, group = np.unique(np.array(groups, str), return_inverse=True)
        metrics["per_group"] = {str(name): rows(group[picture] == g) for g, name in enumerate(names)}
    limits2d = CURVE_2D.tolist() if due or np.isfinite(torsos).any() else []
    metrics["curves"] = {
        "pr": {
            "recall": [] if precision is None else np.linspace(0, 1, precision.shape[1]).tolist(),
            "precision": {f"{at:.2f}": [] if precision is None else precision[n].tolist() for n, at in PR_AT.items()},
        },
        "pck2d": {
            "threshold": limits2d,
            "matched": shares(torsos, CURVE_2D, int((~np.isnan(torsos)).sum()), closed=True),
            "all": shares(torsos, CURVE_2D, int(due), closed=True),
        },
        "pck3d": {
            "threshold_mm": CURVE_3D_MM.tolist() if due3d else [],
            "matched": shares(error3d.plain, CURVE_3D_MM, error3d.plain.size, closed=False),
            "all": shares(error3d.plain, CURVE_3D_MM, due3d, closed=False),
        },
    }
    if settings.predecessor:
        metrics["predecessor"] = predecessor(truth, found, skeleton)
    return metrics


def judge(truth: Sequence[People], found: Sequence[Sequence[Person]], skeleton: Skeleton) -> Judged:
    """Which of all detections, and which of their joints, are right, by each of `calibration.EVENTS`.

    Detections are paired with people by the largest sum of OKS, however small. One without a pair is wrong in all its
    joints, or not judged in a crowd region. By millimetres only people with 3D are judged, and false detections where
    everybody in the image has it.
    """
    joints, every = len(skeleton), list(EVENTS)
    outcomes = _outcomes(truth, found, skeleton, config.Evaluate(oks=0, min_score=0))
    persons = [person for own in found for person in own]
    start = np.cumsum([0, *(len(own) for own in found)])
    image = np.repeat(np.arange(len(found)), [len(own) for own in found])
    right, right_j = np.full((len(every), len(persons)), np.nan), np.full((len(every), len(persons), joints), np.nan)
    rows, people, near = [np.zeros(0, np.int64)], [People.empty(0, joints)], [np.zeros(0)]
    for i, (own, outcome) in enumerate(zip(truth, outcomes, strict=True)):
        false = start[i] + outcome.false
        all3d = bool(own.has3d[~_regions(own)].all())
        for e in range(3 if all3d else 1):
            right[e, false], right_j[e, false] = 0, 0
        rows.append(start[i] + outcome.pairs[:, 1])
        people.append(own[outcome.pairs[:, 0]])
        near.append(outcome.oks)
    row, true = np.concatenate(rows), People.join(people)
    pose2d, known = _poses2d([persons[n] for n in row], joints), true.seen > 0
    right[0, row] = np.concatenate(near) >= 0.5
    away = ((pose2d - true.pose2d) ** 2).sum(-1)
    scale = 2 * (2 * skeleton.sigma) ** 2 * (true.area.astype(np.float64) + np.spacing(1))[:, None]
    right_j[0, row] = np.where(known, np.exp(-away / scale) >= 0.5, np.nan)
    has3d = true.has3d.astype(bool)
    pose3d = np.array([persons[n].pose3d for n in row], np.float64).reshape(-1, joints, 3)[has3d]
    error = errors3d(pose3d, true.pose3d[has3d].astype(np.float64), skeleton).plain
    for e, limit in ((1, 50), (2, 100)):
        right[e, row[has3d]], right_j[e, row[has3d]] = error.mean(-1) < limit, error < limit
    return Judged(
        image,
        np.array([p.score for p in persons], np.float64),
        np.array([p.joint_score for p in persons], np.float64).reshape(-1, joints),
        dict(zip(every, right, strict=True)),
        dict(zip(every, right_j, strict=True)),
    )


def oks_ap(truth: Sequence[People], found: Sequence[Sequence[Person]], skeleton: Skeleton) -> dict[str, float | None]:
    """COCO's keypoint AP of `oks_ap` 0.5:0.95, `oks_ap50`, `oks_ap75` by pycocotools, with the skeleton's sigmas.

    Regions are its crowds; every detection takes part. None where there is nobody to find, or no sigmas.
    """
    return _ap(_precision(truth, found, skeleton))


def _ap(precision: np.ndarray | None) -> dict[str, float | None]:
    if precision is None:
        return dict.fromkeys(("oks_ap", "oks_ap50", "oks_ap75"))
    return {"oks_ap": mean(precision), "oks_ap50": mean(precision[0]), "oks_ap75": mean(precision[5])}


def _precision(truth: Sequence[People], found: Sequence[Sequence[Person]], skeleton: Skeleton) -> np.ndarray | None:
    """(10, 101) COCOeval's precision at OKS 0.5:0.95 and recall 0:1; None where nobody is to be found."""
    joints = len(skeleton)
    people = People.join([People.empty(0, joints), *truth])
    region = _regions(people)
    if region.all() or len(skeleton.oks_sigma) != joints:
        return None
    seen = np.where(region[:, None], 0, people.seen)
    keypoints = np.concatenate([people.pose2d, seen[..., None]], -1, dtype=np.float64).reshape(-1, 3 * joints)
    box = people.box.astype(np.float64)
    box[:, 2:] -= box[:, :2]
    picture = np.repeat(np.arange(1, len(truth) + 1), [len(t) for t in truth])
    labels = [
        {"id": n, "image_id": i, "category_id": 1, "keypoints": k, "num_keypoints": c, "bbox": b, "area": a,
         "iscrowd": r}
        for n, (i, k, c, b, a, r) in enumerate(
            zip(picture.tolist(), keypoints, (seen > 0).sum(1).tolist(), box.tolist(), people.area.tolist(),
                region.astype(int).tolist(), strict=True), 1)
    ]  # fmt: skip
    persons = [person for own in found for person in own]
    picture = np.repeat(np.arange(1, len(found) + 1), [len(own) for own in found])
    pose2d = _poses2d(persons, joints)
    flat = np.concatenate([pose2d, np.ones((len(persons), joints, 1))], -1).reshape(-1, 3 * joints)
    results = [
        {"id": n, "image_id": i, "category_id": 1, "keypoints": k, "score": float(person.score), "area": 1.0}
        for n, (i, k, person) in enumerate(zip(picture.tolist(), flat, persons, strict=True), 1)
    ]
    images = [{"id": i} for i in range(1, len(truth) + 1)]
    with contextlib.redirect_stdout(io.StringIO()):
        judge = COCOeval(_coco(images, labels), _coco(images, results), "keypoints")
        judge.params.kpt_oks_sigmas = skeleton.sigma
        judge.params.maxDets = [max(20, *(len(own) for own in found))]
        judge.params.areaRng, judge.params.areaRngLbl = judge.params.areaRng[:1], ["all"]
        judge.evaluate()
        judge.accumulate()
    precision: np.ndarray = judge.eval["precision"][:, :, 0, 0, 0]
    return precision


def table(metrics: Metrics) -> str:
    """The figures as text for a terminal: all but the curves and other lists."""
    lines = [f"{name:24}{_text(value)}" for name, value in metrics.items() if not isinstance(value, (dict, list))]
    for title, rows in ((name, value) for name, value in metrics.items() if name.startswith("per_")):
        columns = list(next(iter(rows.values()), {}))
        first = 2 + max(len(title), *map(len, rows)) if rows else len(title)
        width = {c: max(len(c), 7) + 2 for c in columns}
        lines += ["", f"{title:{first}}" + "".join(f"{c:>{width[c]}}" for c in columns)]
        for row, values in rows.items():
            lines.append(f"{row:{first}}" + "".join(f"{_text(values[c]):>{width[c]}}" for c in columns))
    if metrics.get("predecessor"):
        lines += ["", "predecessor, as the seed's test_net.py computes it, faults included:"]
        lines += [f"{name:24}{_text(value)}" for name, value in metrics["predecessor"].items()]
    return "\n".join(lines)


def _poses2d(persons: Sequence[Person], joints: int) -> np.ndarray:
    """(N, J, 2) float64; NaN becomes inf, far from everything (COCOeval would take NaN for a match)."""
    pose2d = np.array([person.pose2d for person in persons], np.float64).reshape(-1, joints, 2)
    return np.where(np.isnan(pose2d), np.inf, pose2d)


def _assign(gain: np.ndarray) -> np.ndarray:
    """(M, 2) pairs (row, column) of the assignment of the largest sum of gain (P, N), those of gain above 0."""
    pairs = np.stack(linear_sum_assignment(gain, maximize=True), 1)
    return pairs[gain[pairs[:, 0], pairs[:, 1]] > 0]


def _within(ratio: np.ndarray, limit: float) -> np.ndarray:
    """1 where ratio <= limit, else 0; NaN stays."""
    return np.where(np.isnan(ratio), np.nan, ratio <= limit)


def _regions(people: People) -> np.ndarray:
    """(P,) bool: not to be found."""
    return people.crowd.astype(bool) | ~(people.seen > 0).any(-1)


def _share_inside(box: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """(N,) largest part of each box (N, 4) that lies in one of the regions (R, 4)."""
    low = np.maximum(box[:, None, :2], regions[None, :, :2])
    high = np.minimum(box[:, None, 2:], regions[None, :, 2:])
    common = np.maximum(high - low, 0).prod(-1).max(1, initial=0)
    return common / np.maximum((box[:, 2:] - box[:, :2]).prod(-1), 1e-9)


def _positive(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, values, np.nan)


def _coco(images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> COCO:
    coco = COCO()
    coco.dataset = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
    coco.createIndex()
    return coco


def _text(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:.0f}"
