"""Detectron's configuration and the predecessor's, converted: hand-written YAML of the keys that their files have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lcrnet import config, detectron, unpickle
from lcrnet.config import UserError

C4 = """
MODEL: {TYPE: generalized_rcnn, CONV_BODY: ResNet.ResNet50_conv4_body, FASTER_RCNN: True, NUM_CLASSES: 21}
NUM_GPUS: 8
SOLVER: {WEIGHT_DECAY: 0.0001, LR_POLICY: steps_with_decay, BASE_LR: 0.001, MAX_ITER: 2700000,
         STEPS: [0, 1800000, 2400000]}
RPN: {SIZES: "(32, 64, 128, 256, 512)"}
FAST_RCNN: {ROI_BOX_HEAD: ResNet.ResNet_roi_conv5_head, ROI_XFORM_METHOD: RoIAlign}
TRAIN: {SCALES: "(800,)", MAX_SIZE: 1333, IMS_PER_BATCH: 1, BATCH_SIZE_PER_IM: 512, USE_FLIPPED: False}
TEST: {SCALE: 800, MAX_SIZE: 1333, NMS: 0.5, RPN_PRE_NMS_TOP_N: 6000, RPN_POST_NMS_TOP_N: 1000}
"""
FPN = """
MODEL: {CONV_BODY: FPN.add_fpn_ResNet101_conv5_body, FASTER_RCNN: True}
FPN: {FPN_ON: True, MULTILEVEL_ROIS: True, MULTILEVEL_RPN: True}
RESNETS: {STRIDE_1X1: False, NUM_GROUPS: 32, WIDTH_PER_GROUP: 8}
FAST_RCNN: {ROI_BOX_HEAD: fast_rcnn_heads.add_roi_2mlp_head, ROI_XFORM_METHOD: RoIAlign, ROI_XFORM_RESOLUTION: 7,
            ROI_XFORM_SAMPLING_RATIO: 2}
"""
GN = """
MODEL: {CONV_BODY: FPN.fpn_ResNet50_conv5_body, FASTER_RCNN: True, MASK_ON: True}
FPN: {FPN_ON: True, MULTILEVEL_ROIS: True, MULTILEVEL_RPN: True, USE_GN: True}
RESNETS: {STRIDE_1X1: False, TRANS_FUNC: bottleneck_gn_transformation, STEM_FUNC: basic_gn_stem,
          SHORTCUT_FUNC: basic_gn_shortcut}
FAST_RCNN: {ROI_BOX_HEAD: fast_rcnn_heads.roi_Xconv1fc_gn_head, ROI_XFORM_METHOD: RoIAlign, ROI_XFORM_RESOLUTION: 7}
TRAIN: {FREEZE_AT: 0, SCALES: "(640, 672, 800)"}
TEST: {SCALE: 800, MAX_SIZE: 1333, BBOX_AUG: {ENABLED: True, H_FLIP: True}}
MRCNN: {RESOLUTION: 28}
"""


def convert(text: str, batch: int | None = None, **change: Any) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Of YAML with some keys changed: SECTION__KEY=value. What comes out is always a configuration."""
    values = yaml.safe_load(text)
    for name, value in change.items():
        *section, key = name.split("__")
        (values.setdefault(section[0], {}) if section else values)[key] = value
    fields, ignored, warnings = detectron.convert(values, batch)
    config.from_dict(fields)
    return fields, ignored, warnings


