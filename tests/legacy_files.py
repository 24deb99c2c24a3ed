"""Files as other people's programs wrote them: their names, shapes, types and pickle structure, with random numbers.

Real files cannot be had here; this is what the tests of imports stand on. Facts: the public code of Detectron,
Detectron.pytorch, LCR-Net, DOPE and torchvision. Small values, so that networks of them stay finite.
"""

from __future__ import annotations

import copyreg
import gzip
import io
import pickle
import struct
import sys
import tarfile
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch

STAGES = {"50": (3, 4, 6, 3), "101": (3, 4, 23, 3), "152": (3, 8, 36, 3)}
PPI = {"th_pose3D": 0.3, "th_iou": 0.1, "iou_func": "shoulderhead", "min_mode_score": 0.1, "th_persondetect": 0.2}


DETECTRON = """!!python/object/new:detectron.utils.collections.AttrDict
dictitems:
  MODEL: !!python/object/new:detectron.utils.collections.AttrDict
    dictitems: {TYPE: generalized_rcnn, CONV_BODY: FPN.add_fpn_ResNet50_conv5_body, NUM_CLASSES: 81, FASTER_RCNN: true}
    state: {__immutable__: true}
  FPN: {FPN_ON: true, MULTILEVEL_ROIS: true, MULTILEVEL_RPN: true}
  FAST_RCNN: {ROI_BOX_HEAD: fast_rcnn_heads.add_roi_2mlp_head, ROI_XFORM_METHOD: RoIAlign, ROI_XFORM_RESOLUTION: 7,
    ROI_XFORM_SAMPLING_RATIO: 2}
  TEST: {SCALE: 800, MAX_SIZE: 1333, NMS: 0.5, RPN_PRE_NMS_TOP_N: 1000, RPN_POST_NMS_TOP_N: 1000}
state: {__immutable__: true}
"""
"""The configuration in a detector, as Detectron dumps it."""


class Draw:
    """Random numbers by shape; `tiny` gives arrays that hold one number each, strided to any shape."""

    def __init__(self, seed: int = 0, tiny: bool = False):
        self.random, self.tiny = np.random.default_rng(seed), tiny

    def __call__(self, *shape: int, low: float = -1, high: float = 1, scale: float | None = None) -> np.ndarray:
        if self.tiny:
            return np.broadcast_to(np.float32((low + high) / 2), shape)
        fan = int(np.prod(shape[1:])) or 1
        out = self.random.random(shape, np.float32) * np.float32(high - low) + np.float32(low)
        return out * np.float32(scale if scale is not None else (fan**-0.5 if len(shape) > 1 else 1))


def stages(depth: str, groups: int = 1, width: int = 64) -> Iterator[tuple[int, int, int, int, int]]:
    """(stage from 0, block, inputs, inner, outputs) of each bottleneck."""
    inputs = 64
    for stage, blocks in enumerate(STAGES[depth]):
        for block in range(blocks):
            yield stage, block, inputs, groups * width * 2**stage, 256 * 2**stage
            inputs = 256 * 2**stage


