"""How good are people found in images: who is found, missed or false, and how far off their 2D and 3D poses are.

    metrics = evaluate(truth, found, skeleton, config.evaluate)    # a dict for JSON
    print(table(metrics))

A person is found if OKS, COCO's similarity of keypoints, pairs it with a detection; each belongs to one pair at most.
Errors of joints are measured on those pairs. Shares are 0..1. Crowd people, and people without a labelled joint, are
regions: not to be found, and what is found there is not false.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.optimize import linear_sum_assignment

from lcrnet import config, image
from lcrnet.pose import People, Person, box_of, centre, procrustes
from lcrnet.skeleton import Skeleton

Metrics = dict[str, Any]

REGION_SHARE = 0.5
"""A detection with more than this part of its box in a crowd region belongs to the region."""

MIN_TORSO = 0.1
"""PCK's unit is at least this part of the longer side of the pose's box: a torso seen from its end has no length."""

AUC_MM = np.arange(0, 151, 5)
"""Thresholds of the 3D AUC (Mehta et al., "Monocular 3D human pose estimation in the wild", 3DV 2017)."""

SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, np.inf)}
"""COCO's sizes of people: `area`, pixels of the image."""


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


def oks(true: People, pose2d: np.ndarray, skeleton: Skeleton) -> np.ndarray:
    """(P, N) object keypoint similarity 0..1 of true people and 2D poses (N, J, 2) in pixels.

    pycocotools' COCOeval.computeOks: exp(-d^2 / (2 area k^2)), k = 2 sigma, averaged over the labelled joints. A true
    person without a labelled joint gets 0. ValueError: the skeleton has no `oks_sigma`.
    """
    if len(skeleton.oks_sigma) != len(skeleton):
        raise ValueError(f"{skeleton.name} has no oks_sigma, which OKS needs")
    known = true.seen > 0
    distance = ((true.pose2d[:, None].astype(np.float64) - pose2d[None]) ** 2).sum(-1)
    scale = 2 * (2 * skeleton.sigma) ** 2 * (true.area.astype(np.float64) + np.spacing(1))[:, None]
    near = np.where(known[:, None], np.exp(-distance / scale[:, None]), 0)
    return near.sum(-1) / np.maximum(known.sum(-1), 1)[:, None]


def match(true: People, found: Sequence[Person], skeleton: Skeleton, threshold: float) -> np.ndarray:
    """(M, 2) pairs (index of the true, index of the found person), the assignment of the largest sum of OKS.

    Only pairs with OKS of at least `threshold` (and above 0) count. Regions are never matched.
    """
    return _match(true, _oks(true, found, skeleton), threshold)


@dataclass
class Outcome:
    """What became of the people of one image; indices into its `People` and its list of found persons.

    pairs (M, 2), oks (M,), missed: true people without a pair, false: found without a pair, ignored: the same, but
    inside a crowd region.
    """

    pairs: np.ndarray
    oks: np.ndarray
    missed: np.ndarray
    false: np.ndarray
    ignored: np.ndarray

    @property
    def quality(self) -> float:
        """OKS summed over pairs / (pairs + missed + false); 1 for an image without people where none is found."""
        count = len(self.pairs) + len(self.missed) + len(self.false)
        return float(self.oks.sum() / count) if count else 1.0

    def __str__(self) -> str:
        counts = f"{len(self.pairs)} found, {len(self.missed)} missed, {len(self.false)} false"
        return f"quality {self.quality:.2f}: {counts}"


