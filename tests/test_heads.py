"""Classes and refinements of regions: what is sampled, what it should be, what takes part in the loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from lcrnet.anchors import AnchorPoses
from lcrnet.config import Head
from lcrnet.heads import PosePredictor, Regions
from lcrnet.pose import People, into_box, out_of_box

J = 4
RNG = np.random.default_rng(0)
BASE3D = RNG.normal(0, 0.3, (2, J, 3)).astype(np.float32)
BASE2D = RNG.uniform(0.1, 0.9, (2, J, 2)).astype(np.float32)
# 0, 1: two poses, whole body; 2, 3: the same in boxes of the upper body, out of which they reach
ANCHORS = AnchorPoses(
    np.concatenate([BASE2D, BASE2D * [1, 2]]).astype(np.float32), np.concatenate([BASE3D, BASE3D]),
    np.array([False, False, True, True]),
)  # fmt: skip
K = len(ANCHORS)
BOX = torch.tensor([[10.0, 20, 110, 220]])
CONFIG = Head()


def predictor(shared: bool = False) -> PosePredictor:
    torch.manual_seed(0)
    return PosePredictor(16, ANCHORS, shared)


def nearest(pose2d: np.ndarray, pose3d: np.ndarray, seen2d: Any = 1.0, seen3d: Any = 1.0) -> int:
    """The class of one person in BOX; pose2d in units of the box."""
    pixels = out_of_box(torch.tensor(pose2d)[None].float(), BOX)
    seen = [torch.ones(1, J) * torch.as_tensor(s, dtype=torch.float32) for s in (seen2d, seen3d)]
    return int(predictor().nearest(BOX, pixels, torch.tensor(pose3d)[None].float(), *seen))


def test_class_is_3d_first_then_2d() -> None:
    """Nearer in 3D to pose 0 by centimetres, in 2D exactly pose 1's upper body: a distance over both says 3."""
    pose3d = 0.6 * BASE3D[0] + 0.4 * BASE3D[1]
    pose2d = ANCHORS.pose2d[3]
    mixed = np.linalg.norm(ANCHORS.pose3d - pose3d, axis=-1).mean(1) + np.linalg.norm(
        ANCHORS.pose2d - pose2d, axis=-1
    ).mean(1)
    assert mixed.argmin() == 3
    apart = np.linalg.norm(ANCHORS.pose2d - pose2d, axis=-1).mean(1)
    goal = 0 if apart[0] < apart[2] else 2
    assert nearest(pose2d, pose3d) == goal
    for anchor in range(K):
        assert nearest(ANCHORS.pose2d[anchor], ANCHORS.pose3d[anchor]) == anchor


def test_class_without_3d_is_by_2d() -> None:
    for anchor in range(K):
        assert nearest(ANCHORS.pose2d[anchor], np.zeros((J, 3)), seen3d=0) == anchor


def test_class_is_that_of_the_joints_seen() -> None:
    """Most joints are those of another anchor pose, in 2D and 3D, but nobody labelled them."""
    seen = np.array([0.0, 0, 0, 1])
    pose2d, pose3d = (np.where(seen[:, None] > 0, a[2], a[1]) for a in (ANCHORS.pose2d, ANCHORS.pose3d))
    assert nearest(pose2d, pose3d, seen, seen) == 2
    assert nearest(pose2d, pose3d) == 1


def people(boxes: list[list[float]], **fields: Any) -> People:
    out = People.empty(len(boxes), J)
    out.box = np.array(boxes, np.float32).reshape(-1, 4)
    out.seen[:], out.has3d[:] = 2, True
    out.pose2d = out_of_box(np.tile(ANCHORS.pose2d[1], (len(boxes), 1, 1)), out.box)
    out.pose3d[:] = ANCHORS.pose3d[1]
    for name, value in fields.items():
        getattr(out, name)[:] = value
    return out.tensors()


def scattered(count: int, seed: int = 0) -> Tensor:
    low, extent = torch.rand(2, count, 2, generator=torch.Generator().manual_seed(seed)) * 100
    return torch.cat([low, low + extent + 1], 1)


