"""Every recipe of configs/: its header, its network's shapes, and one real training step of each family.

Shapes are those of meta tensors. The step is that of the recipe with ResNet-18, 64 pixels and few proposals: what a
body, head, norm or pooling does wrong does not depend on the depth.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lcrnet import config, image, model, ops, synthetic
from lcrnet.anchors import AnchorPoses
from lcrnet.config import Config

FILES = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.yaml"))
JOBS = {"sweep_ppi": "tune", "demo": "demo", "sweep": "tune"}
FAMILIES = [  # (recipe, network of the step): the other recipes differ from these in depth only
    ("tiny", "tiny"), ("resnet50", "resnet18"), ("resnet50_c4", "resnet50"), ("resnet101_c4", "resnet18"),
    ("resnet50_c5", "resnet50"), ("resnet50_fpn", "resnet18"), ("resnet50_fpn_p2", "resnet18"),
    ("resnet50_fpn_conv", "resnet18"), ("resnet50_fpn_gn", "resnet18"), ("resnet50_fpn_gn_scratch", "resnet18"),
    ("resnet50_c4_pool", "resnet50"), ("resnet50_c4_crop", "resnet18"), ("vgg16", "vgg16"),
]  # fmt: skip
WANTED = {  # SEED.md B4: (backbone, body, head, norm, pool) that there must be a recipe for
    *((f"resnet{depth}", body, head, "frozen_bn", "align")
      for depth in (50, 101, 152) for body, head in (("c4", "res5"), ("c5", "2mlp"), ("fpn", "2mlp"))),
    *((f"resnext{kind}", "fpn", "2mlp", "frozen_bn", "align") for kind in ("101_32x8d", "101_64x4d", "152_32x8d")),
    ("resnet50", "fpn_p2", "2mlp", "frozen_bn", "align"), ("resnet50", "fpn", "conv", "frozen_bn", "align"),
    ("resnet50", "fpn", "conv", "gn", "align"), ("resnet50", "c4", "res5", "gn", "align"),
    ("resnet50", "c4", "res5", "frozen_bn", "pool"), ("resnet50", "c4", "res5", "frozen_bn", "crop_max"),
    ("vgg16", "c4", "2mlp", "frozen_bn", "align"), ("tiny", "c4", "res5", "gn", "align"),
}  # fmt: skip


def test_every_family_has_a_recipe() -> None:
    models = [config.load(file).model for file in FILES]
    assert {(m.backbone, m.body, m.head, m.norm, m.pool) for m in models} == WANTED


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_header(file: Path) -> None:
    """It opens with what it is, its command, whose options exist, and a line on the score."""
    lines = file.read_text(encoding="utf-8").splitlines()
    head = [line.removeprefix("#").strip() for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")]]
    assert head[0].endswith((".", ":")) and not head[1]
    assert head[2].startswith(f"python jobs/{JOBS.get(file.stem, 'train')}.py --config configs/{file.name} ")
    assert any(re.match("Score|Four trials", line) for line in head)
    assert all(len(line) <= 136 for line in lines)
    for option, value in re.findall(r"--(\w+\.\w+) ('[^']*'|[^ ;.,]+)", " ".join(head)):
        config.load(file, {option: value.strip("'")})


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_shapes(file: Path, poses: AnchorPoses) -> None:
    settings = config.load(file)
    height, width = image.padded((96, 160), settings.image.multiple)
    with torch.device("meta"):
        net = model.build(settings, poses)
        maps = net.body(torch.zeros(2, 3, height, width))
        logits, offsets, boxes, counts = net.rpn([maps[s] for s in net.body.rpn_strides])
        bins = -(-settings.model.roi_size // getattr(net.box_head, "step", 1))
        classes, refined = net.predictor(net.box_head(torch.zeros(5, net.body.roi_channels, bins, bins)))
    cells = [-(-height // s) * -(-width // s) for s in net.body.rpn_strides]
    shapes = len(settings.rpn.ratios) * (len(settings.rpn.sizes) if len(cells) == 1 else 1)
    assert counts == [c * shapes for c in cells] and len(cells) == settings.model.rpn_levels
    assert logits.shape == (2, sum(counts)) and offsets.shape == (2, sum(counts), 4) == (2, *boxes.shape)
    assert classes.shape == (5, len(poses.pose2d) + 1)
    assert refined.shape == (5, *poses.pose2d.shape[:2], 5)
    frozen = {name.split(".")[1] for name, p in net.named_parameters() if not p.requires_grad}
    assert not frozen or settings.model.norm == "frozen_bn" or settings.model.freeze


def small(file: Path, backbone: str) -> Config:
    """The recipe for 64 pixels and a core."""
    values: dict[str, Any] = config.load(file).model_dump()
    values["model"] |= {"backbone": backbone, "head_width": 32, "head_convs": min(2, values["model"]["head_convs"])}
    if backbone == "resnet18":
        values["model"] |= {"stride_in_1x1": False, "dilate_c5": False}
    values["rpn"] |= {"sizes": [8 * 2**n for n in range(len(values["rpn"]["sizes"]))], "samples": 32,
                      "train_pre_nms": 60, "train_post_nms": 16, "min_size": 1}  # fmt: skip
    values["head"] |= {"samples": 8, "jitter": 2, "positive_share": 0.5}
    return config.from_dict(values)


@pytest.mark.parametrize(("recipe", "backbone"), FAMILIES)
def test_step(recipe: str, backbone: str, root: Path, poses: AnchorPoses) -> None:
    """Finite losses, and a finite gradient for every parameter that is not frozen."""
    settings = small(root / "configs" / f"{recipe}.yaml", backbone)
    if settings.model.pool != "align" and not hasattr(ops, "roi_pool"):
        pytest.skip("ops has no RoIPool and RoICrop yet")
    torch.manual_seed(0)
    net = model.build(settings, poses).train()
    drawn = next(d for d in (synthetic.draw(seed, 64, 75) for seed in range(20)) if len(d[1]))
    pixels, sizes = image.stack([drawn[0]], settings.image.multiple)
    losses = net(pixels, sizes, [drawn[1].tensors()])
    assert sorted(losses) == ["class", "pose2d", "pose3d", "rpn_box", "rpn_class"]
    assert all(value.isfinite() for value in losses.values()) and losses["class"] > 0 and losses["pose3d"] > 0
    sum(losses.values()).backward()
    trained = [name for name, p in net.named_parameters() if p.requires_grad]
    for name, parameter in net.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    moved = [name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()]
    # A pyramid has levels without a region, and behind the zeros that residuals of `tiny` start with nothing moves yet.
    assert len(moved) > 0.6 * len(trained), sorted(set(trained) - set(moved))
    frozen = config.load(root / "configs" / f"{recipe}.yaml").model.freeze
    assert any(name.startswith("body.") for name in trained) and (len(trained) < len(list(net.parameters()))) == (
        frozen > 0 or settings.model.body == "fpn_p2"
    )
