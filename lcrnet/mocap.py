"""Motion-capture poses: a file of 3D poses without images, and how people with those poses look to a camera.

Frame: the camera's (x right, y down, z away) of a level camera, so gravity is +y and a turn about y is another heading
of the person. Origin at the centre of the torso.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from dataclasses import dataclass, replace

import numpy as np

from lcrnet.camera import Camera
from lcrnet.config import UserError
from lcrnet.pose import People, box_of, centre
from lcrnet.skeleton import LCR13, Skeleton, by_joints, convert

FAR = 10.0
"""No joint is so many metres from the torso: a pose that has one is in other units."""

LARGEST = 2 * 2**30
"""Bytes that a file may unpack to."""

DISTANCE = 5.0
"""Metres from the camera to the people that `seen` shows: LCR-Net's images show them from about 3 to 10."""


@dataclass(frozen=True, eq=False)
class Mocap:
    """pose3d (N, J, 3) float32 metres, root-centred; clip and action (N,) names; N poses."""

    pose3d: np.ndarray
    clip: np.ndarray
    action: np.ndarray
    skeleton: Skeleton = LCR13

    def __len__(self) -> int:
        return len(self.pose3d)

    def __getitem__(self, rows: np.ndarray) -> Mocap:
        return replace(self, pose3d=self.pose3d[rows], clip=self.clip[rows], action=self.action[rows])


def is_mocap(file: str | os.PathLike[str]) -> bool:
    """Whether a file is one that `read` takes, by its first bytes."""
    try:
        return zipfile.is_zipfile(file)
    except OSError:
        return False


def read(file: str | os.PathLike[str], skeleton: Skeleton = LCR13) -> Mocap:
    """An .npz file with `poses` (N, J, 3) metres, y up, right-handed, any origin; `joints` (J,) their names; optionally
    `clip` and `action` (N,).

    Joints are converted to `skeleton` by name. UserError names the file, the field and what is wrong with it; poses of
    which a joint is missing or not finite are refused too, by their row.
    """
    try:
        with zipfile.ZipFile(file) as parts:
            if (size := sum(part.file_size for part in parts.infolist())) > LARGEST:
                raise UserError(f"{file}: unpacks to {size / 2**30:.1f} GiB; at most {LARGEST / 2**30:g} are read")
        with np.load(file, allow_pickle=False) as fields:
            values = {name: fields[name] for name in ("poses", "joints", "clip", "action") if name in fields}
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    # RuntimeError is an encrypted part, NotImplementedError an unknown compression.
    except (ValueError, EOFError, KeyError, AttributeError, TypeError, SyntaxError, MemoryError, RuntimeError,
            NotImplementedError, OverflowError, struct.error, zlib.error, zipfile.BadZipFile) as error:  # fmt: skip
        raise UserError(f"{file}: not an .npz file of poses: {' '.join(str(error).split())}") from None
    for name in ("poses", "joints"):
        if name not in values:
            raise UserError(f"{file}: {name}: missing; expected poses (N, J, 3) in metres, y up, and joints (J,)")
    joints, poses = values["joints"], values["poses"]
    if joints.ndim != 1 or joints.dtype.kind != "U":
        raise UserError(f"{file}: joints: expected a list of names, found {joints.dtype} of shape {joints.shape}")
    if poses.dtype.kind != "f" or poses.ndim != 3 or poses.shape[1:] != (len(joints), 3) or not len(poses):
        raise UserError(f"{file}: poses: expected N x {len(joints)} x 3 numbers, found {poses.dtype} {poses.shape}")
    source = by_joints([str(j) for j in joints])
    if len(set(source.joints)) < len(source):
        raise UserError(f"{file}: joints: two have the same name among {', '.join(source.joints)}")
    finite = np.isfinite(poses).all((1, 2))
    if not finite.all():
        raise UserError(f"{file}: poses: row {int((~finite).argmax())} has a number that is not finite")
    pose3d, seen = convert(poses, np.ones(poses.shape[:2], np.int64), source, skeleton)
    if not seen.all():
        lacking = [name for name, s in zip(skeleton.joints, seen[0], strict=True) if not s]
        raise UserError(f"{file}: joints: {skeleton.name} also needs {', '.join(lacking)}")
    far = np.abs(centre(pose3d.astype(np.float64), skeleton)).max((1, 2)) > FAR
    if far.any():
        raise UserError(
            f"{file}: poses: row {int(far.argmax())} has a joint more than {FAR:g} m from the torso; they are in metres"
        )
    names = []
    for name in ("clip", "action"):
        value = values.get(name, np.full(len(poses), ""))
        if value.shape != (len(poses),) or value.dtype.kind != "U":
            raise UserError(f"{file}: {name}: expected a name for each of the {len(poses)} poses")
        names.append(value)
    clip, action = names
    pose3d = centre(pose3d * np.array([-1, -1, 1]), skeleton)  # y up, right-handed, seen from the front: x left
    return Mocap(pose3d.astype(np.float32), clip, action, skeleton)


def turn(pose3d: np.ndarray, angle: np.ndarray | float) -> np.ndarray:
    """3D poses (..., J, 3) turned about the vertical by angles (...) in radians: x -> x cos + z sin."""
    angle = np.asarray(angle, np.float64)[..., None]
    cos, sin = np.cos(angle), np.sin(angle)
    x, y, z = np.moveaxis(pose3d, -1, 0)
    return np.stack([x * cos + z * sin, y, z * cos - x * sin], -1).astype(pose3d.dtype)


def heading(pose3d: np.ndarray, skeleton: Skeleton) -> np.ndarray:
    """(...,) radians by which `turn` makes poses (..., J, 3) face the camera: right hip and shoulder on its left."""
    right, left = (skeleton.indices(f"{side}_hip", f"{side}_shoulder") for side in "rl")
    across = pose3d[..., left, :].mean(-2) - pose3d[..., right, :].mean(-2)  # along +x when facing the camera
    return np.arctan2(across[..., 2], across[..., 0])


def seen(
    pose3d: np.ndarray, skeleton: Skeleton, camera: Camera | None = None, distance: float = DISTANCE
) -> People:  # fmt: skip
    """People with 3D poses (N, J, 3) as a level camera sees them at a distance (metres), the torso in its middle.

    2D joints are in pixels of a 1000 x 1000 image, box and area those of the 2D pose; every joint counts as visible.
    """
    camera = camera or Camera.guess(1000, 1000)
    pose2d = camera.project(pose3d + np.array([0, 0, distance])).astype(np.float32)
    people = People.empty(len(pose3d), len(skeleton))
    box = box_of(pose2d)
    return replace(
        people, box=box, pose2d=pose2d, pose3d=pose3d.astype(np.float32), seen=np.full_like(people.seen, 2),
        has3d=np.ones(len(pose3d), bool), area=(box[:, 2:] - box[:, :2]).prod(1),
    )  # fmt: skip


def views(poses: Mocap, count: int, camera: Camera | None = None, distance: float = DISTANCE) -> People:
    """N `count` people: each pose as recorded and turned to `count` headings evenly round, one after the other."""
    angle = np.tile(2 * np.pi / count * np.arange(count), len(poses))
    return seen(turn(np.repeat(poses.pose3d, count, axis=0), angle), poses.skeleton, camera, distance)