def compare(true: People, found: Sequence[Person], skeleton: Skeleton, settings: config.Evaluate) -> Outcome:
    """True and found people of one image; those found below `settings.min_score` take no part."""
    rows = np.array([i for i, person in enumerate(found) if person.score >= settings.min_score], np.int64)
    kept = [found[i] for i in rows]
    similar = _oks(true, kept, skeleton)
    pairs = _match(true, similar, settings.oks)
    single = np.setdiff1d(np.arange(len(kept)), pairs[:, 1])
    region = _regions(true)
    box = np.array([kept[i].box for i in single], np.float64).reshape(-1, 4)
    inside = _share_inside(box, true.box[region].astype(np.float64)) > REGION_SHARE
    missed = np.setdiff1d(np.flatnonzero(~region), pairs[:, 0])
    score = similar[pairs[:, 0], pairs[:, 1]]
    pairs[:, 1] = rows[pairs[:, 1]]
    return Outcome(pairs, score, missed, rows[single[~inside]], rows[single[inside]])


def evaluate(
    truth: Sequence[People], found: Sequence[Sequence[Person]], skeleton: Skeleton, settings: config.Evaluate
) -> Metrics:
    """Figures of a data set: truth and detections of each image, in the same order. ValueError: their lengths differ.

    Counts: `images`, `people` (true), `people3d` (found ones with a true 3D pose: the 3D figures are theirs),
        `detections` (of at least min_score) = `found` + `false` + `ignored` (in crowd regions); `missed`.
    `recall` found / people, `precision` found / (found + false).
    `oks_ap`, `oks_ap50`, `oks_ap75`: pycocotools' COCOeval, all detections with their scores.
    2D, on the labelled joints (hidden ones included) of found people:
    `pck2d` share of joints within settings.pck2d times the torso (middle of the shoulders to middle of the hips in the
        true pose, at least MIN_TORSO of its box; people without those four joints labelled are left out), `pck2d_all`
        the same over all true people, the joints of missed ones being wrong, `error2d_height_median` median distance
        / height of the box of the true pose.
    3D, both poses centred on the torso, on all joints: `mpjpe_mm` mean distance, `n_mpjpe_mm` after scaling (Rhodin et
        al., CVPR 2018), `pa_mpjpe_mm` after Procrustes with scale, without reflection, `pck3d` share under
        settings.pck3d_mm, `auc3d` mean share under 0, 5 .. 150 mm (a perfect pose has 30/31, as in MPI-INF-3DHP).
    Tables: `per_joint` by joint name, `per_size` by COCO's sizes. Figures of nobody are None.
    """
    if len(truth) != len(found):
        raise ValueError(f"{len(truth)} images of truth, but detections of {len(found)}")
    joints = len(skeleton)
    outcomes = [compare(t, f, skeleton, settings) for t, f in zip(truth, found, strict=True)]
    people = People.join([People.empty(0, joints), *truth])
    start = np.cumsum([0, *(len(t) for t in truth)])
    row = np.concatenate([np.zeros(0, np.int64), *(s + o.pairs[:, 0] for s, o in zip(start, outcomes, strict=False))])
    persons = [found[i][n] for i, o in enumerate(outcomes) for n in o.pairs[:, 1]]
    hit = people[row]
    wanted = ~_regions(people)
    false, ignored = sum(len(o.false) for o in outcomes), sum(len(o.ignored) for o in outcomes)

    # 2D: distances (M, J), NaN where there is no label
    pose2d = np.array([p.pose2d for p in persons], np.float64).reshape(-1, joints, 2)
    error = np.where(hit.seen > 0, np.linalg.norm(pose2d - hit.pose2d, axis=-1), np.nan)
    box = box_of(hit.pose2d.astype(np.float64), hit.seen, margin=0)
    relative = error / _positive(box[:, 3] - box[:, 1])[:, None]
    torso = _torso(hit, skeleton)
    measured = (hit.seen > 0) & np.isfinite(torso)[:, None]
    right = np.where(measured, error <= settings.pck2d * torso[:, None], np.nan)
    due = (people.seen[wanted] > 0)[np.isfinite(_torso(people[wanted], skeleton))].sum()

    # 3D: distances (M3, J) in millimetres
    has3d = hit.has3d.astype(bool)
    pose = centre(np.array([p.pose3d for p in persons], np.float64).reshape(-1, joints, 3)[has3d], skeleton)
    goal = centre(hit.pose3d[has3d].astype(np.float64), skeleton)
    scale = (pose * goal).sum((-1, -2)) / np.maximum((pose**2).sum((-1, -2)), 1e-12)
    error3d = _millimetres(pose, goal)

    size = {name: (hit.area >= low) & (hit.area < high) for name, (low, high) in SIZES.items()}
    count = {n: int((wanted & (people.area >= low) & (people.area < high)).sum()) for n, (low, high) in SIZES.items()}
    return {
        "images": len(truth),
        "people": int(wanted.sum()),
        "people3d": int(has3d.sum()),
        "detections": len(persons) + false + ignored,
        "found": len(persons),
        "missed": int(wanted.sum()) - len(persons),
        "false": false,
        "ignored": ignored,
        "recall": _share(len(persons), wanted.sum()),
        "precision": _share(len(persons), len(persons) + false),
        **oks_ap(truth, found, skeleton),
        "pck2d": _mean(right),
        "pck2d_all": _share(np.nansum(right), due),
        "error2d_height_median": _median(relative),
        "mpjpe_mm": _mean(error3d),
        "n_mpjpe_mm": _mean(_millimetres(scale[:, None, None] * pose, goal)),
        "pa_mpjpe_mm": _mean(_millimetres(procrustes(pose, goal), goal)),
        "pck3d": _mean(error3d < settings.pck3d_mm),
        "auc3d": _mean([np.mean(error3d < limit) for limit in AUC_MM]) if error3d.size else None,
        "per_joint": {
            name: {
                "error2d_height_median": _median(relative[:, j]),
                "pck2d": _mean(right[:, j]),
                "mpjpe_mm": _mean(error3d[:, j]),
            }
            for j, name in enumerate(skeleton.joints)
        },
        "per_size": {
            name: {
                "people": count[name],
                "found": int(rows.sum()),
                "recall": _share(rows.sum(), count[name]),
                "error2d_height_median": _median(relative[rows]),
                "mpjpe_mm": _mean(error3d[rows[has3d]]),
            }
            for name, rows in size.items()
        },
    }


