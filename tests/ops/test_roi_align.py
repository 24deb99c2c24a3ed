"""RoIAlign against torchvision's, in every implementation: values, gradients, and what torchvision lacks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.ops as tv
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lcrnet import ops

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
    x = torch.rand(shape or (2, 6, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.to(memory_format=torch.channels_last) if last else x


def same(backend: SimpleNamespace, map: Tensor, regions: Any, size: Any, *rest: Any, tolerance: float = 1e-5) -> None:
    """Equal values and equal gradients of a random function of them, and the memory format of the map."""
    mine = map.detach().to(backend.device).requires_grad_()
    other = map.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    got, goal = ops.roi_align(mine, regions.to(backend.device), size, *rest), tv.roi_align(other, regions, size, *rest)
    torch.testing.assert_close(got.cpu(), goal, atol=tolerance, rtol=tolerance)
    upstream = torch.rand(goal.shape, generator=torch.Generator().manual_seed(4)).to(goal)
    got.backward(upstream.to(backend.device))
    goal.backward(upstream)
    assert mine.grad is not None
    torch.testing.assert_close(mine.grad.cpu(), other.grad, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("ratio", [2, 3, -1])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(("size", "scale", "last"), [(3, 1.0, False), ((2, 5), 0.37, True)])
def test_as_torchvision(
    backend: SimpleNamespace, ratio: int, aligned: bool, size: Any, scale: float, last: bool
) -> None:  # fmt: skip
    same(backend, features(last=last), REGIONS, size, scale, ratio, aligned)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 3), st.sampled_from([1, 3, 16, 21, 70]), st.integers(1, 11), st.integers(1, 11)),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    ratio=st.integers(-1, 3),
    aligned=st.booleans(),
    last=st.booleans(),
    seed=st.integers(0, 1000),
    count=st.integers(0, 5),
)
def test_many_shapes(
    backend: SimpleNamespace, shape: tuple[int, ...], size: tuple[int, int], ratio: int, aligned: bool, last: bool,
    seed: int, count: int,
) -> None:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    image = torch.randint(shape[0], (count, 1), generator=g)
    regions = torch.cat([image, torch.randn(count, 4, generator=g) * 12 + 4], 1)
    # in steps that are exact in binary: a sample that sits on the border sits there for both
    regions[:, 1:] = (regions[:, 1:] * 8).round() / 8 + 1 / 32
    if aligned and ratio < 1:  # torchvision fails on exchanged corners with adaptive sampling
        regions[:, 1:] = torch.cat(
            [regions[:, 1:3].minimum(regions[:, 3:]), regions[:, 1:3].maximum(regions[:, 3:])], 1
        )
    same(backend, features(*shape, last=last, seed=seed), regions, size, 0.5, ratio, aligned, tolerance=2e-5)


def test_of_a_plane_is_the_plane(backend: SimpleNamespace) -> None:
    """Independently of torchvision: the mean of a linear function over a bin is its value in the bin's middle."""
    y, x = torch.meshgrid(torch.arange(20.0) + 0.5, torch.arange(20.0) + 0.5, indexing="ij")
    region = torch.tensor([[0, 8.0, 12, 24, 32]], device=backend.device)
    got = ops.roi_align((x + 10 * y)[None, None].to(backend.device), region, 4, 0.5, 2, aligned=True)[0, 0]
    at = torch.arange(4) + 0.5
    torch.testing.assert_close(got.cpu(), (4 + 2 * at)[None] + 10 * (6 + 2.5 * at)[:, None])


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("channels", [3, 80])
def test_step_is_every_other_bin(backend: SimpleNamespace, last: bool, channels: int) -> None:
    map = features(2, channels, HEIGHT, WIDTH, last=last).to(backend.device).requires_grad_()
    regions = REGIONS.to(backend.device)
    for size, step in (((5, 4), 2), ((7, 7), 3), ((2, 2), 5)):
        every = ops.roi_align(map, regions, size, 0.5, 2, True)[:, :, ::step, ::step]
        some = ops.roi_align(map, regions, size, 0.5, 2, True, step=step)
        torch.testing.assert_close(some, every)
        weight = torch.rand(every.shape, generator=torch.Generator().manual_seed(0)).to(backend.device)
        goal, got = (torch.autograd.grad((x * weight).sum(), map)[0] for x in (every, some))
        torch.testing.assert_close(got, goal, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("last", [False, True])
def test_pyramid(backend: SimpleNamespace, last: bool) -> None:
    """Several maps in one call: as each region on its own map; a level that does not exist gives zeros."""
    maps = [
        features(2, 6, 16 // 2**i, 12 // 2**i, last=last, seed=i).to(backend.device).requires_grad_() for i in range(3)
    ]
    regions = REGIONS.to(backend.device)
    scales, level = [1.0, 0.5, 0.25], torch.tensor([0, 1, 2, 0, 1, 2, 7, 1], device=backend.device)
    got = ops.roi_align(maps, regions, 3, scales, 2, True, level)
    upstream = torch.rand(got.shape, generator=torch.Generator().manual_seed(0)).to(backend.device)
    gradients = torch.autograd.grad(got, maps, upstream)
    assert not got[6].any()
    for i, (map, gradient) in enumerate(zip(maps, gradients, strict=True)):
        here = (level == i).nonzero()[:, 0]
        goal = ops.roi_align(map, regions[here], 3, scales[i], 2, True)
        torch.testing.assert_close(got[here], goal)
        torch.testing.assert_close(gradient, torch.autograd.grad(goal, map, upstream[here])[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="level of each region"):
        ops.roi_align(maps, regions, 3, scales)


@pytest.mark.parametrize("ratio", [2, -1])
@pytest.mark.parametrize("last", [False, True])
def test_strange_regions_give_zeros(backend: SimpleNamespace, ratio: int, last: bool) -> None:
    map = features(last=last).to(backend.device).requires_grad_()
    got = ops.roi_align(map, torch.cat([STRANGE, REGIONS[:1], STRANGE]).to(backend.device), 3, 1.0, ratio, True)
    n = len(STRANGE)
    assert not got[:n].any() and not got[n + 1 :].any() and got[n].any()
    (gradient,) = torch.autograd.grad(got.sum(), map)
    (alone,) = torch.autograd.grad(ops.roi_align(map, REGIONS[:1].to(backend.device), 3, 1.0, ratio, True).sum(), map)
    torch.testing.assert_close(gradient, alone)


def test_region_of_a_million_maps(backend: SimpleNamespace) -> None:
    """Adaptive sampling of a vast region costs no more than that of the map, whose part of it is the mean."""
    map = torch.ones(1, 2, HEIGHT, WIDTH, device=backend.device)
    region = torch.tensor([[0, -1e6, -1e6, 1e6, 1e6]], device=backend.device)
    got = ops.roi_align(map, region, 1, 1.0, -1, True)
    # Samples every cell reach from -1 to the map's end: WIDTH + 1 of them across, two million in all.
    torch.testing.assert_close(
        got.cpu(), torch.full_like(got, (WIDTH + 1) * (HEIGHT + 1) / 4e12).cpu(), rtol=0.2, atol=0
    )
    assert ops.roi_align(map, region * 1e6, 2, 1.0, -1, True).isfinite().all()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(backend: SimpleNamespace, dtype: torch.dtype, last: bool) -> None:
    """Computed in float32 and rounded once, with the regions in float32."""
    map = features(2, 21, HEIGHT, WIDTH, dtype=dtype, last=last)
    mine = map.detach().to(backend.device).requires_grad_()
    got = ops.roi_align(mine, REGIONS.to(backend.device), 3, 0.7, 2, True)
    got.sum().backward()
    exact = map.detach().double().requires_grad_()
    goal = tv.roi_align(exact, REGIONS.double(), 3, 0.7, 2, True)
    goal.sum().backward()
    assert got.dtype == dtype and mine.grad is not None and mine.grad.dtype == dtype
    epsilon = torch.finfo(dtype).eps if backend.name != "twin" else 8 * torch.finfo(dtype).eps  # it rounds on its way
    for a, b in ((got, goal), (mine.grad, exact.grad)):
        torch.testing.assert_close(a.detach().cpu().double(), b, atol=max(epsilon, 1e-6), rtol=epsilon)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e-6, 60000.0])
def test_what_is_not_finite_stays_so(backend: SimpleNamespace, dtype: torch.dtype, value: float) -> None:
    """A diverging network must show: no rounding turns NaN into a number. Also the ends of half's range."""
    map = torch.full((1, 19, 4, 4), value, dtype=dtype, device=backend.device).to(memory_format=torch.channels_last)
    got = ops.roi_align(map, torch.tensor([[0, 0.7, 0.7, 3.2, 3.2]], device=backend.device), 2, 1.0, 2, True)
    if backend.name == "twin" and not np.isfinite(value):
        assert not got.isfinite().any()  # a product with all cells: infinities become NaN
    else:
        torch.testing.assert_close(got, map[..., :2, :2], equal_nan=True)


def test_memory(backend: SimpleNamespace) -> None:
    """The result lies in memory as the map does; maps and regions need not be contiguous."""
    map, regions = features().to(backend.device), REGIONS.to(backend.device)
    goal = ops.roi_align(map, regions, 3, 1.0, 2, True)
    last = ops.roi_align(map.to(memory_format=torch.channels_last), regions, 3, 1.0, 2, True)
    if backend.name != "twin":
        assert goal.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, goal)
    torch.testing.assert_close(ops.roi_align(map.repeat(1, 1, 1, 2)[..., :WIDTH], regions, 3, 1.0, 2, True), goal)
    torch.testing.assert_close(ops.roi_align(map, regions.T.contiguous().T, 3, 1.0, 2, True), goal)
    some = map.to(memory_format=torch.channels_last)[:, 1:4]
    torch.testing.assert_close(ops.roi_align(some, regions, 3, 1.0, 2, True), goal[:, 1:4])