def test_sample() -> None:
    """Shares, labels and truth of what is sampled; true boxes are among it, people in the order of their image."""
    who = [people([[10, 10, 60, 110], [100, 50, 150, 150]], trust=0.5), people([]), people([[0, 0, 90, 90]])]
    config = Head(samples=40, positive_share=0.25, jitter=30)
    proposals = [scattered(300, i) for i in range(3)]
    got = predictor().sample(proposals, who, config)
    assert [int((got.roi[:, 0] == b).sum()) for b in range(3)] == [40, 40, 40]
    person = got.label > 0
    assert [int((person & (got.roi[:, 0] == b)).sum()) for b in range(3)] == [10, 0, 10]
    for b in range(3):
        mine = got.roi[:, 0] == b
        overlap = box_iou(got.roi[mine, 1:], who[b].box) if len(who[b]) else torch.zeros(40, 1)
        assert torch.equal(overlap.max(1).values >= config.positive_iou, person[mine])
    assert torch.equal(got.trust[person & (got.roi[:, 0] == 0)], torch.full((10,), 0.5))
    assert (got.trust[~person] == 1).all(), "background is background whoever labelled the people"
    assert not got.seen2d[~person].any() and not got.seen3d[~person].any() and got.seen2d[person].all()
    assert (got.pose3d[person] == torch.tensor(ANCHORS.pose3d[1])).all()
    assert ((got.label[person] - 1) % 2 == 1).all(), "pose 1, whole or upper body"
    alone = predictor().sample([torch.zeros(0, 4)], [people([[10, 10, 60, 110]])], Head())
    assert alone.roi.tolist() == [[0, 10, 10, 60, 110]] and alone.label.tolist() == [2]


def test_sample_without_anything() -> None:
    got = predictor().sample([torch.zeros(0, 4)], [people([])], Head())
    assert got.roi.shape == (0, 5) and got.label.shape == (0,)


def test_ignored_people_are_never_background() -> None:
    """Nor persons: what lies in a crowd region, or on one whose pose nobody labelled, is left out."""
    region = [0.0, 0.0, 80.0, 120.0]
    inside = torch.tensor([region, [10.0, 10, 50, 60], [60, 0, 90, 100]])  # the last by two thirds
    outside = torch.tensor([[70.0, 0, 130, 100], [90, 0, 99, 9]])
    who = people([region, [100, 0, 140, 110]], crowd=[True, False])
    got = predictor().sample([torch.cat([inside, outside])], [who], Head(samples=100, positive_share=0.5))
    rows = got.roi[:, 1:].tolist()
    assert not any(box in rows for box in inside.tolist()) and all(box in rows for box in outside.tolist())
    assert got.roi[got.label > 0, 1:].tolist() == [[100, 0, 140, 110]]
    # a person in front of the crowd is one
    who = people([region, [10, 10, 50, 60]], crowd=[True, False])
    got = predictor().sample([inside[:1]], [who], Head())
    assert got.roi[:, 1:].tolist() == [[10, 10, 50, 60]] and got.label.tolist() == [2]


def test_people_without_3d() -> None:
    got = predictor().sample([torch.zeros(0, 4)], [people([[10, 10, 60, 110]], has3d=False, pose3d=9)], Head())
    assert got.seen2d.all() and not got.seen3d.any() and got.label.tolist() == [2]


def regions(count: int = 3, **fields: Tensor) -> Regions:
    """People in random boxes: labels 1, 2, 3, ..., all joints known; the last region is background."""
    rng = torch.Generator().manual_seed(1)
    label = torch.arange(1, count + 1)
    label[-1] = 0
    person = (label > 0).float()
    roi = torch.cat([torch.zeros(count, 1), scattered(count)], 1)
    pose2d = out_of_box(torch.rand(count, J, 2, generator=rng), roi[:, 1:])
    pose3d = torch.randn(count, J, 3, generator=rng) * 0.3
    seen = person[:, None].expand(-1, J).clone()
    return replace(Regions(roi, label, torch.ones(count), pose2d, pose3d, seen, seen.clone()), **fields)


def outputs(count: int = 3) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(2)
    logits, refined = torch.randn(count, K + 1, generator=rng), torch.randn(count, K, J, 5, generator=rng)
    return logits.requires_grad_(), refined.requires_grad_()


def losses(given: Regions, config: Head = CONFIG) -> tuple[dict[str, float], Tensor, Tensor]:
    """(losses, gradient of the logits, gradient of the refinements)."""
    logits, refined = outputs(len(given.label))
    out = predictor().loss(logits, refined, given, config)
    sum(out.values()).backward()  # type: ignore[union-attr]
    assert logits.grad is not None and refined.grad is not None
    return {k: float(v.detach()) for k, v in out.items()}, logits.grad, refined.grad


