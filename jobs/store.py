"""Where the checkpoints of a run lie (RUN, or `store.checkpoints`, any file system of pyarrow), fit to go on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.fs
from pyarrow.fs import FileSelector, FileSystem, FileType
from ray.train import Checkpoint

from jobs import session
from lcrnet.config import Store as Settings
from lcrnet.config import UserError

RECORDS = ("config.yaml", "anchors.json")
"""What a run needs besides its checkpoints to go on where RUN itself was lost; kept beside them."""


class Store:
    """Checkpoints at `uri`/ray/checkpoint_*; `files`, `path`: the same for pyarrow."""

    def __init__(self, settings: Settings, out: Path):
        self.out, self.apart = out, bool(settings.checkpoints)
        where = settings.checkpoints or str(out)
        # Ray takes a path or a URI; a relative path would be relative to a worker's own folder.
        self.uri = where if "://" in where else str(session.writable(where, "--store.checkpoints").resolve())
        try:
            self.files, self.path = FileSystem.from_uri(self.uri)
            self.files.create_dir(self.path, recursive=True)
            self.files.get_file_info(self.path)
        except (OSError, pyarrow.ArrowException) as error:
            why = " ".join(str(error).split())[:300]
            raise UserError(
                f"store.checkpoints: {self.uri}: {why}; a folder, or a URI such as s3://BUCKET/RUN"
            ) from None

    def fetch(self) -> None:
        """Brings the records of a run that began in another RUN, lost since."""
        for name in RECORDS:
            if self.apart and not (self.out / name).exists() and self._type(name) == FileType.File:
                pyarrow.fs.copy_files(f"{self.path}/{name}", str(self.out / name), source_filesystem=self.files)

    def put(self) -> None:
        """Leaves RUN's records beside the checkpoints."""
        for name in RECORDS if self.apart else ():
            pyarrow.fs.copy_files(str(self.out / name), f"{self.path}/{name}", destination_filesystem=self.files)

    def mend(self) -> Checkpoint | None:
        """Takes away checkpoints whose upload was cut off, which Ray's own list does not name.

        Ray writes that list in place, and refuses to go on with one cut off by a kill or naming what is gone: then it
        is put aside, and the newest whole checkpoint is returned, to go on from.
        """
        file = f"{self.path}/ray/checkpoint_manager_snapshot.json"
        folders = self._checkpoints()
        if self._type("ray/checkpoint_manager_snapshot.json") != FileType.File:
            return self._newest(folders)
        try:
            listed = {r["checkpoint_dir_name"] for r in json.loads(self._read(file))["checkpoint_results"]}
            if listed <= folders.keys():
                for name in folders.keys() - listed:
                    self.files.delete_dir(folders[name])
                return None
        except (ValueError, KeyError, TypeError):
            pass
        self.files.move(file, file + ".broken")
        return self._newest(folders)

    def _newest(self, folders: dict[str, str]) -> Checkpoint | None:
        whole = [(step, path) for path in folders.values() if (step := self._step(path)) is not None]
        return Checkpoint(max(whole)[1], filesystem=self.files) if whole else None

    def _step(self, folder: str) -> int | None:
        """The step of a checkpoint; None if it is not whole: a safetensors file says itself how long it is."""
        try:
            step = int(json.loads(self._read(f"{folder}/state.json"))["step"])
            with self.files.open_input_file(f"{folder}/training.safetensors") as tensors:
                head = int.from_bytes(tensors.read(8), "little")
                held = json.loads(tensors.read(head))
                ends = [t["data_offsets"][1] for name, t in held.items() if name != "__metadata__"]
                return step if tensors.size() == 8 + head + max(ends, default=0) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _checkpoints(self) -> dict[str, str]:
        found = self.files.get_file_info(FileSelector(f"{self.path}/ray", allow_not_found=True))
        return {i.base_name: i.path for i in found if i.base_name.startswith("checkpoint_") and not i.is_file}

    def _type(self, name: str) -> Any:
        return self.files.get_file_info(f"{self.path}/{name}").type

    def _read(self, file: str) -> bytes:
        with self.files.open_input_stream(file) as stream:
            return bytes(stream.read())