def oks_ap(truth: Sequence[People], found: Sequence[Sequence[Person]], skeleton: Skeleton) -> dict[str, float | None]:
    """COCO's keypoint AP of `oks_ap` 0.5:0.95, `oks_ap50`, `oks_ap75` by pycocotools, with the skeleton's sigmas.

    Regions are its crowds; every detection takes part. None where there is nobody to find.
    """
    images = [{"id": i} for i in range(1, len(truth) + 1)]
    labels: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for i, (true, persons) in enumerate(zip(truth, found, strict=True), 1):
        region = _regions(true)
        seen = np.where(region[:, None], 0, true.seen)
        keypoints = np.concatenate([true.pose2d, seen[..., None]], -1, dtype=np.float64).reshape(-1, 3 * len(skeleton))
        box = true.box.astype(np.float64)
        box[:, 2:] -= box[:, :2]
        for p in range(len(true)):
            labels.append(
                {"id": len(labels) + 1, "image_id": i, "category_id": 1, "keypoints": keypoints[p],
                 "num_keypoints": int((seen[p] > 0).sum()), "bbox": box[p].tolist(), "area": float(true.area[p]),
                 "iscrowd": int(region[p])}
            )  # fmt: skip
        for person in persons:
            pose2d = np.nan_to_num(person.pose2d, nan=np.inf)  # COCOeval would take NaN for a match
            flat = np.concatenate([pose2d, np.ones((len(skeleton), 1))], 1, dtype=np.float64).ravel()
            results.append(
                {"id": len(results) + 1, "image_id": i, "category_id": 1, "keypoints": flat,
                 "score": float(person.score), "area": 1.0}
            )  # fmt: skip
    names = ("oks_ap", "oks_ap50", "oks_ap75")
    if all(label["iscrowd"] for label in labels):
        return dict.fromkeys(names)
    with contextlib.redirect_stdout(io.StringIO()):
        judge = COCOeval(_coco(images, labels), _coco(images, results), "keypoints")
        judge.params.kpt_oks_sigmas = skeleton.sigma
        judge.params.maxDets = [max(20, *(len(persons) for persons in found))]
        judge.params.areaRng, judge.params.areaRngLbl = judge.params.areaRng[:1], ["all"]
        judge.evaluate()
        judge.accumulate()
    precision = judge.eval["precision"]  # (10 thresholds of OKS, 101 of recall, 1, 1, 1)
    return {name: _mean(precision[at]) for name, at in zip(names, (slice(None), 0, 5), strict=True)}


