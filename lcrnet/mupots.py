"""MuPoTS-3D's annotation files: `TS1` to `TS20`, each with annot.mat and occlusion.mat beside its images.

    annotations       {frames, people} structs: annot2 (2, 17) pixels, annot3 (3, 17) millimetres in the camera's frame
                      (x right, y down, z away), univ_annot3 the same at the size of a "universal" body, isValidFrame
    occlusion_labels  {frames, people} (1, 17), 1 = hidden

Joints in the order of MPI_INF_3DHP17. Mehta et al., "Single-shot multi-person 3D pose estimation from monocular RGB",
3DV 2018.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lcrnet import matfile
from lcrnet.annotations import FAR, CocoImage
from lcrnet.config import UserError
from lcrnet.pose import People, box_of, centre, clip
from lcrnet.skeleton import MPI_INF_3DHP17

SEQUENCES = tuple(f"TS{n}" for n in range(1, 21))


def read(folder: str | Path) -> tuple[list[CocoImage], list[np.ndarray]]:
    """(The images with somebody annotated; the (P, 17, 3) `univ_annot3` of their valid people), joints MPI_INF_3DHP17.

    `group` is the sequence; names are `TS1/img_000000.jpg`. People come in the order of the file, the valid ones first;
    those without a valid annotation in that frame are ignored regions (`crowd`). univ_annot3 in metres, pelvis at the
    origin. UserError names file, field and fault.
    """
    folder = Path(folder)
    present = [name for name in SEQUENCES if (folder / name / "annot.mat").is_file()]
    if not present:
        raise UserError(f"{folder}: has no TS1/annot.mat ... TS20/annot.mat; give the folder MultiPersonTestSet")
    images: list[CocoImage] = []
    universal: list[np.ndarray] = []
    for name in present:
        _sequence(folder, name, images, universal)
    if not images:
        raise UserError(f"{folder}: no person of {', '.join(present)} has isValidFrame 1")
    return images, universal


def _sequence(folder: Path, name: str, images: list[CocoImage], universal: list[np.ndarray]) -> None:
    """Adds one sequence's images."""
    file, other = folder / name / "annot.mat", folder / name / "occlusion.mat"
    cells, hidden = _cells(file, "annotations"), _cells(other, "occlusion_labels")
    if cells.shape != hidden.shape:
        raise UserError(f"{other}: occlusion_labels: {hidden.shape} cells, but {file} has {cells.shape}")
    # The studio's cameras are square, those outdoors are not (mupots readers on GitHub; it is in no annotation file).
    width, height = (2048, 2048) if int(name[2:]) <= 5 else (1920, 1080)
    joints = len(MPI_INF_3DHP17)
    for frame in range(cells.shape[0]):
        known, ignored, rest = [], [], []
        for k in range(cells.shape[1]):
            where = f"{file}: annotations{{{frame + 1},{k + 1}}}"
            cell = cells[frame, k]
            valid = bool(_field(cell, "isValidFrame", (1, 1), where)[0, 0])
            if not valid:
                outline = cell.get("annot2")
                if isinstance(outline, np.ndarray) and outline.shape == (2, joints) and outline.dtype != object:
                    ignored.append(outline.T)  # who is not annotated in this frame may have anything here
                continue
            pose2d = _field(cell, "annot2", (2, joints), where).T
            pose3d = _field(cell, "annot3", (3, joints), where).T / 1000
            rest.append(_field(cell, "univ_annot3", (3, joints), where).T / 1000)
            for key, pose in (
                ("annot2", pose2d / 1e5),
                ("annot3", centre(pose3d, MPI_INF_3DHP17)),
                ("univ_annot3", rest[-1]),
            ):
                if not (np.abs(pose) < (FAR if key != "univ_annot3" else 10 * FAR)).all():
                    raise UserError(f"{where}.{key}: numbers that are not finite, or in other units than mm and pixels")
            label = f"{other}: occlusion_labels{{{frame + 1},{k + 1}}}"
            known.append((pose2d, pose3d, _numbers(hidden[frame, k], (1, joints), label)[0] > 0))
        if not known:
            continue
        people = _people(known, ignored, width, height)
        pose3d = np.array([pose for _, pose, _ in known])
        roots = pose3d[:, MPI_INF_3DHP17.torso].mean(1).round(5).tolist()
        extras: list[dict[str, Any]] = [{"root_camera": root} for root in roots]
        extras += [{} for _ in range(len(people) - len(known))]
        images.append(
            CocoImage(len(images) + 1, f"{name}/img_{frame:06d}.jpg", width, height, name, people,
                      [0] * len(people), {}, extras)
        )  # fmt: skip
        universal.append(np.array(rest) - np.array(rest)[:, MPI_INF_3DHP17.indices("pelvis")])


def _people(
    known: list[tuple[np.ndarray, np.ndarray, np.ndarray]], ignored: list[np.ndarray], width: int, height: int
) -> People:
    people = People.empty(len(known), len(MPI_INF_3DHP17))
    people.pose2d[:] = [pose2d for pose2d, _, _ in known]
    people.pose3d[:] = centre(np.array([pose3d for _, pose3d, _ in known]), MPI_INF_3DHP17)
    people.seen[:] = np.where([hidden for _, _, hidden in known], 1, 2)
    people.has3d[:] = True
    people.box[:] = clip(box_of(people.pose2d), height, width)
    regions = People.empty(len(ignored), len(MPI_INF_3DHP17))
    regions.crowd[:] = True
    outline = np.clip(np.nan_to_num(np.array(ignored, np.float64)), -1e5, 1e5).astype(np.float32)
    regions.box[:] = clip(box_of(outline.reshape(-1, len(MPI_INF_3DHP17), 2)), height, width)
    everybody = People.join([people, regions])
    everybody.area[:] = (everybody.box[:, 2:] - everybody.box[:, :2]).prod(1)
    return everybody[~everybody.crowd | (everybody.area > 0)]


def _cells(file: Path, name: str) -> np.ndarray:
    """A cell array of a .mat file, (frames, people) objects."""
    value = matfile.read(file, name)
    if not isinstance(value, np.ndarray) or value.dtype != object or value.ndim != 2:
        raise UserError(f"{file}: {name}: expected cells {{frames, people}}")
    return value


def _field(cell: Any, name: str, shape: tuple[int, int], where: str) -> np.ndarray:
    """A field of one struct, as numbers."""
    if not isinstance(cell, dict) or name not in cell:
        raise UserError(f"{where}.{name}: missing")
    return _numbers(cell[name], shape, f"{where}.{name}")


def _numbers(value: Any, shape: tuple[int, int], where: str) -> np.ndarray:
    if not isinstance(value, np.ndarray) or value.shape != shape or value.dtype == object:
        found = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        raise UserError(f"{where}: expected {shape[0]} x {shape[1]} numbers, found {found}")
    return value.astype(np.float64)
