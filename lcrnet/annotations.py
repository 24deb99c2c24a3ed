"""A COCO document taken apart into images and people; every fault of it noted, with its place, on the way.

What a person may carry in a file, and what it becomes:

`keypoints` (3 J: x, y, v)  `seen` = v, by the joint names of the category; what `skeleton` has not is unlabelled.
`pose` (5 J)                the predecessor's: J x, J y (pixels), J X, J Y, J Z (metres; X to the left, Y up, Z away)
                            of the category's `joints`, LCR13 if it has none. All joints are known: `seen` is 2 where
                            v is 2, or where there is no v, else 1.
`pose3d` (J x 3)            metres in our frame, of the category's `keypoints`.
`trust`, else `score`       `trust`.
no joints, too few, `iscrowd`, or a box of the top-level list `persons_without_pose`: an ignored region, `crowd`.

Boxes are (x, y, width, height) in the file only. Fields that are not ours stay with the image and the person.
`parse` notes faults and goes on, so that one run names them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lcrnet.pose import People, centre
from lcrnet.skeleton import LCR13, Skeleton, by_joints, convert

FAR = 10.0
"""No joint is so many metres from the torso: a pose that has one is in other units."""
OFF = 0.002
"""Metres between the origin of a 3D pose and its torso's centre that are no rounding: the pose is moved."""

