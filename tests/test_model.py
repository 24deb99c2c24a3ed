"""The whole network: losses and gradients, detection in pixels of the image, any number of anchor poses and joints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lcrnet import backbone, config, image, ppi, synthetic, weights
from lcrnet.anchors import AnchorPoses
from lcrnet.config import Config
from lcrnet.model import LCRNet, build
from lcrnet.pose import People, PoseProposals, centre
from lcrnet.skeleton import COCO17


@pytest.fixture(scope="module")
def net(model_folder: Path) -> LCRNet:
    return weights.load(model_folder)


def changed(settings: Config, **fields: object) -> Config:
    """A configuration with other fields; `section__field=value`."""
    values = settings.model_dump()
    for name, value in fields.items():
        section, _, field = name.partition("__")
        values[section][field] = value
    return config.from_dict(values)


def shots(count: int = 2, size: int = 64) -> tuple[torch.Tensor, torch.Tensor, list[People]]:
    """Drawings with somebody in them as a batch of the network."""
    drawn = [synthetic.draw(seed, size, 75) for seed in range(20)]
    drawn = [d for d in drawn if len(d[1])][:count]
    pixels, sizes = image.stack([d[0] for d in drawn], 16)
    return pixels, sizes, [d[1].tensors() for d in drawn]


def by_hand(k: int) -> AnchorPoses:
    """Anchor poses of another skeleton, in odd number."""
    rng = np.random.default_rng(0)
    pose3d = centre(rng.normal(0, 0.3, (k, len(COCO17), 3)), COCO17).astype(np.float32)
    return AnchorPoses(rng.random((k, len(COCO17), 2)).astype(np.float32), pose3d, np.zeros(k, bool), COCO17)


def in_coco17(people: People, joints: int = 17) -> People:
    out = People.empty(len(people), joints).tensors()
    rng = torch.Generator().manual_seed(0)
    out.box, out.seen[:], out.has3d[:] = people.box, 2, True
    out.pose2d = people.box[:, None, :2] + torch.rand(len(people), joints, 2, generator=rng) * 30
    out.pose3d = torch.rand(len(people), joints, 3, generator=rng)
    return out


def check_gradients(net: LCRNet, losses: dict[str, torch.Tensor]) -> None:
    assert sorted(losses) == ["class", "pose2d", "pose3d", "rpn_box", "rpn_class"]
    assert all(value.shape == () and value.isfinite() for value in losses.values())
    sum(losses.values()).backward()  # type: ignore[union-attr]
    for name, parameter in net.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    for layer in (net.predictor.classes, net.predictor.refine, net.rpn.objectness, net.rpn.offsets):
        assert layer.weight.grad is not None and layer.weight.grad.any()


def test_losses_and_gradients(net: LCRNet) -> None:
    pixels, sizes, people = shots()
    net = build(net.config, net.anchors)
    losses = net(pixels, sizes, people)
    assert isinstance(losses, dict) and all(value > 0 for value in losses.values())
    check_gradients(net, losses)


def test_losses_of_a_resnet(tiny: Config, net: LCRNet) -> None:
    """Also in bfloat16, and with one regressor for all anchor poses beside those of each."""
    resnet = {"model__backbone": "resnet18", "model__norm": "frozen_bn", "model__freeze": 2}
    other = build(changed(tiny, **resnet, model__shared_regressor=True), net.anchors)
    with torch.autocast("cpu", torch.bfloat16):
        losses = other(*shots(1))
    check_gradients(other, losses)


@pytest.mark.parametrize("half", [False, True])
def test_projecting_changes_rounding_only(
    tiny: Config, net: LCRNet, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and gradients of a ResNet-50 whose head runs its first convolutions before pooling, or after."""
    torch.manual_seed(0)
    resnet = {"model__backbone": "resnet50", "model__norm": "frozen_bn", "model__freeze": 2, "model__roi_size": 7}
    other = build(changed(tiny, **resnet), net.anchors)
    for name, module in other.named_modules():
        if name.endswith("bn3"):
            module.weight.fill_(0.2)  # type: ignore[operator, union-attr]
    gradients, called = [], []
    for projects in (True, False):
        monkeypatch.setattr(backbone.Res5Head, "projects", lambda *_, p=projects: called.append(p) or p)
        other.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses = other(*shots(1))
        sum(losses.values()).backward()
        gradients.append([*losses.values(), *(p.grad for p in other.parameters() if p.grad is not None)])
    assert called == [True, False]
    for one, goal in zip(*gradients, strict=True):
        apart = (one - goal).detach().norm() / goal.detach().norm().clamp(min=1e-12)
        assert apart < (0.1 if half else 1e-3)  # rounding decides whether activations near 0 pass a gradient
    if not half:
        assert all(abs(one / goal - 1) < 1e-5 for one, goal in zip(gradients[0][:5], gradients[1][:5], strict=True))


def test_nobody_and_nothing_to_look_at(tiny: Config, net: LCRNet) -> None:
    """No person, no proposal: DDP waits for a gradient of every parameter all the same."""
    other = build(changed(tiny, rpn__min_size=1000), net.anchors)
    pixels, sizes, people = shots()
    losses = other(pixels, sizes, [p[:0] for p in people])
    assert losses["pose2d"] == losses["class"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in other.parameters())
    assert other.eval().detect(np.zeros((64, 64, 3), np.uint8)) == []


