"""The label table: one row per image, whatever became of it, in plain Arrow types.

    table = table([row(uri, width=640, height=480, people=model.detect(image))])
    table = read("labels/")          # what jobs/annotate.py wrote; DuckDB, pandas and polars read it too

Coordinates are those of the upright image (EXIF orientation applied), which `width` and `height` are of.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from lcrnet.config import UserError
from lcrnet.pose import Person

VERSION = "1"
Side = Literal["train", "val"]

_VECTOR = pa.list_(pa.float32())

PERSON = pa.struct(
    {
        "box": _VECTOR,  # (4,) pixels x1, y1, x2, y2
        "pose2d": pa.list_(_VECTOR),  # (J, 2) pixels
        "pose3d": pa.list_(_VECTOR),  # (J, 3) metres, camera's frame (x right, y down, z away), origin in the torso
        "score": pa.float32(),
        "joint_score": _VECTOR,  # (J,)
        "anchor": pa.int32(),
        "support": pa.int32(),
        "spread": _VECTOR,  # (J,) metres
        "place": _VECTOR,  # (3,) metres, the torso in the camera's frame, or null
    }
)
"""`pose.Person`, field by field."""

SCHEMA = pa.schema(
    {
        "uri": pa.string(),  # the key: absolute path of the image
        "sha256": pa.string(),  # of the file's bytes, hexadecimal; null if they could not be read
        "width": pa.int32(),  # of the upright image; null if unreadable
        "height": pa.int32(),
        "group": pa.string(),  # images that belong together, see `group_of`
        "status": pa.string(),  # "ok" | "unreadable"
        "error": pa.string(),  # why it is unreadable
        "people": pa.list_(PERSON),
        "model": pa.string(),  # content hash of the model folder
        "config": pa.string(),  # hash of the configuration
        "skeleton": pa.string(),  # name, as in skeleton.SKELETONS
    },
    metadata={"lcrnet.labels": VERSION},
)


def row(
    uri: str,
    *,
    sha256: str | None = None,
    width: int | None = None,
    height: int | None = None,
    group: str | None = None,
    error: str | None = None,
    people: Sequence[Person] = (),
    model: str | None = None,
    config: str | None = None,
    skeleton: str = "lcr13",
) -> dict[str, Any]:
    """The row of one image. With `error`, the reason why, it is unreadable; else it is ok, with people or none."""
    return {
        "uri": uri, "sha256": sha256, "width": width, "height": height, "group": group,
        "status": "ok" if error is None else "unreadable", "error": error,
        "people": [person_struct(person) for person in people],
        "model": model, "config": config, "skeleton": skeleton,
    }  # fmt: skip


def person_struct(person: Person) -> dict[str, Any]:
    """A person as the plain lists and numbers of `PERSON`."""
    return {
        "box": np.asarray(person.box, np.float32).tolist(),
        "pose2d": np.asarray(person.pose2d, np.float32).tolist(),
        "pose3d": np.asarray(person.pose3d, np.float32).tolist(),
        "score": float(person.score),
        "joint_score": np.asarray(person.joint_score, np.float32).tolist(),
        "anchor": int(person.anchor),
        "support": int(person.support),
        "spread": np.asarray(person.spread, np.float32).tolist(),
        "place": None if person.place is None else np.asarray(person.place, np.float32).tolist(),
    }


def person_of(struct: Mapping[str, Any]) -> Person:
    """The inverse of `person_struct`, with float32 arrays."""
    place = struct["place"]
    return Person(
        box=np.asarray(struct["box"], np.float32),
        pose2d=np.asarray(struct["pose2d"], np.float32).reshape(-1, 2),
        pose3d=np.asarray(struct["pose3d"], np.float32).reshape(-1, 3),
        score=float(struct["score"]),
        joint_score=np.asarray(struct["joint_score"], np.float32),
        anchor=int(struct["anchor"]),
        support=int(struct["support"]),
        spread=np.asarray(struct["spread"], np.float32),
        place=None if place is None else np.asarray(place, np.float32),
    )


def table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Rows as a table of `SCHEMA`; none give an empty one."""
    return pa.Table.from_pylist([dict(r) for r in rows], schema=SCHEMA)


