"""Motion-capture files, headings, and how such people look to a camera."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lcrnet import mocap
from lcrnet.camera import Camera
from lcrnet.config import UserError
from lcrnet.pose import box_of, mirror3d
from lcrnet.skeleton import LCR13

UP = {"r_ankle": (-0.1, -0.9, 0.05), "l_ankle": (0.1, -0.9, 0.05), "r_knee": (-0.1, -0.45, 0.06),
      "l_knee": (0.1, -0.45, 0.06), "r_hip": (-0.1, 0, 0), "l_hip": (0.1, 0, 0), "r_wrist": (-0.3, 0, 0.1),
      "l_wrist": (0.3, 0, 0.1), "r_elbow": (-0.25, 0.25, 0), "l_elbow": (0.25, 0.25, 0), "r_shoulder": (-0.2, 0.5, 0),
      "l_shoulder": (0.2, 0.5, 0), "head": (0, 0.7, 0.03)}  # fmt: skip
"""A person in a file's frame (y up, right-handed) that looks along +z, so its right is at -x."""


def fields(count: int = 3) -> dict[str, Any]:
    poses = np.tile(np.array(list(UP.values()), np.float32), (count, 1, 1))
    names = np.array([f"c{i}" for i in range(count)])
    return {"poses": poses, "joints": np.array(list(UP)), "clip": names, "action": names}


def write(folder: Path, values: dict[str, Any]) -> Path:
    np.savez(folder / "poses.npz", **values)
    return folder / "poses.npz"


def test_read(tmp_path: Path) -> None:
    """Any order and spelling of joints, any origin; y up becomes y down, and the frame stays right-handed."""
    values = fields()
    order = np.random.default_rng(0).permutation(13)
    values["poses"] = values["poses"][:, order] + np.float32(3)
    spelling = {"r_": "Right ", "l_": "left_"}
    values["joints"] = np.array([spelling.get(j[:2], j[:2]) + j[2:] for j in values["joints"][order]])
    found = mocap.read(write(tmp_path, values))
    assert mocap.is_mocap(tmp_path / "poses.npz") and len(found) == 3 and found.skeleton is LCR13
    assert found.clip.tolist() == ["c0", "c1", "c2"] and found.pose3d.dtype == np.float32
    np.testing.assert_allclose(found.pose3d[:, LCR13.torso].mean(1), 0, atol=1e-6)
    pose = dict(zip(LCR13.joints, found.pose3d[0], strict=True))
    assert pose["head"][1] < 0 < pose["r_ankle"][1]
    # It looks along +z of its file. With y turned down by half a turn about z that is away from the camera, which sees
    # its back: the right hand on the right of the image.
    assert pose["r_hip"][0] > pose["l_hip"][0] and pose["head"][2] > pose["r_shoulder"][2]
    assert abs(mocap.heading(found.pose3d, LCR13)) == pytest.approx(np.pi)
    assert [c.tolist() for c in (found[np.array([2, 0])].clip,)] == [["c2", "c0"]]


def test_clip_and_action_may_lack(tmp_path: Path) -> None:
    values = fields()
    del values["clip"], values["action"]
    found = mocap.read(write(tmp_path, values))
    assert found.clip.tolist() == found.action.tolist() == [""] * 3


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"poses": None}, "poses: missing"),
    ({"joints": None}, "joints: missing"),
    ({"joints": np.arange(13)}, "joints: expected a list of names"),
    ({"joints": np.array(["r_ankle"] * 13)}, "joints: two have the same name"),
    ({"joints": np.array(["x", *list(UP)[1:]])}, "joints: lcr13 also needs r_ankle"),
    ({"joints": np.array(list(UP)[:12])}, "poses: expected N x 12 x 3"),
    ({"joints": np.array(list(UP), object)}, "not an .npz file"),
    ({"poses": np.zeros((0, 13, 3), np.float32)}, "poses: expected"),
    ({"poses": np.zeros((3, 13, 3), np.int64)}, "poses: expected"),
    ({"poses": np.zeros((3, 13, 3), complex)}, "poses: expected"),
    ({"poses": np.where(np.arange(3)[:, None, None] == 1, np.nan, 0.1) * np.ones((3, 13, 3))}, "row 1 has a number"),
    ({"poses": 1000 * fields()["poses"]}, "row 0 has a joint more than 10 m from the torso; they are in metres"),
    ({"poses": 3e38 * fields()["poses"]}, "row 0 has a joint more than 10 m"),
    ({"clip": np.array(["a"])}, "clip: expected a name for each of the 3 poses"),
    ({"action": np.arange(3)}, "action: expected a name"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "says"), FAULTS, ids=[says for _, says in FAULTS])
