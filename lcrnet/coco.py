"""COCO files of people: read, checked, written, made of the label table.

    data = read("annotations.json")          # UserError names the first faults
    for fault in check("annotations.json"):  # every one of them
        print(fault)
    write("copy.json", data.images, data.skeleton, data.info, data.licenses)

annotations.py says what a person may carry in a file and what becomes of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from lcrnet import config, labels
from lcrnet.annotations import CocoImage, CocoSet, Fault, bad_name, from_pose65, parse, to_pose65
from lcrnet.config import UserError
from lcrnet.pose import People, centre, clip
from lcrnet.skeleton import LCR13, Skeleton

__all__ = [
    "CocoImage", "CocoSet", "Fault", "bad_name", "check", "dump", "file_names", "from_labels", "from_pose65", "read",
    "refuse_others", "to_pose65", "write", "write_folder",
]  # fmt: skip


def read(file: str | os.PathLike[str], skeleton: Skeleton = LCR13, min_joints: int = 0) -> CocoSet:
    """The images and people of a COCO file, people in the joints of `skeleton`, boxes cut to the image.

    min_joints  people with fewer labelled joints become ignored regions (those without any always do)

    UserError: the file is missing, or has faults that would make training wrong; it names the first of them.
    """
    faults: list[Fault] = []
    data = parse(_load(file, faults), skeleton, min_joints, faults)
    fatal = [str(fault) for fault in faults if fault.fatal]
    if fatal or data is None:
        more = f"; ... `python jobs/coco.py check {file}` names them all" if len(fatal) > 5 else ""
        raise UserError(f"{file}: {len(fatal)} fault{'s' * (len(fatal) > 1)}: {'; '.join(fatal[:5])}{more}")
    return data


def check(file: str | os.PathLike[str], skeleton: Skeleton = LCR13) -> list[Fault]:
    """Every fault of a COCO file, in the order of the file's parts. UserError: there is no such file."""
    faults: list[Fault] = []
    parse(_load(file, faults), skeleton, 0, faults)
    return faults


def _load(file: str | os.PathLike[str], faults: list[Fault]) -> Any:
    constants: list[str] = []  # Python reads NaN and Infinity, JSON and most other readers have none

    def constant(name: str) -> float:
        constants.append(name)
        return float(name)

    try:
        document = json.loads(Path(file).read_text(encoding="utf-8-sig"), parse_constant=constant)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        faults.append(Fault("file", f"not JSON: {' '.join(str(error).split())}"))
        return None
    if constants:
        faults.append(Fault("file", f"holds {constants[0]}, which is no JSON ({len(constants)} times)", fatal=False))
    return document


def dump(
    images: Iterable[CocoImage],
    skeleton: Skeleton = LCR13,
    info: Mapping[str, Any] | None = None,
    licenses: Sequence[Any] = (),
) -> dict[str, Any]:
    """Images and their people as a COCO document, which `read` and pycocotools take.

    Pixels are rounded to 1e-3, metres to 1e-5, boxes cut to the image. `keypoints` is what can be seen in the image:
    a joint beyond its edge gets v = 0 where `pose` or `pose3d` keep it. ValueError: a person's numbers are not finite.
    """
    images = list(images)
    people = People.join([image.people for image in images] or [People.empty(0, len(skeleton))])
    owner = np.repeat(np.arange(len(images)), [len(image.people) for image in images])
    for name in ("box", "pose2d", "pose3d", "trust", "area"):
        values = getattr(people, name)
        finite = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
        if not finite.all():
            raise ValueError(f"{images[owner[~finite][0]].file_name}: a person's {name} is not finite")

    size = np.array([(image.width, image.height) for image in images], np.float64).reshape(-1, 2)[owner]
    box = np.clip(people.box, 0, np.tile(size, 2))
    xywh = np.concatenate([box[:, :2], box[:, 2:] - box[:, :2]], 1)
    pose2d, pose3d = np.round(people.pose2d.astype(np.float64), 3), np.round(people.pose3d.astype(np.float64), 5)
    whole = people.has3d & (people.seen > 0).all(1)
    outside = ((pose2d < 0) | (pose2d > size[:, None])).any(-1)
    v = np.where(outside & whole[:, None], 0, people.seen)
    columns = zip(
        np.round(xywh, 3).tolist(), np.round(people.area.astype(np.float64), 3).tolist(), v.tolist(),
        np.where(v[..., None] > 0, pose2d, 0).tolist(), to_pose65(pose2d, pose3d).tolist(), pose3d.tolist(),
        whole.tolist(), people.has3d.tolist(), people.crowd.tolist(), people.trust.tolist(), strict=True,
    )  # fmt: skip

    image_ids = _numbered([image.id for image in images])
    ids = _numbered([i for image in images for i in image.ids or [0] * len(image.people)])
    extras = [extra for image in images for extra in image.extras or [{}] * len(image.people)]
    annotations = []
    for row, (bbox, area, vs, xy, flat65, xyz, has_pose, has3d, crowd, trust) in enumerate(columns):
        annotation: dict[str, Any] = {
            "id": ids[row], "image_id": image_ids[owner[row]], "category_id": 1, "bbox": bbox, "area": area,
            "iscrowd": int(crowd), "num_keypoints": sum(k > 0 for k in vs),
            "keypoints": [c for (x, y), k in zip(xy, vs, strict=True) for c in (x, y, k)],
        }  # fmt: skip
        if has_pose:
            annotation["pose"] = flat65
        if has3d:
            annotation["pose3d"] = xyz
        if abs(trust - extras[row].get("score", 1)) > 1e-6:
            annotation["trust"] = round(trust, 6)
        # Many loaders (torchvision's, the predecessor's) want a segmentation; the box is the one we know.
        annotation |= {"segmentation": [_corners(*bbox)], **extras[row]}
        annotations.append(annotation)

    side = {"r_": "right_", "l_": "left_"}
    joints = [side.get(name[:2], name[:2]) + name[2:] for name in skeleton.joints]
    return {
        "info": dict(info or {"description": "people with 2D and 3D poses, written by lcrnet"}),
        "licenses": list(licenses),
        "images": [
            {"id": image_ids[i], "file_name": image.file_name, "width": image.width, "height": image.height}
            | ({} if image.group is None else {"group": image.group})
            | image.extra
            for i, image in enumerate(images)
        ],
        "annotations": annotations,
        "categories": [
            {
                "id": 1, "name": "person", "supercategory": "person", "keypoints": joints,
                "skeleton": (skeleton.bones + 1).tolist(), "joints": list(skeleton.joints),
            }
        ],
    }  # fmt: skip