def test_loss_by_hand() -> None:
    """Cross entropy, the mean over regions; smooth L1 of the persons' true class: summed over coordinates, the mean
    over the joints seen, times J."""
    given = regions()
    given.seen2d[0, 2] = 0
    config = Head(beta2d=0.2, beta3d=0.3, class_weight=2, weight2d=3, weight3d=5)
    got, _, gradient = losses(given, config)
    logits, refined = (x.detach() for x in outputs())
    cross, sums, counts = 0.0, {"pose2d": 0.0, "pose3d": 0.0}, {"pose2d": 0, "pose3d": 0}
    for r, label in enumerate(given.label.tolist()):
        cross -= float(logits[r].log_softmax(0)[label]) / 3
        if label == 0:
            continue
        goal2d = into_box(given.pose2d[r], given.roi[r, 1:]) - torch.tensor(ANCHORS.pose2d[label - 1])
        goal3d = given.pose3d[r] - torch.tensor(ANCHORS.pose3d[label - 1])
        for name, at, goal, seen, beta in (
            ("pose2d", slice(0, 2), goal2d, given.seen2d[r], 0.2),
            ("pose3d", slice(2, 5), goal3d, given.seen3d[r], 0.3),
        ):
            d = (refined[r, label - 1, :, at] - goal).abs()
            each = torch.where(d < beta, d**2 / (2 * beta), d - beta / 2)
            sums[name] += float((each.sum(1) * seen).sum())
            counts[name] += int(seen.sum())
    assert counts == {"pose2d": 7, "pose3d": 8}
    expected = {"class": 2 * cross, "pose2d": 3 * J * sums["pose2d"] / 7, "pose3d": 5 * J * sums["pose3d"] / 8}
    assert got == pytest.approx(expected, rel=1e-5)
    others = torch.ones(3, K, dtype=torch.bool)
    others[torch.arange(2), given.label[:2] - 1] = False
    assert not gradient[others].any(), "only the true class is refined, and nothing of background"


def test_unlabelled_joints_take_no_part() -> None:
    seen = torch.ones(3, J)
    seen[0, 1] = seen[1, 3] = seen[2] = 0
    given = regions(seen2d=seen, seen3d=seen.clone())
    wild = regions(seen2d=seen, seen3d=seen.clone())
    for r, j in ((0, 1), (1, 3)):
        wild.pose2d[r, j], wild.pose3d[r, j] = 1e4, -1e4
    (before, _, gradient), (after, _, same) = losses(given), losses(wild)
    assert before == after and torch.equal(gradient, same)
    true = gradient[torch.arange(2), given.label[:2] - 1]
    assert not true[0, 1].any() and not true[1, 3].any() and true[0, [0, 2, 3]].all()


def test_missing_3d_takes_no_part() -> None:
    given, wild = regions(seen3d=torch.zeros(3, J)), regions(seen3d=torch.zeros(3, J))
    wild.pose3d[:] = 1e4
    (before, _, gradient), (after, _, _) = losses(given), losses(wild)
    assert before == after and before["pose3d"] == 0 < before["pose2d"]
    assert not gradient[..., 2:].any() and gradient[..., :2].any()


def test_trust_weighs() -> None:
    full, full_logits, full_refined = losses(regions())
    _, logits, refined = losses(regions(trust=torch.tensor([1, 0.25, 1])))
    torch.testing.assert_close(logits, full_logits * torch.tensor([[1], [0.25], [1]]))
    torch.testing.assert_close(refined, full_refined * torch.tensor([1, 0.25, 1]).view(3, 1, 1, 1))
    half, _, _ = losses(regions(trust=torch.full((3,), 0.5)))
    assert half == pytest.approx({k: v / 2 for k, v in full.items()})


@pytest.mark.parametrize("soft", [0, 0.1])
def test_refinement_equal_to_the_goal_is_the_pose(soft: float) -> None:
    """Decoding what the loss asks for gives the pose back exactly, and the loss is 0."""
    given = regions(4, label=torch.tensor([1, 2, 4, 3]), seen2d=torch.ones(4, J), seen3d=torch.ones(4, J))
    goal2d = into_box(given.pose2d, given.roi[:, 1:])[:, None] - torch.tensor(ANCHORS.pose2d)
    goal3d = given.pose3d[:, None] - torch.tensor(ANCHORS.pose3d)
    refined = torch.cat([goal2d, goal3d], -1)
    logits = torch.nn.functional.one_hot(given.label, K + 1) * 50.0
    out = predictor().loss(logits, refined, given, Head(soft=soft))
    assert all(float(v) < 1e-6 for v in out.values())
    found = predictor().decode(logits, refined, given.roi, 1, 0.5)[0]
    torch.testing.assert_close(found.pose2d, given.pose2d, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found.pose3d, given.pose3d, atol=1e-6, rtol=1e-5)
    assert (found.anchor + 1).tolist() == given.label.tolist() and torch.equal(found.box, given.roi[:, 1:])
    # and only the goal: one coordinate off shows
    refined[0, 0, 2, 4] += 0.1
    assert predictor().loss(logits, refined, given, Head(soft=soft))["pose3d"] > 1e-4


