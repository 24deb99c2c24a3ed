"""From other people's tensors to ours: the steps of an import, and what comes out of it.

What the original programs do otherwise than we is either a field of the configuration (legacy.py) or folded into the
weights, here:

    channels BGR              conv1's input channels turned round
    AffineChannel             FrozenBatchNorm of mean 0 and variance 1 - eps, whose scale and shift are the same
    regression / 5            the layer's weights and biases / 5; the rows of the background class are dropped
    (J x, J y, J X, J Y, J Z) one joint after the other; X and Y negated: ours is x right, y down
    anchor boxes by ratio     by size
    two logits a box          their difference
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcrnet import config as configuration
from lcrnet.anchors import AnchorPoses
from lcrnet.config import Config, ConfigError, UserError
from lcrnet.model import LCRNet, build

BODY = ("model.backbone", "model.norm", "model.stride_in_1x1", "image.mean", "image.std")
"""What a body computes with."""
_EPS = 1e-5  # of torchvision's FrozenBatchNorm2d


@dataclass
class Report:
    """What became of the tensors of a file.

    matched {their name: ours}; left_over: theirs that our network has no place for; missing: ours that the file lacks.
    """

    kind: str
    matched: dict[str, str] = field(default_factory=dict)
    left_over: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Imported:
    """What a file holds.

    model    ready to detect, where the file is a whole detector with anchor poses; else None
    tensors  float32, by our names
    needs    the fields of `config` that these weights were trained with, by their dotted names: of a body those of
             `BODY`, of a detector all that decides its output
    """

    model: LCRNet | None
    config: Config
    anchors: AnchorPoses | None
    tensors: dict[str, Tensor]
    report: Report
    needs: dict[str, Any]


class Import:
    """An import under way: tensors by our names, turned step by step into our conventions."""

    def __init__(self, kind: str, file: str, fields: dict[str, Any]):
        self.file, self.fields, self.report = file, fields, Report(kind)
        self.tensors: dict[str, Tensor] = {}
        self.theirs: dict[str, str] = {}

    def note(self, text: str) -> None:
        self.report.notes.append(text)

    def take(self, state: dict[str, Any], renamed: dict[str, str]) -> None:
        """Tensors with a name of ours; the others are left over."""
        for name, value in state.items():
            our = renamed.get(name)
            if our is None or not isinstance(value, np.ndarray) or our in self.tensors or our.endswith("_tracked"):
                self.report.left_over.append(name)
                continue
            if value.dtype.kind not in "fiu":
                raise UserError(f"{self.file}: {name}: expected numbers, found {value.dtype}")
            tensor = torch.from_numpy(np.asarray(value, np.float32))
            if not tensor.isfinite().all():
                raise UserError(f"{self.file}: {name}: not all its numbers are finite")
            self.tensors[our], self.theirs[our] = tensor, name

    def drop(self, prefix: str) -> None:
        for our in [o for o in self.tensors if o.startswith(prefix)]:
            del self.tensors[our]
            self.report.left_over.append(self.theirs.pop(our))

    def flip(self) -> None:
        """BGR -> RGB."""
        for our in ("body.conv1.weight", "body.features.0.weight"):
            if our in self.tensors and self.tensors[our].ndim == 4:
                self.tensors[our] = self.tensors[our].flip(1)

    def affine(self) -> None:
        """AffineChannel -> FrozenBatchNorm: statistics that leave x as it is."""
        if self.fields["model"]["norm"] == "gn":
            return
        for our in [o for o in self.tensors if re.search(r"(bn\d|downsample\.1)\.weight$", o)]:
            prefix, like = our.removesuffix("weight"), self.tensors[our]
            self.tensors.setdefault(f"{prefix}running_mean", torch.zeros_like(like))
            self.tensors.setdefault(f"{prefix}running_var", torch.full_like(like, 1 - _EPS))

    def boxes(self) -> None:
        """The RPN's channels: one logit a box, and boxes by size, then by ratio."""
        rpn = self.fields["rpn"]
        ratios = len(rpn["ratios"])
        sizes = 1 if self.fields["model"].get("body") == "fpn" else len(rpn["sizes"])
        for our in [o for o in self.tensors if o.startswith(("rpn.objectness.", "rpn.offsets."))]:
            value = self.tensors[our]
            each = 4 if "offsets" in our else 1
            count = sizes * ratios
            if each == 1 and len(value) == 2 * count:  # softmax: background first
                value = value[count:] - value[:count]
            if len(value) != each * count:
                raise UserError(f"{self.file}: {self.theirs[our]}: {len(value)} channels for {sizes} sizes of anchor "
                                f"boxes and {ratios} ratios")  # fmt: skip
            rest = value.shape[1:]
            value = value.reshape(ratios, sizes, each, *rest).transpose(0, 1).reshape(each * count, *rest)
            self.tensors[our] = value.contiguous()

    def poses(self, interleaved: bool, divisor2d: float, divisor3d: float) -> None:
        """The regression's rows: joint by joint, ours x right and y down, without background and divisor.

        interleaved  (J x 2, J x 3) of each anchor pose (DOPE), else (J x's, y's, X's, Y's, Z's) of each class
        """
        classes = self.tensors.get("predictor.classes.bias")
        if classes is None or len(classes) < 2:
            raise UserError(f"{self.file}: the scores of the anchor poses are missing")
        count = len(classes) - 1
        factor = torch.tensor([1 / divisor2d] * 2 + [-1 / divisor3d] * 2 + [1 / divisor3d])
        for our in ("predictor.refine.weight", "predictor.refine.bias"):
            value = self.tensors.get(our)
            if value is None:
                continue
            rows, rest = len(value) // (count + (not interleaved)), value.shape[1:]
            if rows % 5 or rows * (count + (not interleaved)) != len(value):
                raise UserError(f"{self.file}: {self.theirs[our]}: {len(value)} rows for {count} anchor poses")
            joints = rows // 5
            value = value.reshape(-1, rows, *rest)
            if interleaved:
                two, three = value[:, : 2 * joints], value[:, 2 * joints :]
                value = torch.cat([two.reshape(count, joints, 2, *rest), three.reshape(count, joints, 3, *rest)], 2)
            else:
                value = value[1:].reshape(count, 5, joints, *rest).transpose(1, 2)
            value = value * factor.view(1, 1, 5, *[1] * len(rest))
            self.tensors[our] = value.reshape(count * rows, *rest).contiguous()

    def done(self, whole: tuple[str, ...], poses: AnchorPoses | None) -> Imported:
        """Compares with the network that the configuration describes, and builds it where nothing is missing.

        whole  how the names begin of the tensors that such a file should hold
        """
        try:
            config = configuration.from_dict(self.fields, self.file)
        except ConfigError as error:
            raise UserError(str(error)) from None
        count = len(self.tensors.get("predictor.classes.bias", ())) - 1
        refine = self.tensors.get("predictor.refine.bias")
        joints = len(poses.skeleton) if poses is not None else 13 if refine is None else len(refine) // (5 * count)
        if poses is not None and len(poses) != count:
            raise UserError(f"{self.file}: {count} classes, but {len(poses)} anchor poses: they belong to another file")
        if joints != 13:
            raise UserError(f"{self.file}: poses of {joints} joints; those of 13 are imported")
        blank = np.zeros((max(count, 1), joints, 5), np.float32)
        stand_in = AnchorPoses(blank[..., :2], blank[..., 2:], np.zeros(len(blank), bool))
        with torch.device("meta"):
            own = build(config, poses if poses is not None else stand_in).state_dict()
        for our in [o for o in self.tensors if o not in own]:
            del self.tensors[our]
            if our in self.theirs:
                self.report.left_over.append(self.theirs.pop(our))
        for our, value in self.tensors.items():
            if value.shape != own[our].shape:
                raise UserError(f"{self.file}: {self.theirs.get(our, our)}: shape {tuple(value.shape)}, "
                                f"but {our} of such a network has {tuple(own[our].shape)}")  # fmt: skip
        report = self.report
        report.matched = {name: our for our, name in self.theirs.items()}
        report.missing = [our for our in own if our.startswith(whole) and our not in self.tensors]
        model = None
        if poses is not None and not report.missing:
            model = build(config, poses)
            model.load_state_dict(self.tensors)
            model = model.to(memory_format=torch.channels_last).eval()
        all_set = [f"{section}.{name}" for section, fields in self.fields.items() for name in fields]
        values = config.model_dump()
        needed = BODY if whole == ("body.", "box_head.") else all_set
        needs = {f: values[f.split(".")[0]][f.split(".")[1]] for f in needed}
        return Imported(model, config, poses, self.tensors, report, needs)