def test_the_predecessors_c4() -> None:
    """Every field, by hand: Detectron's defaults where the file is silent."""
    fields, ignored, warnings = convert(C4)
    assert fields["model"] == {
        "backbone": "resnet50", "body": "c4", "head": "res5", "head_width": 1024, "head_convs": 4, "norm": "frozen_bn",
        "freeze": 2, "stride_in_1x1": True, "dilate_c5": False, "pool": "align", "aligned": False, "roi_size": 14,
        "sampling_ratio": 0, "shared_regressor": False,
    }  # fmt: skip
    assert fields["rpn"] == {
        "sizes": [32, 64, 128, 256, 512], "ratios": [0.5, 1, 2], "convention": "detectron", "nms_iou": 0.7,
        "pre_nms": 6000, "post_nms": 1000, "train_pre_nms": 12000, "train_post_nms": 2000, "samples": 256,
        "positive_share": 0.5, "positive_iou": 0.7, "negative_iou": 0.3, "min_size": 0,
    }  # fmt: skip
    assert fields["head"] == {"samples": 512, "positive_share": 0.25, "positive_iou": 0.5, "jitter": 0}
    assert fields["data"] == {"flip": 0, "scale": [1, 1]}
    assert fields["train"] == {
        "steps": 2700000, "batch": 8, "optimizer": "sgd", "lr": 0.001, "momentum": 0.9, "weight_decay": 0.0001,
        "warmup": 500, "schedule": "steps", "decay_at": [0.666667, 0.888889], "seed": 3, "save_every": 20000,
    }  # fmt: skip
    image = fields["image"]
    assert (image["short_side"], image["max_side"], image["resize"], image["multiple"]) == (800, 1333, "detectron", 1)
    # RGB of 0..1, from BGR of 0..255
    assert [m * 255 for m in image["mean"]] == pytest.approx([122.7717, 115.9465, 102.9801], abs=1e-6)
    assert [s * 255 for s in image["std"]] == pytest.approx([1, 1, 1], abs=1e-6)
    assert ignored == {"MODEL.NUM_CLASSES": "the classes are the anchor poses, and background",
                       "TEST.NMS": "detections are merged and chosen by section ppi and head.score_floor"}  # fmt: skip
    assert len(warnings) == 1 and "no MODEL.ANCHOR_POSES" in warnings[0]


def test_pyramids_and_groupnorm() -> None:
    fields, _, _ = convert(FPN)
    model = fields["model"]
    assert (model["backbone"], model["body"], model["head"]) == ("resnext101_32x8d", "fpn", "2mlp")
    assert not model["stride_in_1x1"] and fields["image"]["multiple"] == 32
    assert fields["rpn"]["sizes"] == [32, 64, 128, 256, 512]
    fields, ignored, warnings = convert(GN)
    model = fields["model"]
    assert (model["backbone"], model["body"], model["head"], model["norm"]) == ("resnet50", "fpn", "conv", "gn")
    assert model["freeze"] == 0 and fields["data"]["scale"] == [0.8, 1] and fields["data"]["flip"] == 0.5
    assert set(ignored) == {"MODEL.MASK_ON", "TEST.BBOX_AUG.ENABLED", "TEST.BBOX_AUG.H_FLIP", "MRCNN.RESOLUTION"}
    assert any("between 640 and 800" in text for text in warnings)


