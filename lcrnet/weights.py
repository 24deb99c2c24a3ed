"""Our model folder: tensors (safetensors) and what a person can read (YAML, JSON).

MODEL/model.safetensors   the weights
MODEL/config.yaml         the resolved configuration
MODEL/anchors.json        the anchor poses and their skeleton
MODEL/model.json          versions, metrics, training data, id
MODEL/calibration.json    what turns scores into probabilities, once jobs/evaluate.py --calibrate has found it

    python -m lcrnet.weights FILE [PART ...] [--out FOLDER]

says what a file of other people's weights is (legacy.py), what it needs and what it lacks, or what a model folder is.
PART: more files of the same model (anchor poses, PPI's parameters, configuration). --out writes a whole detector as a
model folder. FILE may be a URL, https://HOST/FILE#sha256=HEX.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import lcrnet
from lcrnet import anchors, calibration, config, legacy
from lcrnet.calibration import Calibration
from lcrnet.config import Config, UserError
from lcrnet.imports import BODY, Imported
from lcrnet.model import LCRNet, build
from lcrnet.skeleton import Skeleton

FORMAT = 1
_HASHED = ("model.safetensors", "config.yaml", "anchors.json")


def save(model: LCRNet, folder: str | os.PathLike[str], about: dict[str, Any] | None = None) -> None:
    """Writes a model folder. about: what else model.json says (metrics, data, step)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    config.save(model.config, folder / "config.yaml")
    anchors.save(model.anchors, folder / "anchors.json")
    if model.calibration:
        calibration.save(model.calibration, folder / calibration.FILE)
    else:
        (folder / calibration.FILE).unlink(missing_ok=True)  # of the model that was there
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
    folder = _whole(folder)
    about = read_about(folder)
    if about.get("format") != FORMAT:
        raise UserError(f"{folder}/model.json: format {about.get('format')!r}, this version reads {FORMAT}")
    model = build(config.load(folder / "config.yaml"), anchors.load(folder / "anchors.json"))
    fill(model, folder, strict=True)
    if (folder / calibration.FILE).exists():
        model.calibration = calibration.load(folder / calibration.FILE)
    return model.to(memory_format=torch.channels_last).to(device).eval()


def skeleton(folder: str | os.PathLike[str]) -> Skeleton:
    """The skeleton of a model folder's poses. UserError as `load`."""
    return anchors.load(_whole(folder) / "anchors.json").skeleton


def _whole(folder: str | os.PathLike[str]) -> Path:
    folder = Path(folder)
    absent = [name for name in (*_HASHED, "model.json") if not (folder / name).is_file()]
    if absent:
        raise UserError(f"{folder}: not a model folder: {', '.join(absent)} missing (jobs/train.py writes RUN/model)")
    return folder


def calibrate(folder: str | os.PathLike[str], found: Calibration) -> None:
    """Puts a calibration into a model folder, in place of its old one; the model gets a new id."""
    folder = Path(folder)
    about = read_about(folder)
    calibration.save(found, folder / calibration.FILE)
    about["id"] = model_id(folder)
    part = folder / ".model.json.part"
    part.write_text(json.dumps(about, indent=1), encoding="utf-8")
    part.replace(folder / "model.json")


def fill(model: LCRNet, folder: str | os.PathLike[str], strict: bool) -> list[str]:
    """Loads the weights of a folder into a model; strict=False leaves out what does not fit and returns its names."""
    file = Path(folder) / "model.safetensors"
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: not readable: {error}") from None
    misfit = _fill(model, tensors)
    if strict and misfit:
        raise UserError(f"{file}: does not fit its configuration: {'; '.join(misfit[:5])} ({len(misfit)} in all)")
    return misfit


def start(model: LCRNet, source: str) -> list[str]:
    """Fills a model that is about to be trained from a model folder or a file of other people's weights (legacy.load).

    -> lines on what did not fit and starts at random. UserError: the model's configuration computes something else
    with these weights than they were trained for; it names the fields.
    """
    if Path(source).is_dir():
        return fill(model, source, strict=False)
    found = legacy.load(source)
    differ = {name: _argument(value) for name, value in found.needs.items() if not _agrees(model.config, name, value)}
    if must := " ".join(f"--{name} {value}" for name, value in differ.items() if name in BODY):
        raise UserError(f"train.init: {source}: {legacy.KINDS[found.report.kind]} needs {must}")
    tensors = found.tensors
    own = model.state_dict()
    # Stage 5 of a body trained on ImageNet goes wherever this network has its own.
    for one, other in (("box_head.layer4.", "body.layer4."), ("body.layer4.", "box_head.layer4.")):
        if not any(name.startswith(one) for name in own):
            tensors = {name.replace(one, other, 1) if name.startswith(one) else name: t for name, t in tensors.items()}
    misfit = _fill(model, tensors)
    return [
        *(
            f"{name} {value} is what the weights were trained with"
            for name, value in differ.items()
            if name[:3] != "ppi"
        ),
        *misfit,
        *(f"{name}: left over" for name in found.report.left_over),
    ]


