"""Our model folder: tensors (safetensors) and what a person can read (YAML, JSON).

MODEL/model.safetensors   the weights
MODEL/config.yaml         the resolved configuration
MODEL/anchors.json        the anchor poses and their skeleton
MODEL/model.json          versions, metrics, training data, id
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import lcrnet
from lcrnet import anchors, config
from lcrnet.config import UserError
from lcrnet.model import LCRNet, build

FORMAT = 1
_HASHED = ("model.safetensors", "config.yaml", "anchors.json")


def save(model: LCRNet, folder: str | os.PathLike[str], about: dict[str, Any] | None = None) -> None:
    """Writes a model folder. about: what else model.json says (metrics, data, step)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    config.save(model.config, folder / "config.yaml")
    anchors.save(model.anchors, folder / "anchors.json")
    facts = {
        "format": FORMAT,
        "lcrnet": lcrnet.__version__,
        "torch": torch.__version__,
        "id": model_id(folder),
        "skeleton": model.skeleton.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        **(about or {}),
    }
    (folder / "model.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def load(folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> LCRNet:
    """The model of a folder, ready to detect. UserError names what is missing, unreadable or does not fit."""
    folder = Path(folder)
    absent = [name for name in (*_HASHED, "model.json") if not (folder / name).is_file()]
    if absent:
        raise UserError(f"{folder}: not a model folder: {', '.join(absent)} missing (jobs/train.py writes RUN/model)")
    about = read_about(folder)
    if about.get("format") != FORMAT:
        raise UserError(f"{folder}/model.json: format {about.get('format')!r}, this version reads {FORMAT}")
    model = build(config.load(folder / "config.yaml"), anchors.load(folder / "anchors.json"))
    fill(model, folder, strict=True)
    return model.to(memory_format=torch.channels_last).to(device).eval()


def fill(model: LCRNet, folder: str | os.PathLike[str], strict: bool) -> list[str]:
    """Loads the weights of a folder into a model; strict=False leaves out what does not fit and returns its names."""
    file = Path(folder) / "model.safetensors"
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: not readable: {error}") from None
    own = model.state_dict()
    misfit = [
        *(f"{name}: not in the file" for name in own if name not in tensors),
        *(f"{name}: not in the network" for name in tensors if name not in own),
        *(
            f"{name}: {tuple(tensors[name].shape)} in the file, {tuple(own[name].shape)} in the network"
            for name in own
            if name in tensors and own[name].shape != tensors[name].shape
        ),
    ]
    if strict and misfit:
        raise UserError(f"{file}: does not fit its configuration: {'; '.join(misfit[:5])} ({len(misfit)} in all)")
    model.load_state_dict({k: v for k, v in tensors.items() if k in own and own[k].shape == v.shape}, strict=False)
    return misfit


def read_about(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What model.json says."""
    file = Path(folder) / "model.json"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable: {error}") from None
    if not isinstance(about, dict):
        raise UserError(f"{file}: expected an object")
    return about


def model_id(folder: str | os.PathLike[str]) -> str:
    """16 hex digits of the sha256 of weights, configuration and anchor poses: what decides the model's output."""
    digest = hashlib.sha256()
    for name in _HASHED:
        try:
            digest.update((Path(folder) / name).read_bytes())
        except OSError as error:
            raise UserError(f"{folder}: not a model folder: {name}: {error.strerror}") from None
    return digest.hexdigest()[:16]
