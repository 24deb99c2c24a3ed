"""Augmentation: pixels, boxes, 2D and 3D poses change together; each kind is off by default."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lcrnet import config, synthetic
from lcrnet.augment import KEPT, augment, crop, occlude, recolour, rotate
from lcrnet.camera import Camera, place
from lcrnet.config import Config
from lcrnet.pose import People, centre, mirror2d, mirror3d
from lcrnet.skeleton import LCR13

BLACK = [0.0, 0.0, 0.0]


def settings(**fields: Any) -> Config:
    """128-pixel images, nothing random; `section__field=value` changes that."""
    values: dict[str, dict[str, Any]] = {
        "image": {"short_side": 128, "max_side": 128}, "data": {"flip": 0, "scale": [1, 1]}, "train": {},
    }  # fmt: skip
    for name, value in fields.items():
        section, _, field = name.partition("__")
        values[section][field] = value
    return config.from_dict(values)


def spots(width: int = 90, height: int = 70) -> tuple[np.ndarray, People]:
    """An image with a spot of its own colour at every joint of one person."""
    rng = np.random.default_rng(0)
    people = People.empty(1, 13)
    grid = np.stack(np.meshgrid(np.arange(8, width - 8, 16), np.arange(8, height - 8, 16)), -1).reshape(-1, 2)
    people.pose2d[0] = rng.permutation(grid)[:13]
    people.pose3d[:] = rng.normal(size=(1, 13, 3))
    people.seen[0] = np.arange(13) % 3
    people.box[0], people.area[:] = [5, 6, 60, 65], 100
    shot = np.zeros((height, width, 3), np.uint8)
    for j, (x, y) in enumerate(people.pose2d[0].astype(int)):
        shot[y - 4 : y + 4, x - 4 : x + 4] = COLOURS[j]
    return shot, people


COLOURS = np.random.default_rng(1).permutation(np.arange(60, 256, 15)).astype(np.uint8)[:, None].repeat(3, 1)


def own(of: np.ndarray) -> int:
    """Which of COLOURS a pixel has."""
    return int(np.abs(COLOURS[:, 0].astype(int) - int(of[0])).argmin())


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.75])
def test_mirrored_and_resized_people_stay_on_their_pixels(scale: float) -> None:
    """Each joint lies on its spot; mirrored, the left wrist lies on what was the spot of the right one."""
    shot, people = spots()
    assert len(np.unique(COLOURS)) == len(COLOURS) >= 13
    for flip in (0, 1):
        asked = settings(data__flip=flip, image__short_side=70, image__max_side=90)
        image, got = augment(shot, people, 5, scale, asked, LCR13)
        assert abs(image.shape[1] - scale * 90) < 1
        for j in range(13):
            x, y = got.pose2d[0, j].astype(int)
            source = LCR13.mirror[j] if flip else j
            assert own(image[y, x]) == source, (LCR13.joints[j], flip)
            assert got.seen[0, j] == people.seen[0, source]
            expected = people.pose3d[0, source] * ([-1, 1, 1] if flip else [1, 1, 1])
            np.testing.assert_allclose(got.pose3d[0, j], expected)
        width = image.shape[1]
        exact = round(70 * scale) / 70  # sides are whole pixels
        x1, y1, x2, y2 = people.box[0] * exact
        box = [width - x2, y1, width - x1, y2] if flip else [x1, y1, x2, y2]
        np.testing.assert_allclose(got.box[0], box, rtol=1e-5)
        assert got.area[0] == pytest.approx(100 * exact**2)


def test_mirrored_drawing() -> None:
    shot, people = next(d for d in (synthetic.draw(s, 128, 75) for s in range(9)) if len(d[1]) > 1)
    before = people.copy()
    image, got = augment(shot, people, 0, 1.0, settings(data__flip=1), LCR13)
    assert np.array_equal(image, shot[:, ::-1]) and image.flags["C_CONTIGUOUS"]
    np.testing.assert_allclose(got.pose2d, mirror2d(people.pose2d, 128, LCR13))
    np.testing.assert_allclose(got.pose3d, mirror3d(people.pose3d, LCR13))
    np.testing.assert_allclose(got.box[:, [2, 1, 0, 3]], people.box * [-1, 1, -1, 1] + [128, 0, 128, 0])
    assert all(np.array_equal(v, getattr(before, k)) for k, v in people.__dict__.items()), "the data set is untouched"


def test_augmentation_is_that_of_the_position() -> None:
    shot, people = synthetic.draw(1, 128, 75)
    asked = settings(data__flip=0.5, data__colour=0.3)
    samples = [augment(shot, people, p, 1.0, asked, LCR13) for p in range(40)]
    again = augment(shot, people, 17, 1.0, asked, LCR13)
    assert np.array_equal(samples[17][0], again[0]) and np.array_equal(samples[17][1].box, again[1].box)
    assert len({pixels.tobytes() for pixels, _ in samples}) == 40
    flipped = sum(not np.array_equal(p.box, people.box) for _, p in samples)
    assert 8 < flipped < 32
    other = settings(data__flip=0.5, data__colour=0.3, train__seed=1)
    assert not np.array_equal(augment(shot, people, 17, 1.0, other, LCR13)[0], again[0])


def test_recolour() -> None:
    grey = np.full((4, 4, 3), 100, np.uint8)
    rng = np.random.default_rng(0)
    new = np.stack([recolour(grey, rng, 0.2)[0, 0] for _ in range(100)]).astype(float)
    assert new.std(0).min() > 3 and np.abs(new - 100).max() < 100 * (1.2 * 1.1 - 1) + 0.2 * 64 + 1
    assert np.array_equal(recolour(grey, rng, 0), grey)


def test_off_by_default() -> None:
    """Each at 0 draws nothing that another gets: the samples of before there was any of them."""
    data = config.from_dict({}).data
    assert (data.crop, data.rotate, data.occlude, data.group_aspect, data.decode) == (0, 0, 0, False, "exact")
    shot, people = synthetic.draw(1, 128, 75)
    plain = [augment(shot, people, p, 1.0, settings(data__flip=0.5), LCR13) for p in range(20)]
    others = settings(data__flip=0.5, data__occlude=1)
    for (pixels, was), p in zip(plain, range(20), strict=True):
        patched, now = augment(shot, people, p, 1.0, others, LCR13)
        np.testing.assert_array_equal(now.pose2d, was.pose2d)
        assert not np.array_equal(patched, pixels)
        rng = np.random.default_rng([0, p])
        assert np.array_equal(was.box, people.box) == (rng.random() >= 0.5), "the flip is that of (seed, position)"


def test_quarter_turns() -> None:
    """One is what NumPy calls one, four are none: pixels, boxes, 2D and 3D."""
    shot, people = spots(96, 96)
    pixels, once = rotate(shot, people, 90, BLACK, 4)
    assert np.array_equal(pixels, np.rot90(shot, -1))
    for j in range(13):
        x, y = once.pose2d[0, j].astype(int)
        assert own(pixels[y, x]) == j, LCR13.joints[j]
    for _ in range(3):
        pixels, once = rotate(pixels, once, 90, BLACK, 4)
    assert np.array_equal(pixels, shot)
    for name, value in people.__dict__.items():
        np.testing.assert_allclose(getattr(once, name), value, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("degrees", [-30.0, 7.0, 45.0, 120.0])
def test_turned_people_stay_on_their_pixels(degrees: float) -> None:
    """Each joint on its spot, under its own name; the box holds the joints that were in it; bones keep their length."""
    shot, people = spots(200, 160)
    pixels, got = rotate(shot, people, degrees, BLACK, 1)
    inside = ((got.pose2d[0] > 4) & (got.pose2d[0] < [196, 156])).all(-1)
    assert inside.sum() > 5
    for j in np.flatnonzero(inside):
        x, y = got.pose2d[0, j].astype(int)
        assert own(pixels[y, x]) == j
    held = (people.seen[0] > 0) & ((people.pose2d[0] > [5, 6]) & (people.pose2d[0] < [60, 65])).all(-1) & inside
    joints = got.pose2d[0, held]
    assert (joints >= got.box[0, :2] - 1e-3).all() and (joints <= got.box[0, 2:] + 1e-3).all()
    length = [np.linalg.norm(p.pose3d[:, 0] - p.pose3d[:, 5], axis=-1) for p in (people, got)]
    np.testing.assert_allclose(*length, rtol=1e-5)
    np.testing.assert_allclose(got.pose3d[..., 2], people.pose3d[..., 2])


@pytest.mark.parametrize("degrees", [25.0, -70.0])
def test_3d_turns_with_the_image(degrees: float) -> None:
    """A person before a camera: the turned 3D pose, placed by the turned 2D pose, is seen at the turned 2D pose; with
    the 3D pose left as it was it is not. Also after a crop, which moves the principal point.
    """
    rng = np.random.default_rng(3)
    camera = Camera((300.0, 300.0), (100.0, 80.0))
    people = People.empty(1, 13)
    people.pose3d[0] = centre(rng.normal(0, 0.3, (13, 3)), LCR13)
    people.pose2d[0] = camera.project(people.pose3d[0] + [0.2, 0.1, 4])
    people.seen[:], people.box[0], people.area[:] = 2, [0, 0, 200, 160], 1
    shot = np.zeros((160, 200, 3), np.uint8)
    _, cut = crop(shot, people, 0.3, np.random.default_rng(1), 1)
    shift = cut.pose2d[0, 0] - people.pose2d[0, 0]
    window, got = rotate(np.zeros((120, 150, 3), np.uint8), cut, degrees, BLACK, 1)
    assert window.shape == (120, 150, 3) and len(got) == 1
    turn = np.radians(degrees)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    c = matrix @ (np.array(camera.c) + shift - [75, 60]) + [75, 60]
    moved = Camera(camera.f, (float(c[0]), float(c[1])))

    def off(pose3d: np.ndarray) -> float:
        at = place(got.pose2d[0], pose3d, moved)
        return float(np.abs(moved.project(pose3d + at) - got.pose2d[0]).max())

    assert off(got.pose3d[0]) < 0.01 < 5 < off(people.pose3d[0])
    np.testing.assert_allclose(place(got.pose2d[0], got.pose3d[0], moved)[2], 4, atol=1e-3)


def test_crop() -> None:
    """Joints on their spots, those outside known but hidden; the proportions of the image; 3D as it was."""
    shot, people = spots(180, 140)
    people.box[0] = [10, 20, 170, 130]
    sizes = set()
    for seed in range(20):
        pixels, got = crop(shot, people, 0.4, np.random.default_rng(seed), 1)
        height, width = pixels.shape[:2]
        sizes.add((height, width))
        assert 0.6 * 140 - 1 <= height <= 140 and abs(width / height - 180 / 140) < 0.02
        assert (got.box >= 0).all() and (got.box <= [width, height, width, height]).all()
        np.testing.assert_array_equal(got.pose3d, people.pose3d)
        part = (got.box[0, 2:] - got.box[0, :2]).prod() / (160 * 110)
        assert got.area[0] == pytest.approx(100 * part, rel=1e-4)
        for j in range(13):
            x, y = got.pose2d[0, j]
            inside = 0 <= x <= width and 0 <= y <= height
            assert got.seen[0, j] == (people.seen[0, j] if inside else min(people.seen[0, j], 1))
            if 4 < x < width - 4 and 4 < y < height - 4:
                assert own(pixels[int(y), int(x)]) == j
    assert len(sizes) > 10


def test_people_that_a_crop_leaves_little_of() -> None:
    """Gone, an ignored region, or a person, by what is left of the box and of the joints."""
    people = People.empty(4, 13)
    people.box[:] = [[0, 0, 10, 10], [-60, 40, 20, 90], [20, 20, 60, 90], [20, 20, 60, 90]]
    people.seen[:], people.area[:] = 2, 100
    people.pose2d[:] = [30, 30]
    people.pose2d[3] = [150, 30]
    shot = np.zeros((200, 200, 3), np.uint8)

    class Corner(np.random.Generator):
        """The window from (12, 0) on, half as large as the image."""

        def uniform(self, *_: Any) -> Any:
            return 0.5

        def integers(self, high: Any, *_: Any, **__: Any) -> Any:
            self.calls = getattr(self, "calls", 0) + 1
            return 12 if self.calls == 1 else 0

    _, got = crop(shot, people, 0.5, Corner(np.random.PCG64(0)), 4)
    assert len(got) == 3 and got.crowd.tolist() == [True, False, True]
    assert 8 / 80 < KEPT and got.area.tolist() == pytest.approx([10, 100, 100])
    assert not people.crowd.any() and people.box[0, 2] == 10, "the data set is untouched"


def test_occlude() -> None:
    """Patches lie on people; just the joints under them become hidden; nothing else changes, nor does the input."""
    shot, people = next(d for d in (synthetic.draw(s, 128, 75) for s in range(9)) if len(d[1]) > 1)
    people.seen[:, 0] = 0
    kept, before = shot.copy(), people.copy()
    hidden = 0
    for seed in range(20):
        pixels, got = occlude(shot, people, 1, np.random.default_rng(seed))
        changed = (pixels != shot).any(-1)
        assert changed.any() and changed.mean() < 0.5
        y, x = np.nonzero(changed)
        near = [(x >= b[0] - 1) & (x <= b[2] + 1) & (y >= b[1] - 1) & (y <= b[3] + 1) for b in people.box]
        assert np.any(near, axis=0).all(), "on people only"
        for p, j in np.argwhere(got.seen != people.seen):
            assert (people.seen[p, j], got.seen[p, j]) == (2, 1)
            px, py = people.pose2d[p, j].astype(int)
            assert changed[max(py - 1, 0) : py + 2, max(px - 1, 0) : px + 2].any()
            hidden += 1
        for name in ("box", "pose2d", "pose3d", "area", "crowd"):
            np.testing.assert_array_equal(getattr(got, name), getattr(people, name))
    assert hidden > 5
    assert np.array_equal(shot, kept) and all(np.array_equal(v, getattr(before, k)) for k, v in people.__dict__.items())
    assert np.array_equal(occlude(shot, people, 0, np.random.default_rng(0))[0], shot)


@pytest.mark.parametrize("rule", ["area", "detectron", "torchvision"])
def test_all_at_once(rule: str) -> None:
    """Any image, also without people, in any rule of resizing: boxes in the frame, the same again at its position."""
    asked = settings(image__resize=rule, data__flip=0.5, data__crop=0.4, data__rotate=40, data__occlude=0.7,
                     data__colour=0.3)  # fmt: skip
    for p in range(12):
        shot, people = synthetic.draw(p, 128, 75)
        if p == 0:
            people = People.empty(0, 13)
        pixels, got = augment(shot, people, p, 1.2, asked, LCR13)
        height, width = pixels.shape[:2]
        assert pixels.dtype == (np.uint8 if rule == "area" else np.float32) and min(height, width) >= 150
        assert (got.box >= 0).all() and (got.box <= [width, height, width, height]).all()
        assert all(len(v) == len(got) and v.dtype == getattr(people, k).dtype for k, v in got.__dict__.items())
        again = augment(shot, people, p, 1.2, asked, LCR13)
        assert np.array_equal(again[0], pixels) and np.array_equal(again[1].pose3d, got.pose3d)
