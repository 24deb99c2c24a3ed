"""Human3.6M's test subjects from the annotation files of two public tools; one person an image.

A folder of `Human36M_subject{S}_data.json`, `_camera.json` and `_joint_3d.json` (3DMPPE, RootNet and what followed;
written by github.com/mks0601/3DMPPE_POSENET_RELEASE tool/Human36M/h36m2coco.py):

    data      images: [{id, file_name, width, height, action_name, action_idx, subaction_idx, cam_idx, frame_idx}, ...],
              annotations: [{image_id, bbox}, ...]
    camera    {cam_idx: {R (3, 3), t (3,), f (2,), c (2,)}}, millimetres and pixels
    joint_3d  {action_idx: {subaction_idx: {frame_idx: (17, 3)}}}, millimetres in the scene's frame

or mmpose's `h36m_test.npz` (tools/dataset_converters/preprocess_h36m.py), whose cameras.pkl is not needed:

    imgname   (N,) S9/S9_Directions_1.54138969/S9_Directions_1.54138969_000001.jpg
    S, part   (N, 17, 4) metres in the camera's frame, (N, 17, 3) pixels; the last number is 1
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from lcrnet.annotations import FAR, CocoImage, bad_name
from lcrnet.config import UserError
from lcrnet.pose import People, box_of, centre, clip
from lcrnet.skeleton import H36M17

SUBJECTS = (9, 11)
"""Those whose poses were kept for testing; all others have been trained on."""

EVERY = 64
"""The JSON files have every frame of the videos; 3DMPPE's Human36M.py evaluates each 64th."""

ACTIONS = (
    "Directions", "Discussion", "Eating", "Greeting", "Phoning", "Photo", "Posing", "Purchases", "Sitting",
    "SittingDown", "Smoking", "Waiting", "WalkDog", "Walking", "WalkTogether",
)  # fmt: skip
_ALIASES = {"TakingPhoto": "Photo", "WalkingDog": "WalkDog", "WalkingTogether": "WalkTogether"}

_SIZES = {"54138969": (1000, 1002), "55011271": (1000, 1000), "58860488": (1000, 1000), "60457274": (1000, 1002)}
"""Width and height of each camera's images (mmpose's preprocess_h36m.py)."""

_MOST_BYTES = 8 * 2**30
_NAME = re.compile(r"S(\d{1,2})_([A-Za-z]+)(?:[_ ]\d)?\.(\d+)_(\d+)\.jpg")
_FITS = 0.25
"""A camera is right if the joints' box is the annotated one, which is 1.2 times as large, to this part of its longer
side at each border, ..."""
_MOST = 0.9
"""... in this share of the images."""


def read(path: str | Path, every: int | None = None) -> list[CocoImage]:
    """The images of the test subjects and their people in the joints of H36M17; `group` is the action.

    path    the folder of JSON files, or an .npz
    every   each so many frames of the videos; by default EVERY of the JSON files' and all of the .npz, which has been
            thinned out (each 5th) by the tool that wrote it

    `extra` has the `subject` and, from JSON, the `camera` (f, c); `extras` the `root_camera` (3,) metres of the torso's
    centre. UserError names file, field and fault.
    """
    path = Path(path)
    if path.is_dir():
        return _images([row for subject in _subjects(path) for row in _json(path, subject, every or EVERY)], path)
    return _images(_npz(path, every or 1), path)


class _Row:
    """One image: name, size, subject, action, joints (17, 3) metres of the camera's frame and (17, 2) pixels."""

    def __init__(
        self, name: str, size: tuple[int, int], subject: int, action: str, camera: dict[str, list[float]] | None
    ) -> None:
        self.name, self.size, self.subject, self.camera = name, size, subject, camera
        self.action = _ALIASES.get(action, action)
        self.pose3d = np.zeros((17, 3))
        self.pose2d = np.zeros((17, 2))


