"""Other people's weights: a file -> what it is, and our tensors, configuration and model of it.

    imported = load("InTheWild-ResNet50.pkl")       # a path, or https://...#sha256=HEX (fetch.py)
    weights.save(imported.model, "models/inthewild")

A file is known by what it holds, never by its name; what is none of `KINDS` is refused. Here is what each kind's
program computes with, as fields of the configuration; imports.py folds the rest into the weights.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from lcrnet import anchors as anchor_poses
from lcrnet import config as configuration
from lcrnet import detectron, fetch, names, torchfile
from lcrnet.anchors import AnchorPoses
from lcrnet.backbone import RESNETS
from lcrnet.config import UserError
from lcrnet.imports import Import, Imported, Report
from lcrnet.names import Layout

__all__ = ["KINDS", "PARTS", "Imported", "Report", "load", "recognise"]

KINDS = {
    "resnet_caffe": "a ResNet of Caffe, trained on ImageNet (resnet*_caffe.pth)",
    "resnet_torchvision": "a ResNet or ResNeXt of torchvision, trained on ImageNet",
    "vgg16_caffe": "VGG16 of Caffe, trained on ImageNet (vgg16_caffe.pth)",
    "vgg16_torchvision": "VGG16 of torchvision, trained on ImageNet",
    "detectron_imagenet": "a body of Detectron, trained on ImageNet (R-*.pkl, X-*.pkl)",
    "detectron_detector": "a detector of Detectron (model_final.pkl)",
    "lcrnet_checkpoint": "a checkpoint of the LCR-Net on Detectron.pytorch (model_step*.pth)",
    "lcrnet_state": "the weights of an LCR-Net of INRIA, without anchor poses (*_model.pth.tgz)",
    "lcrnet_inria": "an LCR-Net of INRIA with anchor poses and parameters (.pkl)",
    "dope": "DOPE, of which the body part is imported (.pth.tgz)",
}
PARTS = {
    "lcrnet_anchors": "anchor poses",
    "lcrnet_ppi": "parameters of PPI",
    "lcrnet_cfg": "Detectron's configuration",
}
"""What complements the weights of others; alone these are no weights."""

CAFFE_MEAN = tuple(round(m / 255, 10) for m in (122.7717, 115.9465, 102.9801))
CAFFE_STD = (round(1 / 255, 10),) * 3
_READ = ("MODEL", "RESNETS", "FPN", "FAST_RCNN", "RPN", "TEST", "GROUP_NORM", "PIXEL_MEANS", "POOLING_SIZE",
         "CROP_RESIZE_WITH_MAX_POOL")  # fmt: skip


def recognise(file: str | os.PathLike[str]) -> str:
    """One of `KINDS` or `PARTS`; UserError says what the file is instead."""
    path, settings = fetch.local(file)
    value = _read(path)
    try:
        return _kind(value, str(path), settings.get("kind"))[0]
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"{path}: damaged: {' '.join(str(error).split())[:200]}") from error


def load(
    file: str | os.PathLike[str],
    anchors: AnchorPoses | str | os.PathLike[str] | None = None,
    parts: Sequence[str | os.PathLike[str]] = (),
    sha256: str | None = None,
) -> Imported:
    """The weights of a file, in our names and conventions.

    file     a path, or a URL with its sha256 (fetch.py); `#kind=vgg16_caffe` says what its numbers do not tell
    anchors  poses, or a file of them, for weights that come without: the predecessor's checkpoints, INRIA's in parts
    parts    more files of the same model: its anchor poses, PPI parameters, configuration; a released *_anchor_cfg.pkl
             is all three

    UserError: no such weights (it says what the file is instead), damaged, or parts that do not belong together.
    """
    path, settings = fetch.local(file, sha256)
    value = _read(path)
    try:
        return _load(value, str(path), settings.get("kind"), anchors, parts)
    except (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError, ArithmeticError) as error:
        if isinstance(error, NotImplementedError):
            raise
        # Any value may stand anywhere in a stranger's file: what is not what its name says ends here.
        raise UserError(f"{path}: damaged: {' '.join(str(error).split())[:200] or type(error).__name__}") from error


def _load(
    value: Any,
    where: str,
    said: str | None,
    anchors: AnchorPoses | str | os.PathLike[str] | None,
    parts: Sequence[str | os.PathLike[str]],
) -> Imported:
    kind, state, more = _kind(value, where, said)
    if kind in PARTS:
        raise UserError(f"{where}: {PARTS[kind]}, not weights: name it beside the file of the weights they belong to")
    given = list(parts) + ([anchors] if isinstance(anchors, str | os.PathLike) else [])
    for part in given:
        more |= _part(part)
    poses = anchors if isinstance(anchors, AnchorPoses) else None
    if kind == "dope":
        return _dope(state, more, where)
    if kind.startswith(("detectron", "lcrnet")):
        return _detector(kind, state, more, poses, where)
    return _backbone(kind, state, where)


# Reading and recognising


def _read(path: Path) -> Any:
    """A file's content as plain data and arrays; UserError says what it is instead."""
    data = torchfile.read(path)
    header = data[8 : 8 + int.from_bytes(data[:8], "little")] if len(data) > 8 else b""
    if header[:1] == b"{":
        try:
            json.loads(header)
            return {name: value.float().numpy() for name, value in load_safetensors(data).items()}
        except (ValueError, RecursionError, SafetensorError) as error:
            raise UserError(f"{path}: damaged safetensors: {' '.join(str(error).split())[:200]}") from None
    if what := _other(data):
        raise UserError(f"{path}: {what}, not weights")
    value = torchfile.load(data, str(path))
    if isinstance(value, dict) and isinstance(value.get("model"), bytes):  # a file of torch.save within the pickle
        value["model"] = torchfile.load(value["model"], f"{path}: model")
    return value


