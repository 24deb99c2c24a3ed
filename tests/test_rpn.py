"""Anchor boxes, their targets and sampling, proposals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from lcrnet import rpn
from lcrnet.config import Rpn
from lcrnet.pose import People

STRIDE, SIZES, RATIOS = 8, (16.0, 40.0), (0.5, 1.0, 2.0)
CONFIG = Rpn(sizes=SIZES, ratios=RATIOS, samples=40, positive_share=0.25)
SHAPE = torch.Size([6, 10])  # a map of 48 x 80 pixels
ANCHORS = rpn.anchor_boxes(SHAPE, STRIDE, SIZES, RATIOS)


def network(**fields: Any) -> rpn.RPN:
    torch.manual_seed(0)
    return rpn.RPN(8, (STRIDE,), CONFIG.model_copy(update=fields))


def people(*boxes: tuple[float, ...], crowd: int = 0) -> People:
    """People with these boxes, the last `crowd` of them ignored regions."""
    out = People.empty(len(boxes), 13)
    out.box = np.array(boxes, np.float32).reshape(-1, 4)
    out.crowd[len(boxes) - crowd :] = crowd > 0
    return out.tensors()


def test_encode_and_decode() -> None:
    rng = torch.Generator().manual_seed(0)
    boxes = [torch.rand(2, 50, 2, generator=rng) * 100 for _ in range(2)]
    anchors, goal = (torch.cat([low, low + extent + 1], 1) for low, extent in boxes)
    offsets = rpn.encode(goal, anchors)
    torch.testing.assert_close(rpn.decode(offsets, anchors), goal, atol=1e-3, rtol=1e-4)
    assert not rpn.encode(anchors, anchors).any()
    # by hand: moved by half its width and quarter its height, twice as wide
    offset = rpn.encode(torch.tensor([0.0, 10, 40, 30]), torch.tensor([0.0, 5, 20, 25]))
    torch.testing.assert_close(offset, torch.tensor([0.5, 0.25, np.log(2), 0], dtype=torch.float32))
    huge = rpn.decode(torch.full((1, 4), 1e4), anchors[:1])
    assert huge.isfinite().all(), "an untrained network may say anything"


def test_anchor_boxes() -> None:
    """Cell by cell in rows, in each cell size by size; areas and ratios as asked, centres in the middle of cells."""
    assert len(ANCHORS) == 6 * 10 * 6
    by_cell = ANCHORS.view(6, 10, 6, 4)
    extent = by_cell[..., 2:] - by_cell[..., :2]
    area = torch.tensor(SIZES).repeat_interleave(3) ** 2
    torch.testing.assert_close(extent.prod(-1), area.expand(6, 10, 6))
    torch.testing.assert_close(extent[..., 1] / extent[..., 0], torch.tensor(RATIOS).repeat(2).expand(6, 10, 6))
    middle = (by_cell[..., 2:] + by_cell[..., :2]) / 2
    torch.testing.assert_close(middle[3, 7], torch.tensor([7.5 * 8, 3.5 * 8]).expand(6, 2))


def test_outputs_are_in_the_order_of_the_anchor_boxes() -> None:
    net = network()
    for parameter in net.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        net.conv.weight[:, :, 1, 1] = torch.eye(8)
        net.objectness.weight[4, 0] = 1  # shape 4 looks at channel 0
        net.offsets.weight[4 * 4 + 2, 0] = 1  # its third offset too
    x = torch.zeros(1, 8, *SHAPE)
    x[0, 0, 3, 7] = 1
    logits, offsets, anchors, counts = net([x])
    assert counts == [len(ANCHORS)]
    hit = (3 * 10 + 7) * 6 + 4
    assert torch.equal(anchors, ANCHORS)
    assert logits[0].nonzero().tolist() == [[hit]] and offsets[0].nonzero().tolist() == [[hit, 2]]


def test_every_person_has_a_positive() -> None:
    """However small or odd they are: the anchor boxes of largest overlap, with the offsets to that person."""
    who = people((3, 3, 6, 7), (30, 0, 34, 48), (50, 10, 78, 44))
    label, goal, _ = network()._targets(ANCHORS, who)
    overlap = box_iou(ANCHORS, who.box)
    assert (overlap.max(0).values[:2] < CONFIG.negative_iou).all(), "the first two would have none by overlap alone"
    for i in range(3):
        best = overlap[:, i].argmax()
        assert label[best] == 1
        torch.testing.assert_close(rpn.decode(goal[best], ANCHORS[best]), who.box[i], atol=1e-3, rtol=1e-4)
    background = overlap.max(1).values < CONFIG.negative_iou
    forced = (overlap == overlap.max(0).values).any(1)
    assert torch.equal(label == 0, background & ~forced)
    assert ((label == 1) <= (forced | (overlap.max(1).values >= CONFIG.positive_iou))).all()


def test_ignored_regions_are_neither() -> None:
    region = (0.0, 0.0, 40.0, 48.0)
    label, _, _ = network()._targets(ANCHORS, people(region, crowd=1))
    inside = rpn.coverage(ANCHORS, torch.tensor([region])) > 0.5
    assert inside.any() and (~inside).any()
    assert (label[inside] == -1).all() and (label[~inside] == 0).all()
    # someone in front of a crowd is a person all the same
    person = (12.0, 12.0, 28.0, 28.0)
    label, _, _ = network()._targets(ANCHORS, people(person, region, crowd=1))
    assert label[box_iou(ANCHORS, torch.tensor([person]))[:, 0].argmax()] == 1
    assert not (label[inside] == 0).any()


def test_coverage() -> None:
    box = torch.tensor([[0.0, 0, 10, 10], [5, 5, 15, 15], [90, 90, 91, 91], [3, 3, 3, 3]])
    regions = torch.tensor([[0.0, 0, 5, 10], [0, 0, 8, 8]])
    torch.testing.assert_close(rpn.coverage(box, regions), torch.tensor([0.64, 0.09, 0, 0]))
    assert rpn.coverage(box, regions[:0]).tolist() == [0, 0, 0, 0]


def use_of(logits: Tensor, who: list[People], **fields: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(B, A) masks of the positives and the negatives in the class loss, seen from its gradient; and the losses."""
    logits = logits.clone().requires_grad_()
    offsets = torch.zeros(*logits.shape, 4, requires_grad=True)
    losses = network(**fields).loss(logits, offsets, ANCHORS, who)
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert logits.grad is not None
    return logits.grad < 0, logits.grad > 0, losses


