"""NMS against torchvision's: the same boxes kept, in the same order."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
import torchvision.ops as tv
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lcrnet import ops

INF, NAN = torch.inf, torch.nan


def boxes(count: int, size: float = 40, seed: int = 0) -> Tensor:
    """Boxes that overlap, those at the end without area."""
    low, extent = torch.rand(2, count, 2, generator=torch.Generator().manual_seed(seed))
    extent[-2:] = 0
    return torch.cat([low * size, low * size + extent * size], 1)


def scores(count: int, seed: int = 1) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def clusters(count: int, seed: int = 0) -> Tensor:
    """Many near-duplicates of a few boxes."""
    random = torch.Generator().manual_seed(seed)
    few = boxes(12, 300, seed)[torch.randint(12, (count,), generator=random)]
    return few + 3 * torch.randn(count, 4, generator=random)


def same(where: SimpleNamespace, box: Tensor, score: Tensor, threshold: float, most: int | None = None) -> Tensor:
    got = ops.nms(box.to(where.device), score.to(where.device), threshold, most).cpu()
    want = tv.nms(box, score, threshold)[:most]
    assert got.dtype == torch.int64 and got.tolist() == want.tolist()
    return got


def by_group(box: Tensor, score: Tensor, group: Tensor, threshold: float) -> list[int]:
    """torchvision's of each group, merged by score."""
    kept = [(group == g).nonzero()[:, 0] for g in group.unique()]
    one = torch.cat([rows[tv.nms(box[rows], score[rows], threshold)] for rows in kept])
    rank = score.argsort(descending=True, stable=True).argsort()
    kept_ranks = rank[one].sort().indices
    return one[kept_ranks].tolist()


@pytest.mark.parametrize("threshold", [0, 0.3, 0.5, 0.7, 1])
def test_same_as_torchvision(backend: SimpleNamespace, threshold: float) -> None:
    box, score = boxes(150), scores(150)
    for most in (None, 0, 1, 5, 1000):
        same(backend, box, score, threshold, most)
    same(backend, box.double(), score.double(), threshold)
    # non-contiguous
    got = ops.nms(
        box.repeat(1, 2).to(backend.device)[:, :4], score.repeat(2).view(2, -1).to(backend.device).T[:, 0], threshold
    )
    assert got.tolist() == tv.nms(box, score, threshold).tolist()


@pytest.mark.parametrize("count", [63, 64, 65, 2300])
def test_many(backend: SimpleNamespace, count: int) -> None:
    """Several tiles of bits, and several chunks of rows, on CUDA; several cells and blocks on the CPU."""
    for box in (boxes(count, 300), clusters(count)):
        score = scores(count)
        same(backend, box, score, 0.7)
        same(backend, box, score, 0.4, 50)


def test_ties_and_order(backend: SimpleNamespace) -> None:
    """Equal scores: the first of the input stays; touching boxes and an overlap equal to the threshold do not count."""
    box = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4], [4, 0, 8, 4], [0, 0, 4, 2], [0, 0, 4, 4]])
    score = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.9])
    assert same(backend, box, score, 0.5).tolist() == [4, 2, 3]
    assert same(backend, box[:4], score[:4], 0.5).tolist() == [0, 2, 3]
    assert same(backend, box, score, 0.49).tolist() == [4, 2]
    same(backend, boxes(300), torch.zeros(300), 0.3)
    same(backend, boxes(300), torch.zeros(300) * torch.tensor([1.0, -1.0]).repeat(150), 0.3)  # -0 is 0


@pytest.mark.parametrize("threshold", [0.1, 0.3, 1 / 3, 0.6, 0.7, 0.9])
def test_at_the_threshold(backend: SimpleNamespace, threshold: float) -> None:
    """IoUs that differ from the threshold by rounding: it is not rounded to float32, the IoU is."""
    whole = torch.randint(0, 21, (250, 4), generator=torch.Generator().manual_seed(3)).float()
    whole[:, 2:] += whole[:, :2]
    same(backend, whole, scores(250), threshold)
    same(backend, 0.1 * whole + 1000, scores(250), threshold)
    wide = torch.tensor([[0.0, 0, 10, 1], [0, 0, 3, 1], [0, 0, 6, 1], [0, 0, 7, 1], [0, 0, 1, 1], [0, 0, 9, 1]])
    same(backend, wide, torch.arange(6.0, 0, -1), threshold)


def test_nothing(backend: SimpleNamespace) -> None:
    assert ops.nms(torch.zeros(0, 4, device=backend.device), torch.zeros(0, device=backend.device), 0.5).shape == (0,)
    for images, count, most, width in [(0, 5, None, 5), (2, 0, 7, 0), (0, 0, None, 0), (2, 5, 0, 0)]:
        zero = torch.zeros(images, count, device=backend.device)
        keep, kept = ops.batched_nms(zero[..., None].expand(-1, -1, 4), zero, 0.5, most)
        assert keep.shape == (images, width) and kept.tolist() == [0] * images
        assert keep.dtype == kept.dtype == torch.int64
    absent = torch.full((1, 70), -INF, device=backend.device)
    keep, kept = ops.batched_nms(torch.zeros(1, 70, 4, device=backend.device), absent, 0.5)
    assert kept.tolist() == [0] and (keep == -1).all()