def test_list_of_boxes(backend: SimpleNamespace) -> None:
    map = features().to(backend.device)
    each = [REGIONS[REGIONS[:, 0] == i, 1:].to(backend.device) for i in range(2)]
    rows = torch.cat([REGIONS[REGIONS[:, 0] == i] for i in range(2)]).to(backend.device)
    assert torch.equal(ops.rois(each), rows)
    assert torch.equal(ops.roi_align(map, each, 3), ops.roi_align(map, rows, 3))
    assert ops.roi_align(map, (each[0], each[1][:0]), 3).shape == (len(each[0]), 6, 3, 3)


@pytest.mark.parametrize("shape", [(2, 6, 5, 4), (0, 6, 5, 4), (2, 0, 5, 4)])
def test_no_regions(backend: SimpleNamespace, shape: tuple[int, ...]) -> None:
    """The result hangs on the map all the same: DDP waits for a gradient of every parameter."""
    map = features(*shape).to(backend.device).requires_grad_()
    got = ops.roi_align(map, torch.zeros(0, 5, device=backend.device), 3)
    assert got.shape == (0, shape[1], 3, 3)
    got.sum().backward()
    assert map.grad is not None and not map.grad.any()


@pytest.mark.parametrize("last", [False, True])
def test_gradcheck(backend: SimpleNamespace, last: bool) -> None:
    map = features(2, 3, 4, 5, dtype=torch.float64, last=last).to(backend.device).requires_grad_()
    regions = REGIONS.to(backend.device).double()

    def call(x: Tensor) -> Tensor:
        return ops.roi_align(x, regions, (2, 3), 0.6, -1, True)

    assert torch.autograd.gradcheck(call, map, fast_mode=backend.name == "emulated")


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
                out = ops.roi_align(x, regions, 7, 1.0, 2, True)
                results.append((out.detach(), torch.autograd.grad((out * out).sum(), x)[0]))
            finally:
                torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_more_than_int_can_count() -> None:
    """An output of 2^31 numbers and more: indices are 64 bits. Bins on top of one another keep the map small."""
    assert ops.use_ext("cpu")
    count = 2**31 // (64 * 128 * 128) + 2
    map = torch.ones(1, 64, 4, 4, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    regions = torch.tensor([[0.0, 1, 1, 3, 3]]).repeat(count, 1)
    out = ops.roi_align(map, regions, 128, 1.0, 1, True)
    assert out.numel() > 2**31 and bool((out[-1] == 1).all()) and bool((out[count // 2] == 1).all())


def test_pytorch_takes_it_as_its_own() -> None:
    """Schema, fake kernel and gradient fit (opcheck); torch.compile and torch.export pass through; so does autocast."""
    assert ops.use_ext("cpu")
    map, regions = features(last=True).requires_grad_(), REGIONS
    operators = torch.ops.lcrnet
    arguments = ([map, map[:, :, ::2, ::2].contiguous()], regions, torch.arange(8) % 2, [0.5, 0.25], 3, 3, 2, True, 1)
    torch.library.opcheck(operators.roi_align.default, arguments)
    with torch.no_grad():
        grad = operators.roi_align(*arguments)
    shape = [2, 6, HEIGHT, WIDTH, 5, 6]
    torch.library.opcheck(
        operators.roi_align_backward.default, (grad, regions, arguments[2], [0.5, 0.25], shape, 3, 3, 2, True, 1, True)
    )

    class Pool(torch.nn.Module):
        def forward(self, map: Tensor, regions: Tensor) -> Tensor:
            return ops.roi_align(map, regions, 3, 0.5, 2, True).relu()

    goal = Pool()(map, regions)
    compiled = torch.compile(Pool(), fullgraph=True, backend="aot_eager")
    got = compiled(map, regions)
    torch.testing.assert_close(got, goal)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), map), torch.autograd.grad(goal.sum(), map))
    regions_many = {"map": None, "regions": {0: torch.export.Dim("R", min=2)}}
    exported = torch.export.export(Pool(), (map.detach(), regions), dynamic_shapes=regions_many)
    torch.testing.assert_close(exported.module()(map, regions[:5]), goal[:5])
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.roi_align(map, regions, 3).dtype == torch.float32
        assert ops.roi_align(map.bfloat16(), regions, 3).dtype == torch.bfloat16


def test_wrong_arguments_are_named(backend: SimpleNamespace) -> None:
    if backend.name == "twin":
        pytest.skip("the twin leaves it to PyTorch")
    map = features().to(backend.device)
    with pytest.raises(RuntimeError, match=r"\(R, 5\)"):
        ops.roi_align(map, torch.zeros(3, 4, device=backend.device), 3)
    with pytest.raises(RuntimeError, match="output_size"):
        ops.roi_align(map, torch.zeros(3, 5, device=backend.device), 0)
    assert np.isfinite(ops.roi_align(map, torch.zeros(3, 5, device=backend.device), 3).cpu().numpy()).all()
