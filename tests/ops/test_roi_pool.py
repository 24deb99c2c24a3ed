"""RoIPool against torchvision's, in every implementation: values, gradients, and what torchvision lacks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision.ops as tv
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lcrnet import ops

HEIGHT, WIDTH = 9, 12
LEAST = torch.finfo(torch.float32).min
REGIONS = torch.tensor([  # image, x1, y1, x2, y2
    [0, 2.3, 1.7, 8.9, 6.1],
    [1, 0, 0, 12, 9],
    [1, -3.2, -2.1, 4.4, 20.7],  # reaches outside
    [0, 40, 40, 50, 60],  # is outside
    [0, -30, -40, -20, -10],
    [1, 5.3, 5.3, 5.3, 5.3],  # no area
    [0, 8.2, 6.1, 3.6, 2.2],  # corners exchanged
    [1, 3.1, 3.2, 3.4, 3.3],
    [0, -2.5, -0.5, 2.5, 3.5],  # halves: away from zero, on both sides of it
])  # fmt: skip
STRANGE = torch.tensor([
    [0, torch.nan, 1, 2, 3],
    [1, 1, 1, torch.inf, 3],
    [0, -torch.inf, -torch.inf, torch.inf, torch.inf],
    [2, 1, 1, 5, 5],  # no such image
    [-1, 1, 1, 5, 5],
    [torch.nan, 1, 1, 5, 5],
])  # fmt: skip


def features(*shape: int, dtype: torch.dtype = torch.float32, last: bool = False, seed: int = 3) -> Tensor:
    x = torch.rand(shape or (2, 6, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.to(memory_format=torch.channels_last) if last else x


def same(backend: SimpleNamespace, map: Tensor, regions: Any, size: Any, scale: float, tolerance: float = 1e-6) -> None:
    """Equal values, to the bit, and equal gradients of a random function of them."""
    mine = map.detach().to(backend.device).requires_grad_()
    other = map.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    got, goal = ops.roi_pool(mine, regions.to(backend.device), size, scale), tv.roi_pool(other, regions, size, scale)
    assert torch.equal(got.cpu(), goal)
    upstream = torch.rand(goal.shape, generator=torch.Generator().manual_seed(4)).to(goal)
    got.backward(upstream.to(backend.device))
    goal.backward(upstream)
    assert mine.grad is not None
    torch.testing.assert_close(mine.grad.cpu(), other.grad, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("size", "scale", "last"), [(3, 1.0, False), ((2, 5), 0.37, True), ((17, 1), 1.0, False)])
def test_as_torchvision(backend: SimpleNamespace, size: Any, scale: float, last: bool) -> None:
    same(backend, features(last=last), REGIONS, size, scale)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 3), st.sampled_from([1, 3, 16, 21, 70]), st.integers(1, 11), st.integers(1, 19)),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    scale=st.sampled_from([1.0, 0.5, 0.3]),
    ties=st.booleans(),
    last=st.booleans(),
    seed=st.integers(0, 1000),
    count=st.integers(0, 5),
)
def test_many_shapes(
    backend: SimpleNamespace, shape: tuple[int, ...], size: tuple[int, int], scale: float, ties: bool, last: bool,
    seed: int, count: int,
) -> None:  # fmt: skip
    """Boxes in steps of a quarter, whose halves must be rounded as torchvision does; few values: many are equal."""
    g = torch.Generator().manual_seed(seed)
    boxes = (torch.randn(count, 4, generator=g) * 48 + 16).round() / 4
    map = features(*shape, last=last, seed=seed)
    same(
        backend,
        (map * 3).round().relu() - 1 if ties else map,
        torch.cat([torch.randint(shape[0], (count, 1), generator=g), boxes], 1),
        size,
        scale,
        tolerance=1e-5,
    )


@pytest.mark.parametrize("last", [False, True])
def test_strange_regions_give_zeros(backend: SimpleNamespace, last: bool) -> None:
    map = features(last=last).to(backend.device).requires_grad_()
    got = ops.roi_pool(map, torch.cat([STRANGE, REGIONS[:1], STRANGE]).to(backend.device), 3)
    n = len(STRANGE)
    assert not got[:n].any() and not got[n + 1 :].any() and got[n].all()
    (gradient,) = torch.autograd.grad(got.sum(), map)
    (alone,) = torch.autograd.grad(ops.roi_pool(map, REGIONS[:1].to(backend.device), 3).sum(), map)
    assert torch.equal(gradient, alone)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("far", [1e5, 1e9, 1e15, 1e37])
def test_vast_regions(backend: SimpleNamespace, far: float, last: bool) -> None:
    """The whole map lies in the bins about the middle; nothing overflows, nothing takes longer."""
    map = features(last=last).to(backend.device)
    regions = torch.tensor([[0, -far, -far, far, far], [0, -far, -far, -far / 2, far], [1, 0, 0, far, far]])
    got = ops.roi_pool(map, regions.to(backend.device), (1, 3))
    most = map.amax((2, 3))
    assert torch.equal(got[0, :, 0, 1], most[0]) and torch.equal(got[2, :, 0, 0], most[1])
    assert not got[0, :, 0, ::2].any() and not got[1].any() and not got[2, :, 0, 1:].any()


@pytest.mark.parametrize("last", [False, True])
def test_nan_is_never_the_maximum(backend: SimpleNamespace, last: bool) -> None:
    """Nor is -inf: a bin of nothing else gives the least float32 and no gradient, as torchvision's does."""
    map = features(1, 2, 4, 5)
    map[0, 0, 1, 1:4], map[0, 1, 2:], map[0, 1, :2, :2] = torch.nan, torch.nan, -torch.inf
    map[0, 0, 3, 3], map[0, 0, 3, 4] = torch.inf, LEAST
    map = map.to(memory_format=torch.channels_last) if last else map
    regions = torch.tensor([[0.0, 0, 0, 4, 3], [0, 1, 1, 3, 1], [0, 0, 2, 4, 3], [0, 0, 0, 1, 1], [0, 4, 3, 4, 3]])
    same(backend, map, regions, 2, 1.0)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(backend: SimpleNamespace, dtype: torch.dtype, last: bool) -> None:
    """The maxima of the numbers as they are, with the regions in float32; gradients rounded once."""
    map = features(2, 21, HEIGHT, WIDTH, dtype=dtype, last=last)
    mine = map.detach().to(backend.device).requires_grad_()
    got = ops.roi_pool(mine, REGIONS.to(backend.device), 3, 0.7)
    exact = map.detach().float().requires_grad_()
    goal = tv.roi_pool(exact, REGIONS, 3, 0.7)
    assert got.dtype == dtype and torch.equal(got.detach().cpu(), goal.to(dtype))
    got.sum().backward()
    goal.sum().backward()
    assert mine.grad is not None and exact.grad is not None and mine.grad.dtype == dtype
    torch.testing.assert_close(mine.grad.cpu(), exact.grad.to(dtype))


