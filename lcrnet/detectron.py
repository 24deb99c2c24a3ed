"""Detectron's configuration, and that of the LCR-Net built on it, as one of ours.

    python -m lcrnet.detectron FILE.yaml [--out RECIPE.yaml] [--batch IMAGES]

prints FILE as a recipe, under a header of the keys that mean nothing here. `--batch` asks for other batches than FILE's
NUM_GPUS * TRAIN.IMS_PER_BATCH; learning rate and steps then scale with it (Goyal et al. 2017), as both programs do.

A setting whose meaning we cannot keep is refused; one that changes no number here, or that we decide otherwise, is
listed. `detectron_keys` has all keys.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import itertools
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lcrnet import config
from lcrnet.config import UserError
from lcrnet.detectron_keys import DEFAULTS, IGNORED

_BODY = re.compile(r"(?:\w+\.)?(?:add_)?(fpn_)?(ResNet\d+|VGG16)_conv([45])(_P2only)?_body")
_HEADS = {"ResNet_roi_conv5_head": "res5", "roi_2mlp_head": "2mlp", "roi_Xconv1fc_head": "conv",
          "roi_Xconv1fc_gn_head": "conv", "VGG16_roi_fc_head": "2mlp"}  # fmt: skip
_POOLS = {"RoIAlign": "align", "RoIPoolF": "pool", "RoICrop": "crop"}
_TYPES = ("generalized_rcnn", "fast_rcnn", "faster_rcnn", "mask_rcnn", "keypoint_rcnn")  # one and the same there
_ALL = 1_000_000  # proposals: 0 and less mean "all" there


@dataclass
class Notes:
    """What did not become a field: ignored keys with the reason of each, and what else a user should know."""

    ignored: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def read(file: str | os.PathLike[str], batch: int | None = None) -> tuple[dict[str, Any], Notes]:
    """The fields, for `config.from_dict`, of a YAML file; UserError names the file, the key and the fix."""
    try:
        values = parse(Path(file).read_text(encoding="utf-8"))
        fields, ignored, warnings = convert(values, batch)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not YAML: not UTF-8") from None
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return fields, Notes(ignored, warnings)


def parse(text: str) -> dict[str, Any]:
    """Detectron's YAML, also as it dumps a whole configuration, with Python's tags: data only, no object is made."""
    try:
        values = yaml.load(text, _Loader)  # a SafeLoader that knows some more tags as plain data
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"not YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(values, dict):
        raise UserError(f"expected sections such as `MODEL:`, found {type(values).__name__}")
    return values


def convert(values: dict[str, Any], batch: int | None = None) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """(fields for `config.from_dict`, ignored keys with the reason of each, warnings) of a nested dict of keys.

    Values may be text of literals, "(32, 64)", as in INRIA's bundles; such text is never evaluated. batch: images of a
    step, if not NUM_GPUS * TRAIN.IMS_PER_BATCH. UserError names an unknown key, or one whose meaning we cannot keep.
    """
    given = dict(_flat(values))
    ignored = {}
    for key in given:
        reason = IGNORED.get(key) or next((IGNORED[w] for w in _wild(key) if w in IGNORED), None)
        if key not in DEFAULTS and reason is None:
            near = difflib.get_close_matches(key, [*DEFAULTS, *IGNORED], n=1, cutoff=0.6)
            raise UserError(f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if reason:
            ignored[key] = reason
    said = _Said(given)
    warnings: list[str] = []
    model = _model(said, warnings)
    fields = {
        "image": _image(said, model["body"], warnings),
        "model": model,
        "rpn": _rpn(said, model["body"], warnings),
        "head": _head(said, warnings),
        "data": {"flip": 0.5 if said.truth("TRAIN.USE_FLIPPED") else 0.0, "scale": _scale(said, warnings)},
        "train": _train(said, batch, warnings),
    }
    if poses := said.text("MODEL.ANCHOR_POSES"):
        fields["anchors"] = {"file": poses}
        warnings.append(f"anchors.file {poses!r} is as in the file: a path seen from where that program ran")
    else:
        warnings.append(
            "no MODEL.ANCHOR_POSES: anchor poses are clustered from the data unless anchors.file names some"
        )
    return fields, ignored, warnings


def recipe(fields: dict[str, Any], notes: Notes, origin: str) -> str:
    """YAML of the fields under a header that says where they come from and what was left out."""
    lines = [f"Converted from {origin} by python -m lcrnet.detectron.", "",
             "  python jobs/train.py --config RECIPE.yaml --data ANN.json --images DIR --out RUN", "",
             "Score: not measured here."]  # fmt: skip
    lines += ["", *(f"Note: {text}" for text in notes.warnings)] if notes.warnings else []
    lines += ["", "Ignored:", *(f"  {key}: {why}" for key, why in notes.ignored.items())] if notes.ignored else []
    # A key may hold any text; a line break in it must not end the comment.
    head = "".join(f"# {' '.join(line.splitlines())}".rstrip() + "\n" for line in lines)
    return head + yaml.safe_dump(fields, sort_keys=False, default_flow_style=None, width=110)


class _Said:
    """Keys of the file or their defaults, by type; UserError names a key whose value is none."""

    def __init__(self, given: dict[str, Any]):
        self.given = given

    def value(self, key: str) -> Any:
        return self.given.get(key, DEFAULTS[key])

    def text(self, key: str) -> str:
        return str(self.value(key) or "")

    def truth(self, key: str) -> bool:
        value = self.value(key)
        if value not in (True, False):
            raise UserError(f"{key}: expected True or False, found {value!r}")
        return bool(value)

    def number(self, key: str) -> float:
        value = self.value(key)
        if isinstance(value, str):  # YAML 1.1 takes 1e-4 for text
            try:
                value = float(value)
            except ValueError:
                pass
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e15:
            raise UserError(f"{key}: expected a number, found {value!r}")
        return value

    def whole(self, key: str) -> int:
        value = self.number(key)
        if value != int(value):
            raise UserError(f"{key}: expected a whole number, found {value!r}")
        return int(value)

    def numbers(self, key: str) -> list[float]:
        value = self.value(key)
        while isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], (list, tuple)):
            value = value[0]  # PIXEL_MEANS is [[[b, g, r]]]
        value = list(value) if isinstance(value, (list, tuple)) else [value]
        return [_Said({key: v}).number(key) for v in value]

    def must(self, key: str, *values: Any, why: str) -> None:
        """Refuses another value than these, which is all that we have."""
        if self.value(key) not in values:
            raise UserError(f"{key}: {self.value(key)!r} cannot be kept: {why}")


def _model(said: _Said, warnings: list[str]) -> dict[str, Any]:
    for key in ("MODEL.RPN_ONLY", "MODEL.CLS_AGNOSTIC_BBOX_REG", "FPN.EXTRA_CONV_LEVELS"):
        said.must(key, False, why="an LCR-Net has an RPN and a head with a regression for each anchor pose")
    said.must("MODEL.TYPE", "", *_TYPES, why="LCR-Net is a generalized_rcnn")
    name = said.text("MODEL.CONV_BODY")
    found = _BODY.fullmatch(name)
    if not found:
        raise UserError(f"MODEL.CONV_BODY: {name!r} is none of ResNet*_conv4/5_body, fpn_ResNet*_conv5[_P2only]_body, "
                        "VGG16_conv5_body")  # fmt: skip
    pyramid, network, stage, finest = found.groups()
    head_name = said.text("FAST_RCNN.ROI_BOX_HEAD").split(".")[-1].removeprefix("add_")
    if head_name not in _HEADS:
        raise UserError(f"FAST_RCNN.ROI_BOX_HEAD: {head_name!r} is none of {', '.join(_HEADS)}")
    vgg = network == "VGG16"
    if vgg != (head_name == "VGG16_roi_fc_head"):
        raise UserError(f"FAST_RCNN.ROI_BOX_HEAD: {head_name} does not go with MODEL.CONV_BODY {name}")
    body = (
        "c4" if vgg else {(True, False): "fpn", (True, True): "fpn_p2"}.get((bool(pyramid), bool(finest)), f"c{stage}")
    )
    if body == "fpn":
        said.must("FPN.FPN_ON", True, why="MODEL.CONV_BODY is a feature pyramid")
        said.must("FPN.MULTILEVEL_ROIS", True, why="regions are pooled from all levels of a pyramid")
        for key in ("ROI_CANONICAL_SCALE", "ROI_CANONICAL_LEVEL", "ROI_MAX_LEVEL", "ROI_MIN_LEVEL", "RPN_MAX_LEVEL",
                    "RPN_MIN_LEVEL"):  # fmt: skip
            said.must(
                f"FPN.{key}", DEFAULTS[f"FPN.{key}"], why="a pyramid is P2 to P6 for proposals, P2 to P5 for regions"
            )
    said.must("FPN.DIM", 256, why="maps of a pyramid have 256 channels")
    said.must("RPN.OUT_DIM_AS_IN_DIM", True, why="the RPN is as wide as its input")
    if not said.truth("MODEL.FASTER_RCNN"):
        warnings.append("MODEL.FASTER_RCNN is not on: instead of reading proposals an RPN is trained with the rest")

    method = said.text("FAST_RCNN.ROI_XFORM_METHOD")
    if method not in _POOLS:
        raise UserError(f"FAST_RCNN.ROI_XFORM_METHOD: {method!r} is none of {', '.join(_POOLS)}")
    pool, size = _POOLS[method], said.whole("FAST_RCNN.ROI_XFORM_RESOLUTION")
    if vgg:
        size = 7  # whatever the key says
    if pool == "crop":
        pool = "crop_max" if said.truth("CROP_RESIZE_WITH_MAX_POOL") else "crop"
        size = said.whole("POOLING_SIZE")
        warnings.append(f"RoICrop makes POOLING_SIZE {size} bins a side, whatever FAST_RCNN.ROI_XFORM_RESOLUTION is")
    head = _HEADS[head_name]
    if head == "res5" and size not in (7, 14):
        raise UserError(f"FAST_RCNN.ROI_XFORM_RESOLUTION: {size} cannot be kept: stage 5 ends in a mean of 7 x 7 bins")
    if head == "conv":
        said.must("FAST_RCNN.CONV_HEAD_DIM", 256, why="convolutions of a head have 256 channels")
    dilation = said.whole("RESNETS.RES5_DILATION")
    if dilation not in (1, 2):
        raise UserError(f"RESNETS.RES5_DILATION: {dilation} cannot be kept: it is 1 or 2")
    dilate = dilation == 2 and body != "c4"
    stride_in_1x1 = said.truth("RESNETS.STRIDE_1X1") and not vgg
    if dilate and not stride_in_1x1:
        warnings.append("RESNETS.RES5_DILATION with STRIDE_1X1 off: the first 3x3 of stage 5 is not dilated here")
    return {
        "backbone": "vgg16" if vgg else _backbone(said, network.lower()),
        "body": body, "head": head,
        "head_width": 4096 if vgg else said.whole("FAST_RCNN.MLP_HEAD_DIM"),
        "head_convs": said.whole("FAST_RCNN.NUM_STACKED_CONVS"),
        "norm": _norm(said, body, head_name),
        "freeze": _freeze(said, vgg, body, warnings),
        "stride_in_1x1": stride_in_1x1, "dilate_c5": dilate, "pool": pool, "aligned": False, "roi_size": size,
        "sampling_ratio": max(0, said.whole("FAST_RCNN.ROI_XFORM_SAMPLING_RATIO")), "shared_regressor": False,
    }  # fmt: skip


def _backbone(said: _Said, network: str) -> str:
    groups, width = said.whole("RESNETS.NUM_GROUPS"), said.whole("RESNETS.WIDTH_PER_GROUP")
    known = {("resnet101", 32, 8): "resnext101_32x8d", ("resnet101", 64, 4): "resnext101_64x4d",
             ("resnet152", 32, 8): "resnext152_32x8d",
             **{(f"resnet{depth}", 1, 64): f"resnet{depth}" for depth in (50, 101, 152)}}  # fmt: skip
    if (network, groups, width) not in known:
        raise UserError(f"RESNETS.NUM_GROUPS {groups}, WIDTH_PER_GROUP {width} of {network}: there is none of "
                        f"{', '.join(known.values())} with these")  # fmt: skip
    return known[network, groups, width]


def _norm(said: _Said, body: str, head: str) -> str:
    """One norm for all: what differs is refused."""
    keys = ("RESNETS.TRANS_FUNC", "RESNETS.STEM_FUNC", "RESNETS.SHORTCUT_FUNC")
    grouped = {key: "_gn_" in said.text(key) for key in keys}
    if "RESNETS.USE_GN" in said.given:  # the predecessor's; it only names weights by it
        grouped["RESNETS.USE_GN"] = said.truth("RESNETS.USE_GN")
    if body in ("fpn", "fpn_p2"):
        grouped["FPN.USE_GN"] = said.truth("FPN.USE_GN")
    if "Xconv1fc" in head:
        grouped["FAST_RCNN.ROI_BOX_HEAD"] = "_gn_" in head
    if len(set(grouped.values())) > 1:
        some = [key for key, on in grouped.items() if on]
        raise UserError(f"GroupNorm in {', '.join(some)} but not in {', '.join(k for k in grouped if k not in some)}: "
                        "here all norms are of one kind")  # fmt: skip
    if not grouped["RESNETS.TRANS_FUNC"]:
        return "frozen_bn"
    for key in ("GROUP_NORM.DIM_PER_GP", "GROUP_NORM.NUM_GROUPS", "GROUP_NORM.EPSILON"):
        said.must(key, DEFAULTS[key], why="GroupNorm has 32 groups and an epsilon of 1e-5")
    return "gn"


def _freeze(said: _Said, vgg: bool, body: str, warnings: list[str]) -> int:
    if said.truth("TRAIN.FREEZE_CONV_BODY"):
        if body in ("fpn", "fpn_p2"):
            warnings.append("TRAIN.FREEZE_CONV_BODY: the layers of the pyramid are trained all the same")
        return 5
    both = {said.whole(k) for k in ("RESNETS.FREEZE_AT", "TRAIN.FREEZE_AT") if k in said.given}
    if len(both) > 1:
        raise UserError("RESNETS.FREEZE_AT and TRAIN.FREEZE_AT differ: they mean the same, keep one")
    depth = 2 if vgg or not both else both.pop()  # its VGG16 is frozen up to pool2
    if depth and said.given.get("MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS") is False:
        warnings.append(f"no weights are loaded, yet {depth} stages are frozen: without train.init take model.freeze 0")
    return depth


def _image(said: _Said, body: str, warnings: list[str]) -> dict[str, Any]:
    longest, training = said.whole("TEST.MAX_SIZE"), said.whole("TRAIN.MAX_SIZE")
    if longest != training:
        warnings.append(f"TRAIN.MAX_SIZE {training} is not TEST.MAX_SIZE {longest}, which image.max_side is for both")
    means = said.numbers("PIXEL_MEANS")
    if len(means) != 3:
        raise UserError(f"PIXEL_MEANS: expected blue, green and red, found {means}")
    return {
        "short_side": said.whole("TEST.SCALE"), "max_side": max(longest, said.whole("TEST.SCALE")),
        "resize": "detectron",
        "multiple": said.whole("FPN.COARSEST_STRIDE") if body in ("fpn", "fpn_p2") else 1,
        "mean": [round(mean / 255, 10) for mean in reversed(means)],  # BGR of 0..255 -> RGB of 0..1
        "std": [round(1 / 255, 10)] * 3,
    }  # fmt: skip


def _scale(said: _Said, warnings: list[str]) -> list[float]:
    """TRAIN.SCALES as factors on the size that images are detected at."""
    scales, test = said.numbers("TRAIN.SCALES"), said.whole("TEST.SCALE")
    if not scales or min(scales) <= 0 or test <= 0:
        raise UserError("TRAIN.SCALES and TEST.SCALE: expected sizes above 0")
    if len(scales) > 1:
        warnings.append(f"TRAIN.SCALES: sizes between {min(scales):g} and {max(scales):g} are drawn, not these only")
    elif scales[0] != test:
        warnings.append(f"images are trained at {scales[0]:g} and detected at {test}: data.scale {scales[0] / test:g}")
    return [round(min(scales) / test, 6), round(max(scales) / test, 6)]


def _rpn(said: _Said, body: str, warnings: list[str]) -> dict[str, Any]:
    if body == "fpn":
        sizes = [said.number("FPN.RPN_ANCHOR_START_SIZE") * 2**level for level in range(5)]
        ratios = said.numbers("FPN.RPN_ASPECT_RATIOS")
    else:
        sizes, ratios = said.numbers("RPN.SIZES"), said.numbers("RPN.ASPECT_RATIOS")
    overlap, training = said.number("TEST.RPN_NMS_THRESH"), said.number("TRAIN.RPN_NMS_THRESH")
    if overlap != training:
        warnings.append(f"TRAIN.RPN_NMS_THRESH {training} is not TEST's {overlap}, which rpn.nms_iou is for both")
    smallest = said.number("TEST.RPN_MIN_SIZE")
    if smallest or said.number("TRAIN.RPN_MIN_SIZE") != smallest:
        warnings.append("rpn.min_size is TEST.RPN_MIN_SIZE, in pixels of the resized image (there: of the original)")

    def most(key: str) -> int:
        count = said.whole(key)
        return count if count > 0 else _ALL

    return {
        "sizes": sizes, "ratios": ratios, "convention": "detectron",
        "nms_iou": overlap if overlap > 0 else 1.0,
        "pre_nms": most("TEST.RPN_PRE_NMS_TOP_N"), "post_nms": most("TEST.RPN_POST_NMS_TOP_N"),
        "train_pre_nms": most("TRAIN.RPN_PRE_NMS_TOP_N"), "train_post_nms": most("TRAIN.RPN_POST_NMS_TOP_N"),
        "samples": said.whole("TRAIN.RPN_BATCH_SIZE_PER_IM"), "positive_share": said.number("TRAIN.RPN_FG_FRACTION"),
        "positive_iou": said.number("TRAIN.RPN_POSITIVE_OVERLAP"),
        "negative_iou": said.number("TRAIN.RPN_NEGATIVE_OVERLAP"), "min_size": smallest,
    }  # fmt: skip


def _head(said: _Said, warnings: list[str]) -> dict[str, Any]:
    person = said.number("TRAIN.FG_THRESH")
    low, high = said.number("TRAIN.BG_THRESH_LO"), said.number("TRAIN.BG_THRESH_HI")
    if low > 0 or high != person:
        warnings.append(f"TRAIN.BG_THRESH_LO {low}, BG_THRESH_HI {high}: here all regions below head.positive_iou "
                        f"{person} are background")  # fmt: skip
    return {"samples": said.whole("TRAIN.BATCH_SIZE_PER_IM"), "positive_share": said.number("TRAIN.FG_FRACTION"),
            "positive_iou": person, "jitter": 0}  # fmt: skip


def _train(said: _Said, batch: int | None, warnings: list[str]) -> dict[str, Any]:
    theirs = said.whole("NUM_GPUS") * said.whole("TRAIN.IMS_PER_BATCH")
    if theirs < 1 or (batch is not None and batch < 1):
        raise UserError(f"NUM_GPUS * TRAIN.IMS_PER_BATCH: expected a batch of 1 or more, found {batch or theirs}")
    more = (batch or theirs) / theirs
    last = said.whole("SOLVER.MAX_ITER")
    if last < 1:
        raise UserError(f"SOLVER.MAX_ITER: expected 1 or more, found {last}")
    kind = said.text("SOLVER.TYPE").lower()
    if kind not in ("sgd", "adam"):
        raise UserError(f"SOLVER.TYPE: {kind!r} is none of SGD, Adam")
    if kind == "adam":
        warnings.append("SOLVER.TYPE Adam: here weight decay is AdamW's")
    return {
        "steps": max(1, round(last / more)), "batch": batch or theirs, "optimizer": {"adam": "adamw"}.get(kind, kind),
        "lr": said.number("SOLVER.BASE_LR") * more, "momentum": said.number("SOLVER.MOMENTUM"),
        "weight_decay": said.number("SOLVER.WEIGHT_DECAY"), "warmup": round(said.whole("SOLVER.WARM_UP_ITERS") / more),
        "schedule": "steps", "decay_at": [round(at / last, 6) for at in _decays(said, last, warnings)],
        "seed": said.whole("RNG_SEED"), "save_every": max(1, round(said.whole("TRAIN.SNAPSHOT_ITERS") / more)),
    }  # fmt: skip


def _decays(said: _Said, last: int, warnings: list[str]) -> list[float]:
    """Iterations at which the learning rate is divided, without the first, 0."""
    policy = said.text("SOLVER.LR_POLICY")
    steps = [at for at in said.numbers("SOLVER.STEPS") if 0 < at < last]
    if policy == "step":
        every = said.whole("SOLVER.STEP_SIZE")
        if every < 1:
            raise UserError(f"SOLVER.STEP_SIZE: expected 1 or more, found {every}")
        steps = [float(at) for at in range(every, last, every)][:20]  # a rate of 1e-20 teaches nothing
    elif policy == "steps_with_lrs":
        rates = said.numbers("SOLVER.LRS")
        if len(rates) != len(said.numbers("SOLVER.STEPS")) or min(rates, default=0) <= 0:
            raise UserError("SOLVER.LRS: expected a learning rate for each of SOLVER.STEPS")
        if any(abs(a / b - 10) > 0.01 for a, b in itertools.pairwise(rates)):
            raise UserError(f"SOLVER.LRS: {rates} cannot be kept: each step divides the learning rate by 10")
    elif policy not in ("steps_with_decay", "step_with_decay"):  # the second in INRIA's bundles
        raise UserError(f"SOLVER.LR_POLICY: {policy!r} is none of step, steps_with_decay, steps_with_lrs")
    if policy != "steps_with_lrs" and steps and abs(said.number("SOLVER.GAMMA") - 0.1) > 1e-6:
        warnings.append(f"SOLVER.GAMMA {said.number('SOLVER.GAMMA')}: here a step divides the learning rate by 10")
    return steps


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of nested dicts, text of literals read as what it spells."""
    out: list[tuple[str, Any]] = []
    for key, value in values.items():
        if not isinstance(key, str):
            raise UserError(f"{prefix}{key!r}: expected a name")
        if isinstance(value, dict) and len(prefix) < 100:
            out += _flat(value, f"{prefix}{key}.")
        else:
            out.append((prefix + key, _literal(value)))
    return out