_LARGEST = float(np.finfo(np.float32).max)
_OF_IMAGE = ("id", "file_name", "width", "height", "group")
_OF_PERSON = (
    "id", "image_id", "category_id", "bbox", "area", "iscrowd", "keypoints", "num_keypoints", "pose", "pose3d", "trust",
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """What is wrong at one place of a file. `fatal`: training on it would go wrong, `read` refuses it."""

    where: str
    message: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass
class CocoImage:
    """One image of a COCO file and its people.

    id         0 = to be numbered when written
    file_name  below the folder of the images, with its sub-folders
    group      what must stay on one side of a split (a clip, a folder)
    ids        annotation id of each of the P people, 0 = none yet
    extra      other fields of the image, written through (`camera`, `license`, ...)
    extras     the same of each person (`score`, `root_camera`, ...); empty or P long
    """

    id: int
    file_name: str
    width: int
    height: int
    group: str | None
    people: People
    ids: list[int] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    extras: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class CocoSet:
    """A COCO file: its images (those without people included) in the joints of `skeleton`."""

    images: list[CocoImage]
    skeleton: Skeleton
    info: dict[str, Any] = field(default_factory=dict)
    licenses: list[Any] = field(default_factory=list)


def from_pose65(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The predecessor's (..., 5 J) -> pose2d (..., J, 2) pixels, pose3d (..., J, 3) metres in our frame."""
    parts = np.moveaxis(flat.reshape(*flat.shape[:-1], 5, flat.shape[-1] // 5), -2, -1)
    return parts[..., :2].copy(), parts[..., 2:] * _FRAME.astype(parts.dtype)


def to_pose65(pose2d: np.ndarray, pose3d: np.ndarray) -> np.ndarray:
    """The inverse of `from_pose65`."""
    parts = np.concatenate([pose2d, pose3d * _FRAME.astype(pose3d.dtype)], -1)
    return np.moveaxis(parts, -1, -2).reshape(*parts.shape[:-2], 5 * parts.shape[-2])


_FRAME = np.array([-1, -1, 1])  # the old files have x to the left and y up


def parse(document: Any, skeleton: Skeleton, min_joints: int, faults: list[Fault]) -> CocoSet | None:
    """The data set, people with faults included as far as they can be read; None if there is none at all."""
    if not isinstance(document, dict):
        if document is not None or not faults:
            faults.append(Fault("file", f"holds a {type(document).__name__}, expected an object with `images`, ..."))
        return None
    for key in ("images", "annotations", "categories"):
        if not isinstance(document.get(key), list):
            faults.append(Fault(key, "missing" if key not in document else "must be a list"))
            document = {**document, key: []}
    if not isinstance(document.get("info", {}), dict):
        faults.append(Fault("info", "must be an object", fatal=False))
    images = _images(document["images"], faults)
    categories = _categories(document["categories"], skeleton, faults)
    rows = _rows(document, images, categories, faults)
    people = _people(rows, images, categories, skeleton, min_joints)

    position = {i: n for n, i in enumerate(images)}
    owner = np.array([position[i] for i in rows.image], np.int64)
    order = np.argsort(owner, kind="stable")
    people, stops = people[order], np.searchsorted(owner[order], np.arange(len(images) + 1))
    listed = order.tolist()
    for n, image in enumerate(images.values()):
        start, stop = int(stops[n]), int(stops[n + 1])
        mine = [rows.fields[row] for row in listed[start:stop]]
        image.people = people[start:stop]
        image.ids = [f["id"] if _is_int(f.get("id")) else 0 for f in mine]
        image.extras = [{k: v for k, v in f.items() if k not in _OF_PERSON} for f in mine]
    info, licenses = document.get("info"), document.get("licenses")
    return CocoSet(
        list(images.values()),
        skeleton,
        info if isinstance(info, dict) else {},
        licenses if isinstance(licenses, list) else [],
    )


@dataclass
class _Rows:
    """People of a file, one entry each: how a fault names them, their fields, their image and category."""

    faults: list[Fault]
    where: list[str] = field(default_factory=list)
    fields: list[dict[str, Any]] = field(default_factory=list)
    image: list[int] = field(default_factory=list)
    category: list[int | None] = field(default_factory=list)

    def report(self, row: int, key: str, message: str, fatal: bool = True) -> None:
        self.faults.append(Fault(f"{self.where[row]}, {key}", message, fatal))

    def numbers(self, key: str, shape: tuple[int, ...], rows: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
        """The rows that have the field, as they should, and its values (n, *shape); faults of the others."""
        have = [row for row in rows if self.fields[row].get(key) is not None]
        values, bad = _numbers([self.fields[row][key] for row in have], shape)
        for n, reason in bad.items():
            self.report(have[n], key, reason)
        keep = [n for n in range(len(have)) if n not in bad]
        return np.array(have, np.int64)[keep], values[keep]


@dataclass
class _Category:
    """Joints of a category's `keypoints` (None: it has none) and of its `pose`."""

    keypoints: Skeleton | None
    joints: Skeleton


def bad_name(name: Any) -> str | None:
    """Why a `file_name` cannot be used below the folder of the images, None if it can."""
    if not isinstance(name, str) or not name:
        return "missing" if name is None else f"{name!r} is no file name"
    if name[0] in "/\\" or name[1:3] in (":/", ":\\"):
        return f"{name!r} is absolute; it must be below the folder of the images"
    if ".." in name.replace("\\", "/").split("/"):
        return f"{name!r} leaves the folder of the images"
    return None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _id(entry: Any, kind: str, row: int, taken: Iterable[int], faults: list[Fault]) -> str | None:
    """How to name an entry in a fault; None if it cannot be used for want of an id of its own."""
    if not isinstance(entry, dict):
        faults.append(Fault(f"{kind} in row {row}", "must be an object"))
    elif not _is_int(entry.get("id")):
        shown = f"{entry['id']!r} is no integer" if "id" in entry else "missing"
        faults.append(Fault(f"{kind} in row {row}, id", shown))
    elif entry["id"] in taken:
        faults.append(Fault(f"{kind} {entry['id']}, id", f"there are two (row {row})"))
    else:
        return f"{kind} {entry['id']}"
    return None


def _images(entries: list[Any], faults: list[Fault]) -> dict[int, CocoImage]:
    images: dict[int, CocoImage] = {}
    names: dict[str, int] = {}
    for row, entry in enumerate(entries):
        where = _id(entry, "image", row, images, faults)
        if where is None:
            continue
        name, size = entry.get("file_name"), [entry.get("width"), entry.get("height")]
        if reason := bad_name(name):
            faults.append(Fault(f"{where}, file_name", reason))
        elif name in names:
            faults.append(Fault(f"{where}, file_name", f"{name!r} is image {names[name]} too", fatal=False))
        names.setdefault(str(name), entry["id"])
        for key, value in zip(("width", "height"), size, strict=True):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9 or value % 1:
                shown = f"{value!r} is no number of pixels" if key in entry else "missing"
                faults.append(Fault(f"{where}, {key}", shown))
                size = [0, 0]
        group = entry.get("group")
        images[entry["id"]] = CocoImage(
            entry["id"], str(name), int(size[0] or 0), int(size[1] or 0), None if group is None else str(group),
            People.empty(0, 0), extra={k: v for k, v in entry.items() if k not in _OF_IMAGE},
        )  # fmt: skip
    return images


def _categories(entries: list[Any], skeleton: Skeleton, faults: list[Fault]) -> dict[int, _Category | None]:
    """Joints of the categories that are people, None for others."""
    found: dict[int, dict[str, Any]] = {}
    for row, entry in enumerate(entries):
        if _id(entry, "category", row, found, faults):
            found[entry["id"]] = entry
    people = {i for i, entry in found.items() if str(entry.get("name")).lower() == "person"}
    people = people or {i for i, entry in found.items() if entry.get("keypoints")}
    if len(found) == 1:
        people = set(found)
    if found and not people:
        faults.append(Fault("categories", "none is called 'person' or has `keypoints`"))

    def joints(entry: dict[str, Any], key: str) -> Skeleton | None:
        names, where = entry.get(key), f"category {entry['id']}, {key}"
        if not names:
            return None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            faults.append(Fault(where, "must be a list of names of joints"))
            return None
        source = by_joints(names)
        if len(set(source.joints)) < len(names):
            faults.append(Fault(where, "names a joint twice"))
            return None
        if not convert(np.ones((len(source), 2)), np.ones(len(source)), source, skeleton)[1].any():
            faults.append(Fault(where, f"no joint of {skeleton.name} ({', '.join(skeleton.joints)}) is among them"))
        return source

    return {
        i: _Category(joints(entry, "keypoints"), joints(entry, "joints") or LCR13) if i in people else None
        for i, entry in found.items()
    }


def _rows(
    document: dict[str, Any],
    images: Mapping[int, CocoImage],
    categories: Mapping[int, _Category | None],
    faults: list[Fault],
) -> _Rows:
    """The entries that are people of an image of the file; things of other categories are left out."""
    out = _Rows(faults)
    taken: set[int] = set()

    def add(where: str, entry: dict[str, Any], category: int | None) -> None:
        owner: Any = entry.get("image_id")
        if not _is_int(owner) or owner not in images:
            shown = f"there is no image {owner!r}" if "image_id" in entry else "missing"
            faults.append(Fault(f"{where}, image_id", shown))
        elif category is None or categories[category] is not None:
            out.where.append(where)
            out.fields.append(entry)
            out.image.append(owner)
            out.category.append(category)

    for row, entry in enumerate(document["annotations"]):
        where = _id(entry, "annotation", row, taken, faults)
        if where is None:
            continue
        taken.add(entry["id"])
        if entry["id"] == 0:
            faults.append(Fault(where, "pycocotools takes id 0 for `no match`; count from 1", fatal=False))
        category: Any = entry.get("category_id")
        if not _is_int(category) or category not in categories:
            shown = f"there is no category {category!r}" if "category_id" in entry else "missing"
            faults.append(Fault(f"{where}, category_id", shown))
        else:
            add(where, entry, category)
    boxes = document.get("persons_without_pose") or []
    if not isinstance(boxes, list):
        faults.append(Fault("persons_without_pose", "must be a list"))
        boxes = []
    for row, entry in enumerate(boxes):
        where = f"persons_without_pose in row {row}"
        if not isinstance(entry, dict):
            faults.append(Fault(where, "must be an object"))
        else:
            add(where, {key: entry[key] for key in entry if key not in ("id", "keypoints", "pose", "pose3d")}, None)
    return out


def _people(
    rows: _Rows,
    images: Mapping[int, CocoImage],
    categories: Mapping[int, _Category | None],
    skeleton: Skeleton,
    min_joints: int,
) -> People:
    """Everybody, in the order of the rows."""
    count = len(rows.where)
    people = People.empty(count, len(skeleton))

    everybody = range(count)
    for row in everybody:
        if rows.fields[row].get("bbox") is None:
            rows.report(row, "bbox", "missing")
    at, box = rows.numbers("bbox", (4,), everybody)
    size = np.array([(images[i].width, images[i].height) for i in rows.image], np.float64).reshape(-1, 2)
    corners = np.concatenate([box[:, :2], box[:, :2] + box[:, 2:]], 1)
    cut = np.clip(corners, 0, np.tile(size[at], 2))
    flat = np.any(box[:, 2:] <= 0, axis=1)
    gone = np.any(cut[:, 2:] <= cut[:, :2], axis=1) & np.all(size[at] > 0, axis=1)
    beyond = np.abs(cut - corners).max(1, initial=0)
    people.box[at] = cut
    for n in np.flatnonzero(flat | gone | (beyond > 1)).tolist():
        if flat[n]:
            rows.report(int(at[n]), "bbox", f"width {box[n, 2]:g} and height {box[n, 3]:g}: a box without area")
        elif gone[n]:
            rows.report(int(at[n]), "bbox", "lies outside the image")
        else:
            rows.report(int(at[n]), "bbox", f"reaches {beyond[n]:.1f} px beyond the image; it is cut", fatal=False)

    people.area[at] = (cut[:, 2:] - cut[:, :2]).prod(1)
    at, area = rows.numbers("area", (), everybody)
    for row in at[area <= 0].tolist():
        rows.report(row, "area", "not above 0; width * height is taken", fatal=False)
    people.area[at[area > 0]] = area[area > 0]
    at, score = rows.numbers("score", (), everybody)
    people.trust[at] = score.clip(0, 1)
    at, trust = rows.numbers("trust", (), everybody)
    for row in at[(trust < 0) | (trust > 1)].tolist():
        rows.report(row, "trust", "must be within 0 and 1")
    people.trust[at] = trust.clip(0, 1)
    for row, fields in enumerate(rows.fields):
        if "area" not in fields and rows.category[row] is not None:
            rows.report(row, "area", "missing; width * height is taken", fatal=False)
        crowd = fields.get("iscrowd", 0)
        if crowd not in (0, 1):
            rows.report(row, "iscrowd", f"{crowd!r} is neither 0 nor 1")
        people.crowd[row] = bool(crowd)

    for category, joints in categories.items():
        members = [row for row in everybody if rows.category[row] == category]
        if members and joints is not None:
            _poses(people, rows, members, category, joints, skeleton)
    people.crowd |= (people.seen > 0).sum(1) < max(min_joints, 1)
    return people


def _poses(
    people: People,
    rows: _Rows,
    members: list[int],
    category: int,
    joints: _Category,
    skeleton: Skeleton,
) -> None:
    """Fills in the poses of the people of one category."""

    def whole(key: str, source: Skeleton, at: np.ndarray) -> bool:
        """Whether 3D poses of `source` give all joints of `skeleton`; with less they cannot be centred."""
        known = convert(np.ones((len(source), 1)), np.ones(len(source)), source, skeleton)[1] > 0
        if len(at) and not known.all():
            lacking = ", ".join(skeleton.joints[j] for j in np.flatnonzero(~known))
            rows.faults.append(Fault(f"category {category}, {key}", f"without {lacking}: 3D poses are not used", False))
        return bool(known.all())

    if joints.keypoints is None:
        if any(rows.fields[row].get("keypoints") for row in members):
            rows.faults.append(Fault(f"category {category}, keypoints", "missing, though annotations have `keypoints`"))
    else:
        source = joints.keypoints
        at, flat = rows.numbers("keypoints", (3 * len(source),), members)
        points = flat.reshape(-1, len(source), 3)
        wrong = ~np.isin(points[..., 2], (0, 1, 2))
        for n in np.flatnonzero(wrong.any(1)).tolist():
            rows.report(int(at[n]), "keypoints", f"v = {points[n, wrong[n], 2][0]:g} of a joint is none of 0, 1, 2")
        for row, true in zip(at.tolist(), (points[..., 2] > 0).sum(1).tolist(), strict=True):
            if (stated := rows.fields[row].get("num_keypoints")) != true:
                shown = "missing" if stated is None else f"{stated!r}, though {true} joints are labelled"
                rows.report(row, "num_keypoints", shown, fatal=False)
        people.pose2d[at], people.seen[at] = convert(points[..., :2], points[..., 2].astype(np.int64), source, skeleton)
        at, pose3d = rows.numbers("pose3d", (len(source), 3), members)
        if whole("keypoints", source, at):
            people.pose3d[at] = _rooted(pose3d, source, skeleton, at, "pose3d", rows)
            people.has3d[at] = True

    source = joints.joints
    at, flat = rows.numbers("pose", (5 * len(source),), members)
    pose2d, pose3d = from_pose65(flat)
    # Where humans said which joints they saw, and the rest was filled in, the rest counts as hidden.
    seen = np.full((len(at), len(source)), 2)
    for n, row in enumerate(at.tolist()):
        origin = rows.fields[row].get("pose_2d_source")
        if isinstance(origin, list) and len(origin) == len(source):
            seen[n] = [1 if o in ("human_occluded", "teacher") else 2 for o in origin]
    has_v = np.array([rows.fields[row].get("keypoints") is not None for row in at], bool)
    people.pose2d[at], known = convert(pose2d, seen, source, skeleton)
    v = np.where(people.seen[at] == 2, 2, 1)
    people.seen[at] = np.where(known == 0, 0, np.where(has_v[:, None], v, known))
    if whole("joints", source, at):
        people.pose3d[at] = _rooted(pose3d, source, skeleton, at, "pose", rows)
        people.has3d[at] = True


def _rooted(
    pose3d: np.ndarray, source: Skeleton, skeleton: Skeleton, at: np.ndarray, key: str, rows: _Rows
) -> np.ndarray:
    """3D poses (n, J of source, 3) in the joints of `skeleton`, with the torso's centre at the origin."""
    pose3d, _ = convert(pose3d, np.ones(pose3d.shape[:2], np.int64), source, skeleton)
    rooted = centre(pose3d, skeleton)
    off = np.linalg.norm(pose3d - rooted, axis=-1).max(-1, initial=0)
    far = np.abs(rooted).max((-2, -1), initial=0) > FAR
    for n in np.flatnonzero(far | (off > OFF)).tolist():
        if far[n]:
            rows.report(int(at[n]), key, f"a joint is more than {FAR:g} m from the torso; 3D poses are in metres")
        else:
            rows.report(
                int(at[n]), key, f"its origin is {off[n]:.3f} m off the torso's centre; it is moved", fatal=False
            )
    return np.where((off > OFF)[:, None, None], rooted, pose3d)


def _numbers(values: list[Any], shape: tuple[int, ...]) -> tuple[np.ndarray, dict[int, str]]:
    """(n, *shape) float64 of JSON numbers, and by row what is wrong with those that are not (0 in the array)."""
    whole = _array(values, (len(values), *shape)) if values else np.zeros((0, *shape))
    if whole is not None:
        return whole, {}
    out, bad = np.zeros((len(values), *shape)), {}
    for row, value in enumerate(values):
        one = _array(value, shape)
        if one is None:
            bad[row] = _reason(value, shape)
        else:
            out[row] = one
    return out, bad


def _array(value: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    """JSON numbers as an array of that shape, None if they are not, or are NaN, infinite or beyond float32."""
    try:
        out = np.array(value)
    except (ValueError, TypeError, OverflowError):
        return None
    if out.shape != shape or out.dtype.kind not in "iuf":
        return None
    return out.astype(np.float64) if (np.abs(out) < _LARGEST).all() else None


def _reason(value: Any, shape: tuple[int, ...]) -> str:
    """Why `_array` refuses a value."""
    expected = " x ".join(map(str, shape)) + " numbers" if shape else "a number"
    numbers: list[Any] = [value]
    for length in shape:
        if any(not isinstance(part, list) for part in numbers):
            return f"must be {expected}"
        if wrong := [len(part) for part in numbers if len(part) != length]:
            return f"has {wrong[0]} entries, expected {expected}"
        numbers = [number for part in numbers for number in part]
    for position, number in enumerate(numbers):
        if isinstance(number, bool) or not isinstance(number, int | float):
            return f"{number!r} at position {position} is no number" if shape else f"{number!r} is no number"
        if not abs(number) < _LARGEST:
            return f"{number} at position {position} is not finite" if shape else f"{number} is not finite"
    return f"must be {expected}"