def test_memory(backend: SimpleNamespace) -> None:
    """The result lies in memory as the map does; map, regions and gradient need not be contiguous."""
    map, regions = features().to(backend.device), REGIONS.to(backend.device)
    goal = ops.roi_pool(map, regions, 3)
    last = ops.roi_pool(map.to(memory_format=torch.channels_last), regions, 3)
    if backend.name != "twin":
        assert goal.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, goal)
    assert torch.equal(ops.roi_pool(map.repeat(1, 1, 1, 2)[..., :WIDTH], regions, 3), goal)
    assert torch.equal(ops.roi_pool(map, regions.T.contiguous().T, 3), goal)
    some = map.to(memory_format=torch.channels_last)[:, 1:4].requires_grad_()
    part = ops.roi_pool(some, regions, 3)
    assert torch.equal(part, goal[:, 1:4])
    ones = torch.ones(1, device=backend.device)
    spread, full = (
        torch.autograd.grad(ops.roi_pool(some, regions, 3), some, g)[0]
        for g in (ones.expand(part.shape), ones + 0 * part)
    )
    assert torch.equal(spread, full)


def test_list_of_boxes(backend: SimpleNamespace) -> None:
    map = features().to(backend.device)
    each = [REGIONS[REGIONS[:, 0] == i, 1:].to(backend.device) for i in range(2)]
    rows = torch.cat([REGIONS[REGIONS[:, 0] == i] for i in range(2)]).to(backend.device)
    assert torch.equal(ops.roi_pool(map, each, 3), ops.roi_pool(map, rows, 3))
    assert ops.roi_pool(map, (each[0], each[1][:0]), 3).shape == (len(each[0]), 6, 3, 3)


