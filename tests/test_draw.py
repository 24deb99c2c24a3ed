"""draw.py: what is where in the pictures, by the colours of their pixels; nothing leaks, nothing odd crashes."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from matplotlib._pylab_helpers import Gcf
from PIL import Image

from lcrnet import coco, draw, image
from lcrnet.pose import People, Person
from lcrnet.skeleton import LCR13

J = len(LCR13)


def standing() -> tuple[np.ndarray, np.ndarray]:
    """A person that faces the camera, right arm up and forward (towards the camera): (J, 2) pixels, (J, 3) metres."""
    rows = {"ankle": 0.95, "knee": 0.5, "hip": 0.25, "wrist": 0.2, "elbow": -0.05, "shoulder": -0.25, "head": -0.45}
    pose = np.zeros((J, 3), np.float32)
    for j, name in enumerate(LCR13.joints):
        pose[j, 1] = rows[name[2:] if name != "head" else name]
        pose[j, 0] = {"r_": -0.2, "l_": 0.2}.get(name[:2], 0)
    pose[LCR13.index("r_elbow")], pose[LCR13.index("r_wrist")] = (-0.25, -0.5, -0.3), (-0.25, -0.7, -0.6)
    return 100 * pose[:, :2] + (100, 90), pose


def person(**change: np.ndarray) -> Person:
    pose2d, pose3d = standing()
    box = np.concatenate([pose2d.min(0), pose2d.max(0)])
    return Person(**{**dict(box=box, pose2d=pose2d, pose3d=pose3d, score=0.9, joint_score=np.ones(J), anchor=0,
                            support=3, spread=np.zeros(J)), **change})  # fmt: skip


def people() -> People:
    out = People.empty(1, J)
    out.pose2d[0], out.pose3d[0] = standing()
    out.seen[:], out.has3d[:] = 2, True
    out.box[0] = person().box
    return out


def where(picture: np.ndarray, colour: draw.Colour) -> np.ndarray:
    """(n, 2) x, y of the pixels near a colour."""
    near = np.abs(picture.astype(int) - colour).max(-1) < 40
    return np.argwhere(near)[:, ::-1] + 0.5


GREEN = np.full((200, 200, 3), (0, 120, 0), np.uint8)


# Overlays ------------------------------------------------------------------------------------------------------------


def test_sides_have_their_colours() -> None:
    before = GREEN.copy()
    picture = draw.overlay(GREEN, [person()], LCR13)
    assert (before == GREEN).all() and picture.shape == GREEN.shape and picture.dtype == np.uint8
    right, left = where(picture, draw.RIGHT), where(picture, draw.LEFT)
    assert len(right) > 50 and len(left) > 50
    assert right[:, 0].max() < 85 and left[:, 0].min() > 115
    assert abs(right[:, 1].min() - 20) < 6 and left[:, 1].min() > 55  # the right arm is up
    assert len(where(picture, draw.MIDDLE)) > 50
    assert (draw.overlay(GREEN, people(), LCR13) == picture).all()


@pytest.mark.parametrize("min_side", [0, 600])
def test_a_joint_is_where_it_is(min_side: int) -> None:
    one = people()
    one.seen[:] = 0
    one.seen[0, 0], one.pose2d[0, 0] = 2, (60.25, 70.75)
    picture = draw.overlay(GREEN, one, LCR13, min_side)
    scale = picture.shape[0] / 200
    assert scale == (3 if min_side else 1)
    np.testing.assert_allclose(where(picture, draw.RIGHT).mean(0), scale * np.array([60.25, 70.75]), atol=0.4)


def test_unlabelled_joints_are_not_drawn_and_hidden_ones_hollow() -> None:
    one = people()
    wrist, knee = LCR13.index("l_wrist"), LCR13.index("l_knee")
    one.pose2d *= 5
    one.seen[0, :] = 0
    one.seen[0, wrist], one.seen[0, knee] = 2, 1
    large = np.repeat(np.repeat(GREEN, 5, 0), 5, 1)
    picture = draw.overlay(large, one, LCR13)

    def at(joint: int) -> list[int]:
        x, y = np.floor(one.pose2d[0, joint]).astype(int)
        return picture[y, x].tolist()

    assert at(wrist) == list(draw.LEFT) and at(knee) == [0, 120, 0]
    assert len(where(picture, draw.RIGHT)) == 0
    one.seen[:] = 0
    assert (draw.overlay(large, one, LCR13) == large).all()


def test_overlay_of_odd_people() -> None:
    assert (draw.overlay(GREEN, [], LCR13) == GREEN).all()
    assert (draw.overlay(GREEN, People.empty(0, J), LCR13) == GREEN).all()
    pose2d = standing()[0]
    pose2d[0], pose2d[1] = (1e9, -1e9), np.nan
    draw.overlay(GREEN, [person(pose2d=pose2d)], LCR13)
    assert (draw.overlay(GREEN, [person(pose2d=np.full((J, 2), np.nan))], LCR13) == GREEN).all()
    crowd = people()
    crowd.crowd[:] = True
    picture = draw.overlay(GREEN, crowd, LCR13)
    assert len(where(picture, draw.RIGHT)) == 0 and len(where(picture, draw.GREY)) > 100


def test_several_people_are_numbered() -> None:
    shifted = person(pose2d=standing()[0] + np.float32((60, 0)))
    assert len(where(draw.overlay(GREEN, [person()], LCR13), draw.PAPER)) == 0
    assert len(where(draw.overlay(GREEN, [person(), shifted], LCR13), draw.PAPER)) > 4


# 3D ------------------------------------------------------------------------------------------------------------------


def test_view_of_the_camera() -> None:
    """As in the photograph: the right side on the left, up is up."""
    picture = draw.view3d(standing()[1][None], LCR13, size=(300, 200), turn=0, rise=0)
    assert picture.shape == (300, 200, 3) and picture.dtype == np.uint8
    right, left = where(picture, draw.RIGHT), where(picture, draw.LEFT)
    assert right[:, 0].max() < 100 < left[:, 0].min()
    assert right[:, 1].min() < left[:, 1].min() - 30  # the arm that is up
    assert left[:, 1].max() > 200


def test_view_from_the_side_shows_depth() -> None:
    """The viewer has gone to the right: what is nearer to the camera, the raised arm, is on the left."""
    picture = draw.view3d(standing()[1][None], LCR13, size=(300, 300), turn=90, rise=0)
    arm = where(picture, draw.RIGHT)
    high = arm[arm[:, 1] < arm[:, 1].min() + 15]
    assert high[:, 0].mean() < where(picture, draw.LEFT)[:, 0].mean() - 40


def test_one_scale_for_all_axes() -> None:
    """Bars of 1 m along each axis, seen head on."""
    length = {}
    for axis, turn in ((0, 0), (1, 0), (1, 90), (2, 90)):
        pose = np.zeros((1, J, 3))
        pose[:, LCR13.indices("l_hip", "l_shoulder")] = 0
        pose[:, LCR13.indices("l_ankle", "l_knee"), axis] = [[-0.5, 0.5]]
        seen = where(draw.view3d(pose, LCR13, size=(400, 300), turn=turn, rise=0), draw.LEFT)
        length[axis, turn] = np.ptp(seen, axis=0).max()
    assert np.ptp(list(length.values())) <= 4 and min(length.values()) > 100, length


def test_places_of_people() -> None:
    poses = np.stack([standing()[1]] * 2)
    apart = draw.view3d(poses, LCR13, np.array([[-1.5, 0, 4], [1.5, 0, 4]]), size=(300, 300), turn=0, rise=0)
    columns = np.unique(where(apart, draw.RIGHT)[:, 0])
    assert np.diff(columns).max() > 80 and columns.min() > 5 and columns.max() < 295
    beside = draw.view3d(poses, LCR13, size=(300, 150), turn=60)
    columns = where(beside, draw.RIGHT)[:, 0]
    assert np.diff(np.unique(columns)).max() > 15 and columns.min() > 2 and columns.max() < 148


def test_view_of_nobody_and_of_nonsense() -> None:
    assert (draw.view3d(np.zeros((0, J, 3)), LCR13) == 255).all()
    draw.view3d(np.full((1, J, 3), np.nan), LCR13)


def test_no_figure_stays() -> None:
    draw.view3d(standing()[1][None], LCR13)
    draw.curves({"loss": ([1, 2], [3, 4])})
    assert Gcf.get_num_fig_managers() == 0


# Sheets --------------------------------------------------------------------------------------------------------------


def test_sheet_of_tiles() -> None:
    layers = {"truth": people(), "found": [person()]}
    small = draw.tile(GREEN, {"found": [person()]}, LCR13, height=200)
    one = draw.tile(GREEN, layers, LCR13, "a caption that is much too long for the tile, naïvely cut " * 5, height=200)
    assert small.shape == (200, 200 + 2 * 144, 3)
    assert one.shape[1] == 2 * small.shape[1] and one.shape[0] > 200
    page = draw.sheet([one, one, small], columns=2, gap=4)
    assert page.shape == (one.shape[0] + 200 + 12, 2 * one.shape[1] + 12, 3)
    assert (page[4 : 4 + len(one), 4 : 4 + one.shape[1]] == one).all()
    assert draw.sheet([]).size > 0


def test_tile_of_nobody_and_of_wide_images() -> None:
    wide = np.zeros((50, 1000, 3), np.uint8)
    assert draw.tile(wide, {"found": []}, LCR13, height=100).shape == (100, 200 + 2 * 72, 3)
    no3d = people()
    no3d.has3d[:] = False
    assert draw.tile(GREEN, {"truth": no3d}, LCR13, height=100).shape == (100, 100 + 2 * 72, 3)


def test_24_tiles_in_time() -> None:
    """6 tiles with two layers; 24 are to take less than 15 s."""
    start = time.perf_counter()
    draw.sheet([draw.tile(GREEN, {"truth": people(), "found": [person()]}, LCR13, "x") for _ in range(6)])
    assert time.perf_counter() - start < 15 / 4


def test_curves() -> None:
    picture = draw.curves({"loss": ([0, 10, 20], [3.0, 2.0, np.nan]), "lr": ([0, 20], [0.1, 0.01])}, size=(200, 500))
    assert picture.shape == (200, 500, 3) and len(where(picture, draw.LEFT)) > 100
    assert draw.curves({}).shape == (480, 900, 3)


def test_save(tmp_path: Path) -> None:
    draw.save(GREEN, tmp_path / "a.png")
    draw.save(GREEN[:5], tmp_path / "a.png")
    assert np.asarray(Image.open(tmp_path / "a.png")).tolist() == GREEN[:5].tolist()
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_real_people(shared: Path) -> None:
    data = coco.read(shared / "coco-mini" / "annotations" / "lcrnet_pose.json")
    shot = next(i for i in data.images if i.people.has3d.any() and i.people.crowd.any())
    pixels = image.read(shared / "coco-mini" / "images" / shot.file_name)
    tile = draw.tile(pixels, {"truth": shot.people}, LCR13, shot.file_name)
    assert len(where(tile, draw.RIGHT)) > 100