def from_labels(
    rows: Iterable[Mapping[str, Any]], names: Mapping[str, str], settings: config.Coco, skeleton: Skeleton = LCR13
) -> list[CocoImage]:
    """Rows of the label table that are ok as images with people, both numbered from 1 in the order of the rows.

    names  file_name by uri

    A person below `settings.min_score` becomes an ignored region; one of which less than a pixel lies inside the image
    is left out. A joint below `settings.min_joint_score`, or outside the image, is hidden. `trust` is the score.
    """
    images, last = [], 0
    for number, row in enumerate((row for row in rows if row["status"] == "ok"), 1):
        width, height = row["width"], row["height"]
        found = [labels.person_of(struct) for struct in row["people"] or []]
        boxes = [clip(person.box, height, width) for person in found]
        inside = [n for n, box in enumerate(boxes) if (box[2:] - box[:2] >= 1).all()]
        people, extras = People.empty(len(inside), len(skeleton)), []
        for p, person in enumerate(found[n] for n in inside):
            people.box[p] = boxes[inside[p]]
            people.trust[p] = person.score
            people.crowd[p] = person.score < settings.min_score
            if not people.crowd[p]:
                people.pose2d[p], people.pose3d[p] = person.pose2d, centre(person.pose3d, skeleton)
                outside = ((person.pose2d < 0) | (person.pose2d > (width, height))).any(-1)
                people.seen[p] = np.where(outside | (person.joint_score < settings.min_joint_score), 1, 2)
                people.has3d[p] = True
            place = (
                {} if person.place is None else {"root_camera": np.round(person.place.astype(np.float64), 4).tolist()}
            )
            extras.append({"score": round(person.score, 6)} | place)
        people.area[:] = (people.box[:, 2:] - people.box[:, :2]).prod(1)
        ids = list(range(last + 1, last + 1 + len(inside)))
        last += len(inside)
        images.append(
            CocoImage(
                number, names[row["uri"]], width, height, row["group"] or None, people, ids,
                {key: row[key] for key in ("uri", "sha256") if row[key]}, extras,
            )
        )  # fmt: skip
    return images


def write(
    file: str | os.PathLike[str],
    images: Iterable[CocoImage],
    skeleton: Skeleton = LCR13,
    info: Mapping[str, Any] | None = None,
    licenses: Sequence[Any] = (),
) -> None:
    """`dump` into a file, which is replaced in one step or not at all; one image or person a line."""
    document = dump(images, skeleton, info, licenses)
    parts = []
    for key, value in document.items():
        rows = [json.dumps(row, allow_nan=False) for row in value] if isinstance(value, list) else []
        text = "[\n" + ",\n".join(rows) + "\n]" if rows else json.dumps(value, allow_nan=False)
        parts.append(f"{json.dumps(key)}: {text}")
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        half.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")
        os.replace(half, file)
    finally:
        half.unlink(missing_ok=True)


# A folder: annotations/*.json, images/ and the texts that say how it came about.

