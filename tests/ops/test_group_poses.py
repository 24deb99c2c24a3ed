"""`group_poses` against a slow reference in plain Python that was written apart from it (golden/ppi_reference.py)."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lcrnet import ops, twins

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
import ppi_reference

J = 13
LEGS = torch.tensor([j in ppi_reference.ANKLES_KNEES for j in range(J)])
LIMITS = {"th_pose3d": 0.12, "min_mode_score": 0.05, "th_persondetect": 0.5, "th_iou": 0.3, "max_people": 8}


def scene(seed: int, images: int = 2, count: int = 30, people: int = 3, joints: int = J) -> dict[str, Any]:
    """Proposals round people drawn at random: overlapping, in several 3D modes, some of them absent."""
    r = np.random.default_rng(seed)
    who = r.integers(0, max(people, 1), (images, count))
    shape, place = r.uniform(-1, 1, (max(people, 1), joints, 2)) * [25, 50], r.uniform(0, 250, (max(people, 1), 1, 2))
    pose2d = (shape + place)[who] + r.normal(0, 4, (images, count, joints, 2))
    pose3d = r.normal(0, 0.3, (3, joints, 3))[r.integers(0, 3, who.shape)] + r.normal(0, 0.05, (*who.shape, joints, 3))
    given = {
        "score": np.where(r.random(who.shape) < 0.1, 0, r.uniform(0.005, 1, who.shape) ** 2),
        "pose2d": pose2d,
        "pose3d": pose3d,
        "boxes": np.concatenate([pose2d.min(2), pose2d.max(2) + 1], -1),
        "legs": np.where(r.random(who.shape) < 0.5, 0.1, 1),
    }
    return {k: torch.from_numpy(v.astype(np.float32)) for k, v in given.items()} | {"lower": LEGS[:joints]} | LIMITS


def by_points(given: dict[str, Any], swapped: bool = False, centres: bool = False) -> dict[str, Any]:
    """The same with overlap by distance: of all joints, below 30 pixels."""
    points = {"points": given["pose2d"], "limit": torch.full_like(given["score"], 30.0)}
    if swapped:
        points["swapped"] = given["pose2d"][:, :, list(ppi_reference.OTHER_SIDE)]
    if centres:
        points["centres"] = points["swapped"].flip(2) + 5
    return {k: v for k, v in given.items() if k != "boxes"} | points


def by_joints(given: dict[str, Any]) -> dict[str, Any]:
    """The same with overlap of boxes round some joints, in images that cut them."""
    joints = torch.tensor([j in (0, 4, 5, 7, 12) for j in range(given["pose2d"].shape[2])])
    size = torch.tensor([[150, 220], [90, 400], [300, 120]])[: len(given["score"])]
    return {k: v for k, v in given.items() if k != "boxes"} | {"joints": joints, "size": size}


def run(given: dict[str, Any], backend: SimpleNamespace) -> ops.PeopleFound:
    found = ops.group_poses(**{k: v.to(backend.device) if isinstance(v, Tensor) else v for k, v in given.items()})
    return ops.PeopleFound(*(v.cpu() for v in found))


def image(given: dict[str, Any], b: int) -> dict[str, Any]:
    return {k: v[b : b + 1] if isinstance(v, Tensor) and k != "lower" else v for k, v in given.items()}


def check(given: dict[str, Any], found: ops.PeopleFound) -> int:
    """Against the reference; how many people there are."""
    images, proposals = given["score"].shape
    joints, most = given["pose3d"].shape[2], given["max_people"]
    every = list(range(joints))
    people = 0
    for b in range(images):

        def overlap(p: int, c: int, b: int = b) -> bool:
            if "joints" in given:
                some, size = given["joints"].nonzero()[:, 0].tolist(), given["size"][b].tolist()
                boxes = [ppi_reference.box(given["pose2d"][b, i].tolist(), tuple(some), *size) for i in (p, c)]
                return ppi_reference.iou(*boxes) > given["th_iou"]
            if "boxes" in given:
                p_box, c_box = (tuple(given["boxes"][b, i].tolist()) for i in (p, c))
                solid = c_box[2] > c_box[0] and c_box[3] > c_box[1]
                return solid and ppi_reference.iou(p_box, c_box) > given["th_iou"]
            pairs = [(q, q) for q in range(given["points"].shape[2])]
            against = {"points": "points", "swapped": "centres" if "centres" in given else "points"}
            apart = [
                ppi_reference.mean_distance(given[name][b, p].tolist(), given[other][b, c].tolist(), pairs)
                for name, other in against.items()
                if name in given
            ]
            return min(apart) < float(given["limit"][b, c])

        there = given["score"][b] > 0
        score, pose3d = given["score"][b].tolist(), given["pose3d"][b].tolist()
        left = sorted((i for i in range(proposals) if there[i]), key=lambda i: (-score[i], i))
        truth = []
        while left:
            group = [i for i in left if i == left[0] or overlap(i, left[0])]
            left = [i for i in left if i not in group]
            modes, free = [], list(group)
            while free and (not modes or score[free[0]] >= given["min_mode_score"]):
                pairs = [(j, j) for j in every]
                modes.append(
                    [
                        i
                        for i in group
                        if ppi_reference.mean_distance(pose3d[i], pose3d[free[0]], pairs) < given["th_pose3d"]
                    ]
                )
                free = [i for i in free if i not in modes[-1]]
            best = max(modes, key=lambda m: sum(score[i] for i in m))
            if sum(score[i] for i in best) > given["th_persondetect"]:
                truth.append(best)
        truth.sort(key=lambda m: -sum(score[i] for i in m))
        person = torch.full((proposals,), -1)
        assert found.total[b] == len(truth)
        for p, members in enumerate(truth[:most]):
            person[members] = p
            weight = given["score"][b, members, None].double() * torch.where(
                given["lower"], given["legs"][b, members, None], 1
            )
            trust = weight / weight.sum(0)
            mean2d, mean3d = ((trust[..., None] * given[k][b, members]).sum(0) for k in ("pose2d", "pose3d"))
            spread = (trust * (given["pose3d"][b, members] - mean3d).norm(dim=-1)).sum(0)
            close(found.mass[b, p], sum(score[i] for i in members), 1e-5)
            close(found.pose2d[b, p], mean2d, 1e-3)
            close(found.pose3d[b, p], mean3d, 1e-6)
            close(found.spread[b, p], spread, 1e-6)
            assert found.support[b, p] == len(members) and found.best[b, p] == members[0]
        assert torch.equal(found.person[b], person)
        for name in ("mass", "pose2d", "pose3d", "spread", "support"):
            assert not getattr(found, name)[b, len(truth) :].any()
        assert (found.best[b, len(truth) :] == -1).all()
        people += len(truth)
    return people


def close(found: Tensor, truth: Any, apart: float) -> None:
    truth = torch.as_tensor(truth, dtype=torch.float64)
    assert found.shape == truth.shape and (found - truth).abs().max() <= apart


@pytest.mark.parametrize("overlap", ["boxes", "joints", "points", "swapped", "centres"])
def test_equals_the_slow_reference(backend: SimpleNamespace, overlap: str) -> None:
    people = 0
    for seed in range(3 if backend.name == "emulated" else 6):
        given = scene(seed, count=12 + 13 * seed, people=1 + seed)
        if overlap == "joints":
            given = by_joints(given)
        elif overlap != "boxes":
            given = by_points(given, overlap != "points", overlap == "centres")
        people += check(given, run(given, backend))
    assert people > 4


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 9999), images=st.integers(1, 3), count=st.integers(0, 40), people=st.integers(0, 4),
    joints=st.sampled_from([1, 4, 13]), most=st.integers(0, 4), iou=st.floats(0, 1), near=st.floats(0.01, 1),
    least=st.floats(0, 1), mass=st.floats(0, 1),
)  # fmt: skip
def test_random_shapes(
    backend: SimpleNamespace, seed: int, images: int, count: int, people: int, joints: int, most: int, iou: float,
    near: float, least: float, mass: float,
) -> None:  # fmt: skip
    given = scene(seed, images, count, people, joints) | {
        "max_people": most, "th_iou": iou, "th_pose3d": near, "min_mode_score": least, "th_persondetect": mass,
    }  # fmt: skip
    check(given, run(given, backend))


def test_many_in_one_image(backend: SimpleNamespace) -> None:
    """More than a block of threads, a word of bits or a tile holds; with the twin as the truth."""
    few = backend.name == "emulated"
    given = scene(5, 1, 400 if few else 3000, 10) | {"max_people": 40}
    spread = {"pose2d": given["pose2d"], "boxes": given["boxes"] + 60 * given["score"][..., None]}
    for one in (given, given | spread, by_points(given, True), given | {"th_iou": 0.9}):
        found, truth = run(one, backend), twin(one)
        assert torch.equal(found.person, truth.person) and torch.equal(found.total, truth.total)
        assert torch.equal(found.best, truth.best) and torch.equal(found.support, truth.support)
        for name, apart in (("mass", 1e-4), ("pose2d", 1e-3), ("pose3d", 1e-5), ("spread", 1e-5)):
            close(getattr(found, name), getattr(truth, name), apart)
        assert int(found.total) > 3


def twin(given: dict[str, Any]) -> ops.PeopleFound:
    choose, ops._operator = ops._operator, lambda op, where: getattr(twins, op)
    try:
        return ops.group_poses(**given)
    finally:
        ops._operator = choose


def test_order_of_proposals_does_not_matter(backend: SimpleNamespace) -> None:
    given = scene(3, 1, 40)
    mixed = torch.from_numpy(np.random.default_rng(0).permutation(40))
    a = run(given, backend)
    b = run({k: v[:, mixed] if isinstance(v, Tensor) and k != "lower" else v for k, v in given.items()}, backend)
    assert torch.equal(a.person[:, mixed], b.person)
    for name in ("mass", "pose2d", "pose3d", "spread", "support", "total"):
        assert torch.equal(getattr(a, name), getattr(b, name))


def test_of_equals_the_first(backend: SimpleNamespace) -> None:
    """Of equal scores the first leads; of equal modes, and of equal people, the one whose centre is first."""
    given = image(scene(0, 1, 12), 0)
    given = {k: v[:, :1].expand(-1, 12, *[-1] * (v.dim() - 2)).clone() if isinstance(v, Tensor) and k != "lower" else v
             for k, v in given.items()} | {"score": torch.full((1, 12), 0.5)}  # fmt: skip
    given["pose3d"][:, 1::2] += 1
    found = run(given, backend)
    assert found.person[0].tolist() == [0, -1] * 6 and found.best[0, 0] == 0 and found.support[0, 0] == 6
    given["pose2d"][:, 1::2] += 900
    given["boxes"][:, 1::2] += 900
    found = run(given, backend)
    assert found.person[0].tolist() == [0, 1] * 6 and found.best[0, :3].tolist() == [0, 1, -1]


@pytest.mark.parametrize("overlap", ["boxes", "points"])
def test_thresholds_are_exact(backend: SimpleNamespace, overlap: str) -> None:
    """A step of float32 below the threshold is near, the threshold itself is not: in 3D, then in 2D."""
    steps = np.float32(0.25) + np.spacing(np.float32(0.125)) * np.arange(-9, 10, dtype=np.float32)
    count = len(steps) + 1
    poses = {"pose2d": torch.zeros(1, count, J, 2), "pose3d": torch.zeros(1, count, J, 3)}
    given = {"score": torch.full((1, count), 0.5), "boxes": torch.tensor([0.0, 0, 9, 9]).expand(1, count, 4)} | poses
    given |= LIMITS | {"th_pose3d": 0.25, "min_mode_score": 1}
    near = [True, *(steps < 0.25).tolist()]
    if overlap == "points":
        given |= {"points": torch.zeros(1, count, J, 2), "limit": torch.full((1, count), 0.25), "boxes": None}
    where = given["pose3d"] if overlap == "boxes" else given["points"]
    where[0, 1:, :, 1] = torch.from_numpy(steps)[:, None] * torch.tensor([1, -1]).repeat(J)[:J]
    assert (run(given, backend).person[0] == 0).tolist() == near and 5 < sum(near) < 15


def test_more_people_than_room(backend: SimpleNamespace) -> None:
    given = scene(2, 2, 40, 6) | {"th_persondetect": 0.05}
    whole, cut = run(given | {"max_people": 40}, backend), run(given | {"max_people": 2}, backend)
    assert torch.equal(whole.total, cut.total) and (cut.total > 2).all()
    assert torch.equal(whole.pose3d[:, :2], cut.pose3d) and torch.equal(whole.mass[:, :2], cut.mass)
    assert torch.equal(torch.where(whole.person < 2, whole.person, -1), cut.person)


def test_absent_proposals(backend: SimpleNamespace) -> None:
    """A number that is not finite, anywhere, is as if the proposal were not there."""
    given = scene(1, 1, 30) | {"legs": torch.ones(1, 30)}
    for overlap in (given, by_joints(given), by_points(given, True), by_points(given, True, True)):
        broken = {k: v.clone() if isinstance(v, Tensor) else v for k, v in overlap.items()}
        names = [k for k, v in overlap.items() if isinstance(v, Tensor) and k not in ("lower", "joints", "size")]
        order = overlap["score"][0].argsort(descending=True)
        values = itertools.cycle([float("nan"), float("inf"), -float("inf")])
        for name, row, value in zip(names, order, values, strict=False):
            broken[name][0, row].view(-1)[-1] = value
        gone = order[: len(names)]
        without = overlap | {"score": overlap["score"].index_fill(1, gone, 0.0)}
        found, truth = run(broken, backend), run(without, backend)
        assert found.dropped.tolist() == [len(names)] and not truth.dropped.any()
        for a, b in zip(found[:-1], truth[:-1], strict=True):
            assert torch.equal(a, b)
        for score in (0.0, -1.0, float("nan"), -float("inf")):
            found = run(overlap | {"score": torch.full((1, 30), score)}, backend)
            assert not found.total.any() and not found.pose2d.any() and (found.person == -1).all()
            assert found.dropped.tolist() == [0 if np.isfinite(score) else 30]


def test_boxes_without_size(backend: SimpleNamespace) -> None:
    """They overlap nothing, and are groups all the same; nor does one of negative size overlap anything."""
    given = image(scene(1, 1, 20), 0) | {"th_iou": 0.0, "th_persondetect": 0.0, "max_people": 20}
    given["score"].fill_(0.5)
    for box, alone in (((0, 0, 0, 0), 17), ((5, 5, 5, 9), 17), ((9, 9, 5, 5), 17), ((1e30, 0, 2e30, 1e30), 1)):
        given["boxes"][:, 3:] = torch.tensor(box, dtype=torch.float32)
        assert check(given, run(given, backend)) >= alone


def test_empty(backend: SimpleNamespace) -> None:
    for images, count, most in ((0, 0, 3), (2, 0, 3), (0, 5, 3), (2, 5, 0)):
        found = run(scene(0, images, count) | {"max_people": most}, backend)
        assert found.pose2d.shape == (images, most, J, 2) and found.person.shape == (images, count)
        assert (found.best == -1).all() and not found.mass.any()


def test_not_contiguous_and_other_types(backend: SimpleNamespace) -> None:
    given = scene(4, 2, 20)
    truth = run(given, backend)
    turned = {k: v.transpose(0, 1).contiguous().transpose(0, 1) if isinstance(v, Tensor) and k != "lower" else v
              for k, v in given.items()}  # fmt: skip
    doubles = {k: v.double() if isinstance(v, Tensor) and k != "lower" else v for k, v in given.items()}
    for other in (turned, doubles):
        for a, b in zip(run(other, backend), truth, strict=True):
            assert torch.equal(a, b)
    plain = run({k: v for k, v in given.items() if k not in ("legs", "lower")}, backend)
    ones = run(given | {"legs": torch.ones(2, 20)}, backend)
    assert all(torch.equal(a, b) for a, b in zip(plain, ones, strict=True))
    half = {k: v.to(torch.bfloat16) if k in ("score", "pose2d", "pose3d") else v for k, v in given.items()}
    check({k: v.float() if isinstance(v, Tensor) and k != "lower" else v for k, v in half.items()}, run(half, backend))


def test_wrong_arguments(backend: SimpleNamespace) -> None:
    if backend.name == "twin":
        pytest.skip("checked in C++")
    given = scene(0, 1, 5)
    for wrong, says in (
        ({"pose3d": given["pose3d"][:, :4]}, "pose3d"),
        ({"boxes": given["boxes"][..., :3]}, "boxes"),
        ({"lower": given["lower"].float()}, "lower"),
        ({"boxes": None}, "either boxes"),
        ({"points": given["pose2d"], "limit": given["score"]}, "either boxes"),
        ({"th_iou": -0.1}, "th_iou"),
        ({"max_people": -1}, "max_people"),
        ({"score": given["score"][0]}, "score"),
    ):
        with pytest.raises(RuntimeError, match=says):
            run(given | wrong, backend)


@pytest.mark.parametrize("overlap", ["boxes", "joints", "points"])
def test_opcheck_compile_export(overlap: str) -> None:
    assert ops.use_ext("cpu")
    given = scene(0)
    given = {"boxes": given, "joints": by_joints(given), "points": by_points(given, True, True)}[overlap]
    names = (
        "score",
        "pose2d",
        "pose3d",
        "legs",
        "lower",
        "boxes",
        "joints",
        "size",
        "points",
        "swapped",
        "centres",
        "limit",
    )
    tensors = [given.get(n) for n in names]
    tensors = [
        t.double() if t is not None and n in ("boxes", "limit") else t for n, t in zip(names, tensors, strict=True)
    ]
    rest = [given[n] for n in ("th_iou", "th_pose3d", "min_mode_score", "th_persondetect", "max_people")]
    torch.library.opcheck(torch.ops.lcrnet.group_poses.default, (*tensors, *rest))

    class Network(torch.nn.Module):
        def forward(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
            found = ops.group_poses(**tensors, **{k: v for k, v in given.items() if not isinstance(v, Tensor)})
            return found.pose3d * 2, found.total

    only = {k: v for k, v in given.items() if isinstance(v, Tensor)}
    truth = Network()(only)
    for run_ in (
        torch.compile(Network(), fullgraph=True, backend="aot_eager"),
        torch.export.export(Network(), (only,)).module(),
    ):
        assert all(torch.equal(a, b) for a, b in zip(run_(only), truth, strict=True))


def test_threads() -> None:
    assert ops.use_ext("cpu")
    given, threads = scene(7, 6, 50), torch.get_num_threads()
    try:
        found = []
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(ops.group_poses(**given))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.cuda
def test_cuda_graph() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    assert ops.use_ext("cuda")
    given = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in scene(0).items()}
    truth = ops.group_poses(**given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ops.group_poses(**given)
    for _ in range(2):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))
    given["score"].zero_()
    graph.replay()
    assert not found.total.any()