CHANGES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [  # (file, change, fields as "section.field")
    (C4, {"MODEL__CONV_BODY": "ResNet.add_ResNet152_conv4_body"}, {"model.backbone": "resnet152"}),
    (C4, {"MODEL__ANCHOR_POSES": "a.pkl"}, {"anchors.file": "a.pkl"}),
    (C4, {"FAST_RCNN__ROI_XFORM_RESOLUTION": "7"}, {"model.roi_size": 7}),
    (C4, {"FAST_RCNN__ROI_XFORM_METHOD": "RoIPoolF"}, {"model.pool": "pool"}),
    (C4, {"FAST_RCNN__ROI_XFORM_METHOD": "RoICrop"}, {"model.pool": "crop_max", "model.roi_size": 7}),
    (C4, {"FAST_RCNN__ROI_XFORM_METHOD": "RoICrop", "CROP_RESIZE_WITH_MAX_POOL": False}, {"model.pool": "crop"}),
    (C4, {"TRAIN__FREEZE_CONV_BODY": True}, {"model.freeze": 5}),
    (C4, {"RESNETS__FREEZE_AT": 3}, {"model.freeze": 3}),
    (C4, {"RESNETS__RES5_DILATION": 2}, {"model.dilate_c5": False}),
    (C4, {"MODEL__CONV_BODY": "ResNet.ResNet50_conv5_body", "RESNETS__RES5_DILATION": 2,
          "FAST_RCNN__ROI_BOX_HEAD": "lcrnet_heads.roi_2mlp_head"}, {"model.dilate_c5": True, "model.body": "c5"}),
    (C4, {"MODEL__CONV_BODY": "VGG16.add_VGG16_conv5_body", "FAST_RCNN__ROI_BOX_HEAD": "VGG16.add_VGG16_roi_fc_head"},
     {"model.backbone": "vgg16", "model.body": "c4", "model.head": "2mlp", "model.head_width": 4096,
      "model.roi_size": 7, "model.stride_in_1x1": False, "model.freeze": 2}),
    (FPN, {"MODEL__CONV_BODY": "FPN.fpn_ResNet101_conv5_P2only_body", "FPN": {}},
     {"model.body": "fpn_p2", "rpn.sizes": [64, 128, 256, 512], "image.multiple": 32}),
    (FPN, {"RESNETS__WIDTH_PER_GROUP": 4, "RESNETS__NUM_GROUPS": 64}, {"model.backbone": "resnext101_64x4d"}),
    (FPN, {"FPN__RPN_ANCHOR_START_SIZE": 16}, {"rpn.sizes": [16, 32, 64, 128, 256]}),
    (FPN, {"FAST_RCNN__ROI_BOX_HEAD": "fast_rcnn_heads.roi_Xconv1fc_head", "FAST_RCNN__NUM_STACKED_CONVS": 2},
     {"model.head": "conv", "model.head_convs": 2, "model.norm": "frozen_bn"}),
    (C4, {"TEST__RPN_PRE_NMS_TOP_N": 0}, {"rpn.pre_nms": 1_000_000}),
    (C4, {"TEST__SCALE": 320}, {"image.short_side": 320, "data.scale": [2.5, 2.5]}),
    (C4, {"PIXEL_MEANS": [[[0, 51, 255]]]}, {"image.mean": [1, 0.2, 0]}),
    (C4, {"SOLVER__LR_POLICY": "step", "SOLVER__STEP_SIZE": 900000}, {"train.decay_at": [0.333333, 0.666667]}),
    (C4, {"SOLVER__LR_POLICY": "step_with_decay", "SOLVER__STEPS": "0,1800000,2400000"},
     {"train.decay_at": [0.666667, 0.888889]}),
    (C4, {"SOLVER__LR_POLICY": "steps_with_lrs", "SOLVER__LRS": [0.01, 0.001, 0.0001]},
     {"train.decay_at": [0.666667, 0.888889]}),
    (C4, {"SOLVER__BASE_LR": "1e-3", "SOLVER__TYPE": "Adam"}, {"train.lr": 0.001, "train.optimizer": "adamw"}),
]  # fmt: skip


@pytest.mark.parametrize(("file", "change", "goal"), CHANGES, ids=[str(c) for _, c, _ in CHANGES])
def test_keys(file: str, change: dict[str, Any], goal: dict[str, Any]) -> None:
    fields, _, _ = convert(file, **change)
    found = {name: fields[name.split(".")[0]][name.split(".")[1]] for name in goal}
    assert found == {k: pytest.approx(v) if isinstance(v, list) else v for k, v in goal.items()}


