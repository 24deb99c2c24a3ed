"""camera.py: projection, and the place of a person, on made-up poses and on motion capture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lcrnet.camera import Camera, place
from lcrnet.pose import centre
from lcrnet.skeleton import LCR13

CAMERA = Camera((1100.0, 1150.0), (510.0, 490.0))


def poses(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Root-centred poses (count, J, 3) and places (count, 3) in front of the camera."""
    rng = np.random.default_rng(seed)
    pose = centre(rng.normal(0, 0.4, (count, len(LCR13), 3)), LCR13)
    return pose, rng.uniform([-2, -1, 3], [2, 1, 9], (count, 3))


def test_project_by_hand() -> None:
    point = Camera((100.0, 200.0), (50.0, 60.0)).project(np.array([[1.0, -2.0, 4.0], [0.0, 0.0, 1.0]]))
    np.testing.assert_allclose(point, [[75, -40], [50, 60]])


def test_guess_sees_53_degrees() -> None:
    camera = Camera.guess(480, 640)
    np.testing.assert_allclose(camera.project(np.array([np.tan(np.radians(53.13 / 2)), 0, 1])), [640, 240], atol=0.01)
    assert Camera.guess(640, 480).f == camera.f


def test_place_is_exact_and_vectorised() -> None:
    pose, where = poses(20)
    pose2d = CAMERA.project(pose + where[:, None])
    found = place(pose2d, pose, CAMERA)
    np.testing.assert_allclose(found, where, atol=1e-9)
    np.testing.assert_allclose(place(pose2d[3], pose[3], CAMERA), where[3], atol=1e-9)
    assert place(pose2d[:0], pose[:0], CAMERA).shape == (0, 3)


def test_place_leaves_out_joints_without_weight() -> None:
    pose, where = poses(5, seed=1)
    pose2d = CAMERA.project(pose + where[:, None])
    weights = np.ones(pose2d.shape[:-1])
    pose2d[:, 3], weights[:, 3] = np.nan, 0
    pose2d[:, 7], weights[:, 7] = 5000, 0
    np.testing.assert_allclose(place(pose2d, pose, CAMERA, weights), where, atol=1e-9)
    weights[0, 1:] = 0
    assert np.isnan(place(pose2d, pose, CAMERA, weights)[0]).all()


def test_wrong_focal_length_scales_the_depth() -> None:
    pose, where = poses(20, seed=2)
    guess = Camera((2200.0, 2300.0), CAMERA.c)
    found = place(CAMERA.project(pose + where[:, None]), pose, guess)
    assert np.all(np.abs(found[:, 2] / where[:, 2] / 2 - 1) < 0.25)


@pytest.mark.parametrize("name", ["h36m", "mpi-inf-3dhp"])
def test_place_of_motion_capture(shared: Path, name: str) -> None:
    data = json.loads((shared / name / "annotations" / "lcrnet_pose.json").read_text())
    images = {image["id"]: image for image in data["images"]}
    for person in data["annotations"]:
        flat = np.array(person["pose"]).reshape(5, 13)
        camera = images[person["image_id"]]["camera"]
        pose3d = flat[2:].T * [-1, -1, 1]  # x left, y up in these files
        found = place(flat[:2].T, pose3d, Camera(tuple(camera["f"]), tuple(camera["c"])))
        off = np.abs(found - person["root_camera"])
        assert off[:2].max() < 0.02 and off[2] < 0.06, off