def _literal(value: Any) -> Any:
    """Text such as "(32, 64)" or "0,180000" as numbers; other text as it is."""
    if not isinstance(value, str) or len(value) > 1000 or not re.fullmatch(r"[\s\d.,eE+\-()\[\]]+", value):
        return value
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value


def _wild(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:n]) + ".*" for n in range(1, len(parts))]


class _Loader(yaml.SafeLoader):
    """Plain YAML, and the tags of a dumped configuration: tuples, AttrDicts and arrays, read as lists and dicts."""

    def python(self, suffix: str, node: yaml.Node) -> Any:
        if suffix == "tuple" and isinstance(node, yaml.SequenceNode):
            return tuple(self.construct_sequence(node, deep=True))
        if suffix in ("unicode", "str") and isinstance(node, yaml.ScalarNode):
            return self.construct_scalar(node)
        if suffix.startswith("object/new:") and suffix.endswith(".AttrDict") and isinstance(node, yaml.MappingNode):
            found = self.construct_mapping(node, deep=True).get("dictitems", {})
            return found if isinstance(found, dict) else {}
        if suffix.startswith("object/apply:numpy") and isinstance(node, yaml.MappingNode):
            state = self.construct_mapping(node, deep=True).get("state")
            data = state[-1] if isinstance(state, (list, tuple)) and state else None
            if suffix.endswith("_reconstruct") and isinstance(data, bytes) and len(data) == 24:  # PIXEL_MEANS
                return memoryview(data).cast("d").tolist()
            return None
        if suffix.startswith(("object/apply:numpy", "name:numpy")):
            return None
        raise yaml.constructor.ConstructorError(None, None, f"tag !!python/{suffix} is not for configurations")


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", _Loader.python)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lcrnet.detectron", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE.yaml", help="configuration of Detectron or the predecessor")
    parser.add_argument("--out", type=Path, metavar="RECIPE.yaml", help="where the recipe goes, if not to the screen")
    parser.add_argument("--batch", type=int, metavar="IMAGES", help="images of a step; rate and steps scale with it")
    args = parser.parse_args(argv)
    fields, notes = read(args.file, args.batch)
    text = recipe(fields, notes, args.file.name)
    config.from_dict(fields, str(args.file))
    if args.out is None:
        sys.stdout.write(text)
        return 0
    try:
        args.out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{args.out}: {error.strerror or error}") from None
    print(f"{args.out}: {len(notes.ignored)} keys ignored, {len(notes.warnings)} notes, which it lists")
    return 0


if __name__ == "__main__":
    config.run(main)