def test_other_batches() -> None:
    """Twice the images: twice the rate, half the steps, the same images in all."""
    train = convert(C4, batch=16)[0]["train"]
    assert (train["batch"], train["lr"], train["steps"], train["warmup"]) == (16, 0.002, 1350000, 250)
    assert train["decay_at"] == [0.666667, 0.888889]
    assert convert(C4, batch=2)[0]["train"]["steps"] == 4 * 2700000


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (C4, {"MODEL__CONV_BOD": "x"}, "unknown key 'MODEL.CONV_BOD'; did you mean 'MODEL.CONV_BODY'?"),
    (C4, {"MODLE": {"TYPE": 1}}, "unknown key 'MODLE.TYPE'; did you mean 'MODEL.TYPE'?"),
    (C4, {"MODEL": 5}, "unknown key 'MODEL'"),
    (C4, {"MODEL__CONV_BODY": "ResNet.ResNet51_conv4_body"}, "of resnet51: there is none"),
    (C4, {"MODEL__CONV_BODY": "VGG_CNN_M_1024.x"}, "MODEL.CONV_BODY: 'VGG_CNN_M_1024.x' is none of"),
    (C4, {"MODEL__CONV_BODY": "VGG16.VGG16_conv5_body"}, "does not go with MODEL.CONV_BODY VGG16"),
    (C4, {"FAST_RCNN__ROI_BOX_HEAD": ""}, "FAST_RCNN.ROI_BOX_HEAD: '' is none of"),
    (C4, {"FAST_RCNN__ROI_XFORM_METHOD": "RoIWarp"}, "'RoIWarp' is none of RoIAlign, RoIPoolF, RoICrop"),
    (C4, {"FAST_RCNN__ROI_XFORM_RESOLUTION": 28}, "28 cannot be kept: stage 5 ends in a mean of 7 x 7"),
    (C4, {"MODEL__RPN_ONLY": True}, "MODEL.RPN_ONLY: True cannot be kept"),
    (C4, {"RESNETS__NUM_GROUPS": 32}, "RESNETS.NUM_GROUPS 32, WIDTH_PER_GROUP 64 of resnet50: there is none"),
    (C4, {"RESNETS__FREEZE_AT": 0, "TRAIN__FREEZE_AT": 2}, "differ: they mean the same, keep one"),
    (C4, {"RESNETS__TRANS_FUNC": "bottleneck_gn_transformation"}, "GroupNorm in RESNETS.TRANS_FUNC but not in"),
    (GN, {"GROUP_NORM__NUM_GROUPS": 16}, "GROUP_NORM.NUM_GROUPS: 16 cannot be kept"),
    (FPN, {"FPN__FPN_ON": False}, "FPN.FPN_ON: False cannot be kept"),
    (FPN, {"FPN__DIM": 128}, "FPN.DIM: 128 cannot be kept"),
    (FPN, {"FPN__RPN_MAX_LEVEL": 7}, "FPN.RPN_MAX_LEVEL: 7 cannot be kept"),
    (C4, {"SOLVER__LR_POLICY": "cosine"}, "SOLVER.LR_POLICY: 'cosine' is none of"),
    (C4, {"SOLVER__LR_POLICY": "steps_with_lrs", "SOLVER__LRS": [0.1, 0.05, 0.01]}, "divides the learning rate by 10"),
    (C4, {"SOLVER__BASE_LR": "fast"}, "SOLVER.BASE_LR: expected a number, found 'fast'"),
    (C4, {"SOLVER__MAX_ITER": 0}, "SOLVER.MAX_ITER: expected 1 or more"),
    (C4, {"NUM_GPUS": 0}, "expected a batch of 1 or more"),
    (C4, {"NUM_GPUS": 1.5}, "NUM_GPUS: expected a whole number, found 1.5"),
    (C4, {"TRAIN__USE_FLIPPED": "maybe"}, "TRAIN.USE_FLIPPED: expected True or False, found 'maybe'"),
    (C4, {"TRAIN__SCALES": []}, "TRAIN.SCALES and TEST.SCALE: expected sizes above 0"),
    (C4, {"PIXEL_MEANS": [1, 2]}, "PIXEL_MEANS: expected blue, green and red"),
    (C4, {"RPN__SIZES": "__import__('os').system('true')"}, "RPN.SIZES: expected a number"),
    (C4, {"RPN__SIZES": "(" * 500 + ")" * 500}, "RPN.SIZES: expected a number"),
    (C4, {"RPN__SIZES": {1: 2}}, "RPN.SIZES.1: expected a name"),
]