def test_boxes_without_area_and_not_finite(backend: SimpleNamespace) -> None:
    """They are kept, and drop nothing."""
    box = boxes(80)
    odd = [[NAN, 0, 9, 9], [0, 0, INF, INF], [-INF, -INF, INF, INF], [0, 0, 30, NAN], [INF, 0, -INF, 9], [9, 9, 0, 0],
           [9, 0, 0, 9], [5, 5, 5, 5], [0, 5, 9, 5], [0, 0, 3e38, 3e38], [-3e38, -3e38, 3e38, 3e38], [0, 0, 1e30, 1e30],
           [0, 0, 1e-30, 1e-30], [NAN] * 4, [INF] * 4, [-INF] * 4]  # fmt: skip
    mixed = torch.cat([box[:40], torch.tensor(odd * 2), box[40:]])
    for seed in range(3):
        score = scores(len(mixed), seed)
        for threshold in (0, 0.3, 0.7):
            got = same(backend, mixed, score, threshold)
            assert set(range(40, 49)) <= set(got.tolist())
            same(backend, mixed.double(), score.double(), threshold)


@pytest.mark.parametrize("size", [1e-22, 1e-19, 1e-3, 1e9, 1e18, 3e37])
def test_tiny_and_huge(backend: SimpleNamespace, size: float) -> None:
    """Areas that lose digits to underflow, and those that overflow."""
    for box in (boxes(120, size), clusters(120) * (size / 300), boxes(120, size) - size):
        for threshold in (0, 1e-7, 0.4, 0.7):
            same(backend, box, scores(120), threshold)


def test_far_from_the_origin(backend: SimpleNamespace) -> None:
    """Boxes of a few units in the last place of their coordinates."""
    whole = torch.randint(0, 30, (200, 4), generator=torch.Generator().manual_seed(5)).float() * 0.0625
    whole[:, 2:] += whole[:, :2]
    same(backend, whole + 1e6, scores(200), 0.5)


def test_scores_not_finite(backend: SimpleNamespace) -> None:
    """NaN comes first, as in torch.sort; -inf is no box."""
    score = torch.tensor([0.1, NAN, INF, -INF, 0.5, NAN, -INF])
    score[5] = -score[5]  # the sign of a NaN says nothing
    apart = torch.arange(7.0)[:, None] * 10 + torch.tensor([0.0, 0, 5, 5])
    keep, count = ops.batched_nms(apart[None].to(backend.device), score[None].to(backend.device), 0.5)
    assert keep.tolist() == [[1, 5, 2, 4, 0, -1, -1]] and count.tolist() == [5]
    keep, _ = ops.batched_nms(
        torch.ones(1, 7, 4, device=backend.device) * apart[:1].to(backend.device), score[None].to(backend.device), 0.5
    )
    assert keep[0].tolist() == [1, *[-1] * 6]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(backend: SimpleNamespace, dtype: torch.dtype) -> None:
    """Half precision counts as float32; one float64 makes all float64."""
    box, score = boxes(90).to(dtype), scores(90).to(dtype)
    to = backend.device
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    goal = tv.nms(box.to(wide), score.to(wide), 0.4).tolist()
    assert ops.nms(box.to(to), score.to(to), 0.4).tolist() == goal
    assert ops.nms(box.to(to), score.to(wide).to(to), 0.4).tolist() == goal
    mixed = tv.nms(boxes(90).to(wide), score.to(wide), 0.4).tolist()
    assert ops.nms(boxes(90).to(to), score.to(to), 0.4).tolist() == mixed


@pytest.mark.parametrize("spread", [1, 2**40])
def test_batches_and_groups(backend: SimpleNamespace, spread: int) -> None:
    box, score = torch.stack([boxes(130, seed=s) for s in range(3)]), torch.stack([scores(130, s) for s in range(3)])
    score[1, 100:] = -INF  # an image with fewer boxes
    score[2] = -INF
    group = torch.randint(-2, 3, (3, 130), generator=torch.Generator().manual_seed(0)) * spread
    for most in (None, 20):
        keep, count = ops.batched_nms(
            *(t.to(backend.device) for t in (box, score)), 0.3, most, group.to(backend.device)
        )
        plain, plain_count = ops.batched_nms(box.to(backend.device), score.to(backend.device), 0.3, most)
        for b, there in enumerate((130, 100, 0)):
            goal = by_group(box[b, :there], score[b, :there], group[b, :there], 0.3)[:most] if there else []
            assert keep[b, : count[b]].tolist() == goal and (keep[b, count[b] :] == -1).all()
            alone = tv.nms(box[b, :there], score[b, :there], 0.3)[:most].tolist()
            assert plain[b, : plain_count[b]].tolist() == alone and (plain[b, plain_count[b] :] == -1).all()