def resnet(depth: str, draw: Draw, groups: int = 1, width: int = 64, variance: float = 1.0) -> dict[str, np.ndarray]:
    """torchvision's names, also those of resnet*_caffe.pth. variance: of conv1's output."""
    out: dict[str, np.ndarray] = OrderedDict()

    def norm(name: str, channels: int, var: float = 1.0) -> None:
        out[f"{name}.weight"] = draw(channels, low=0.5, high=1)
        out[f"{name}.bias"] = draw(channels, scale=0.1)
        out[f"{name}.running_mean"] = draw(channels, scale=0.1)
        out[f"{name}.running_var"] = draw(channels, low=0.5 * var, high=1.5 * var)

    out["conv1.weight"] = draw(64, 3, 7, 7)
    norm("bn1", 64, variance)
    for stage, block, inputs, inner, outputs in stages(depth, groups, width):
        name = f"layer{stage + 1}.{block}"
        out[f"{name}.conv1.weight"] = draw(inner, inputs, 1, 1)
        norm(f"{name}.bn1", inner)
        out[f"{name}.conv2.weight"] = draw(inner, inner // groups, 3, 3)
        norm(f"{name}.bn2", inner)
        out[f"{name}.conv3.weight"] = draw(outputs, inner, 1, 1)
        norm(f"{name}.bn3", outputs)
        if block == 0:
            out[f"{name}.downsample.0.weight"] = draw(outputs, inputs, 1, 1)
            norm(f"{name}.downsample.1", outputs)
    out["fc.weight"], out["fc.bias"] = draw(1000, 2048), draw(1000)
    return out


def vgg16(draw: Draw, biases: tuple[float, float] | None, thin: bool = True) -> dict[str, np.ndarray]:
    """biases: the first two of conv1_1, by which the published files are told."""
    out: dict[str, np.ndarray] = OrderedDict()
    inputs = 3
    index = 0
    for channels in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if channels:
            out[f"features.{index}.weight"], out[f"features.{index}.bias"] = (
                draw(channels, inputs, 3, 3),
                draw(channels),
            )
            inputs = channels
        index += 2 if channels else 1
    if biases:
        out["features.0.bias"] = out["features.0.bias"].copy()
        out["features.0.bias"][:2] = biases
    # Views of one number: 0.5 GB of layers would say no more.
    layer = Draw(tiny=True) if thin else draw
    for n, (rows, columns) in zip((0, 3, 6), ((4096, 25088), (4096, 4096), (1000, 4096)), strict=True):
        out[f"classifier.{n}.weight"], out[f"classifier.{n}.bias"] = layer(rows, columns), layer(rows)
    return out


def blobs(
    depth: str, draw: Draw, groups: int = 1, width: int = 64, norm: str = "bn", head: bool = True
) -> dict[str, Any]:
    """Detectron's ImageNet blobs; `head`: with the scores of ImageNet's classes, which are nobody's any more."""
    out: dict[str, Any] = {"conv1_w": draw(64, 3, 7, 7)}
    first = "res_conv1_bn" if norm == "bn" else "conv1_gn"
    out |= {f"{first}_s": draw(64, low=0.5, high=1), f"{first}_b": draw(64, scale=0.1)}
    if norm == "bn" and groups == 1 and head:  # of MSRA's conversion
        out["conv1_b"] = np.zeros(64, np.float32)

    def conv(name: str, *shape: int) -> None:
        out[f"{name}_w"] = draw(*shape)
        out[f"{name}_{norm}_s"] = draw(shape[0], low=0.5, high=1)
        out[f"{name}_{norm}_b"] = draw(shape[0], scale=0.1)

    for stage, block, inputs, inner, outputs in stages(depth, groups, width):
        name = f"res{stage + 2}_{block}_branch"
        conv(f"{name}2a", inner, inputs, 1, 1)
        conv(f"{name}2b", inner, inner // groups, 3, 3)
        conv(f"{name}2c", outputs, inner, 1, 1)
        if block == 0:
            conv(f"{name}1", outputs, inputs, 1, 1)
    if head:
        name = "fc1000" if norm == "bn" and groups == 1 else "pred"
        out |= {f"{name}_w": draw(1000, 2048), f"{name}_b": draw(1000)}
    return out


def detector(draw: Draw, pyramid: bool, norm: str = "bn") -> dict[str, Any]:
    """Blobs of a full Detectron Faster R-CNN of ResNet-50."""
    out = blobs("50", draw, norm=norm, head=False)
    rpn, shapes, channels = ("_fpn2", 3, 256) if pyramid else ("", 15, 1024)
    if pyramid:
        for stage, last in ((5, 2), (4, 5), (3, 3), (2, 2)):
            blob = f"res{stage}_{last}_sum"
            inner = f"fpn_inner_{blob}{'' if stage == 5 else '_lateral'}"
            for name, shape in ((inner, (256, 256 * 2 ** (stage - 2), 1, 1)), (f"fpn_{blob}", (256, 256, 3, 3))):
                out[f"{name}_w"] = draw(*shape)
                if norm == "gn":
                    out |= {f"{name}_gn_s": draw(256), f"{name}_gn_b": draw(256)}
                else:
                    out[f"{name}_b"] = draw(256)
        if norm == "gn":
            for n in range(1, 5):
                out |= {f"head_conv{n}_w": draw(256, 256, 3, 3), f"head_conv{n}_gn_s": draw(256),
                        f"head_conv{n}_gn_b": draw(256)}  # fmt: skip
            out |= {"fc6_w": draw(1024, 256 * 49), "fc6_b": draw(1024)}
        else:
            out |= {"fc6_w": draw(1024, 256 * 49), "fc6_b": draw(1024), "fc7_w": draw(1024, 1024), "fc7_b": draw(1024)}
    out |= {f"conv_rpn{rpn}_w": draw(channels, channels, 3, 3), f"conv_rpn{rpn}_b": draw(channels),
            f"rpn_cls_logits{rpn}_w": draw(shapes, channels, 1, 1), f"rpn_cls_logits{rpn}_b": draw(shapes),
            f"rpn_bbox_pred{rpn}_w": draw(4 * shapes, channels, 1, 1),
            f"rpn_bbox_pred{rpn}_b": draw(4 * shapes)}  # fmt: skip
    width = 1024 if pyramid else 2048
    return out | {"cls_score_w": draw(81, width), "cls_score_b": draw(81), "bbox_pred_w": draw(324, width),
                  "bbox_pred_b": draw(324), "conv1_w_momentum": draw(64, 3, 7, 7), "lr": np.float32(0.02)}  # fmt: skip


def seed(draw: Draw, softmax: bool = False, poses: int = 20, norm: str = "bn") -> dict[str, np.ndarray]:
    """State of the predecessor's LCRNet and INRIA's: ResNet-50 conv4 body, conv5 head; `softmax`: two logits a box."""
    out: dict[str, np.ndarray] = OrderedDict()
    for name, value in blobs("50", draw, norm=norm, head=False).items():
        out[_seed_name(name, norm)] = value
    scores = 30 if softmax else 15
    for name, shape in (("RPN.RPN_conv", (1024, 1024, 3, 3)), ("RPN.RPN_cls_score", (scores, 1024, 1, 1)),
                        ("RPN.RPN_bbox_pred", (60, 1024, 1, 1)), ("Pose_Outs.cls_score", (poses + 1, 2048)),
                        ("Pose_Outs.pose_pred", ((poses + 1) * 65, 2048))):  # fmt: skip
        out[f"{name}.weight"], out[f"{name}.bias"] = draw(*shape), draw(shape[0], scale=0.1)
    return out


def _seed_name(blob: str, norm: str) -> str:
    """The predecessor's name of one of `blobs`."""
    kind = {"w": "weight", "s": "weight", "b": "bias"}[blob[-1]]
    if blob == "conv1_w":
        return "Conv_Body.res1.conv1.weight"
    if "conv1_" in blob:
        return f"Conv_Body.res1.{norm}1.{kind}"
    stage, block, branch = blob.split("_")[:3]
    normed = f"_{norm}_" in blob
    where = "Box_Head.res5" if stage == "res5" else f"Conv_Body.{stage}"
    if branch == "branch1":
        return f"{where}.{block}.downsample.{int(normed)}.{kind}"
    number = "abc".index(branch[-1]) + 1
    return f"{where}.{block}.{norm if normed else 'conv'}{number}.{kind}"


def dope(draw: Draw, half: bool = True, flat: np.ndarray | None = None, poses: int = 20) -> dict[str, Any]:
    """A checkpoint of DOPE. flat: the body's anchor poses (K, 13, 5)."""
    state: dict[str, np.ndarray] = OrderedDict()
    net = resnet("50", draw)
    state |= {f"backbone.resnet_backbone.{name}": value for name, value in net.items()}
    for name, shape in (
        ("conv", (1024, 1024, 3, 3)),
        ("cls_logits", (15, 1024, 1, 1)),
        ("bbox_pred", (60, 1024, 1, 1)),
    ):
        state[f"rpn.head.{name}.weight"], state[f"rpn.head.{name}.bias"] = draw(*shape), draw(shape[0], scale=0.1)
    for part, joints, count in (("body", 13, poses), ("hand", 21, 10), ("face", 84, 10)):
        state[f"roi_heads.{part}_anchor_poses"] = draw(count, joints, 5)
    if flat is not None:
        state["roi_heads.body_anchor_poses"] = flat.astype(np.float32)
    state |= {f"roi_heads.dope_head.resnet_backbone.{name}": value for name, value in net.items()}
    for part, joints, count in (("body", 13, poses), ("hand", 21, 10), ("face", 84, 10)):
        for name, rows in (("cls_score", count + 1), ("pose_pred", count * joints * 5)):
            layer = f"roi_heads.dope_predictor.{part}_{name}"
            state[f"{layer}.weight"], state[f"{layer}.bias"] = draw(rows, 2048), draw(rows, scale=0.1)
    tensors: dict[str, Any] = OrderedDict((k, torch.from_numpy(v)) for k, v in state.items())
    if half:
        tensors = OrderedDict((k, v.half()) for k, v in tensors.items())
    ppi = {"K": poses // 2, "th_pose3D": 0.3, "th_iou": 0.1, "iou_func": "bbox_torsohead", "min_mode_score": 0.1,
           "th_persondetect": 0.4}  # fmt: skip
    return {
        "state_dict": tensors, "half": half,
        "dope_kwargs": {"num_anchor_poses": {"body": poses, "hand": 10, "face": 10}, "rpn_post_nms_top_n_test": 500,
                        "min_size": 400, "max_size": 1000},
        "body_ppi_kwargs": ppi, "hand_ppi_kwargs": {"K": 5}, "face_ppi_kwargs": {"K": 5},
    }  # fmt: skip


def torch_file(value: Any, new: bool = False) -> bytes:
    """torch.save; new: the zip format of torch >= 1.6."""
    out = io.BytesIO()
    torch.save(value, out, _use_new_zipfile_serialization=new)
    return out.getvalue()


def tensors(state: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return OrderedDict((name, torch.from_numpy(np.ascontiguousarray(value))) for name, value in state.items())


def caffe2_pickle(value: Any) -> bytes:
    """As Detectron's save_object with Python 2's cPickle: protocol 2, arrays' bytes as a str (BINSTRING)."""

    class Writer(pickle._Pickler):  # type: ignore[name-defined,misc]
        dispatch: ClassVar[Any] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

        def save_array(self, array: np.ndarray) -> None:
            array = np.ascontiguousarray(array)
            self.write(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R(K\x01")
            self.save(tuple(array.shape))
            self.write(b"cnumpy\ndtype\nU\x02f4K\0K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89")
            raw = array.astype("<f4").tobytes()
            self.write(b"T" + struct.pack("<i", len(raw)) + raw + b"tb")
            self.memoize(array)

        dispatch[np.ndarray] = save_array

    out = io.BytesIO()
    Writer(out, 2).dump(value)
    return out.getvalue()


@contextmanager
def predecessor() -> Iterator[type[dict[Any, Any]]]:
    """The class utils.collections.AttrDict, as pickles name it, while it is needed."""

    class AttrDict(dict):  # type: ignore[type-arg]
        def __reduce_ex__(self, protocol: Any) -> Any:
            return copyreg.__newobj__, (AttrDict,), {"__immutable__": False}, None, iter(self.items())  # type: ignore[attr-defined]

    AttrDict.__module__, AttrDict.__qualname__ = "utils.collections", "AttrDict"
    package, module = types.ModuleType("utils"), types.ModuleType("utils.collections")
    package.collections = module  # type: ignore[attr-defined]
    module.AttrDict = AttrDict  # type: ignore[attr-defined]
    before = {name: sys.modules.get(name) for name in ("utils", "utils.collections")}
    sys.modules |= {"utils": package, "utils.collections": module}
    try:
        yield AttrDict
    finally:
        for name, was in before.items():
            sys.modules.pop(name)
            if was is not None:
                sys.modules[name] = was


def inria_cfg(attrdict: type = dict, scale: int = 320) -> Any:
    """The configuration in INRIA's bundles, strings where they have strings."""
    return attrdict({
        "MODEL": attrdict(TYPE="generalized_rcnn", CONV_BODY="ResNet.ResNet50_conv4_body", FASTER_RCNN=True,
                          NUM_CLASSES=21, LOAD_IMAGENET_PRETRAINED_WEIGHTS=True),
        "NUM_GPUS": 1,
        "RESNETS": attrdict(IMAGENET_PRETRAINED_WEIGHTS="/home/x/resnet50_caffe.pth"),
        "SOLVER": attrdict(BASE_LR=0.001, LR_POLICY="step_with_decay", STEPS="0,1800000,2400000"),
        "RPN": attrdict(SIZES="(32, 64, 128, 256, 512)"),
        "FAST_RCNN": attrdict(ROI_BOX_HEAD="ResNet.ResNet_roi_conv5_head", ROI_XFORM_METHOD="RoIAlign"),
        "TRAIN": attrdict(SCALES="(800,)", FG_THRESH=0.7),
        "TEST": attrdict(SCALE=scale, MAX_SIZE=1333, NMS=0.5, RPN_PRE_NMS_TOP_N=50, RPN_POST_NMS_TOP_N=500,
                         BBOX_REG=False),
    })  # fmt: skip


def inria(draw: Draw, flat: np.ndarray, protocol: int = 2, **options: Any) -> bytes:
    """INRIA's LCR-Net .pkl: a plain pickle whose tensors reduce to files of torch.save."""
    with predecessor() as attrdict:
        bundle = {"model": tensors(seed(draw, **options)), "anchor_poses": flat.astype(np.float32),
                  "cfg": inria_cfg(attrdict), "ppi_params": dict(PPI)}  # fmt: skip
        return pickle.dumps(bundle, protocol)


def checkpoint(draw: Draw, **options: Any) -> bytes:
    """The predecessor's model_step*.pth."""
    state = tensors(seed(draw, **options))
    moments = {0: {"momentum_buffer": torch.zeros(3)}}
    return torch_file({
        "step": 8999, "train_size": 4000, "batch_size": 1, "model": state,
        "optimizer": {"state": moments, "param_groups": [{"lr": 0.001, "params": [0]}]},
        "losses": [np.float32(1.5), np.float32(1.25)],
    })  # fmt: skip


def tgz(data: bytes, name: str = "model.pth") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return gzip.compress(out.getvalue(), 0)