@pytest.mark.parametrize("shape", [(2, 6, 5, 4), (0, 6, 5, 4), (2, 0, 5, 4), (2, 6, 0, 4)])
@pytest.mark.parametrize("count", [0, 2])
def test_nothing(backend: SimpleNamespace, shape: tuple[int, ...], count: int) -> None:
    """The result hangs on the map all the same: DDP waits for a gradient of every parameter."""
    map = features(*shape).to(backend.device).requires_grad_()
    regions = torch.tensor([[0.0, 90, 90, 99, 99]] * count, device=backend.device).view(count, 5)
    got = ops.roi_pool(map, regions, 3)
    assert got.shape == (count, shape[1], 3, 3) and not got.any()
    got.sum().backward()
    assert map.grad is not None and not map.grad.any()


@pytest.mark.parametrize("last", [False, True])
def test_gradcheck(backend: SimpleNamespace, last: bool) -> None:
    map = features(2, 3, 4, 5, dtype=torch.float64, last=last).to(backend.device).requires_grad_()
    regions = REGIONS.to(backend.device).double()
    assert torch.autograd.gradcheck(
        lambda x: ops.roi_pool(x, regions, (2, 3), 0.6), map, fast_mode=backend.name == "emulated"
    )


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("columns", [37, 300])
def test_many_regions_and_tiles(backend: SimpleNamespace, last: bool, columns: int) -> None:
    """More regions than a CUDA block looks at in one go, on several of its tiles; the same bits on every run."""
    count = 140 if columns < 256 else 9
    g = torch.Generator().manual_seed(0)
    corner = torch.rand(count, 2, generator=g) * torch.tensor([columns, 10]) * 4
    boxes = torch.cat([corner, corner + torch.rand(count, 2, generator=g) * 80], 1)
    regions = torch.cat([torch.randint(2, (count, 1), generator=g), boxes], 1)
    map = features(2, 5, 11, columns, last=last)
    same(backend, map, regions, 2, 0.25, tolerance=1e-4)
    runs = []
    for _ in range(2):
        x = map.detach().to(backend.device).requires_grad_()
        out = ops.roi_pool(x, regions.to(backend.device), 2, 0.25)
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
                out = ops.roi_pool(x, regions, 7)
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
        torch.library.opcheck(operators.roi_pool.default, (map, regions, 0.5, 3, 4))
        grad = operators.roi_pool(map, regions, 0.5, 3, 4).detach()
        torch.library.opcheck(operators.roi_pool_backward.default, (grad, map.detach(), regions, 0.5))

    class Pool(torch.nn.Module):
        def forward(self, map: Tensor, regions: Tensor) -> Tensor:
            return ops.roi_pool(map, regions, 3, 0.5).relu()

    goal = Pool()(map, regions)
    got = torch.compile(Pool(), fullgraph=True, backend="aot_eager")(map, regions)
    torch.testing.assert_close(got, goal)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), map), torch.autograd.grad(goal.sum(), map))
    regions_many = {"map": None, "regions": {0: torch.export.Dim("R", min=2)}}
    exported = torch.export.export(Pool(), (map.detach(), regions), dynamic_shapes=regions_many)
    torch.testing.assert_close(exported.module()(map, regions[:5]), goal[:5])
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.roi_pool(map, regions, 3).dtype == torch.float32
        assert ops.roi_pool(map.bfloat16(), regions, 3).dtype == torch.bfloat16


def test_wrong_arguments_are_named(backend: SimpleNamespace) -> None:
    if backend.name == "twin":
        pytest.skip("the twin leaves it to PyTorch")
    map, regions = features().to(backend.device), torch.zeros(3, 5, device=backend.device)
    with pytest.raises(RuntimeError, match=r"\(R, 5\)"):
        ops.roi_pool(map, regions[:, :4], 3)
    with pytest.raises(RuntimeError, match=r"\(B, C, H, W\)"):
        ops.roi_pool(map[0], regions, 3)
    with pytest.raises(RuntimeError, match="output_size"):
        ops.roi_pool(map, regions, 0)
    with pytest.raises(RuntimeError, match=r"not implemented for|not Int"):
        ops.roi_pool(map.int(), regions, 3)