MANIFEST = "manifest.json"


def file_names(uris: Sequence[str]) -> dict[str, str]:
    """A file_name below COCO/images for each uri (an absolute path): its path below the folder they all are in.

    Two that would be one, or one that no COCO file may have, get a hash of the uri in place of their folder.
    UserError: a uri is no absolute path.
    """
    for uri in uris:
        if not os.path.isabs(uri):
            raise UserError(f"{uri}: no absolute path on this machine; bring the images here and label them from there")
    paths = {uri: os.path.normpath(uri) for uri in uris}
    root = os.path.commonpath([os.path.dirname(path) for path in paths.values()]) if paths else ""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for uri, path in paths.items():
        name = os.path.relpath(path, root)
        if name in taken or bad_name(name):
            name = hashlib.sha256(uri.encode()).hexdigest()[:16] + PurePosixPath(path).suffix
        taken.add(name)
        names[uri] = name
    return names


def refuse_others(out: Path) -> None:
    """UserError if `out` is or holds something that `write_folder` did not write, or that was changed since."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        mine: dict[str, str] = json.loads((out / MANIFEST).read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f"{out}: exists, and was not written by jobs/coco.py; choose another --out") from None
    for name, sha256 in mine.items():
        if (out / name).is_file() and hashlib.sha256((out / name).read_bytes()).hexdigest() != sha256:
            raise UserError(f"{out / name}: was changed since jobs/coco.py wrote it; choose another --out")
    for file in (out / "annotations").glob("*.json"):
        if f"annotations/{file.name}" in mine:
            mine |= {f"images/{image['file_name']}": "" for image in json.loads(file.read_text("utf-8"))["images"]}
    for folder, _, files in os.walk(out):
        for name in files:
            if (found := os.path.relpath(os.path.join(folder, name), out)) not in {*mine, MANIFEST}:
                raise UserError(f"{out}: holds {found}, which jobs/coco.py did not write; choose another --out")


def write_folder(
    out: Path,
    parts: Mapping[str, Sequence[CocoImage]],
    sources: Mapping[str, str],
    skeleton: Skeleton,
    info: Mapping[str, Any],
    texts: Mapping[str, str],
    copy: bool,
) -> None:
    """A COCO folder, whole or not at all; one that it wrote before is replaced.

    parts    images by the name of their file, out/annotations/NAME.json; each file is read back and checked
    sources  path of the image by file_name: out/images holds links to them, or copies
    texts    further files by name; manifest.json gets what `refuse_others` asks for
    UserError: `out` is not ours, images are missing
    """
    refuse_others(out)
    if missing := [path for path in sources.values() if not os.path.isfile(path)]:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(f"{len(missing)} labelled images are not on this machine: {', '.join(missing[:5])}{more}")
    half, old = (out.with_name(f".{out.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    try:
        (half / "images").mkdir(parents=True)
        for name, path in sources.items():
            (half / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            if copy:
                shutil.copyfile(path, half / "images" / name)
            else:
                os.symlink(os.path.abspath(path), half / "images" / name)
        for name, images in parts.items():
            write(half / "annotations" / f"{name}.json", images, skeleton, info)
            _verify(half / "annotations" / f"{name}.json", images, skeleton)
        for name, text in texts.items():
            (half / name).write_text(text, encoding="utf-8")
        files = [*(f"annotations/{name}.json" for name in parts), *texts]
        hashes = {name: hashlib.sha256((half / name).read_bytes()).hexdigest() for name in files}
        (half / MANIFEST).write_text(json.dumps({"sha256": hashes}, indent=1), encoding="utf-8")
        if out.exists():
            os.rename(out, old)
        os.rename(half, out)
    finally:
        if old.exists() and not out.exists():
            os.rename(old, out)
        shutil.rmtree(half, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _verify(file: Path, images: Sequence[CocoImage], skeleton: Skeleton) -> None:
    """RuntimeError if what was written is not what our reader and pycocotools read: a mistake of ours."""
    from pycocotools.coco import COCO  # brings matplotlib, which those who only read need not wait for

    faults = check(file, skeleton)
    with contextlib.redirect_stdout(io.StringIO()):
        found = COCO(str(file))
    if faults or (len(found.imgs), len(found.anns)) != (len(images), sum(len(image.people) for image in images)):
        raise RuntimeError(f"{file}: written wrong: {'; '.join(map(str, faults[:3]))}")


def _corners(x: float, y: float, w: float, h: float) -> list[float]:
    return [round(c, 3) for c in (x, y, x, y + h, x + w, y + h, x + w, y)]


def _numbered(ids: Sequence[int]) -> list[int]:
    """The ids, those that are 0 (pycocotools takes it for "no match") numbered after the largest."""
    last = max(ids, default=0)
    out = []
    for i in ids:
        last += i == 0
        out.append(i or last)
    return out