def _images(rows: list[_Row], path: Path) -> list[CocoImage]:
    if not rows:
        raise UserError(f"{path}: no image of subjects {' and '.join(f'S{s}' for s in SUBJECTS)}, the ones tested on")
    pose3d, pose2d = np.array([row.pose3d for row in rows]), np.array([row.pose2d for row in rows])
    rooted = centre(pose3d, H36M17)
    reach = np.abs(rooted).max((1, 2))
    if not (wrong := ~((reach > 0.1) & (reach < FAR))).any():
        root = pose3d[:, H36M17.torso].mean(1)
        box = box_of(pose2d.astype(np.float32))
    else:
        n = int(wrong.argmax())
        raise UserError(f"{path}: {rows[n].name}: the joints are up to {reach[n]:.4g} m from the torso: other units?")
    out = []
    for n, row in enumerate(rows):
        people = People.empty(1, len(H36M17))
        people.pose2d[0], people.pose3d[0], people.seen[0], people.has3d[0] = pose2d[n], rooted[n], 2, True
        people.box[0] = clip(box[n], row.size[1], row.size[0])
        people.area[0] = np.prod(people.box[0, 2:] - people.box[0, :2])
        extra: dict[str, Any] = {"subject": row.subject, **({"camera": row.camera} if row.camera else {})}
        out.append(
            CocoImage(n + 1, row.name, *row.size, row.action, people, [n + 1], extra,
                      [{"root_camera": [round(float(v), 5) for v in root[n]]}])
        )  # fmt: skip
    return out


def _subjects(folder: Path) -> list[int]:
    found = [s for s in SUBJECTS if (folder / f"Human36M_subject{s}_data.json").is_file()]
    if not found:
        wanted = " or ".join(f"Human36M_subject{s}_data.json" for s in SUBJECTS)
        raise UserError(f"{folder}: has no {wanted}; give the folder `annotations` of Human3.6M's JSON files")
    return found


def _json(folder: Path, subject: int, every: int) -> list[_Row]:
    """One subject's images."""
    files = {kind: folder / f"Human36M_subject{subject}_{kind}.json" for kind in ("data", "camera", "joint_3d")}
    data, cameras, joints = (_load(file) for file in files.values())
    for key in ("images", "annotations"):
        if not isinstance(data.get(key), list) or not all(isinstance(entry, dict) for entry in data[key]):
            raise UserError(f"{files['data']}: {key}: expected a list of objects")
    images, annotations = data["images"], data["annotations"]
    boxes = {entry.get("image_id"): n for n, entry in enumerate(annotations) if type(entry.get("image_id")) is int}
    rows: list[_Row] = []
    world: list[np.ndarray] = []
    box: list[np.ndarray] = []
    by_camera: dict[str, list[int]] = {}
    for n, entry in enumerate(images):
        where = f"{files['data']}: images[{n}]"
        width, height, action, trial, camera, frame = (
            _integer(entry, key, where)
            for key in ("width", "height", "action_idx", "subaction_idx", "cam_idx", "frame_idx")
        )
        if frame % every:
            continue
        at = boxes.get(_integer(entry, "id", where, most=10**12))
        if at is None:
            raise UserError(f"{files['data']}: annotations: none has the image_id {entry['id']} of images[{n}]")
        box.append(_numbers(annotations[at].get("bbox"), (4,), f"{files['data']}: annotations[{at}].bbox"))
        name, label = entry.get("file_name"), entry.get("action_name")
        if reason := bad_name(name):
            raise UserError(f"{where}.file_name: {reason}")
        if not isinstance(label, str):
            raise UserError(f"{where}.action_name: expected a name, found {label!r}")
        by_camera.setdefault(str(camera), []).append(len(rows))
        rows.append(_Row(str(name), (width, height), subject, label, None))
        pose: Any = joints
        for index in (action, trial, frame):
            pose = pose.get(str(index)) if isinstance(pose, dict) else None
        if pose is None:
            raise UserError(f"{files['joint_3d']}: [{action}][{trial}][{frame}]: missing, though {where} needs it")
        world.append(_numbers(pose, (17, 3), f"{files['joint_3d']}: [{action}][{trial}][{frame}]"))
    for key, members in by_camera.items():
        where = f"{files['camera']}: [{key}]"
        entry = cameras.get(key)
        if not isinstance(entry, dict):
            raise UserError(f"{where}: expected an object with R, t, f, c")
        shapes = {"R": (3, 3), "t": (3,), "f": (2,), "c": (2,)}
        values = {name: _numbers(entry.get(name), shape, f"{where}.{name}") for name, shape in shapes.items()}
        pose3d, pose2d = _seen(np.array(world)[members], values, np.array(box)[members], where)
        for n, points, pixels in zip(members, pose3d, pose2d, strict=True):
            rows[n].pose3d, rows[n].pose2d = points / 1000, pixels
            rows[n].camera = {name: values[name].tolist() for name in ("f", "c")}
    return rows