def _other(data: bytes) -> str:
    """What a file is whose first bytes are those of another format; empty if they may be those of weights."""
    start = data[:512].lstrip()
    known = {b"\xff\xd8\xff": "a JPEG image", b"\x89PNG": "a PNG image", b"\x89HDF": "an HDF5 file", b"%PDF": "a PDF",
             b"\x93NUMPY": "a NumPy file", b"version https://git-lfs": "a pointer of Git LFS (git lfs pull fetches it)",
             b"\x08": "perhaps ONNX or another protocol buffer", b"Rar!": "a RAR archive", b"7z": "a 7z archive",
             b"BZh": "a bzip2 file", b"\xfd7zXZ": "an xz file", b"{": "JSON", b"GIF8": "a GIF image"}  # fmt: skip
    if not data:
        return "an empty file"
    if re.match(rb"<(!doctype|html|\?xml)", start, re.IGNORECASE):
        return "a web page (a download that asks for a confirmation?)"
    for magic, what in known.items():
        if data.startswith(magic):
            return what
    if data[:2] != b"PK" and data[:2] != b"\x1f\x8b" and data[:1] != b"\x80" and data[257:262] != b"ustar":
        # Protocol 0 of pickles is text as well.
        if not re.match(rb"[(\]}cd]", data) or not data.rstrip().endswith(b"."):
            return "text" if re.fullmatch(rb"[\t\n\r\x20-\x7e]*", data[:512]) else "no known format"
    return ""


