"""Drawn people: the truth is exact, the bodies are human, the drawings deterministic."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import pytest

from lcrnet import body, coco, synthetic
from lcrnet.pose import People, mirror2d
from lcrnet.skeleton import LCR13
from lcrnet.synthetic import Scene

JOINT = {name: i for i, name in enumerate(LCR13.joints)}


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [synthetic.scene(seed) for seed in range(150)]


@pytest.fixture(scope="module")
def bodies() -> list[body.Body]:
    rng = np.random.default_rng(0)
    return [body.sample(rng, 180) for _ in range(500)]


def same(a: People, b: People) -> bool:
    return all(np.array_equal(v, b.__dict__[k]) for k, v in a.__dict__.items())


def bend(human: body.Body, side: str, start: str, middle: str, end: str) -> tuple[np.ndarray, float]:
    """How far the middle joint stands out from the line between the others, metres, and the flexion in degrees."""
    a, b, c = (human.joints[JOINT[f"{side}_{name}"]] for name in (start, middle, end))
    along = (c - a) / np.linalg.norm(c - a)
    u, v = (b - a) / np.linalg.norm(b - a), (c - b) / np.linalg.norm(c - b)
    return (b - a) - ((b - a) @ along) * along, math.degrees(math.acos(np.clip(u @ v, -1, 1)))


def test_same_seed_same_drawing() -> None:
    (a, people_a), (b, people_b), (c, _) = synthetic.draw(3), synthetic.draw(3), synthetic.draw(4)
    assert np.array_equal(a, b) and same(people_a, people_b)
    assert not np.array_equal(a, c)


@pytest.mark.parametrize("size", [64, 128, 200])
def test_shapes(size: int) -> None:
    image, people = synthetic.draw(1, size)
    assert image.shape == (size, size, 3) and image.dtype == np.uint8 and image.std() > 5
    assert people.pose2d.shape == (len(people), len(LCR13), 2) and len(people) > 0
    assert people.box.max() <= size and people.has3d.all() and not people.crowd.any() and (people.trust == 1).all()


def test_pose2d_is_the_projection_of_pose3d(scenes: list[Scene]) -> None:
    for scene in scenes:
        people = scene.people
        pixels = scene.camera.project(people.pose3d + scene.root[:, None])
        np.testing.assert_allclose(pixels, people.pose2d, atol=1e-2)
        np.testing.assert_allclose(people.pose3d[:, LCR13.torso].mean(1), 0, atol=1e-6)


def test_bones_are_human_and_alike_on_both_sides(bodies: list[body.Body]) -> None:
    # metres, of people of 1.5 to 1.95 m
    ranges = {
        ("knee", "ankle"): (0.33, 0.52), ("hip", "knee"): (0.33, 0.52), ("shoulder", "elbow"): (0.24, 0.40),
        ("elbow", "wrist"): (0.19, 0.32),
    }  # fmt: skip
    for human in bodies:
        at = {name: human.joints[i] for name, i in JOINT.items()}
        for (a, b), (low, high) in ranges.items():
            right, left = (np.linalg.norm(at[f"{s}_{a}"] - at[f"{s}_{b}"]) for s in "rl")
            assert low < right < high
            assert right == pytest.approx(left, abs=1e-9)
        assert 0.11 < np.linalg.norm(at["r_hip"] - at["l_hip"]) < 0.25
        assert 0.25 < np.linalg.norm(at["r_shoulder"] - at["l_shoulder"]) < 0.5
        assert 0.13 < np.linalg.norm(at["head"] - (at["r_shoulder"] + at["l_shoulder"]) / 2) < 0.22


def test_angles_are_within_the_limits(bodies: list[body.Body]) -> None:
    for human in bodies:
        for name, value in human.angles.items():
            low, high = body.LIMITS[name.removeprefix("r_").removeprefix("l_")]
            assert low <= value <= high, (human.activity, name)
    assert {human.activity for human in bodies} == set(body.ACTIVITIES)


def test_knees_and_elbows_bend_one_way(bodies: list[body.Body]) -> None:
    flexed = 0
    for human in bodies:
        for side in "rl":
            for joints, segment, sign in (
                (("hip", "knee", "ankle"), "thigh", 1),  # knees stand out to the front,
                (("shoulder", "elbow", "wrist"), "upper_arm", -1),  # elbows to the back
            ):
                out, flexion = bend(human, side, *joints)
                front = -human.frames[f"{side}_{segment}"][:, 2]
                assert sign * (out @ front) > -1e-9
                assert flexion == pytest.approx(human.angles[f"{side}_{'knee' if sign > 0 else 'elbow'}"], abs=0.1)
                flexed += flexion > 20
    assert flexed > 500


def test_knees_point_where_the_trunk_faces(bodies: list[body.Body]) -> None:
    """From the joints alone: that left and right are not exchanged anywhere, and feet and knees agree with the hips."""
    checked = 0
    for human in bodies:
        at = {name: human.joints[i] for name, i in JOINT.items()}
        left, up = at["l_hip"] - at["r_hip"], (at["r_shoulder"] + at["l_shoulder"] - at["r_hip"] - at["l_hip"]) / 2
        front = np.cross(left, up) / np.linalg.norm(np.cross(left, up))
        for side in "rl":
            out, flexion = bend(human, side, "hip", "knee", "ankle")
            if flexion > 25 and human.angles[f"{side}_hip_flex"] < 60:
                assert out @ front > 0, human.activity
                checked += 1
    assert checked > 50


def test_facing_people_have_their_right_on_the_left(scenes: list[Scene]) -> None:
    for seed in range(60):
        scene = synthetic.scene(seed, heading=60)
        for human, pose2d in zip(scene.bodies, scene.people.pose2d, strict=True):
            if human.activity != "lie":
                assert pose2d[JOINT["r_shoulder"], 0] < pose2d[JOINT["l_shoulder"], 0]
    away = [
        pose2d[JOINT["r_shoulder"], 0] > pose2d[JOINT["l_shoulder"], 0]
        for scene in scenes for pose2d in scene.people.pose2d
    ]  # fmt: skip
    assert 0.35 < np.mean(away) < 0.65


def test_poses_and_their_mirror_images_are_equally_common(scenes: list[Scene]) -> None:
    poses = np.concatenate([s.people.pose2d for s in scenes if len(s.people)])
    wrists = poses[:, JOINT["r_wrist"], 1] - poses[:, JOINT["l_wrist"], 1]
    assert 0.35 < np.mean(wrists > 0) < 0.65
    mirrored = mirror2d(poses, 128, LCR13)
    assert abs(poses[..., 0].mean() - mirrored[..., 0].mean()) < 8


def test_the_face_is_on_the_front(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skin shows on the head of those who face the camera, hair on the head of those who turn away."""
    plain = {
        name: np.full(3, 128.0) for name in ("shirt", "trousers", "leg", "shoe", "sleeve", "cuff", "inner", "seat")
    }
    monkeypatch.setattr(
        synthetic, "_wardrobe", lambda rng: {**plain, "skin": np.array([250.0, 0, 0]), "hair": np.array([0.0, 0, 250])}
    )
    front, back = [], []
    for seed in range(80):
        scene = synthetic.scene(seed)
        for i, human in enumerate(scene.bodies):
            if scene.people.seen[i, JOINT["head"]] < 2:
                continue
            x, y = np.clip(scene.people.pose2d[i, JOINT["head"]], 1, 126).astype(int)
            red, _, blue = scene.image[y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3).astype(float).mean(0)
            facing = -human.frames["head"][:, 2] @ human.joints[JOINT["head"]] / human.joints[JOINT["head"], 2]
            if abs(facing) > 0.7:
                (front if facing < 0 else back).append(red - blue)
    assert len(front) > 10 and len(back) > 10
    assert np.median(front) > 50 and np.median(back) < -50