def test_every_box_its_own_group(backend: SimpleNamespace) -> None:
    box, score = boxes(100)[None].to(backend.device), scores(100)[None].to(backend.device)
    keep, count = ops.batched_nms(box, score, 0.1, group=torch.arange(100, device=backend.device)[None] * 10**15)
    assert count.item() == 100 and keep.equal(score.argsort(descending=True))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), count=st.integers(1, 200), threshold=st.sampled_from([0.0, 0.2, 0.5, 0.7, 0.95]))
def test_any_shape(backend: SimpleNamespace, seed: int, count: int, threshold: float) -> None:
    pick = random.Random(seed)
    box, score = pick.choice([boxes, clusters])(count, seed=seed), scores(count, seed)
    if pick.random() < 0.5:
        score = (4 * score).round()
    if pick.random() < 0.3:
        box[pick.randrange(count), pick.randrange(4)] = pick.choice([NAN, INF, -INF, 0, 1e38])
    same(backend, box, score, threshold, pick.choice([None, pick.randrange(count + 1)]))
    group = torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(seed))
    keep, kept = ops.batched_nms(
        *(t[None].to(backend.device) for t in (box, score)), threshold, None, group[None].to(backend.device)
    )
    assert keep[0, : kept[0]].tolist() == by_group(box, score, group, threshold)


def test_wrong_arguments(backend: SimpleNamespace) -> None:
    box, score = boxes(4)[None].to(backend.device), scores(4)[None].to(backend.device)
    for threshold in (-0.1, NAN):
        with pytest.raises(ValueError, match="iou_threshold"):
            ops.batched_nms(box, score, threshold)
    if backend.name == "twin":
        return
    whole = torch.zeros_like(score, dtype=torch.int64)
    for bad, name in [
        ((box[0], score, 0.5), "boxes"),
        ((box, score[:, :3], 0.5), "scores"),
        ((box.int(), score, 0.5), "float type"),
        ((box, score, 0.5, 1, score), "group"),
        ((box, score, 0.5, 1, whole[0]), "group"),
    ]:
        with pytest.raises(RuntimeError, match=name):
            ops.batched_nms(*bad)


def test_any_number_of_threads() -> None:
    assert ops.use_ext("cpu")
    box, score = torch.stack([clusters(400, s) for s in range(5)]), torch.stack([scores(400, s) for s in range(5)])
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(ops.batched_nms(box, score, 0.6))
    finally:
        torch.set_num_threads(threads)
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


def test_operator_is_described() -> None:
    assert ops.use_ext("cpu")
    box, score = torch.stack([boxes(20), boxes(20, seed=2)]), torch.stack([scores(20), scores(20, 2)])
    for group in (None, torch.zeros(2, 20, dtype=torch.int64)):
        torch.library.opcheck(torch.ops.lcrnet.nms.default, (box, score, group, 0.5, 7))


def test_compile_and_export() -> None:
    def best(box: Tensor, score: Tensor) -> Tensor:
        keep, count = ops.batched_nms(box, score, 0.5, 8)
        return box.gather(1, keep.clamp(min=0)[..., None].expand(-1, -1, 4)) + count[:, None, None]

    box, score = torch.stack([boxes(20), boxes(20, seed=2)]), torch.stack([scores(20), scores(20, 2)])
    want = best(box, score)
    torch.testing.assert_close(torch.compile(best, fullgraph=True, dynamic=True, backend="aot_eager")(box, score), want)

    class Best(torch.nn.Module):
        def forward(self, box: Tensor, score: Tensor) -> Tensor:
            return best(box, score)

    count = torch.export.Dim("count", min=8, max=5000)
    program = torch.export.export(Best(), (box, score), dynamic_shapes={"box": {1: count}, "score": {1: count}})
    torch.testing.assert_close(program.module()(box, score), want)
    more = boxes(33)[None].expand(2, -1, -1), scores(33)[None].expand(2, -1)
    torch.testing.assert_close(program.module()(*more), best(*more))


def test_one_image_compiled_and_exported() -> None:
    """A result whose size depends on values."""
    box, score = boxes(20), scores(20)
    want = tv.nms(box, score, 0.5)

    class One(torch.nn.Module):
        def forward(self, box: Tensor, score: Tensor) -> Tensor:
            return ops.nms(box, score, 0.5)

    assert torch.compile(One(), backend="aot_eager")(box, score).equal(want)
    assert torch.export.export(One(), (box, score)).module()(box, score).equal(want)


def test_in_a_cuda_graph(backend: SimpleNamespace) -> None:
    """Nothing waits for the device, and a graph replays with other boxes."""
    if backend.name != "cuda":
        pytest.skip("CUDA only")
    box, score = boxes(5000, 300)[None].cuda(), scores(5000)[None].cuda()
    ops.batched_nms(box, score, 0.7, 1000)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            keep, count = ops.batched_nms(box, score, 0.7, 1000)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for seed in (7, 8):
        new = boxes(5000, 300, seed)
        box.copy_(new[None])
        graph.replay()
        assert keep[0, : int(count)].tolist() == tv.nms(new, scores(5000), 0.7)[:1000].tolist()