def test_sampling() -> None:
    """At most `samples` an image and `positive_share` of them positive, filled up with background."""
    crowded = people(*((float(x), float(y), x + 16.0, y + 16.0) for x in range(0, 64, 8) for y in range(0, 32, 8)))
    label = network()._targets(ANCHORS, crowded)[0]
    assert (label == 1).sum() > 10
    few = people((50, 10, 78, 44))
    positive, negative, _ = use_of(torch.zeros(3, len(ANCHORS)), [crowded, few, people()])
    some = int((network()._targets(ANCHORS, few)[0] == 1).sum())
    assert 0 < some < 10
    assert positive.sum(1).tolist() == [10, some, 0] and negative.sum(1).tolist() == [30, 40 - some, 40]
    assert label[positive[0]].eq(1).all() and label[negative[0]].eq(0).all()
    again, _, _ = use_of(torch.zeros(3, len(ANCHORS)), [crowded, few, people()])
    assert torch.equal(positive, again), "the same seed draws the same"


def test_loss_of_images_without_people() -> None:
    _, _, losses = use_of(torch.zeros(2, len(ANCHORS)), [people(), people()])
    assert losses["rpn_box"] == 0 and abs(losses["rpn_class"].detach() - np.log(2)) < 1e-5
    _, _, losses = use_of(torch.zeros(1, len(ANCHORS)), [people((-100, -100, 200, 200), crowd=1)])
    assert losses["rpn_class"] == 0, "nothing to learn where all is ignored"