def _kind(value: Any, file: str, said: str | None = None) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(kind, the tensors by their names, what else the file says: anchor_poses, cfg, ppi_params, and DOPE's own)."""
    if said is not None and said not in KINDS:
        raise UserError(f"{file}: kind {said!r} is none of {', '.join(KINDS)}")
    if isinstance(value, np.ndarray) and value.ndim == 2 and value.shape[1] % 5 == 0:
        return "lcrnet_anchors", {}, {"anchor_poses": value}
    if not isinstance(value, dict):
        raise UserError(f"{file}: a pickle of a {type(value).__name__}, not weights")
    if isinstance(value.get("state_dict"), dict) and "dope_kwargs" in value:
        return "dope", _named(value["state_dict"]), {k: v for k, v in value.items() if k != "state_dict"}
    more = {key: value[key] for key in ("anchor_poses", "cfg", "ppi_params") if value.get(key) is not None}
    if "anchor_poses" in value and "model" not in value:
        return "lcrnet_anchors", {}, more
    if "th_pose3D" in value:
        return "lcrnet_ppi", {}, {"ppi_params": value}
    if isinstance(value.get("MODEL"), dict) and "TEST" in value:
        return "lcrnet_cfg", {}, {"cfg": value}
    state = next((value[k] for k in ("model", "blobs", "state_dict") if isinstance(value.get(k), dict)), value)
    state = _named(state)
    if any(name.startswith(("Conv_Body.", "Box_Head.", "Pose_Outs.")) for name in state):
        bare = state.keys() == value.keys() or not ({"optimizer", "step", "anchor_poses"} & value.keys())
        return (
            "lcrnet_inria" if "anchor_poses" in value else "lcrnet_state" if bare else "lcrnet_checkpoint",
            state,
            more,
        )
    if "conv1_w" in state:
        full = any(name.startswith(("conv_rpn", "fpn_inner", "rpn_")) for name in state)
        return "detectron_detector" if full else "detectron_imagenet", state, more
    if "conv1.weight" in state and "layer1.0.conv1.weight" in state:
        return said or _resnet_of(state), state, more
    if "features.0.weight" in state and "features.28.weight" in state:
        return said or _vgg_of(state, file), state, more
    if any(name.startswith(("body.", "box_head.", "predictor.")) for name in state):
        raise UserError(f"{file}: weights of this program: name the model folder that it lies in")
    if any(name.startswith(("backbone.bottom_up.", "backbone.body.")) for name in state):
        raise UserError(
            f"{file}: a detector of detectron2 or torchvision, whose heads know no poses, not weights of LCR-Net"
        )
    some = ", ".join(sorted(map(str, value))[:4])
    raise UserError(
        f"{file}: no weights known here: it holds {some or 'nothing'} ...; known are {'; '.join(KINDS.values())}"
    )


def _named(state: dict[Any, Any]) -> dict[str, Any]:
    """Of DataParallel's names the part that the network gave."""
    named = {str(name): value for name, value in state.items()}
    whole = bool(named) and all(name.startswith("module.") for name in named)
    return {name.removeprefix("module."): value for name, value in named.items()} if whole else named


def _resnet_of(state: dict[str, Any]) -> str:
    """Caffe's and torchvision's files have the same names. Caffe's network saw pixels of -128 .. 128, torchvision's of
    about -2 .. 2: the variance of conv1's output, in units of its filters, is some 3000 times larger there.
    """
    weight, variance = state["conv1.weight"], state.get("bn1.running_var")
    if "bn1.num_batches_tracked" in state or not isinstance(variance, np.ndarray) or weight.ndim != 4:
        return "resnet_torchvision"
    power = np.square(weight.astype(np.float64)).sum((1, 2, 3))
    use = power > 1e-3 * power.max(initial=0)
    ratio = variance.astype(np.float64)[use] / power[use] if variance.shape == power.shape else np.zeros(0)
    return "resnet_caffe" if len(ratio) and np.median(ratio) > 100 else "resnet_torchvision"


def _vgg_of(state: dict[str, Any], file: str) -> str:
    """VGG16 has no statistics that tell; the first biases of the two published networks do."""
    bias = state.get("features.0.bias")
    for kind, first in (("vgg16_caffe", (0.7302, 0.0649)), ("vgg16_torchvision", (0.4034, 0.3778))):
        if isinstance(bias, np.ndarray) and len(bias) == 64 and np.abs(bias[:2] - first).max() < 1e-3:
            return kind
    raise UserError(
        f"{file}: VGG16, but not one of the two published: say which way its images were scaled, "
        f"{file}#kind=vgg16_caffe or {file}#kind=vgg16_torchvision"
    )


def _part(file: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file of parts, or of our anchor poses, says."""
    path, _ = fetch.local(file)
    if torchfile.read(path)[:64].lstrip()[:1] == b"{":
        return {"anchors": anchor_poses.load(path)}
    kind, _, more = _kind(_read(path), str(path))
    if kind not in PARTS and kind != "lcrnet_inria":
        raise UserError(f"{path}: {KINDS[kind]}; expected one of {', '.join(PARTS.values())}")
    return more


# The three families


def _backbone(kind: str, state: dict[str, Any], file: str) -> Imported:
    caffe = kind.endswith("_caffe")
    fields: dict[str, Any] = {"model": {"stride_in_1x1": False}, "image": {}}
    if kind.startswith("vgg16"):
        fields["model"] |= {"backbone": "vgg16", "head": "2mlp", "head_width": 4096, "roi_size": 7}
    else:
        fields["model"] |= {"backbone": _network(state, "", file), "stride_in_1x1": caffe, "roi_size": 14}
    if caffe:
        fields["image"] = {"mean": CAFFE_MEAN, "std": CAFFE_STD}
    work = Import(kind, file, fields)
    work.take(state, names.ours("torchvision", state, Layout()))
    if caffe:
        work.flip()
    work.note("a body and box head: the RPN and the pose predictor are to be trained")
    return work.done(("body.", "box_head."), None)


def _detector(kind: str, state: dict[str, Any], more: dict[str, Any], poses: AnchorPoses | None, file: str) -> Imported:
    """Detectron and what was built on it."""
    family = "detectron" if kind.startswith("detectron") else "seed"
    cfg = more.get("cfg")
    if isinstance(cfg, str | bytes) and cfg.strip():
        try:
            cfg = detectron.parse(cfg if isinstance(cfg, str) else cfg.decode("utf-8"))
        except (UserError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cfg: {error}") from None
    plain = names.ours(family, state, Layout())
    found = {our: state[name] for name, our in plain.items()}
    seen = _seen(state, found, file)
    fields = _fields(cfg, seen, file) if isinstance(cfg, dict) else seen
    model = fields["model"]
    layout = Layout("box_head" if model["head"] == "res5" else "body", model["head"], model["norm"] == "gn")
    work = Import(kind, file, fields)
    work.take(state, names.ours(family, state, layout))
    work.flip()
    work.affine()
    if not isinstance(cfg, dict) and kind != "detectron_imagenet":
        work.note("the file has no configuration: sizes are read from the tensors, all else is Detectron's usual")
    if kind == "detectron_imagenet":
        work.note("a body and stage 5: the RPN and the pose predictor are to be trained")
        return work.done(("body.", "box_head."), None)
    work.boxes()
    if "predictor.refine.weight" not in work.tensors:
        work.drop("predictor.")
        work.note("a detector without poses: the pose predictor is to be trained")
        return work.done(("body.", "box_head.", "rpn."), None)
    work.poses(interleaved=False, divisor2d=5, divisor3d=5)
    poses = poses or more.get("anchors")
    if poses is None and "anchor_poses" in more:
        poses = anchor_poses.from_flat(more["anchor_poses"], file)
    _ppi(work, more.get("ppi_params"))
    work.fields["head"]["at_least"] = 500  # proposals that PPI gets there, whatever their score
    if poses is None:
        work.note("no anchor poses: name their file to make a detector of it")
    else:
        _frame(work, poses)
    return work.done(("",), poses)


def _dope(state: dict[str, Any], more: dict[str, Any], file: str) -> Imported:
    settings = more["dope_kwargs"] if isinstance(more["dope_kwargs"], dict) else {}
    rpn = {"pre_nms": settings.get("rpn_pre_nms_top_n_test", 1000), "post_nms": 1000, "train_pre_nms": 2000,
           "train_post_nms": 2000, "nms_iou": settings.get("rpn_nms_thresh", 0.7), "min_size": 0.001,
           "convention": "torchvision", "sizes": (32, 64, 128, 256, 512), "ratios": (0.5, 1, 2)}  # fmt: skip
    fields = {
        "model": {"backbone": _network(state, "backbone.resnet_backbone.", file), "body": "c4", "head": "res5",
                  "roi_size": 7, "res5_stride": 2, "sampling_ratio": 2, "aligned": False, "stride_in_1x1": False},
        "image": {"short_side": settings.get("min_size", 800), "max_side": settings.get("max_size", 1333),
                  "resize": "torchvision", "multiple": 32,
                  "mean": settings.get("image_mean") or (0.485, 0.456, 0.406),
                  "std": settings.get("image_std") or (0.229, 0.224, 0.225)},
        "rpn": rpn,
    }  # fmt: skip
    work = Import("dope", file, fields)
    work.take(state, names.ours("dope", state, Layout()))
    work.boxes()
    divisors = [settings.get(f"pose{d}d_reg_weights") for d in (2, 3)]
    two, three = (d.get("body", 5.0) if isinstance(d, dict) else 5.0 for d in divisors)
    work.poses(interleaved=True, divisor2d=two, divisor3d=three)
    flat = state.get("roi_heads.body_anchor_poses")
    if not isinstance(flat, np.ndarray) or flat.ndim != 3 or flat.shape[1:] != (13, 5) or not np.isfinite(flat).all():
        raise UserError(f"{file}: roi_heads.body_anchor_poses: expected K x 13 x 5 finite numbers")
    poses = anchor_poses.from_joints(flat.astype(np.float32))
    work.report.left_over.remove("roi_heads.body_anchor_poses")
    _frame(work, poses)
    params = more.get("body_ppi_kwargs")
    if isinstance(params, dict) and isinstance(params.get("K"), int) and 0 < params["K"] <= len(poses):
        poses = replace(poses, upper_only=np.arange(len(poses)) >= params["K"])
    _ppi(work, params)
    if more.get("half"):
        work.note("the original computes in half precision, this in float32")
    if settings.get("rpn_post_nms_top_n_test", 1000) != 1000:
        work.note("1000 proposals, as its program dope.py sets, whatever the file says")
    work.note("hands and face are left over; so is the copy of the body in the box head")
    return work.done(("",), poses)


def _frame(work: Import, poses: AnchorPoses) -> None:
    """Says where the 3D of anchor poses runs against their 2D: the file would be of another frame than LCR-Net's."""
    flat, solid = (p - p.mean(1, keepdims=True) for p in (poses.pose2d.astype(float), poses.pose3d.astype(float)))
    for axis, name in enumerate("XY"):
        a, b = flat[..., axis], solid[..., axis]
        if (a * b).sum() < -0.5 * np.sqrt((a**2).sum() * (b**2).sum()):
            work.note(
                f"{name} of its anchor poses runs the other way than in LCR-Net's files: 3D poses may be mirrored"
            )


def _ppi(work: Import, params: Any) -> None:
    """PPI's parameters, and the score from which on it takes a proposal: 0.1 / K."""
    count = len(work.tensors.get("predictor.classes.bias", ())) - 1
    work.fields["head"] = {"score_floor": 0.1 / max(count, 1)}
    if not isinstance(params, dict):
        work.note("no parameters of PPI: section ppi has our own")
        return
    known = configuration.Ppi.model_fields
    work.fields["ppi"] = {k: v for k, v in params.items() if k in known}
    if isinstance(params.get("score_th"), float):
        work.fields["head"]["score_floor"] = params["score_th"]
    if rest := sorted(str(k) for k in params if k not in known and k not in ("K", "score_th", "J")):
        work.note(f"parameters of PPI without a place here: {', '.join(rest)}")


def _network(state: dict[str, Any], prefix: str, file: str) -> str:
    """Which ResNet: by the blocks of its stages, and the groups of their 3x3 convolutions."""
    blocks = []
    for stage in "1234":
        found = [re.fullmatch(rf"{re.escape(prefix)}layer{stage}\.(\d+)\.conv1\.weight", name) for name in state]
        blocks.append(max((int(m[1]) for m in found if m), default=-1) + 1)
    deep = f"{prefix}layer1.0.conv3.weight" in state
    three = state.get(f"{prefix}layer1.0.conv2.weight")
    if not isinstance(three, np.ndarray) or three.ndim != 4 or not three.shape[1]:
        raise UserError(f"{file}: {prefix}layer1.0.conv2.weight: expected the weights of a convolution")
    groups = three.shape[0] // three.shape[1]
    width = three.shape[0] // max(groups, 1)
    for name, (block, known, its_groups, its_width) in RESNETS.items():
        same = (known == tuple(blocks)) or (not blocks[3] and known[:3] == tuple(blocks[:3]))
        if same and (block.expansion == 4) == deep and (groups, width) == (its_groups, its_width):
            return name
    raise UserError(
        f"{file}: a ResNet of {blocks} blocks with {groups} groups of {width}; there are {', '.join(RESNETS)}"
    )


def _seen(state: dict[str, Any], found: dict[str, Any], file: str) -> dict[str, Any]:
    """The configuration that the tensors' names and shapes tell, the rest being Detectron's usual."""
    flat = {re.sub(r"^(?:body|box_head)\.(?=layer)", "", our): value for our, value in found.items()}
    backbone = _network(flat, "", file)
    grouped = any("_gn_" in name or ".gn1." in name for name in state)
    pyramid = any("fpn." in our for our in found)
    many = any("_fpn2_" in name or "FPN_RPN" in name for name in state)
    width = {"head_width": 1024, "head_convs": 4}
    head, size = "res5", 14
    for our in ("box_head.fc1.weight", "box_head.fc.weight"):
        if isinstance(value := found.get(our), np.ndarray) and value.ndim == 2:
            conv = our == "box_head.fc.weight" or any(".convs." in name for name in found)
            head, width["head_width"] = "conv" if conv else "2mlp", len(value)
            size = max(1, round((value.shape[1] / (256 if pyramid else 2048)) ** 0.5))
            width["head_convs"] = sum(v.ndim == 4 for n, v in found.items() if ".convs." in n) or 4
    body = ("fpn" if many else "fpn_p2") if pyramid else "c4" if head == "res5" else "c5"
    boxes = found.get("rpn.offsets.bias")
    sizes = (32, 64, 128, 256, 512) if body == "fpn" or boxes is None or len(boxes) != 48 else (64, 128, 256, 512)
    plain = not backbone.startswith("resnext") and not grouped
    return {
        "model": {"backbone": backbone, "body": body, "head": head, "norm": "gn" if grouped else "frozen_bn",
                  "stride_in_1x1": plain, "aligned": False, "sampling_ratio": 2 if pyramid else 0, "roi_size": size,
                  **width},
        "image": {"short_side": 800, "max_side": 1333, "resize": "detectron", "multiple": 32 if pyramid else 1,
                  "mean": CAFFE_MEAN, "std": CAFFE_STD},
        "rpn": {"sizes": sizes, "ratios": (0.5, 1, 2), "convention": "detectron", "pre_nms": 6000, "post_nms": 1000,
                "nms_iou": 0.7, "min_size": 0},
    }  # fmt: skip


def _fields(cfg: dict[str, Any], seen: dict[str, Any], file: str) -> dict[str, Any]:
    """The sections model, image and rpn of a file's own configuration."""
    values = {key: value for key, value in cfg.items() if key in _READ and value is not None}
    if seen["model"]["body"] != "fpn":
        # The network reads these only where there is a pyramid.
        values.setdefault("RPN", {})
    try:
        made, _, _ = detectron.convert(values)
    except UserError as error:
        raise UserError(f"{file}: cfg: {error}") from None
    for key in ("backbone", "body", "head", "norm", *(["head_convs"] if seen["model"]["head"] == "conv" else [])):
        if made["model"][key] != seen["model"][key]:
            raise UserError(
                f"{file}: cfg and tensors differ: {key} {made['model'][key]} there, {seen['model'][key]} here"
            )
    return {section: made[section] for section in ("model", "image", "rpn")}