def test_faults_are_named(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    file = write(tmp_path, {k: v for k, v in (fields() | change).items() if v is not None})
    with pytest.raises(UserError) as error:
        mocap.read(file)
    assert str(error.value).startswith(f"{file}: ") and says in str(error.value) and "\n" not in str(error.value)


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "ann.json").write_text('{"images": []}')
    assert not mocap.is_mocap(tmp_path / "ann.json") and not mocap.is_mocap(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere: No such file"):
        mocap.read(tmp_path / "nowhere")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as parts:
        parts.writestr("poses.npy", b"no array")
    for name in ("ann.json", "a.npz"):
        with pytest.raises(UserError, match=rf"{name}: (not an .npz file|joints: missing|poses)"):
            mocap.read(tmp_path / name)


def test_damaged_files(tmp_path: Path) -> None:
    """Whatever byte of a file is wrong, it is read or refused in one line."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **fields(1))
    whole = buffer.getvalue()
    rng, file = np.random.default_rng(0), tmp_path / "bad.npz"
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            data[at] = rng.integers(256)
        file.write_bytes(data[: rng.integers(len(data) // 2, len(data) + 1)] if rng.random() < 0.2 else data)
        try:
            mocap.read(file)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 100


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mocap, "LARGEST", 1000)
    with pytest.raises(UserError, match="unpacks to"):
        mocap.read(write(tmp_path, fields(9)))


def test_turn_and_heading() -> None:
    rng = np.random.default_rng(0)
    pose3d = rng.normal(0, 0.5, (50, 13, 3))
    angle = rng.uniform(-np.pi, np.pi, 50)
    cos, sin = np.cos(angle[7]), np.sin(angle[7])
    about_y = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
    np.testing.assert_allclose(mocap.turn(pose3d, angle)[7], pose3d[7] @ about_y.T, atol=1e-12)
    np.testing.assert_allclose(mocap.turn(mocap.turn(pose3d, angle), -angle), pose3d, atol=1e-12)
    before, after = mocap.heading(pose3d, LCR13), mocap.heading(mocap.turn(pose3d, angle), LCR13)
    np.testing.assert_allclose(np.exp(1j * after), np.exp(1j * (before - angle)), atol=1e-9)
    facing = mocap.turn(pose3d, before)
    np.testing.assert_allclose(mocap.heading(facing, LCR13), 0, atol=1e-9)
    np.testing.assert_allclose(mocap.heading(mirror3d(pose3d, LCR13), LCR13), -before, atol=1e-9)
    assert mocap.turn(pose3d[0].astype(np.float32), 1.0).dtype == np.float32


def test_seen() -> None:
    """A level camera 5 m away, by hand; nearer joints look larger, and everything is labelled."""
    pose3d = np.zeros((2, 13, 3), np.float32)
    pose3d[0, 0] = (1, -0.5, 0)
    pose3d[1, 0] = (1, -0.5, -1)
    found = mocap.seen(pose3d, LCR13)
    np.testing.assert_allclose(found.pose2d[:, 0], [[500 + 200, 500 - 100], [500 + 250, 500 - 125]], rtol=1e-6)
    np.testing.assert_allclose(found.pose2d[:, 1:], 500)
    assert (found.seen == 2).all() and found.has3d.all() and not found.crowd.any() and (found.trust == 1).all()
    np.testing.assert_array_equal(found.box, box_of(found.pose2d))
    np.testing.assert_allclose(found.area, (found.box[:, 2] - found.box[:, 0]) * (found.box[:, 3] - found.box[:, 1]))
    near = mocap.seen(pose3d, LCR13, Camera((100, 100), (0, 0)), distance=2)
    np.testing.assert_allclose(near.pose2d[0, 0], [50, -25])


def test_views(tmp_path: Path) -> None:
    motion = mocap.read(write(tmp_path, fields(2)))
    found = mocap.views(motion, 4)
    assert len(found) == 8
    np.testing.assert_allclose(found.pose3d[[0, 4]], motion.pose3d, atol=1e-7)
    angle = np.unwrap(mocap.heading(found.pose3d[:4], LCR13).astype(np.float64))
    np.testing.assert_allclose(np.degrees(np.diff(angle)), -90, atol=1e-3)


def test_real_file(shared: Path) -> None:
    """People stand upright in our frame, and their knees bend forward."""
    motion = mocap.read(shared / "mocap" / "poses.npz")
    assert len(motion) == 7548 and len(set(motion.clip.tolist())) == 71
    facing = mocap.turn(motion.pose3d, mocap.heading(motion.pose3d, LCR13))
    joint = dict(zip(LCR13.joints, np.moveaxis(facing, 1, 0), strict=True))
    assert (joint["head"][:, 1] < joint["r_ankle"][:, 1]).mean() > 0.97
    forward = joint["r_knee"][:, 2] - (joint["r_hip"][:, 2] + joint["r_ankle"][:, 2]) / 2
    assert (forward < 0).mean() > 0.9  # towards the camera that they face
