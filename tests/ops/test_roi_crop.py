"""RoICrop against grid_sample and max_pool2d, in every implementation: values, gradients, and the edges of both."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lcrnet import ops

HEIGHT, WIDTH = 9, 12
REGIONS = torch.tensor([  # image, x1, y1, x2, y2
    [0, 2.3, 1.7, 8.9, 6.1],
    [1, 0, 0, 11, 8],  # the whole map
    [1, -3.2, -2.1, 4.4, 20.7],  # reaches outside
    [0, 40, 40, 50, 60],  # is outside
    [0, -30, -40, -20, -10],
    [1, 5.3, 5.3, 5.3, 5.3],  # no area
    [0, 8.2, 6.1, 3.6, 2.2],  # corners exchanged: the crop is turned over
    [1, 3.1, 3.2, 3.4, 3.3],
    [0, -0.7, -0.6, 0.3, 0.2],  # the border fades to zero
    [0, 10.6, 7.7, 11.8, 8.9],
])  # fmt: skip
STRANGE = torch.tensor([
    [0, torch.nan, 1, 2, 3],
    [1, 1, 1, torch.inf, 3],
    [0, -torch.inf, -torch.inf, torch.inf, torch.inf],
    [0, -3e38, 0, 3e38, 4],  # the extent is not finite
    [2, 1, 1, 5, 5],  # no such image
    [-1, 1, 1, 5, 5],
    [torch.nan, 1, 1, 5, 5],
])  # fmt: skip


def features(*shape: int, dtype: torch.dtype = torch.float32, last: bool = False, seed: int = 3) -> Tensor:
    x = torch.randn(shape or (2, 6, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.to(memory_format=torch.channels_last) if last else x


def peer(map: Tensor, regions: Tensor, size: Any, scale: float, max_pool: bool) -> Tensor:
    """Sampling and pooling as PyTorch has them, in double; for maps of more than one row and column."""
    height, width = (size, size) if isinstance(size, int) else size
    points, regions, grids = 2 if max_pool else 1, regions.double(), []
    for low, high, cells, count in (
        (regions[:, 1], regions[:, 3], map.shape[3], width * points),
        (regions[:, 2], regions[:, 4], map.shape[2], height * points),
    ):
        theta = torch.stack([(high - low) / (cells - 1), (low + high) / (cells - 1) - 1 / scale], 1) * scale
        at = torch.linspace(-1, 1, count, dtype=torch.float64) if count > 1 else torch.zeros(1, dtype=torch.float64)
        grids.append(theta[:, :1] * at + theta[:, 1:])
    grid = torch.stack(
        [grids[0][:, None].expand(-1, height * points, -1), grids[1][:, :, None].expand(-1, -1, width * points)], 3
    )
    image = regions[:, 0].long()
    out = F.grid_sample(map.double()[image], grid, align_corners=True, padding_mode="zeros")
    return F.max_pool2d(out, 2, 2) if max_pool and len(out) else out[..., :height, :width]


def same(
    backend: SimpleNamespace, map: Tensor, regions: Tensor, size: Any, scale: float, max_pool: bool, tolerance: float
) -> None:
    """Equal values and equal gradients of a random function of them."""
    mine, other = map.detach().to(backend.device).requires_grad_(), map.detach().clone().requires_grad_()
    got = ops.roi_crop(mine, regions.to(backend.device), size, scale, max_pool)
    goal = peer(other, regions, size, scale, max_pool)
    torch.testing.assert_close(got.cpu(), goal.to(map.dtype), atol=tolerance, rtol=tolerance)
    upstream = torch.rand(goal.shape, generator=torch.Generator().manual_seed(4)).to(map.dtype)
    got.backward(upstream.to(backend.device))
    goal.backward(upstream.double())
    assert mine.grad is not None and other.grad is not None
    torch.testing.assert_close(mine.grad.cpu(), other.grad, atol=4 * tolerance, rtol=tolerance)


@pytest.mark.parametrize("max_pool", [False, True])
@pytest.mark.parametrize(("size", "scale", "last"), [(3, 1.0, False), ((2, 5), 0.37, True), ((1, 17), 1.0, False)])
def test_as_grid_sample(backend: SimpleNamespace, size: Any, scale: float, last: bool, max_pool: bool) -> None:
    same(backend, features(last=last), REGIONS, size, scale, max_pool, 2e-5)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 3), st.sampled_from([1, 3, 16, 21, 70]), st.integers(2, 11), st.integers(2, 19)),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    max_pool=st.booleans(),
    last=st.booleans(),
    seed=st.integers(0, 1000),
    count=st.integers(0, 5),
)
def test_many_shapes(
    backend: SimpleNamespace, shape: tuple[int, ...], size: tuple[int, int], max_pool: bool, last: bool, seed: int,
    count: int,
) -> None:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    boxes = (torch.randn(count, 4, generator=g) * 48 + 16).round() / 4
    regions = torch.cat([torch.randint(shape[0], (count, 1), generator=g), boxes], 1).double()
    same(backend, features(*shape, last=last, seed=seed, dtype=torch.float64), regions, size, 0.3, max_pool, 1e-9)


def test_of_a_plane_is_the_plane(backend: SimpleNamespace) -> None:
    """Independently of PyTorch: points of a linear function, corners included; the middle of one; the greatest."""
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(20.0), indexing="ij")
    map, region = (x + 10 * y)[None, None].to(backend.device), torch.tensor([[0, 8.0, 12, 26, 36]]).to(backend.device)
    row, column = 6 + torch.arange(5) * 3, 4 + torch.arange(4) * 3
    torch.testing.assert_close(
        ops.roi_crop(map, region, (5, 4), 0.5)[0, 0].cpu(), 10 * row[:, None] + column[None] + 0.0
    )
    torch.testing.assert_close(ops.roi_crop(map, region, (5, 1), 0.5)[0, 0].cpu(), 10 * row[:, None] + 8.5)
    pooled = ops.roi_crop(map, region, (1, 2), 0.5, max_pool=True)[0, 0].cpu()
    torch.testing.assert_close(pooled, 180 + column[None, 1::2] + 0.0)


@pytest.mark.parametrize("last", [False, True])
def test_one_cell(backend: SimpleNamespace, last: bool) -> None:
    """A hat of one cell: what grid_sample cannot say with align_corners."""
    map = torch.full((1, 2, 1, 1), 8.0, device=backend.device)
    map = map.to(memory_format=torch.channels_last) if last else map
    got = ops.roi_crop(map, torch.tensor([[0, -1.5, -0.25, 1.5, 0.25]], device=backend.device), (1, 7))
    hat = torch.tensor([0, 0, 4, 8, 4, 0, 0.0], device=backend.device)
    torch.testing.assert_close(got, hat.expand(1, 2, 1, 7))


@pytest.mark.parametrize("max_pool", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_strange_regions_give_zeros(backend: SimpleNamespace, last: bool, max_pool: bool) -> None:
    map = features(last=last).to(backend.device).requires_grad_()
    got = ops.roi_crop(map, torch.cat([STRANGE, REGIONS[:1], STRANGE]).to(backend.device), 3, 1.0, max_pool)
    n = len(STRANGE)
    assert not got[:n].any() and not got[n + 1 :].any() and got[n].all()
    (gradient,) = torch.autograd.grad(got.sum(), map)
    (alone,) = torch.autograd.grad(ops.roi_crop(map, REGIONS[:1].to(backend.device), 3, 1.0, max_pool).sum(), map)
    assert torch.equal(gradient, alone)


@pytest.mark.parametrize("max_pool", [False, True])
def test_vast_regions(backend: SimpleNamespace, max_pool: bool) -> None:
    """Points are too far apart to meet the map, but for the middle one of an odd number; pooling has an even one."""
    map = features().to(backend.device)
    for far in (1e5, 1e9, 1e30):
        regions = torch.tensor([[0, -far, -far, far, far]], device=backend.device)
        got = ops.roi_crop(map, regions, 3, 1.0, max_pool)
        assert not got.flatten(2)[..., [0, 1, 2, 3, 5, 6, 7, 8]].any()
        torch.testing.assert_close(got[0, :, 1, 1], torch.zeros_like(map[0, :, 0, 0]) if max_pool else map[0, :, 0, 0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("last", [False, True])
def test_what_is_not_finite_stays_where_it_is(backend: SimpleNamespace, value: float, last: bool) -> None:
    """Cells without weight are not read; the maximum of four points with a NaN is NaN, and the gradient goes there."""
    map = features(1, 2, 5, 6)
    map[:, :, 2, 3] = value
    map = (map.to(memory_format=torch.channels_last) if last else map).to(backend.device).requires_grad_()
    region = torch.tensor([[0.0, 1, 1, 4, 4]], device=backend.device)
    got = ops.roi_crop(map, region, 4)
    expected = map[:, :, 1:5, 1:5]
    torch.testing.assert_close(got, expected, equal_nan=True)
    pooled = ops.roi_crop(map, region, 2, max_pool=True)
    torch.testing.assert_close(pooled, F.max_pool2d(expected, 2, 2), equal_nan=True)
    goal, gradient = (torch.autograd.grad(x.sum(), map)[0] for x in (F.max_pool2d(expected, 2, 2), pooled))
    torch.testing.assert_close(gradient, goal)


@pytest.mark.parametrize("last", [False, True])
def test_of_equal_points_the_first(backend: SimpleNamespace, last: bool) -> None:
    """Points on cells, whose numbers a ReLU made equal: as max_pool2d."""
    map = (features(2, 21, 6, 7, last=last) * 2).round().relu().to(backend.device).requires_grad_()
    regions = torch.tensor([[0.0, 1, 1, 4, 4], [1, 0, 2, 3, 5]], device=backend.device)
    got = ops.roi_crop(map, regions, 2, max_pool=True)
    goal = F.max_pool2d(torch.stack([map[0, :, 1:5, 1:5], map[1, :, 2:6, :4]]), 2, 2)
    assert torch.equal(got, goal)
    weight = torch.rand(goal.shape, generator=torch.Generator().manual_seed(0)).to(backend.device)
    mine, other = (torch.autograd.grad((x * weight).sum(), map)[0] for x in (got, goal))
    torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("max_pool", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(backend: SimpleNamespace, dtype: torch.dtype, last: bool, max_pool: bool) -> None:
    """Computed in float32 and rounded once, with the regions in float32."""
    map = features(2, 21, HEIGHT, WIDTH, dtype=dtype, last=last)
    mine, exact = map.detach().to(backend.device).requires_grad_(), map.detach().float().requires_grad_()
    got = ops.roi_crop(mine, REGIONS.to(backend.device), 3, 0.7, max_pool)
    goal = peer(exact, REGIONS, 3, 0.7, max_pool)
    got.sum().backward()
    goal.sum().backward()
    assert got.dtype == dtype and mine.grad is not None and exact.grad is not None and mine.grad.dtype == dtype
    epsilon = torch.finfo(dtype).eps
    for a, b in ((got, goal), (mine.grad, exact.grad)):
        torch.testing.assert_close(
            a.detach().cpu().double(), b.double(), atol=max(epsilon, 2e-6) / 4, rtol=max(epsilon, 2e-6)
        )


@pytest.mark.parametrize("max_pool", [False, True])
def test_memory(backend: SimpleNamespace, max_pool: bool) -> None:
    """The result lies in memory as the map does; map, regions and gradient need not be contiguous."""
    map, regions = features().to(backend.device), REGIONS.to(backend.device)
    goal = ops.roi_crop(map, regions, 3, 1.0, max_pool)
    last = ops.roi_crop(map.to(memory_format=torch.channels_last), regions, 3, 1.0, max_pool)
    if backend.name != "twin":
        assert goal.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, goal)
    torch.testing.assert_close(ops.roi_crop(map.repeat(1, 1, 1, 2)[..., :WIDTH], regions, 3, 1.0, max_pool), goal)
    torch.testing.assert_close(ops.roi_crop(map, regions.T.contiguous().T, 3, 1.0, max_pool), goal)
    some = map.to(memory_format=torch.channels_last)[:, 1:4].requires_grad_()
    part = ops.roi_crop(some, regions, 3, 1.0, max_pool)
    torch.testing.assert_close(part, goal[:, 1:4])
    ones = torch.ones(1, device=backend.device)
    spread, full = (
        torch.autograd.grad(ops.roi_crop(some, regions, 3, 1.0, max_pool), some, g)[0]
        for g in (ones.expand(part.shape), ones + 0 * part)
    )
    assert torch.equal(spread, full)


def test_list_of_boxes(backend: SimpleNamespace) -> None:
    map = features().to(backend.device)
    each = [REGIONS[REGIONS[:, 0] == i, 1:].to(backend.device) for i in range(2)]
    rows = torch.cat([REGIONS[REGIONS[:, 0] == i] for i in range(2)]).to(backend.device)
    assert torch.equal(ops.roi_crop(map, each, 3), ops.roi_crop(map, rows, 3))


@pytest.mark.parametrize("shape", [(2, 6, 5, 4), (0, 6, 5, 4), (2, 0, 5, 4), (2, 6, 0, 4)])
@pytest.mark.parametrize("max_pool", [False, True])
@pytest.mark.parametrize("count", [0, 2])
def test_nothing(backend: SimpleNamespace, shape: tuple[int, ...], max_pool: bool, count: int) -> None:
    """The result hangs on the map all the same: DDP waits for a gradient of every parameter."""
    map = features(*shape).to(backend.device).requires_grad_()
    regions = torch.tensor([[0.0, 90, 90, 99, 99]] * count, device=backend.device).view(count, 5)
    got = ops.roi_crop(map, regions, 3, 1.0, max_pool)
    assert got.shape == (count, shape[1], 3, 3) and not got.any()
    got.sum().backward()
    assert map.grad is not None and not map.grad.any()


@pytest.mark.parametrize("max_pool", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_gradcheck(backend: SimpleNamespace, last: bool, max_pool: bool) -> None:
    map = features(2, 3, 4, 5, dtype=torch.float64, last=last).to(backend.device).requires_grad_()
    regions = REGIONS.to(backend.device).double()
    assert torch.autograd.gradcheck(
        lambda x: ops.roi_crop(x, regions, (2, 3), 0.6, max_pool), map, fast_mode=backend.name == "emulated"
    )


@pytest.mark.parametrize("max_pool", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_many_regions_and_tiles(backend: SimpleNamespace, last: bool, max_pool: bool) -> None:
    """More regions than a CUDA block looks at in one go, on several of its tiles; the same bits on every run."""
    g = torch.Generator().manual_seed(0)
    corner = torch.rand(140, 2, generator=g) * torch.tensor([148, 40])
    boxes = torch.cat([corner, corner + torch.randn(140, 2, generator=g) * 60], 1)
    regions = torch.cat([torch.randint(2, (140, 1), generator=g), boxes], 1).double()
    map = features(2, 5, 11, 37, last=last, dtype=torch.float64)
    same(backend, map, regions, 2, 0.25, max_pool, 1e-9)
    runs = []
    for _ in range(2):
        x = map.detach().to(backend.device).requires_grad_()
        out = ops.roi_crop(x, regions.to(backend.device), 2, 0.25, max_pool)
        runs.append(torch.autograd.grad((out * out).sum(), x)[0])
    assert torch.equal(*runs) or backend.name == "twin"


def test_same_on_any_number_of_threads() -> None:
    map = features(2, 130, 20, 30)
    regions = torch.cat([torch.randint(2, (40, 1)), torch.rand(40, 2) * 10, 10 + torch.rand(40, 2) * 20], 1)
    assert ops.use_ext("cpu")
    for last in (False, True):
        results = []
        for threads in (1, 2, 3):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                x = map.to(memory_format=torch.channels_last if last else torch.contiguous_format).requires_grad_()
                out = ops.roi_crop(x, regions, 7, max_pool=True)
                results.append((out.detach(), torch.autograd.grad((out * out).sum(), x)[0]))
            finally:
                torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_pytorch_takes_it_as_its_own() -> None:
    """Schema, fake kernel and gradient fit (opcheck); torch.compile and torch.export pass through; so does autocast."""
    assert ops.use_ext("cpu")
    regions, operators = REGIONS, torch.ops.lcrnet
    for last in (False, True):
        map = features(last=last).requires_grad_()
        torch.library.opcheck(operators.roi_crop.default, (map, regions, 0.5, 3, 4, last))
        grad = operators.roi_crop(map, regions, 0.5, 3, 4, last).detach()
        torch.library.opcheck(operators.roi_crop_backward.default, (grad, map.detach(), regions, 0.5, last))

    class Crop(torch.nn.Module):
        def forward(self, map: Tensor, regions: Tensor) -> Tensor:
            return ops.roi_crop(map, regions, 3, 0.5, max_pool=True).relu()

    goal = Crop()(map, regions)
    got = torch.compile(Crop(), fullgraph=True, backend="aot_eager")(map, regions)
    torch.testing.assert_close(got, goal)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), map), torch.autograd.grad(goal.sum(), map))
    regions_many = {"map": None, "regions": {0: torch.export.Dim("R", min=2)}}
    exported = torch.export.export(Crop(), (map.detach(), regions), dynamic_shapes=regions_many)
    torch.testing.assert_close(exported.module()(map, regions[:5]), goal[:5])
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.roi_crop(map, regions, 3).dtype == torch.float32
        assert ops.roi_crop(map.bfloat16(), regions, 3).dtype == torch.bfloat16


def test_wrong_arguments_are_named(backend: SimpleNamespace) -> None:
    if backend.name == "twin":
        pytest.skip("the twin leaves it to PyTorch")
    map, regions = features().to(backend.device), torch.zeros(3, 5, device=backend.device)
    with pytest.raises(RuntimeError, match=r"\(R, 5\)"):
        ops.roi_crop(map, regions[:, :4], 3)
    with pytest.raises(RuntimeError, match=r"\(B, C, H, W\)"):
        ops.roi_crop(map[0], regions, 3)
    with pytest.raises(RuntimeError, match="output_size"):
        ops.roi_crop(map, regions, 0)