def anchors_of(source: str) -> anchors.AnchorPoses | None:
    """The anchor poses of what `start` takes; None if the weights come without."""
    if Path(source).is_dir():
        return anchors.load(Path(source) / "anchors.json")
    return legacy.load(source).anchors


def _agrees(config: Config, name: str, value: Any) -> bool:
    section, _, field = name.partition(".")
    own = getattr(getattr(config, section), field)
    if isinstance(own, tuple):
        return len(own) == len(value) and all(abs(a - b) < 1e-6 for a, b in zip(own, value, strict=True))
    return bool(own == value)


def _argument(value: Any) -> str:
    text = json.dumps(list(value) if isinstance(value, tuple) else value)
    return f"'{text}'" if isinstance(value, tuple) else text.strip('"')


def _fill(model: LCRNet, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Loads what fits; the lines say what does not."""
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
    """16 hex digits of the sha256 of weights, configuration, anchor poses and calibration, if there is one: of what
    decides the model's output."""
    digest = hashlib.sha256()
    calibrated = [calibration.FILE] if (Path(folder) / calibration.FILE).exists() else []
    for name in (*_HASHED, *calibrated):
        try:
            digest.update((Path(folder) / name).read_bytes())
        except OSError as error:
            raise UserError(f"{folder}: not a model folder: {name}: {error.strerror}") from None
    return digest.hexdigest()[:16]


def describe(found: Imported, file: str) -> str:
    """What a file is, what it needs and what it lacks, for a person."""
    report = found.report
    size = sum(t.numel() for t in found.tensors.values()) / 1e6
    counts = f"{len(report.matched)} are ours, {len(report.left_over)} left over; {len(report.missing)} of ours missing"
    lines = [f"{file}: {report.kind}: {legacy.KINDS[report.kind]}",
             f"{found.config.model.backbone}, {size:.1f} M numbers; of its tensors {counts}"]  # fmt: skip
    if found.anchors is not None:
        lines.append(f"{len(found.anchors)} anchor poses ({found.anchors.skeleton.name})")
    lines += ["", "It needs:", *(f"  {name}: {_argument(value)}" for name, value in found.needs.items())]
    lines += ["", *(f"Note: {note}" for note in report.notes)] if report.notes else []
    for title, those in (("Left over", report.left_over), ("Missing", report.missing)):
        if those:
            some = those[:20]
            lines += ["", f"{title}:", *(f"  {name[:120]!a}"[:124] for name in some)]
            lines += [f"  ... and {len(those) - len(some)} more"] if len(those) > len(some) else []
    lines += ["", "A whole detector: --out FOLDER writes it as a model folder." if found.model is not None
              else f"No whole detector: --train.init {file} starts a training from it."]  # fmt: skip
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lcrnet.weights", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", metavar="FILE", help="weights, or a model folder")
    parser.add_argument("parts", metavar="PART", nargs="*", help="more files of the same model")
    parser.add_argument("--out", metavar="FOLDER", help="writes a whole detector as a model folder")
    args = parser.parse_args(argv)
    if Path(args.file).is_dir():
        if args.out:
            raise UserError(f"{args.file}: a model folder already")
        print(f"{args.file}: a model folder of this program")
        print(json.dumps(read_about(args.file), indent=1))
        return 0
    if args.out and Path(args.out).exists():
        raise UserError(f"--out {args.out}: is there already")
    found = legacy.load(args.file, parts=args.parts)
    print(describe(found, args.file))
    if args.out:
        if found.model is None:
            raise UserError(f"{args.file}: no whole detector, so no model folder (see above what it lacks)")
        save(found.model, args.out, {"from": {"file": Path(args.file.split("#")[0]).name, "kind": found.report.kind}})
        print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    config.run(main)
