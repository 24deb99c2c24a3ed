"""One batch and the network before it, so that what went wrong with them can be looked at again.

FOLDER/model               a model folder: weights, configuration, anchor poses
FOLDER/batch.safetensors   the images, their sizes and people, as the network got them
FOLDER/snapshot.json       ids and files of the images, and what else the writer says
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcrnet import weights
from lcrnet.config import UserError
from lcrnet.dataset import Batch
from lcrnet.model import LCRNet
from lcrnet.pose import People


def write(folder: Path, model: LCRNet, batch: Batch, about: dict[str, Any]) -> None:
    """Writes a snapshot, in place of one that is there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".snapshot-", dir=folder.parent))
    weights.save(model, scratch / "model")
    tensors = {"images": batch.images, "sizes": batch.sizes}
    for i, people in enumerate(batch.people):
        tensors |= {f"people.{i}.{f.name}": getattr(people, f.name) for f in fields(People)}
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, scratch / "batch.safetensors")
    about = about | {"ids": batch.ids, "files": batch.files}
    (scratch / "snapshot.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    scratch.chmod(0o755)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


def read(folder: Path) -> tuple[LCRNet, Batch, dict[str, Any]]:
    """The network, the batch and what was said of them. UserError names what is missing or not readable."""
    try:
        about = json.loads((folder / "snapshot.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "batch.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: not a snapshot (RUN/nonfinite/step_N-rank_R): {error}") from None
    people = [_people(tensors, i) for i in range(len(tensors["images"]))]
    batch = Batch(tensors["images"], tensors["sizes"], people, about["ids"], about["files"])
    return weights.load(folder / "model"), batch, about


def _people(tensors: dict[str, Tensor], image: int) -> People:
    return People(*(tensors[f"people.{image}.{f.name}"] for f in fields(People)))
