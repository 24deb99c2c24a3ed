"""The operators, their twins and torchvision's: values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchvision.ops as tv
from torch import Tensor

from lcrnet import ops

NMS = [ops.nms, ops.nms_twin]


def boxes(count: int, size: float = 40, seed: int = 0) -> Tensor:
    """Boxes that overlap, those at the end without area."""
    low, extent = torch.rand(2, count, 2, generator=torch.Generator().manual_seed(seed))
    extent[-2:] = 0
    return torch.cat([low * size, low * size + extent * size], 1)


@pytest.mark.parametrize("nms", NMS)
@pytest.mark.parametrize("threshold", [0, 0.3, 0.7, 1])
def test_nms(nms: Callable[..., Tensor], threshold: float) -> None:
    box, score = boxes(60), torch.rand(60, generator=torch.Generator().manual_seed(1))
    goal = tv.nms(box, score, threshold)
    assert torch.equal(nms(box, score, threshold), goal) and goal.dtype == torch.int64
    for most in (0, 1, 5, 1000):
        assert torch.equal(nms(box, score, threshold, max_keep=most), goal[:most])
    # non-contiguous
    assert torch.equal(nms(box.repeat(1, 2)[:, :4], score.repeat(2).view(2, -1).T[:, 0], threshold), goal)


@pytest.mark.parametrize("nms", NMS)
def test_nms_ties_and_order(nms: Callable[..., Tensor]) -> None:
    """Equal scores: the first of the input stays; touching boxes and an overlap equal to the threshold do not count."""
    box = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4], [4, 0, 8, 4], [0, 0, 4, 2], [0, 0, 4, 4]])
    score = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.9])
    assert nms(box, score, 0.5).tolist() == [4, 2, 3]
    assert nms(box[:4], score[:4], 0.5).tolist() == [0, 2, 3]
    assert nms(box, score, 0.49).tolist() == [4, 2]


@pytest.mark.parametrize("nms", NMS)
def test_nms_empty_and_half(nms: Callable[..., Tensor]) -> None:
    assert nms(torch.zeros(0, 4), torch.zeros(0), 0.5).shape == (0,)
    box = boxes(20).round()  # exact in bfloat16
    score = torch.arange(20.0)
    assert torch.equal(nms(box.bfloat16(), score.bfloat16(), 0.5), tv.nms(box, score, 0.5))


HEIGHT, WIDTH = 9, 12
REGIONS = torch.tensor([  # image, x1, y1, x2, y2
    [0, 2.3, 1.7, 8.9, 6.1],
    [1, 0, 0, 12, 9],
    [1, -3.2, -2.1, 4.4, 20.7],  # reaches outside
    [0, 40, 40, 50, 60],  # is outside
    [0, -30, -40, -20, -10],
    [1, 5.3, 5.3, 5.3, 5.3],  # no area
    [0, 8.2, 6.1, 3.6, 2.2],  # corners exchanged
    [1, 3.1, 3.2, 3.4, 3.3],
])  # fmt: skip


def features(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(2, 6, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(3)).to(dtype)


def same(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], image: Tensor, regions: Any) -> None:
    """Equal values and equal gradients of a random function of them."""
    mine, other = (image.detach().clone().requires_grad_() for _ in range(2))
    got, goal = ours(mine, regions), theirs(other, regions)
    torch.testing.assert_close(got, goal, atol=1e-5, rtol=1e-5)
    upstream = torch.rand(goal.shape, generator=torch.Generator().manual_seed(4))
    got.backward(upstream)
    goal.backward(upstream)
    torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ours", [ops.roi_align, ops.roi_align_twin])
@pytest.mark.parametrize("ratio", [2, 3, -1])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(("size", "scale"), [(3, 1.0), ((2, 5), 0.37)])
def test_roi_align(ours: Callable[..., Tensor], ratio: int, aligned: bool, size: Any, scale: float) -> None:
    options = {"output_size": size, "spatial_scale": scale, "sampling_ratio": ratio, "aligned": aligned}
    same(partial(ours, **options), partial(tv.roi_align, **options), features(), REGIONS)


@pytest.mark.parametrize("ours", [ops.roi_pool, ops.roi_pool_twin])
@pytest.mark.parametrize(("size", "scale"), [(3, 1.0), ((2, 5), 0.37)])
def test_roi_pool(ours: Callable[..., Tensor], size: Any, scale: float) -> None:
    options = {"output_size": size, "spatial_scale": scale}
    same(partial(ours, **options), partial(tv.roi_pool, **options), features(), REGIONS)


def test_roi_align_of_a_plane_is_the_plane() -> None:
    """Independently of torchvision: the mean of a linear function over a bin is its value in the bin's middle."""
    y, x = torch.meshgrid(torch.arange(20.0) + 0.5, torch.arange(20.0) + 0.5, indexing="ij")
    region = torch.tensor([[0, 8.0, 12, 24, 32]])
    got = ops.roi_align((x + 10 * y)[None, None], region, 4, 0.5, 2, aligned=True)[0, 0]
    at = torch.arange(4) + 0.5
    torch.testing.assert_close(got, (4 + 2 * at)[None] + 10 * (6 + 2.5 * at)[:, None])