def test_k_and_j_are_those_of_the_anchor_poses(tiny: Config) -> None:
    torch.manual_seed(0)
    net = build(tiny, by_hand(3))
    assert net.predictor.classes.out_features == 4 and net.predictor.refine.out_features == 3 * 17 * 5
    assert net.skeleton is COCO17
    pixels, sizes, people = shots()
    check_gradients(net, net(pixels, sizes, [in_coco17(p) for p in people]))
    picture = pixels[0].permute(1, 2, 0).numpy()
    found = net.eval().propose([picture])[0]
    assert len(found) and found.pose2d.shape[1:] == (17, 2) and found.pose3d.shape[1:] == (17, 3)
    assert set(found.anchor.tolist()) <= {0, 1, 2}
    people_found = net.detect(picture)
    assert people_found and people_found[0].pose3d.shape == (17, 3)


def picture(seed: int = 1, size: int = 64) -> np.ndarray:
    return synthetic.draw(seed, size, 75)[0]


def close(a: PoseProposals, b: PoseProposals, scale: float = 1) -> None:
    """The same proposals, but for rounding: of two whose scores differ by nothing else either may come first."""
    assert len(a) == len(b) > 0
    apart = np.abs(a.box[:, None] * scale - b.box).max(-1) + 1e6 * (a.anchor[:, None] != b.anchor)
    order = apart.argmin(1)
    assert sorted(order) == list(range(len(a))) and apart.min(1).max() < 1e-2
    np.testing.assert_allclose(a.score, b.score[order], atol=1e-5)
    np.testing.assert_allclose(a.pose2d * scale, b.pose2d[order], atol=1e-2)
    np.testing.assert_allclose(a.pose3d, b.pose3d[order], atol=1e-4)


def test_detection_is_in_pixels_of_the_image(net: LCRNet) -> None:
    """The same picture with more pixels: the network gets the same 64 x 64, the people are at twice the coordinates."""
    small, large = (picture().repeat(n, 0).repeat(n, 1) for n in (2, 4))
    of_small, of_large = net.propose([small, large])
    close(of_small, of_large, 2)
    assert of_large.box.max() > 128
    doubled = replace(of_small, box=2 * of_small.box, pose2d=2 * of_small.pose2d)
    goal = ppi.integrate(doubled, (256, 256), net.config.ppi, net.skeleton, net.anchors.upper_only)
    found = net.detect(large)
    assert len(found) == len(goal) > 0
    for a, b in zip(found, goal, strict=True):
        np.testing.assert_allclose(a.pose2d, b.pose2d, atol=1e-2)
        np.testing.assert_allclose(a.pose3d, b.pose3d, atol=1e-4)
        assert (a.box >= 0).all() and (a.box <= 256).all()


def test_a_batch_is_its_images(net: LCRNet) -> None:
    """Whatever their sizes and order. Not bitwise: a convolution of four images sums in another order than one."""
    wide = np.ascontiguousarray(picture(3, 128)[:70])
    given = [picture(1), picture(2, 128), wide, picture(4, 96), np.ascontiguousarray(wide[:, ::-1])]
    for one, together in zip(given, net.propose(given), strict=True):
        close(net.propose([one])[0], together)
    assert [len(p) for p in net.detect_batch(given)] == [len(net.detect(one)) for one in given]


def test_padding_is_not_looked_at(net: LCRNet) -> None:
    """What stands in the padding, and that it is there, is nothing to proposals: they end at the image."""
    pixels, sizes, _ = shots(1)
    sizes = torch.tensor([[40, 50]])
    other = pixels.clone()
    other[:, :, 40:], other[..., 50:] = 255, 77
    with torch.no_grad():
        found, again = net(pixels, sizes)[0], net(other, sizes)[0]
    assert torch.equal(found.pose2d, again.pose2d) and torch.equal(found.score, again.score)
    assert (found.box <= torch.tensor([50, 40, 50, 40])).all()


def test_passes(net: LCRNet) -> None:
    """The second pass adds proposals, in boxes round the likely poses of the first; it takes none away."""
    net = build(net.config, net.anchors).eval()
    with torch.no_grad():
        net.predictor.classes.bias[2] = 3  # an untrained network is sure of nothing
        net.predictor.refine.bias.view(-1, 13, 5)[:, 0, :2] = 3  # and sees nobody reach out of the image
    once = net.propose([picture()])[0]
    net.config = changed(net.config, head__passes=2)
    twice = net.propose([picture()])[0]
    assert len(twice) > len(once) and np.isfinite(twice.pose2d).all()
    close(once, PoseProposals(*(v[: len(once)] for v in twice.__dict__.values())))
    new = twice.box[len(once) :]
    assert (new >= 0).all() and (new <= 64).all() and not np.isin(new[:, 0], once.box[:, 0]).all()
    net.config = changed(net.config, head__passes=3, head__score_floor=1)
    assert len(net.propose([picture()])[0]) == 0


def test_bad_images(net: LCRNet) -> None:
    assert net.detect_batch([]) == [] and net.propose([]) == []
    good = picture()
    for bad in (good.astype(np.float32), good[..., 0], good.transpose(2, 0, 1), np.zeros((5, 5, 4), np.uint8)):
        with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8 RGB, not "):
            net.detect_batch([good, bad])


def test_odd_images(net: LCRNet) -> None:
    """A single pixel, a line, a plain colour."""
    for shape in ((1, 1, 3), (1, 300, 3), (200, 2, 3), (64, 64, 3)):
        for person in net.detect(np.full(shape, 128, np.uint8)):
            assert np.isfinite(person.pose2d).all() and np.isfinite(person.pose3d).all()


def test_detection_leaves_no_trace(net: LCRNet) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    first = net.detect(picture())
    second = net.detect(picture())
    assert all(np.array_equal(a.pose3d, b.pose3d) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