def test_visibility(scenes: list[Scene]) -> None:
    seen = np.concatenate([s.people.seen for s in scenes])
    assert set(np.unique(seen)) == {1, 2}
    assert 0.4 < (seen == 2).mean() < 0.9
    for scene in scenes:
        people = scene.people
        outside = ((people.pose2d < 0) | (people.pose2d >= 128)).any(-1)
        assert (people.seen[outside] == 1).all()
        assert (people.area > 0).all()
        width, height = (people.box[:, 2:] - people.box[:, :2]).T
        assert (people.area <= width * height).all() and (width > 2).all() and (height > 2).all()
        inside = (people.pose2d >= people.box[:, None, :2] - 1).all(-1) & (
            people.pose2d <= people.box[:, None, 2:] + 1
        ).all(-1)
        assert inside[people.seen == 2].all()
    # Alone and whole, almost all that is hidden is hidden by the body itself: the far side of it.
    far = []
    for scene in scenes:
        for i, human in enumerate(scene.bodies):
            sides = human.joints[JOINT["r_shoulder"], 2] - human.joints[JOINT["l_shoulder"], 2]
            if len(scene.people) == 1 and abs(sides) > 0.25:
                near, hidden = ("l", "r") if sides > 0 else ("r", "l")
                far.append([scene.people.seen[i, JOINT[f"{s}_shoulder"]] for s in (near, hidden)])
    assert np.mean(far, axis=0)[0] > np.mean(far, axis=0)[1] + 0.5


