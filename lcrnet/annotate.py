"""Annotator: a callable on a batch of encoded images -> rows of the label table. What jobs/annotate.py runs everywhere.

annotator = Annotator("run/model")
table = annotator({"uri": ["/a.jpg"], "bytes": [data], "error": [""]})      # labels.SCHEMA, one row per image
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from lcrnet import image, labels, weights
from lcrnet.config import Config, UserError, from_dict
from lcrnet.image import Unreadable
from lcrnet.pose import Person

DETECTION: dict[str, tuple[str, ...]] = {
    "image": ("short_side", "max_side"),
    "rpn": ("nms_iou", "pre_nms", "post_nms", "min_size"),
    "head": ("score_floor", "at_least", "passes"),
    "ppi": (
        "released",
        "variant",
        "faults",
        "postprocess",
        "th_pose3D",
        "th_iou",
        "iou_func",
        "min_mode_score",
        "th_persondetect",
    ),
}
"""The fields that may differ from those a model was trained with: they change what it finds, not what it is."""

_PIXELS = 64_000_000
"""Decoded pixels that one call of the model gets at most (192 MB), so that a batch of photographs fits into memory."""


def settings(own: Config, asked: Config) -> Config:
    """The configuration a model detects with: its own, but for the fields of DETECTION that `asked` says explicitly.

    own     that of the model folder
    asked   of the job: what its file or its command line sets, not its defaults, takes the place of the model's
    """
    out = own.model_dump()
    for section, fields in DETECTION.items():
        wanted = getattr(asked, section)
        said = wanted.model_fields_set if section in asked.model_fields_set else set()
        out[section] |= {name: getattr(wanted, name) for name in fields if name in said}
    return from_dict(out)


def config_id(config: Config, max_pixels: int = image.MAX_PIXELS, calibrated: bool = True) -> str:
    """16 hex digits of what decides the labels besides the weights. Batch size, workers and device do not."""
    return _hash([_decides(config), max_pixels, calibrated])


def detector_id(config: Config) -> str:
    """16 hex digits of what decides which scores a model gives; a calibration holds for those alone."""
    return _hash(_decides(config))


def _decides(config: Config) -> dict[str, Any]:
    return {
        section: {name: getattr(getattr(config, section), name) for name in fields}
        for section, fields in DETECTION.items()
    }


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class _Picture:
    """What becomes known of one image of a batch."""

    uri: str
    data: bytes
    error: str | None
    size: tuple[int, int] = (0, 0)  # height, width
    people: Sequence[Person] = ()


class Annotator:
    """Finds the people of encoded images.

    model       model folder
    device      of torch; None: a GPU if there is one
    max_pixels  larger images are unreadable
    batch       images a call of the model
    asked       configuration whose explicit detection settings take the place of the model's (see `settings`)
    root        folder that is labelled, for the groups of its images (labels.group_of)
    threads     that decode ahead of the model
    calibrated  scores as the model's calibration has them, if it has one
    load        opens the model folder: an object with config, skeleton, calibration, dropped and detect_batch
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        device: str | None = None,
        max_pixels: int = image.MAX_PIXELS,
        batch: int = 16,
        asked: Config | None = None,
        root: str = "",
        threads: int = 4,
        calibrated: bool = True,
        load: Callable[..., Any] = weights.load,
    ):
        self.model = load(model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.max_pixels, self.batch, self.root, self.threads = max_pixels, batch, root, threads
        if asked is not None:
            self.model.config = settings(self.model.config, asked)
            self.model.rpn.config = self.model.config.rpn
        self.model_id = weights.model_id(model)
        self.config_id = config_id(self.model.config, max_pixels, calibrated)
        own = self.model.calibration if calibrated else None
        if own and own.about.get("detector") != detector_id(self.model.config):
            raise UserError(
                f"{model}: its calibration is of other settings of {', '.join(DETECTION)}: detect with the model's "
                "own, calibrate again (jobs/evaluate.py --calibrate), or take scores as they are "
                "(--annotate.calibrated false)"
            )
        self.model.calibration = own

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> pa.Table:
        """One row per image, in the order given, whatever becomes of it.

        batch   columns `uri` (str), `bytes` (the encoded image; b"" if it could not be read), `error` (then why, or "")
        """
        pictures = [
            _Picture(str(uri), bytes(data), str(error or "") or None)
            for uri, data, error in zip(batch["uri"], batch["bytes"], batch["error"], strict=True)
        ]
        for group, pixels in self._decoded(self._groups(pictures)):
            self._detect(group, pixels)
        return labels.table(self._row(picture) for picture in pictures)

    @property
    def dropped(self) -> int:
        """Pose proposals left out so far, because a number of theirs is not finite."""
        return int(self.model.dropped)

    def _groups(self, pictures: Sequence[_Picture]) -> list[list[_Picture]]:
        """Images of similar shape (padding is lost work), at most `batch` of them and _PIXELS pixels, but one."""
        for picture in pictures:
            if picture.error is None:
                try:
                    picture.size = image.size(picture.data, self.max_pixels)
                except Unreadable as error:
                    picture.error = str(error)
        groups: list[list[_Picture]] = []
        pixels = 0
        for picture in sorted(
            (p for p in pictures if p.error is None), key=lambda p: (p.size[1] / p.size[0], p.size, p.uri)
        ):
            area = picture.size[0] * picture.size[1]
            if not groups or len(groups[-1]) == self.batch or pixels + area > _PIXELS:
                groups.append([])
                pixels = 0
            groups[-1].append(picture)
            pixels += area
        return groups

    def _decoded(self, groups: Sequence[list[_Picture]]) -> Iterator[tuple[list[_Picture], list[np.ndarray | None]]]:
        """Each group with its pixels, the next one being decoded while the model has this one."""
        with ThreadPoolExecutor(self.threads) as pool:
            ahead = [pool.submit(self._decode, picture) for group in groups[:1] for picture in group]
            for i, group in enumerate(groups):
                now, ahead = (
                    ahead,
                    [pool.submit(self._decode, p) for following in groups[i + 1 : i + 2] for p in following],
                )
                yield group, [one.result() for one in now]

    def _decode(self, picture: _Picture) -> np.ndarray | None:
        try:
            pixels = image.decode(picture.data, self.max_pixels)
        except Unreadable as error:
            picture.error = str(error)
            return None
        picture.size = pixels.shape[0], pixels.shape[1]
        return pixels

    def _detect(self, group: Sequence[_Picture], pixels: Sequence[np.ndarray | None]) -> None:
        whole = [(picture, shot) for picture, shot in zip(group, pixels, strict=True) if shot is not None]
        try:
            found = self.model.detect_batch([shot for _, shot in whole]) if whole else []
        except Exception:
            # An image must not cost its neighbours their labels. But if the model fails at a plain grey image too, the
            # fault is not the images': raise, rather than record thousands of them as unreadable.
            self.model.detect_batch([np.full((64, 64, 3), 128, np.uint8)])
            for picture, shot in whole:
                try:
                    picture.people = self.model.detect_batch([shot])[0]
                except Exception as error:
                    picture.error = f"the model failed: {type(error).__name__}: {' '.join(str(error).split())}"[:300]
            return
        for (picture, _), people in zip(whole, found, strict=True):
            picture.people = people

    def _row(self, picture: _Picture) -> dict[str, Any]:
        known = picture.error is None
        return labels.row(
            picture.uri,
            sha256=hashlib.sha256(picture.data).hexdigest() if picture.data else None,
            width=picture.size[1] if known else None,
            height=picture.size[0] if known else None,
            group=labels.group_of(picture.uri, self.root),
            error=picture.error,
            people=picture.people,
            model=self.model_id,
            config=self.config_id,
            skeleton=self.model.skeleton.name,
        )


class Labeller:
    """A worker of an annotation job: reads and labels blocks of files, each committed as one file of a label table.

    annotator   makes the Annotator (or a like callable) from `arguments`, its keywords
    out         folder of the label table
    threads     CPU threads of the model; 0 leaves them as they are
    UserError: a folder that the job has is not on this machine.
    """

    def __init__(
        self, out: str | os.PathLike[str], arguments: dict[str, Any], threads: int = 0,
        annotator: Callable[..., Callable[[Mapping[str, Sequence[Any]]], pa.Table]] = Annotator,
    ):  # fmt: skip
        self.out = Path(out)
        for folder in (self.out, Path(arguments["root"])):
            if not folder.is_dir():  # else each of its images would be recorded as unreadable
                raise UserError(f"{folder}: not on {platform.node()}; every machine must mount it at the same place")
        if threads:
            torch.set_num_threads(threads)
        self.annotate = annotator(**arguments)
        self.max_pixels, self.stride = arguments["max_pixels"], 4 * arguments["batch"]

    def __call__(self, block: pa.Table) -> pa.Table:
        """A block with columns `uri` and `error` (see image.find) -> one row: images, people, unreadable, and dropped
        pose proposals (counts).

        The file's name comes from the uris: a block that is done twice, after a lost worker, is still one file. It
        appears under that name when it is whole.
        """
        rows = block.to_pylist()
        dropped = getattr(self.annotate, "dropped", 0)
        parts = [rows[i : i + self.stride] for i in range(0, len(rows), self.stride)]
        tables = []
        with ThreadPoolExecutor(1) as pool:  # reads one part ahead: a whole block of photographs may not fit in memory
            ahead = pool.submit(self._read, parts[0])
            for following in [*parts[1:], None]:
                batch = ahead.result()
                if following is not None:
                    ahead = pool.submit(self._read, following)
                tables.append(self.annotate(batch))
        table = pa.concat_tables(tables)
        key = hashlib.sha256("\n".join(row["uri"] for row in rows).encode()).hexdigest()[:16]
        unfinished = self.out / f".{key}.{os.getpid()}.part"
        pq.write_table(table, unfinished, compression="zstd")
        os.replace(unfinished, self.out / f"{key}.parquet")
        return pa.table({
            "images": [len(table)],
            "people": [pc.sum(pc.list_value_length(table["people"])).as_py() or 0],
            "unreadable": [pc.sum(pc.equal(table["status"], "unreadable")).as_py() or 0],
            "dropped": [getattr(self.annotate, "dropped", 0) - dropped],
        })  # fmt: skip

    def _read(self, rows: Sequence[Mapping[str, str]]) -> dict[str, list[Any]]:
        return read_files([row["uri"] for row in rows], [row["error"] for row in rows], self.max_pixels)


class Detector:
    """A worker of an evaluation job: finds the people of chunks of files, the same in whichever process.

    arguments   the Annotator's (or a like callable's, `annotator`) keywords
    threads     CPU threads of the model; 0 leaves them as they are
    """

    def __init__(
        self, arguments: dict[str, Any], threads: int = 0,
        annotator: Callable[..., Callable[[Mapping[str, Sequence[Any]]], pa.Table]] = Annotator,
    ):  # fmt: skip
        if threads:
            torch.set_num_threads(threads)
        self.annotate, self.max_pixels = annotator(**arguments), arguments["max_pixels"]

    def __call__(self, chunks: Mapping[str, Sequence[Sequence[str]]]) -> pa.Table:
        """A column `uris`, lists of files -> rows of the label table and of each `dropped`, the pose proposals of its
        chunk that were left out, on the chunk's first row."""
        tables = []
        for uris in chunks["uris"]:
            before = getattr(self.annotate, "dropped", 0)
            rows = self.annotate(read_files(list(uris), [""] * len(uris), self.max_pixels))
            dropped = np.zeros(len(rows), np.int64)
            dropped[:1] = getattr(self.annotate, "dropped", 0) - before
            tables.append(rows.append_column("dropped", pa.array(dropped)))
        return pa.concat_tables(tables)


def read_files(uris: Sequence[str], errors: Sequence[str], max_pixels: int) -> dict[str, list[Any]]:
    """A batch for `Annotator`: the bytes of files, or why they could not be read; those with an error are left."""
    batch: dict[str, list[Any]] = {"uri": list(uris), "bytes": [], "error": []}
    for uri, error in zip(uris, errors, strict=True):
        data = b""
        if not error:
            try:
                data = image.read_bytes(uri, max_pixels)
            except Unreadable as reason:
                error = str(reason)
        batch["bytes"].append(data)
        batch["error"].append(error)
    return batch