@pytest.mark.parametrize(("file", "change", "says"), REFUSED, ids=[str(c)[:60] for _, c, _ in REFUSED])
def test_refused_by_name(file: str, change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as refusal:
        convert(file, **change)
    assert says in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_dumped_configuration() -> None:
    """As Detectron writes one into its models: Python's tags, read as data; other tags are refused."""
    text = """
!!python/object/new:detectron.utils.collections.AttrDict
dictitems:
  MODEL: !!python/object/new:utils.collections.AttrDict
    dictitems: {CONV_BODY: ResNet.add_ResNet50_conv4_body, FASTER_RCNN: true}
    state: {__immutable__: true}
  FAST_RCNN: !!python/object/new:utils.collections.AttrDict
    dictitems: {ROI_BOX_HEAD: ResNet.add_ResNet_roi_conv5_head, ROI_XFORM_METHOD: RoIAlign}
  RPN: !!python/object/new:utils.collections.AttrDict
    dictitems:
      SIZES: !!python/tuple [32, 64]
  PIXEL_MEANS: !!python/object/apply:numpy.core.multiarray._reconstruct
    args: [!!python/name:numpy.ndarray '', !!python/tuple [0], b]
    state: !!python/tuple
    - 1
    - !!python/tuple [1, 1, 3]
    - !!python/object/apply:numpy.dtype {args: [f8, 0, 1], state: !!python/tuple [3, <, null, null, null, -1, -1, 0]}
    - false
    - !!binary |
      AAAAAADAWUAAAAAAAABdQAAAAAAAwF5A
state: {__immutable__: true}
"""
    values = detectron.parse(text)
    fields, _, _ = detectron.convert(values)
    config.from_dict(fields)
    assert fields["rpn"]["sizes"] == [32, 64]
    assert [m * 255 for m in fields["image"]["mean"]] == pytest.approx([123, 116, 103])
    for bad in ("!!python/object/apply:os.system ['true']", "a: !!python/name:os.system ''",
                "!!python/object/new:os.AttrDictX {}", "!!python/module:os ''", "a: !unknown b"):  # fmt: skip
        with pytest.raises(UserError, match="not YAML"):
            detectron.parse(bad)


def test_the_released_bundles(shared: Path) -> None:
    """What INRIA's files hold as `cfg`: text in place of tuples, other misspellings."""
    for name, short in (("DEMO_ECCV18", 320), ("InTheWild-ResNet50", 800)):
        file = shared / "legacy" / f"{name}_anchor_cfg.pkl"
        fields, _, _ = detectron.convert(unpickle.load(file.read_bytes(), str(file))["cfg"])
        config.from_dict(fields)
        assert fields["image"]["short_side"] == short
        assert fields["rpn"]["sizes"] == [32, 64, 128, 256, 512] and fields["model"]["roi_size"] == 14


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe that loads, with what was left out; and one line on a mistake."""
    file, out = tmp_path / "e2e.yaml", tmp_path / "recipe.yaml"
    file.write_text(C4 + 'OUTPUT_DIR: "x\\ny: 1"\n')
    assert detectron.main([str(file)]) == 0
    text = capsys.readouterr().out
    assert (
        "#   TEST.NMS: detections are merged" in text and "#   OUTPUT_DIR: " in text and "Score: not measured" in text
    )
    assert detectron.main([str(file), "--out", str(out), "--batch", "16"]) == 0
    assert out.read_text().startswith("# Converted from e2e.yaml")
    settings = config.load(out)
    assert settings.train.batch == 16 and settings.model.backbone == "resnet50"
    for content, says in (("a: [", "not YAML"), ("5", "expected sections"), ("MODEL: {X: 1}", "unknown key 'MODEL.X'"),
                          (C4.replace("0.001", "-1"), "train.lr")):  # fmt: skip
        file.write_text(content)
        with pytest.raises((UserError, config.ConfigError)) as refusal:
            detectron.main([str(file)])
        assert str(file) in str(refusal.value) and says in str(refusal.value)
    with pytest.raises(UserError, match="No such file"):
        detectron.main([str(tmp_path / "none.yaml")])


def test_every_key_has_one_place() -> None:
    assert not set(detectron.DEFAULTS) & set(detectron.IGNORED)