def table(metrics: Metrics) -> str:
    """The figures as text for a terminal."""
    lines = [f"{name:24}{_text(value)}" for name, value in metrics.items() if not isinstance(value, dict)]
    for title, rows in ((name, value) for name, value in metrics.items() if name.startswith("per_")):
        columns = list(next(iter(rows.values()), {}))
        lines += ["", f"{title:14}" + "".join(f"{column:>23}" for column in columns)]
        lines += [f"{row:14}" + "".join(f"{_text(values[c]):>23}" for c in columns) for row, values in rows.items()]
    return "\n".join(lines)


def _oks(true: People, found: Sequence[Person], skeleton: Skeleton) -> np.ndarray:
    pose2d = np.array([person.pose2d for person in found], np.float64).reshape(-1, len(skeleton), 2)
    return oks(true, np.nan_to_num(pose2d, nan=np.inf), skeleton)


def _match(true: People, similar: np.ndarray, threshold: float) -> np.ndarray:
    gain = np.where((similar >= threshold) & ~_regions(true)[:, None], similar, 0)
    pairs = np.stack(linear_sum_assignment(gain, maximize=True), 1)
    return pairs[gain[pairs[:, 0], pairs[:, 1]] > 0]


def _regions(people: People) -> np.ndarray:
    """(P,) bool: not to be found."""
    return people.crowd.astype(bool) | ~(people.seen > 0).any(-1)


def _share_inside(box: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """(N,) largest part of each box (N, 4) that lies in one of the regions (R, 4)."""
    low = np.maximum(box[:, None, :2], regions[None, :, :2])
    high = np.minimum(box[:, None, 2:], regions[None, :, 2:])
    common = np.maximum(high - low, 0).prod(-1).max(1, initial=0)
    return common / np.maximum((box[:, 2:] - box[:, :2]).prod(-1), 1e-9)


def _torso(people: People, skeleton: Skeleton) -> np.ndarray:
    """(P,) pixels from the middle of the shoulders to that of the hips; NaN where one of them is unlabelled."""
    shoulders = people.pose2d[:, skeleton.indices("r_shoulder", "l_shoulder")].mean(1)
    hips = people.pose2d[:, skeleton.indices("r_hip", "l_hip")].mean(1)
    box = box_of(people.pose2d, people.seen, margin=0)
    length = np.maximum(np.linalg.norm(shoulders - hips, axis=-1), MIN_TORSO * (box[:, 2:] - box[:, :2]).max(-1))
    return np.where((people.seen[:, skeleton.torso] > 0).all(-1), length, np.nan)


def _millimetres(pose: np.ndarray, goal: np.ndarray) -> np.ndarray:
    return 1000 * np.linalg.norm(pose - goal, axis=-1)


def _positive(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, values, np.nan)


def _mean(values: Any) -> float | None:
    known = np.asarray(values, np.float64)
    known = known[np.isfinite(known)]
    return float(known.mean()) if known.size else None


def _median(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else None


def _share(part: Any, whole: Any) -> float | None:
    return float(part) / float(whole) if whole else None


def _coco(images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> COCO:
    coco = COCO()
    coco.dataset = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
    coco.createIndex()
    return coco


def _text(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:.0f}"