def test_soft_shares() -> None:
    """Rows of sum 1 that contain the true class; one pose between two, one alone, one without 3D."""
    middle, far = (BASE3D[0] + BASE3D[1]) / 2, 100 * BASE3D[1]
    pose3d = torch.tensor(np.stack([middle, far, middle]))
    given = regions(3, label=torch.tensor([1, 2, 4]), pose3d=pose3d, seen2d=torch.ones(3, J),
                    seen3d=torch.tensor([1.0, 1, 0])[:, None].expand(3, J))  # fmt: skip
    share = predictor()._shares(given, torch.arange(3), 0.05)
    torch.testing.assert_close(share.sum(1), torch.ones(3))
    assert (share[torch.arange(3), given.label - 1] > 0).all()
    torch.testing.assert_close(share[0], torch.full((K,), 1 / K))
    torch.testing.assert_close(share[1], torch.tensor([0, 0.5, 0, 0.5]))
    assert share[2].tolist() == [0, 0, 0, 1]
    assert torch.equal(predictor()._shares(given, torch.arange(3), 0), torch.eye(K)[given.label - 1])
    # by the formula, where one anchor pose is a little farther than the other
    given.pose3d[0] = torch.tensor(0.55 * BASE3D[0] + 0.45 * BASE3D[1])
    apart = 0.1 * np.linalg.norm(BASE3D[0] - BASE3D[1], axis=-1).mean()
    weight = np.exp(-apart / 0.05)
    row = predictor()._shares(given, torch.arange(3), 0.05)[0]
    torch.testing.assert_close(row, torch.tensor([1, weight, 1, weight], dtype=torch.float32) / (2 + 2 * weight))


def test_loss_of_background_alone() -> None:
    given = regions(label=torch.zeros(3, dtype=torch.int64), seen2d=torch.zeros(3, J), seen3d=torch.zeros(3, J))
    for config in (Head(), Head(soft=0.1)):
        got, _, gradient = losses(given, config)
        assert got["pose2d"] == got["pose3d"] == 0 < got["class"]
        assert not gradient.any()
    none = regions(1)
    empty = Regions(*(v[:0] for v in none.__dict__.values()))
    assert losses(empty)[0] == {"class": 0, "pose2d": 0, "pose3d": 0}


def test_decode() -> None:
    """(region, anchor pose) pairs above the floor, image by image; background is none of them."""
    logits = torch.tensor([[0.9, 0.05, 0.03, 0.01, 0.01], [0.1, 0.6, 0.3, 0, 0], [0.2, 0, 0, 0, 0.8]]).log()
    refined = torch.zeros(3, K, J, 5)
    refined[1, 1, :, 2] = 0.5
    roi = torch.cat([torch.tensor([[0.0], [2], [2]]), scattered(3)], 1)
    found = predictor().decode(logits, refined, roi, 3, 0.2)
    assert [len(f) for f in found] == [0, 0, 3]
    assert found[2].anchor.tolist() == [0, 1, 3]
    torch.testing.assert_close(found[2].score, torch.tensor([0.6, 0.3, 0.8]))
    torch.testing.assert_close(found[2].box, roi[[1, 1, 2], 1:])
    torch.testing.assert_close(found[2].pose3d[1], torch.tensor(BASE3D[1]) + torch.tensor([0.5, 0, 0]))
    torch.testing.assert_close(found[2].pose2d[2], out_of_box(torch.tensor(ANCHORS.pose2d[3]), roi[2, 1:]))
    assert [len(f) for f in predictor().decode(logits, refined, roi, 3, 0.02)] == [2, 0, 3]


def test_shared_regressor_adds_to_each() -> None:
    head, x = predictor(shared=True), torch.rand(2, 16)
    assert head.shared is not None
    before = head(x)[1]
    with torch.no_grad():
        head.shared.bias += 1
    torch.testing.assert_close(head(x)[1], before + 1)
    assert predictor().shared is None and before.shape == (2, K, J, 5)