def test_anchor_boxes_of_a_person_count_by_its_trust() -> None:
    """Of one whom nobody vouches for nothing is learnt; background stays as it is; trust 1 is as if there were none."""
    torch.manual_seed(3)
    logits, offsets = torch.randn(1, len(ANCHORS)), torch.randn(1, len(ANCHORS), 4)
    sure, unsure = people((50, 10, 78, 44)), people((50, 10, 78, 44))
    label, goal, trust = network()._targets(ANCHORS, sure)
    assert (trust == 1).all() and (label == 1).sum() > 0

    def gradients(who: People) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        a, b = logits.clone().requires_grad_(), offsets.clone().requires_grad_()
        losses = network(samples=len(ANCHORS)).loss(a, b, ANCHORS, [who])
        return losses, *torch.autograd.grad(losses["rpn_class"] + losses["rpn_box"], [a, b])

    use = label >= 0
    plain, classes, boxes = gradients(sure)
    cross = F.binary_cross_entropy_with_logits(logits[0][use], label[use], reduction="sum") / use.sum()
    far = F.smooth_l1_loss(offsets[0][label == 1], goal[label == 1], beta=1 / 9, reduction="sum") / use.sum()
    assert torch.equal(plain["rpn_class"], cross) and torch.equal(plain["rpn_box"], far), "bit for bit"
    for value in (0.25, 0.0):
        unsure.trust[:] = value
        losses, c, b = gradients(unsure)
        torch.testing.assert_close(losses["rpn_box"], value * plain["rpn_box"])
        torch.testing.assert_close(b, value * boxes)
        torch.testing.assert_close(c[0], classes[0] * torch.where(label == 1, value, 1.0))
    torch.testing.assert_close(c[0, label == 1], torch.zeros(int((label == 1).sum())))


def test_loss_is_zero_where_all_is_right() -> None:
    who = people((50, 10, 78, 44))
    label, goal, _ = network()._targets(ANCHORS, who)
    losses = network(samples=len(ANCHORS)).loss((40 * label - 20)[None], goal[None], ANCHORS, [who])
    assert losses["rpn_box"] == 0 and losses["rpn_class"] < 1e-6


@pytest.mark.parametrize("train", [False, True])
def test_proposals(train: bool) -> None:
    fields = {"post_nms": 7, "train_post_nms": 9, "pre_nms": 200, "train_pre_nms": 250, "nms_iou": 0.5, "min_size": 6}
    torch.manual_seed(1)
    logits, offsets = torch.randn(2, len(ANCHORS)), torch.randn(2, len(ANCHORS), 4)
    sizes = torch.tensor([[48, 80], [30, 50]])
    found = network(**fields).propose(logits, offsets, ANCHORS, [len(ANCHORS)], sizes, train)
    for box, (height, width) in zip(found, sizes.tolist(), strict=True):
        assert len(box) == (9 if train else 7)
        assert (box >= 0).all() and (box[:, [0, 2]] <= width).all() and (box[:, [1, 3]] <= height).all()
        assert (box[:, 2:] - box[:, :2] >= 6).all()
        assert (box_iou(box, box).fill_diagonal_(0) <= 0.5).all()
    # the surest of all is the first of the first image
    order = logits[0].argsort(descending=True)
    decoded = rpn.decode(offsets[0], ANCHORS)[order].clamp(min=0)
    decoded = torch.minimum(decoded, torch.tensor([80.0, 48, 80, 48]))
    big = (decoded[:, 2:] - decoded[:, :2] >= 6).all(1)
    torch.testing.assert_close(found[0][0], decoded[big][0])


def test_proposals_of_nonsense() -> None:
    """NaN weights end in a loss that is not finite, not in a crash here."""
    logits = torch.full((1, len(ANCHORS)), torch.nan)
    offsets, size = logits[..., None].expand(-1, -1, 4), torch.tensor([[48, 80]])
    found = network().propose(logits, offsets, ANCHORS, [len(ANCHORS)], size, False)
    assert found[0].shape == (0, 4)
