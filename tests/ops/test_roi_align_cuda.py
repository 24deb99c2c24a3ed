"""RoIAlign's CUDA kernels: what only they can get wrong. On a GPU where there is one, and emulated everywhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision.ops as tv
from torch import Tensor

from lcrnet import ops

REGION = torch.tensor([[0.0, 1, 1, 5, 5]])


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.cuda)])
def kernels(request: pytest.FixtureRequest) -> SimpleNamespace:
    """`.ops`, and `.device` for the tensors."""
    if request.param == "emulated":
        return SimpleNamespace(ops=request.getfixturevalue("emulated"), device=torch.device("cpu"))
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    assert ops.use_ext("cuda")
    return SimpleNamespace(ops=torch.ops.lcrnet, device=torch.device("cuda"))


def scene(last: bool, dtype: torch.dtype, images: int = 2, channels: int = 20, regions: int = 600) -> Any:
    """Maps of several tiles, and more regions than a block looks at in one go."""
    g = torch.Generator().manual_seed(0)
    layout = torch.channels_last if last else torch.contiguous_format
    maps = [torch.rand(images, channels, s, s + 7, generator=g).to(dtype, memory_format=layout) for s in (37, 18)]
    corner = torch.rand(regions, 2, generator=g) * 130
    boxes = torch.cat([corner, corner + torch.rand(regions, 2, generator=g) * 60], 1)
    image = torch.randint(images, (regions, 1), generator=g)
    return maps, torch.cat([image, boxes], 1), torch.randint(2, (regions,), generator=g), [0.25, 0.125]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_regions_on_many_tiles(kernels: SimpleNamespace, last: bool, dtype: torch.dtype) -> None:
    """As torchvision's level by level; and the same bits on every run, whatever the order of blocks and threads."""
    maps, regions, level, scales = scene(last, dtype)
    exact = [m.float().contiguous().requires_grad_() for m in maps]
    goal = regions.new_zeros(len(regions), maps[0].shape[1], 4, 4)
    for i, map in enumerate(exact):
        here = (level == i).nonzero()[:, 0]
        goal = goal.index_copy(0, here, tv.roi_align(map, regions[here], 4, scales[i], 2, True))
    upstream = torch.rand(goal.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    goals = torch.autograd.grad(goal, exact, upstream.float())
    maps, regions, level, upstream = (
        [x.to(kernels.device) for x in maps], *(x.to(kernels.device) for x in (regions, level, upstream)),
    )  # fmt: skip
    shape = [*maps[0].shape[:2], *(n for m in maps for n in m.shape[2:])]
    tolerance = {"atol": 1e-4, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 8e-3, "rtol": 8e-3}
    runs = []
    for _ in range(3):
        out = kernels.ops.roi_align(maps, regions, level, scales, 4, 4, 2, True, 1)
        back = kernels.ops.roi_align_backward(upstream, regions, level, scales, shape, 4, 4, 2, True, 1, last)
        runs.append([out, *back])
    torch.testing.assert_close(runs[0][0].float().cpu(), goal.detach(), **tolerance)
    for mine, theirs in zip(runs[0][1:], goals, strict=True):
        torch.testing.assert_close(mine.float().cpu(), theirs, **tolerance)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("last", [False, True])
def test_any_alignment(kernels: SimpleNamespace, last: bool) -> None:
    """Maps and gradients that begin between 16-byte borders are read number by number."""
    layout = torch.channels_last if last else torch.contiguous_format
    memory = torch.rand(1 + 8 * 6 * 7, device=kernels.device)
    stride = (336, 1, 56, 8) if last else (336, 42, 7, 1)
    map = memory.as_strided((1, 8, 6, 7), stride, 1)
    assert map.is_contiguous(memory_format=layout) and map.data_ptr() % 16
    arguments = (REGION.to(kernels.device), None, [1.0])
    got = kernels.ops.roi_align([map], *arguments, 3, 3, 2, True, 1)
    torch.testing.assert_close(got, kernels.ops.roi_align([map.clone()], *arguments, 3, 3, 2, True, 1))
    memory = torch.rand(1 + got.numel(), device=kernels.device)
    grad = memory.as_strided(got.shape, got.stride(), 1)
    rest = (*arguments, [1, 8, 6, 7], 3, 3, 2, True, 1, last)
    (odd,), (even,) = (kernels.ops.roi_align_backward(g, *rest) for g in (grad, grad.clone()))
    torch.testing.assert_close(odd, even)


def test_more_bins_than_fit_in_shared_memory(kernels: SimpleNamespace) -> None:
    """Bins of a (B, C, H, W) map are gathered in shared memory if they fit; geometry that does not fit is refused."""
    map = torch.rand(1, 3, 9, 9, device=kernels.device)
    region = REGION.to(kernels.device)
    big = kernels.ops.roi_align([map], region, None, [1.0], 60, 60, 1, True, 1)
    torch.testing.assert_close(big.cpu(), tv.roi_align(map.cpu(), region.cpu(), 60, 1.0, 1, True))
    with pytest.raises(RuntimeError, match="too many bins"):
        kernels.ops.roi_align([map], region, None, [1.0], 9000, 9000, 1, True, 3)


@pytest.mark.parametrize("last", [False, True])
def test_infinite_gradient_stays_where_it_is(kernels: SimpleNamespace, last: bool) -> None:
    """Under loss scaling gradients overflow: infinity in the cells that a bin read, not NaN in those it did not."""
    layout = torch.channels_last if last else torch.contiguous_format
    grad = torch.full((1, 4, 1, 1), torch.inf, device=kernels.device).contiguous(memory_format=layout)
    region = torch.tensor([[0.0, 2, 3, 4, 5]], device=kernels.device)
    (map,) = kernels.ops.roi_align_backward(grad, region, None, [1.0], [1, 4, 12, 12], 1, 1, 2, True, 1, last)
    goal = torch.zeros(12, 12)
    goal[2:6, 1:5] = torch.inf  # samples at 2 and 3 across, at 3 and 4 down
    read = map[0, 0].cpu().isinf()
    assert read.any() and not map.isnan().any()
    assert torch.equal(read, read & (goal > 0))


@pytest.mark.parametrize("last", [False, True])
def test_a_map_of_no_cells(kernels: SimpleNamespace, last: bool) -> None:
    map = torch.rand(1, 2, 0, 5, device=kernels.device)
    arguments = (REGION.to(kernels.device), None, [1.0])
    out = kernels.ops.roi_align([map], *arguments, 2, 2, 2, False, 1)
    assert out.shape == (1, 2, 2, 2) and not out.any()
    (back,) = kernels.ops.roi_align_backward(out, *arguments, [1, 2, 0, 5], 2, 2, 2, False, 1, last)
    assert back.shape == map.shape


@pytest.mark.cuda
@pytest.mark.parametrize("last", [False, True])
def test_in_a_cuda_graph(last: bool) -> None:
    """Forward and backward are captured, and replayed on other numbers; neither waits for the GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    assert ops.use_ext("cuda")
    maps, regions, level, scales = scene(last, torch.float32)
    maps, regions, level = [m.cuda().requires_grad_() for m in maps], regions.cuda(), level.cuda()

    def step() -> tuple[Tensor, ...]:
        out = ops.roi_align(maps, regions, 7, scales, 2, True, level)
        return out.detach(), *torch.autograd.grad(out, maps, out.detach())

    torch.cuda.set_sync_debug_mode("error")
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.no_grad():
        for m in maps:
            m.mul_(2)
        regions[:, 1:] += 3
    graph.replay()
    for got, goal in zip(captured, step(), strict=True):
        assert torch.equal(got, goal)


@pytest.mark.cuda
@pytest.mark.parametrize("last", [False, True])
def test_more_than_int_can_count(last: bool) -> None:
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("no NVIDIA GPU with 20 GiB free")
    assert ops.use_ext("cuda")
    layout = torch.channels_last if last else torch.contiguous_format
    map = torch.rand(1, 1024, 10, 10, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=layout)
    count = 2**31 // (1024 * 14 * 14) + 2
    regions = torch.tensor([[0.0, 1, 1, 8, 8]], device="cuda").repeat(count, 1)
    arguments = (None, [1.0], 14, 14, 2, True, 1)
    out = torch.ops.lcrnet.roi_align([map], regions, *arguments)
    assert out.numel() > 2**31 and torch.equal(out[-1], out[0]) and torch.equal(out[count // 2], out[0])
    out.fill_(1 / 64)
    rest = ([1.0], [1, 1024, 10, 10], 14, 14, 2, True, 1, last)
    (all_of_them,) = torch.ops.lcrnet.roi_align_backward(out, regions, None, *rest)
    (one,) = torch.ops.lcrnet.roi_align_backward(out[:1], regions[:1], None, *rest)
    torch.testing.assert_close(all_of_them.float() / count, one.float(), rtol=2e-2, atol=1e-4)