@pytest.mark.parametrize("name", ["roi_align", "roi_pool"])
class TestBoth:
    """What holds for both ways to pool."""

    def call(self, name: str, image: Tensor, regions: Any, **more: Any) -> Tensor:
        out: Tensor = getattr(ops, name)(image, regions, 3, 1.0, *([2, True] if name == "roi_align" else []), **more)
        return out

    def test_memory_layouts(self, name: str) -> None:
        image = features()
        goal = self.call(name, image, REGIONS)
        torch.testing.assert_close(self.call(name, image.to(memory_format=torch.channels_last), REGIONS), goal)
        torch.testing.assert_close(self.call(name, image.repeat(1, 1, 1, 2)[..., :WIDTH], REGIONS), goal)
        torch.testing.assert_close(self.call(name, image, REGIONS.T.contiguous().T), goal)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_other_precisions(self, name: str, dtype: torch.dtype) -> None:
        image = features(dtype).requires_grad_()
        got = self.call(name, image, REGIONS)
        got.sum().backward()
        assert got.dtype == dtype and image.grad is not None and image.grad.dtype == dtype
        goal = self.call(name, features(), REGIONS).to(dtype)
        torch.testing.assert_close(got, goal, atol=1e-6 if dtype == torch.float64 else 2e-2, rtol=0)

    def test_list_of_boxes(self, name: str) -> None:
        each = [REGIONS[REGIONS[:, 0] == i, 1:] for i in range(2)]
        rows = torch.cat([REGIONS[REGIONS[:, 0] == i] for i in range(2)])
        assert torch.equal(ops.rois(each), rows)
        assert torch.equal(self.call(name, features(), each), self.call(name, features(), rows))
        assert torch.equal(self.call(name, features(), tuple(each)), self.call(name, features(), rows))
        half = [each[0], each[1][:0]]
        assert self.call(name, features(), half).shape == (len(each[0]), 6, 3, 3)

    @pytest.mark.parametrize("none", [torch.zeros(0, 5), [torch.zeros(0, 4)] * 2], ids=["rows", "list"])
    def test_no_regions(self, name: str, none: Any) -> None:
        """The result hangs on the input all the same: DDP waits for a gradient of every parameter."""
        image = features().requires_grad_()
        got = self.call(name, image, none)
        assert got.shape == (0, 6, 3, 3)
        got.sum().backward()
        assert image.grad is not None and not image.grad.any()


def test_large_maps_take_the_same_boxes() -> None:
    """Above MATMUL_CELLS torchvision's loop is the faster one; the result is the same."""
    image = torch.rand(1, 1, 70, 70, generator=torch.Generator().manual_seed(5))
    assert image[0, 0].numel() > ops.MATMUL_CELLS
    regions = torch.tensor([[0, 3.3, 4.4, 60.1, 50.2]])
    arguments = (image, regions, 7, 1.0, 2, True)
    torch.testing.assert_close(ops.roi_align(*arguments), ops.roi_align_twin(*arguments))