def test_some_overlap_and_some_images_are_empty(scenes: list[Scene]) -> None:
    counts = np.array([len(s.people) for s in scenes])
    assert (counts == 0).any() and (counts > 2).any() and counts.max() <= 4
    overlapping = 0
    for scene in scenes:
        box = scene.people.box
        low, high = np.maximum(box[:, None, :2], box[None, :, :2]), np.minimum(box[:, None, 2:], box[None, :, 2:])
        both = (high - low).clip(0).prod(-1)
        overlapping += int((np.triu(both, 1) > 0.1 * scene.people.area[:, None]).sum())
    assert overlapping > 30


def test_nearer_people_hide_farther_ones() -> None:
    """Of two people whose boxes overlap, the nearer one's joints are seen more often than the farther one's."""
    near, far = [], []
    for seed in range(150):
        scene = synthetic.scene(seed)
        box = scene.people.box
        if len(box) == 2 and (np.minimum(*box[:, 2:]) - np.maximum(*box[:, :2]) > 8).all():
            order = np.argsort(scene.root[:, 2])
            near.append((scene.people.seen[order[0]] == 2).mean())
            far.append((scene.people.seen[order[1]] == 2).mean())
    assert np.mean(near) > np.mean(far) + 0.05


def test_write(tmp_path: Path) -> None:
    synthetic.write(tmp_path / "a", 103, seed=5, size=64, processes=1)
    calls: list[tuple[int, int]] = []
    synthetic.write(
        tmp_path / "b", 103, seed=5, size=64, processes=2, progress=lambda done, of: calls.append((done, of))
    )
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) == 104 and calls == [(100, 103), (103, 103)]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file

    assert coco.check(tmp_path / "a" / "annotations.json") == []
    data = coco.read(tmp_path / "a" / "annotations.json")
    assert [image.file_name for image in data.images] == [f"{i:06d}.jpg" for i in range(103)]
    number = next(i for i, image in enumerate(data.images) if len(image.people) > 1)
    image = data.images[number]
    pixels = cv2.imread(str(tmp_path / "a" / "images" / image.file_name))
    assert pixels is not None and pixels.shape == (64, 64, 3)
    for camera, root, pose2d, pose3d in (
        (image.extra["camera"], extra["root_camera"], p2, p3)
        for extra, p2, p3 in zip(image.extras, image.people.pose2d, image.people.pose3d, strict=True)
    ):
        points = pose3d + np.array(root)
        again = points[:, :2] / points[:, 2:] * np.array(camera["f"]) + np.array(camera["c"])
        np.testing.assert_allclose(again, pose2d, atol=0.01)
    assert image.people.has3d.all() and set(np.unique(image.people.seen)) <= {1, 2}


def test_write_without_labels(tmp_path: Path) -> None:
    synthetic.write(tmp_path, 3, seed=1, size=64, labelled=False, processes=1)
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["000000.jpg", "000001.jpg", "000002.jpg"]
