"""The geometry of poses, each rule checked against another way to say it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from lcrnet import pose
from lcrnet.camera import Camera
from lcrnet.pose import People, PoseProposals
from lcrnet.skeleton import COCO17, LCR13

RNG = np.random.default_rng(0)
POSE2D = RNG.uniform(-50, 200, (4, 13, 2))
POSE3D = RNG.normal(0, 0.5, (4, 13, 3))
BOX = np.array([[0, 0, 10, 20], [5, 5, 6, 100], [-20, -5, 300, 4], [100, 100, 101, 101]], float)


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_into_and_out_of_box(kind: Any) -> None:
    pose2d, box = kind(POSE2D), kind(BOX)
    np.testing.assert_allclose(pose.out_of_box(pose.into_box(pose2d, box), box), POSE2D, atol=1e-9)
    corners = kind(BOX.reshape(4, 2, 2))
    assert (pose.into_box(corners, box) == kind(np.array([[0.0, 0], [1, 1]]))).all()


def test_into_box_of_each_of_several() -> None:
    """Regions times anchor poses: any leading axes."""
    got = pose.out_of_box(np.stack([POSE2D, POSE2D]), np.stack([BOX, 2 * BOX]))
    np.testing.assert_array_equal(got[1, 2], pose.out_of_box(POSE2D[2], 2 * BOX[2]))


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_mirror(kind: Any) -> None:
    once, once3d = pose.mirror2d(kind(POSE2D), 128, LCR13), pose.mirror3d(kind(POSE3D), LCR13)
    r, l = LCR13.index("r_wrist"), LCR13.index("l_wrist")  # noqa: E741
    np.testing.assert_array_equal(once[:, l], np.stack([128 - POSE2D[:, r, 0], POSE2D[:, r, 1]], 1))
    np.testing.assert_array_equal(once3d[:, l], POSE3D[:, r] * [-1, 1, 1])
    np.testing.assert_allclose(pose.mirror2d(once, 128, LCR13), POSE2D, atol=1e-9)
    np.testing.assert_array_equal(pose.mirror3d(once3d, LCR13), POSE3D)


def test_mirror_leaves_its_argument_alone() -> None:
    before = POSE2D.copy(), POSE3D.copy()
    pose.mirror2d(POSE2D, 128, LCR13), pose.mirror3d(POSE3D, LCR13)
    assert (before[0] == POSE2D).all() and (before[1] == POSE3D).all()


def test_mirrored_3d_projects_to_mirrored_2d() -> None:
    """A camera in the middle of its image sees the mirrored person where the mirrored image shows them."""
    camera, root = Camera((900, 900), (320, 240)), np.array([0.7, -0.2, 5])
    seen = camera.project(POSE3D + root)
    mirrored = camera.project(pose.mirror3d(POSE3D, LCR13) + root * [-1, 1, 1])
    np.testing.assert_allclose(mirrored, pose.mirror2d(seen, 640, LCR13), atol=1e-9)


def test_centre() -> None:
    got = pose.centre(POSE3D, LCR13)
    np.testing.assert_allclose(got[:, LCR13.torso].mean(1), 0, atol=1e-12)
    np.testing.assert_allclose(pose.centre(POSE3D + [1, 2, 3], LCR13), got, atol=1e-12)
    np.testing.assert_allclose(np.diff(got, axis=1), np.diff(POSE3D, axis=1), atol=1e-12)
    assert torch.allclose(pose.centre(torch.tensor(POSE3D), LCR13), torch.tensor(got))


def test_box_of() -> None:
    joints = np.array([[10, 20], [30, 120], [-500, 900]], np.float32)
    labelled = np.array([2, 1, 0])
    np.testing.assert_allclose(pose.box_of(joints, labelled), [10 - 9, 20 - 9, 30 + 9, 120 + 9])
    np.testing.assert_allclose(pose.box_of(joints, labelled, margin=0), [10, 20, 30, 120])
    assert pose.box_of(joints, labelled).dtype == np.float32
    assert pose.box_of(joints)[0] < -500
    rows = pose.box_of(np.stack([joints, joints]), np.stack([labelled, np.zeros(3)]))
    np.testing.assert_array_equal(rows, [pose.box_of(joints, labelled), [0, 0, 0, 0]])
    assert pose.box_of(np.zeros((0, 13, 2))).shape == (0, 4)


def test_clip() -> None:
    np.testing.assert_array_equal(pose.clip(np.array([[-5.0, 3, 700, 500]]), 480, 640), [[0, 3, 640, 480]])


def test_procrustes_undoes_a_similarity() -> None:
    turn = Rotation.random(4, rng=1).as_matrix()
    moved = 1.7 * POSE3D @ np.swapaxes(turn, 1, 2) + RNG.normal(size=(4, 1, 3))
    np.testing.assert_allclose(pose.procrustes(moved, POSE3D), POSE3D, atol=1e-9)
    rigid = pose.procrustes(moved, POSE3D, scale=False)
    np.testing.assert_allclose(
        np.linalg.norm(np.diff(rigid, axis=1), axis=-1), 1.7 * np.linalg.norm(np.diff(POSE3D, axis=1), axis=-1)
    )


def test_procrustes_does_not_reflect() -> None:
    """A mirrored body stays a wrong one, however it is turned; the best rotation is found all the same."""
    mirrored = POSE3D * [-1, 1, 1]
    found = pose.procrustes(mirrored, POSE3D, scale=False)
    error = ((found - POSE3D) ** 2).sum((1, 2))
    assert (error > 0.1).all()
    shape = POSE3D - POSE3D.mean(1, keepdims=True)
    for turn in Rotation.random(200, rng=2).as_matrix():
        other = ((shape * [-1, 1, 1] @ turn.T - shape) ** 2).sum((1, 2))
        assert (error <= other + 1e-9).all()


def test_procrustes_of_flat_and_of_single_points() -> None:
    flat = POSE3D * [1, 1, 0]
    turn = Rotation.from_euler("xyz", [1, 2, 3]).as_matrix()
    np.testing.assert_allclose(pose.procrustes(flat @ turn.T, flat), flat, atol=1e-9)
    assert np.isfinite(pose.procrustes(np.ones((1, 13, 3)), POSE3D[:1])).all()


def people(count: int) -> People:
    out = People.empty(count, 17)
    out.box[:, 0], out.has3d[:] = np.arange(count), True
    return out


def test_people() -> None:
    both = People.join([people(2), people(3)])
    assert len(both) == 5 and both.box[:, 0].tolist() == [0, 1, 0, 1, 2] and both.pose2d.shape == (5, 17, 2)
    assert both[np.array([4, 1])].box[:, 0].tolist() == [2, 1] and len(both[both.box[:, 0] > 5]) == 0
    twin = both.copy()
    twin.box[:] = -1
    assert both.box.min() == 0
    tensors = both.tensors()
    assert isinstance(tensors.box, torch.Tensor) and len(tensors[~tensors.crowd]) == 5
    assert tensors.seen.dtype == torch.int64 and tensors.has3d.dtype == torch.bool
    assert People.empty(1, len(COCO17)).trust.tolist() == [1]


def test_proposals_on_the_host() -> None:
    parts = [torch.zeros(2, 4, requires_grad=True), torch.ones(2), torch.ones(2, dtype=torch.int64),
             torch.zeros(2, 13, 2), torch.zeros(2, 13, 3)]  # fmt: skip
    got = PoseProposals(*parts).numpy()
    assert all(isinstance(v, np.ndarray) for v in got.__dict__.values()) and len(got) == 2
