"""Other people's names of tensors -> ours. Facts of their public code:

torchvision  models/resnet.py, vgg.py (also jwyang's *_caffe.pth)
detectron    blobs of Caffe2: detectron/modeling/ResNet.py, FPN.py, rpn_heads.py, fast_rcnn_heads.py
seed         the predecessor and INRIA's LCR-Net, after Detectron.pytorch: lib/modeling/*.py
dope         model.py of naver/dope: torchvision's detectors
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

Rule = tuple[str, Callable[[re.Match[str], "Layout"], str]]


@dataclass(frozen=True)
class Layout:
    """What the same name means in different networks.

    stage5   where stage 5 is: `box_head` (head res5) or `body`
    head     2mlp or conv: what the layer `fc6` is
    grouped  GroupNorm: a convolution of head conv is followed by two modules, not one
    """

    stage5: str = "box_head"
    head: str = "res5"
    grouped: bool = False

    def stage(self, detectron: str) -> str:
        """Detectron counts stages from the stem, torchvision from the first with blocks."""
        return f"{self.stage5 if detectron == '5' else 'body'}.layer{int(detectron) - 1}"

    @property
    def first(self) -> str:
        return "box_head.fc" if self.head == "conv" else "box_head.fc1"

    @property
    def step(self) -> int:
        return 3 if self.grouped else 2


_KIND = {"w": "weight", "b": "bias", "s": "weight"}
_BRANCH = {"1": "downsample.", "2a": "conv1", "2b": "conv2", "2c": "conv3"}

_TORCHVISION: list[Rule] = [
    (r"((?:conv1|bn1|layer[123])\..+)", lambda m, _: f"body.{m[1]}"),
    (r"(layer4\..+)", lambda m, at: f"{at.stage5}.{m[1]}"),
    (r"(features\.\d+\.(?:weight|bias))", lambda m, _: f"body.{m[1]}"),
    (r"classifier\.([03])\.(weight|bias)", lambda m, _: f"box_head.fc{1 if m[1] == '0' else 2}.{m[2]}"),
]

_DETECTRON: list[Rule] = [
    (r"conv1_w", lambda m, _: "body.conv1.weight"),
    (r"(?:res_conv1_bn|conv1_gn)_([sb])", lambda m, _: f"body.bn1.{_KIND[m[1]]}"),
    (r"res([2-5])_(\d+)_branch(1|2[abc])_w",
     lambda m, at: f"{at.stage(m[1])}.{m[2]}.{_BRANCH[m[3]]}{'0' if m[3] == '1' else ''}.weight"),
    (r"res([2-5])_(\d+)_branch(1|2[abc])_[bg]n_([sb])",
     lambda m, at: f"{at.stage(m[1])}.{m[2]}.{_BRANCH[m[3]].replace('conv', 'bn')}{'1' if m[3] == '1' else ''}"
                   f".{_KIND[m[4]]}"),
    (r"fpn_(inner_)?res([2-5])_\d+_sum(?:_lateral)?(_gn)?_([wbs])",
     lambda m, _: f"body.fpn.{'inner' if m[1] else 'layer'}_blocks.{int(m[2]) - 2}.{'1' if m[3] else '0'}"
                  f".{_KIND[m[4]]}"),
    (r"conv_rpn(?:_fpn2)?_([wb])", lambda m, _: f"rpn.conv.{_KIND[m[1]]}"),
    (r"rpn_cls_logits(?:_fpn2)?_([wb])", lambda m, _: f"rpn.objectness.{_KIND[m[1]]}"),
    (r"rpn_bbox_pred(?:_fpn2)?_([wb])", lambda m, _: f"rpn.offsets.{_KIND[m[1]]}"),
    (r"fc6_([wb])", lambda m, at: f"{at.first}.{_KIND[m[1]]}"),
    (r"fc7_([wb])", lambda m, _: f"box_head.fc2.{_KIND[m[1]]}"),
    (r"head_conv(\d)(_gn)?_([wbs])",
     lambda m, at: f"box_head.convs.{(int(m[1]) - 1) * at.step + bool(m[2])}.{_KIND[m[3]]}"),
    (r"pose_pred_([wb])", lambda m, _: f"predictor.refine.{_KIND[m[1]]}"),
]  # fmt: skip

_SEED: list[Rule] = [
    (r"Conv_Body\.(?:conv_body\.)?res1\.(conv|[bg]n)1\.(weight|bias)",
     lambda m, _: f"body.{'conv' if m[1] == 'conv' else 'bn'}1.{m[2]}"),
    (r"(?:Conv_Body\.(?:conv_body\.)?|Box_Head\.)res([2-5])\.(\d+)\.(.+)",
     lambda m, at: f"{at.stage(m[1])}.{m[2]}.{re.sub('^gn', 'bn', m[3])}"),
    (r"Conv_Body\.conv_top\.(?:([01])\.)?(weight|bias)",
     lambda m, _: f"body.fpn.inner_blocks.3.{m[1] or 0}.{m[2]}"),
    (r"Conv_Body\.topdown_lateral_modules\.([012])\.conv_lateral\.(?:([01])\.)?(weight|bias)",
     lambda m, _: f"body.fpn.inner_blocks.{2 - int(m[1])}.{m[2] or 0}.{m[3]}"),
    (r"Conv_Body\.posthoc_modules\.([0-3])\.(?:([01])\.)?(weight|bias)",
     lambda m, _: f"body.fpn.layer_blocks.{3 - int(m[1])}.{m[2] or 0}.{m[3]}"),
    (r"RPN\.(?:FPN_)?RPN_conv\.(weight|bias)", lambda m, _: f"rpn.conv.{m[1]}"),
    (r"RPN\.(?:FPN_)?RPN_cls_score\.(weight|bias)", lambda m, _: f"rpn.objectness.{m[1]}"),
    (r"RPN\.(?:FPN_)?RPN_bbox_pred\.(weight|bias)", lambda m, _: f"rpn.offsets.{m[1]}"),
    (r"(Box_Head)\.((?:fc[12]?|convs\.\d+)\.(?:weight|bias))", lambda m, _: f"box_head.{m[2]}"),
    (r"Pose_Outs\.cls_score\.(weight|bias)", lambda m, _: f"predictor.classes.{m[1]}"),
    (r"Pose_Outs\.pose_pred\.(weight|bias)", lambda m, _: f"predictor.refine.{m[1]}"),
]  # fmt: skip

_DOPE: list[Rule] = [
    (r"backbone\.resnet_backbone\.(conv1\..+|bn1\..+|layer[123]\..+)", lambda m, _: f"body.{m[1]}"),
    (r"backbone\.resnet_backbone\.(layer4\..+)", lambda m, _: f"box_head.{m[1]}"),
    # Since torchvision 0.14 the convolution is the first of a sequence.
    (r"rpn\.head\.conv\.(?:0\.0\.)?(weight|bias)", lambda m, _: f"rpn.conv.{m[1]}"),
    (r"rpn\.head\.cls_logits\.(weight|bias)", lambda m, _: f"rpn.objectness.{m[1]}"),
    (r"rpn\.head\.bbox_pred\.(weight|bias)", lambda m, _: f"rpn.offsets.{m[1]}"),
    (r"roi_heads\.dope_predictor\.body_cls_score\.(weight|bias)", lambda m, _: f"predictor.classes.{m[1]}"),
    (r"roi_heads\.dope_predictor\.body_pose_pred\.(weight|bias)", lambda m, _: f"predictor.refine.{m[1]}"),
]

FAMILIES = {"torchvision": _TORCHVISION, "detectron": _DETECTRON, "seed": _SEED, "dope": _DOPE}


def ours(family: str, names: Iterable[str], layout: Layout) -> dict[str, str]:
    """{their name: our name} of those that have one. What our network has no such tensor for is the caller's to see."""
    out = {}
    for name in names:
        for pattern, rule in FAMILIES[family]:
            if match := re.fullmatch(pattern, name):
                out[name] = rule(match, layout)
                break
    # Detectron's detectors name the scores of 81 kinds of things as INRIA's those of poses.
    if family == "detectron" and "predictor.refine.weight" in out.values():
        out |= {f"cls_score_{k}": f"predictor.classes.{_KIND[k]}" for k in "wb" if f"cls_score_{k}" in names}
    return out