def _seen(
    world: np.ndarray, camera: dict[str, np.ndarray], box: np.ndarray, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """(N, 17, 3) millimetres of the camera's frame and (N, 17, 2) pixels, lens distortion left out (about 2 px).

    box   (N, 4) x, y, width, height

    3DMPPE's loader takes x = R X + t, and the tool above writes the t of x = R (X - t): whichever puts the people into
    their boxes.
    """
    rotation = camera["R"]
    if np.abs(rotation @ rotation.T - np.eye(3)).max() > 1e-3 or np.linalg.det(rotation) < 0:
        raise UserError(f"{where}.R: no rotation")
    low, high = box[:, :2], box[:, :2] + box[:, 2:]
    slack = _FITS * box[:, 2:].max(-1)
    for points in (world @ rotation.T + camera["t"], (world - camera["t"]) @ rotation.T):
        depth = np.where(points[..., 2:] > 0, points[..., 2:], np.nan)
        pixels = points[..., :2] / depth * camera["f"] + camera["c"]
        off = np.abs(np.concatenate([pixels.min(1) - low, pixels.max(1) - high], 1)).max(1)
        if (off <= slack).mean() >= _MOST:  # NaN, a joint behind the camera, is not
            return points, np.nan_to_num(pixels)
    raise UserError(f"{where}: the joints are not where their boxes are, neither by R X + t nor by R (X - t)")


def _npz(file: Path, every: int) -> list[_Row]:
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > _MOST_BYTES:
            raise UserError(f"{file}: holds {size} bytes, more than the {_MOST_BYTES} that are read")
        with np.load(file, allow_pickle=False) as fields:
            values = {name: fields[name] for name in ("imgname", "S", "part") if name in fields}
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    except (
        ValueError, EOFError, KeyError, AttributeError, TypeError, zipfile.BadZipFile, MemoryError, OverflowError,
        NotImplementedError, SyntaxError, RuntimeError, zlib.error,
    ) as error:  # fmt: skip
        raise UserError(f"{file}: no .npz file of Human3.6M: {' '.join(str(error).split())[:200]}") from None
    names = values.get("imgname")
    if names is None or names.ndim != 1 or names.dtype.kind != "U":
        raise UserError(f"{file}: imgname: {'missing' if names is None else 'expected (N,) names'}")
    for name, shape in {"S": (len(names), 17, 4), "part": (len(names), 17, 3)}.items():
        value = values.get(name)
        if value is None or value.shape != shape or value.dtype.kind != "f":
            found = "missing" if value is None else f"{value.dtype} {value.shape}"
            raise UserError(f"{file}: {name}: expected {' x '.join(map(str, shape))} numbers, found {found}")
        if not (finite := np.isfinite(value).all((1, 2))).all():
            raise UserError(f"{file}: {name}: row {int((~finite).argmax())} has a number that is not finite")
    rows = []
    for n, name in enumerate(names.tolist()):
        match = _NAME.fullmatch(name.rsplit("/", 1)[-1])
        if not match or bad_name(name):
            raise UserError(f"{file}: imgname: {name!r} is not like S9/S9_Directions_1.54138969/"
                            "S9_Directions_1.54138969_000001.jpg")  # fmt: skip
        subject, action, camera, frame = match.groups()
        if camera not in _SIZES:
            raise UserError(f"{file}: imgname: {name!r} is of none of the cameras {', '.join(_SIZES)}")
        if int(subject) in SUBJECTS and (int(frame) - 1) % every == 0:  # the first frame is number 1
            row = _Row(name, _SIZES[camera], int(subject), action, None)
            row.pose3d, row.pose2d = values["S"][n, :, :3].astype(np.float64), values["part"][n, :, :2]
            rows.append(row)
    return rows


def _load(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{file}: not JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(document, dict):
        raise UserError(f"{file}: holds a {type(document).__name__}, expected an object")
    return document


def _integer(entry: dict[str, Any], key: str, where: str, most: int = 10**7) -> int:
    value = entry.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < most:
        raise UserError(f"{where}.{key}: expected a whole number, found {str(value)[:40]!r}")
    return value


def _numbers(value: Any, shape: tuple[int, ...], where: str) -> np.ndarray:
    """JSON numbers as an array of that shape."""
    try:
        out = np.array(value)
    except (ValueError, TypeError, OverflowError):
        out = np.zeros(0)
    if out.shape != shape or out.dtype.kind not in "iuf" or not (np.abs(out) < 1e9).all():
        raise UserError(f"{where}: expected {' x '.join(map(str, shape))} numbers")
    return out.astype(np.float64)