def read(folder: str | os.PathLike[str]) -> pa.Table:
    """The label table of a folder of Parquet files, ordered by uri. Of rows with one uri the first file's is taken.

    UserError: there is no such folder, no Parquet file in it, or one that is no label table of this version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of labels")
    # Names that begin so are somebody's half-written or private files.
    files = sorted(f for f in folder.glob("*.parquet") if not f.name.startswith((".", "_")))
    if not files:
        raise UserError(f"{folder}: no *.parquet in it; `python jobs/annotate.py IMAGES --out {folder}` writes labels")
    found = pa.concat_tables(_read(file) for file in files)
    found = found.append_column("row", pa.array(np.arange(len(found))))
    first = found.select(["uri", "row"]).group_by("uri").aggregate([("row", "min")]).sort_by("uri")
    return found.drop_columns(["row"]).take(first["row_min"]).replace_schema_metadata(SCHEMA.metadata)


def _read(file: Path) -> pa.Table:
    """One file, whatever width of numbers its writer chose (pandas and Ray may widen them)."""
    try:
        found = ds.dataset(str(file), format="parquet")
    except (pa.ArrowException, OSError, ValueError):
        raise UserError(f"{file}: no Parquet file, or a damaged one") from None
    # Writers may drop the metadata, so only another version is refused, not a missing one.
    version = (found.schema.metadata or {}).get(b"lcrnet.labels", VERSION.encode()).decode()
    if version != VERSION:
        raise UserError(f"{file}: label table of version {version}, expected {VERSION}; annotate anew")
    for name in SCHEMA.names:
        if name not in found.schema.names:
            raise UserError(f"{file}: no label table: column {name!r} is missing")
    try:
        return found.to_table(columns=SCHEMA.names).cast(SCHEMA)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{file}: no label table: {' '.join(str(error).split())}") from None


# Splitting into train and val. Frames of a clip, or files of a folder, must not be on both sides.


def group_of(uri: str, root: str = "") -> str:
    """The group of an image: the folder it is in, below `root`, the folder that is labelled.

    "" for an image directly in `root`: it is a group of its own. Below the root, so that the split stays the same when
    a data set moves.
    """
    folder = uri.rpartition("/")[0]
    return folder.removeprefix(root.rstrip("/")).lstrip("/") if root else folder


def split(group: str, val_share: float) -> Side:
    """The side of a group: by a hash of its name, so it is the same in every run and whatever else there is."""
    return "val" if _place(group) < val_share else "train"


def sides(rows: Sequence[Mapping[str, Any]], val_share: float) -> list[Side]:
    """The side of each row.

    A group goes to one side; an image without a group, or of the only group there is, is split by its sha256. Files
    with the same bytes go together, with the first of their groups by name. Were one side empty although there are two
    groups and 0 < val_share < 1, the group whose hash is nearest to the border changes over.
    """
    single = len({r["group"] or "" for r in rows}) < 2
    keys = [r["sha256"] or r["uri"] if single or not r["group"] else r["group"] for r in rows]
    first: dict[str, str] = {}
    for key, r in zip(keys, rows, strict=True):
        same = r["sha256"] or r["uri"]
        first[same] = min(first.get(same, key), key)
    keys = [first[r["sha256"] or r["uri"]] for r in rows]
    chosen = {key: split(key, val_share) for key in keys}
    if len(chosen) > 1 and 0 < val_share < 1 and len(set(chosen.values())) == 1:
        if "val" in chosen.values():
            chosen[max(chosen, key=_place)] = "train"
        else:
            chosen[min(chosen, key=_place)] = "val"
    return [chosen[key] for key in keys]


def _place(group: str) -> float:
    """0..1, evenly spread."""
    return int.from_bytes(hashlib.sha256(group.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
