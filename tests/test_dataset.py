"""Samples: which, in what order, augmented how, and what is said of images that are no good."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from lcrnet import coco, config, dataset, image, synthetic
from lcrnet.coco import CocoImage
from lcrnet.config import Config, UserError
from lcrnet.dataset import Key, PoseDataset, Source, Steps, augment
from lcrnet.pose import People, mirror2d, mirror3d
from lcrnet.skeleton import LCR13


def settings(**fields: Any) -> Config:
    """64-pixel images, nothing random, nothing in other processes; `section__field=value` changes that."""
    values: dict[str, dict[str, Any]] = {
        "image": {"short_side": 128, "max_side": 128}, "data": {"flip": 0, "scale": [1, 1], "loaders": 0},
        "train": {"batch": 8, "steps": 6},
    }  # fmt: skip
    for name, value in fields.items():
        section, _, field = name.partition("__")
        values[section][field] = value
    return config.from_dict(values)


def test_order() -> None:
    orders = [dataset.order(0, epoch, 50) for epoch in range(3)] + [dataset.order(1, 0, 50)]
    assert all(sorted(o) == list(range(50)) for o in orders)
    assert len({tuple(o) for o in orders}) == 4
    assert (dataset.order(0, 0, 50) == orders[0]).all()


def keys(world: int, rank: int, start: int = 0, **fields: Any) -> list[list[Key]]:
    return list(Steps(settings(**fields), 11, rank, world, start))


@pytest.mark.parametrize("world", [2, 4])
def test_workers_share_the_batches_of_one(world: int) -> None:
    alone = keys(1, 0, data__scale=[0.5, 2])
    each = [keys(world, rank, data__scale=[0.5, 2]) for rank in range(world)]
    assert len(alone) == 6
    for step, batch in enumerate(alone):
        assert [key for rank in range(world) for key in each[rank][step]] == batch


def test_every_image_once_an_epoch() -> None:
    """Also where an epoch ends within a batch."""
    shown = [key.index for batch in keys(1, 0) for key in batch]
    assert [k.position for batch in keys(1, 0) for k in batch] == list(range(48))
    for first in (0, 11, 22, 33):
        assert sorted(shown[first : first + 11]) == list(range(11))
    assert len({tuple(shown[first : first + 11]) for first in (0, 11, 22, 33)}) == 4, "in another order each time"
    assert keys(1, 0, train__seed=1) != keys(1, 0)


def test_resuming_gives_the_rest() -> None:
    for rank in range(2):
        assert keys(2, rank, start=4, data__scale=[0.5, 2]) == keys(2, rank, data__scale=[0.5, 2])[4:]
    assert len(Steps(settings(), 11, 0, 1, 4)) == 2 == len(keys(1, 0, 4))


def test_size_jitter() -> None:
    """One factor a step, within its limits, as often halved as doubled."""
    batches = keys(1, 0, data__scale=[0.5, 2], train__steps=200)
    factors = np.array([[key.scale for key in batch] for batch in batches])
    assert (factors == factors[:, :1]).all()
    assert 0.5 <= factors.min() < 0.55 and 1.8 < factors.max() <= 2
    assert abs(np.log2(factors[:, 0]).mean()) < 0.1
    assert all(key.scale == 1 for batch in keys(1, 0) for key in batch)


def test_images_grow() -> None:
    """From a part of their size to all of it at half the run, and no further; not without `grow`."""
    factors = [batch[0].scale for batch in keys(1, 0, data__grow=0.5, train__steps=40)]
    assert factors[0] == 0.5 and factors[10] == pytest.approx(0.75) and factors[20:] == [1] * 20
    assert factors[:20] == sorted(set(factors[:20]))


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
        got = augment(shot, people, Key(0, 5, scale), asked, LCR13, 7)
        assert got.id == 7 and abs(got.image.shape[1] - scale * 90) < 1
        for j in range(13):
            x, y = got.people.pose2d[0, j].astype(int)
            source = LCR13.mirror[j] if flip else j
            assert own(got.image[y, x]) == source, (LCR13.joints[j], flip)
            assert got.people.seen[0, j] == people.seen[0, source]
            expected = people.pose3d[0, source] * ([-1, 1, 1] if flip else [1, 1, 1])
            np.testing.assert_allclose(got.people.pose3d[0, j], expected)
        width = got.image.shape[1]
        exact = round(70 * scale) / 70  # sides are whole pixels
        x1, y1, x2, y2 = people.box[0] * exact
        box = [width - x2, y1, width - x1, y2] if flip else [x1, y1, x2, y2]
        np.testing.assert_allclose(got.people.box[0], box, rtol=1e-5)
        assert got.people.area[0] == pytest.approx(100 * exact**2)


def test_mirrored_drawing() -> None:
    shot, people = next(d for d in (synthetic.draw(s, 128, 75) for s in range(9)) if len(d[1]) > 1)
    before = people.copy()
    got = augment(shot, people, Key(0, 0, 1.0), settings(data__flip=1), LCR13)
    assert np.array_equal(got.image, shot[:, ::-1]) and got.image.flags["C_CONTIGUOUS"]
    np.testing.assert_allclose(got.people.pose2d, mirror2d(people.pose2d, 128, LCR13))
    np.testing.assert_allclose(got.people.pose3d, mirror3d(people.pose3d, LCR13))
    np.testing.assert_allclose(got.people.box[:, [2, 1, 0, 3]], people.box * [-1, 1, -1, 1] + [128, 0, 128, 0])
    assert all(np.array_equal(v, getattr(before, k)) for k, v in people.__dict__.items()), "the data set is untouched"


def test_augmentation_is_that_of_the_position() -> None:
    shot, people = synthetic.draw(1, 128, 75)
    asked = settings(data__flip=0.5, data__colour=0.3)
    samples = [augment(shot, people, Key(0, p, 1.0), asked, LCR13) for p in range(40)]
    again = augment(shot, people, Key(0, 17, 1.0), asked, LCR13)
    assert np.array_equal(samples[17].image, again.image) and np.array_equal(samples[17].people.box, again.people.box)
    assert len({s.image.tobytes() for s in samples}) == 40
    flipped = sum(not np.array_equal(s.people.box, people.box) for s in samples)
    assert 8 < flipped < 32
    other = settings(data__flip=0.5, data__colour=0.3, train__seed=1)
    assert not np.array_equal(augment(shot, people, Key(0, 17, 1.0), other, LCR13).image, again.image)


def test_recolour() -> None:
    grey = np.full((4, 4, 3), 100, np.uint8)
    rng = np.random.default_rng(0)
    new = np.stack([dataset.recolour(grey, rng, 0.2)[0, 0] for _ in range(100)]).astype(float)
    assert new.std(0).min() > 3 and np.abs(new - 100).max() < 100 * (1.2 * 1.1 - 1) + 0.2 * 64 + 1
    assert np.array_equal(dataset.recolour(grey, rng, 0), grey)


def test_read(drawn: Path) -> None:
    images = dataset.read(Source(drawn / "annotations.json", drawn / "images"), LCR13)
    assert len(images) == 12 and any(len(i.people) == 0 for i in images), "images without people are there"
    samples = PoseDataset(images, drawn / "images", settings(), LCR13)
    assert len(samples) == 12
    got = samples[Key(3, 0, 1.0)]
    assert got.id == images[3].id and got.image.shape == (128, 128, 3)
    np.testing.assert_array_equal(got.people.pose2d, images[3].people.pose2d)


def test_missing_images(drawn: Path, tmp_path: Path) -> None:
    file = drawn / "annotations.json"
    with pytest.raises(UserError, match=r"nowhere: no such folder of images"):
        dataset.read(Source(file, tmp_path / "nowhere"), LCR13)
    for i in range(3):
        (tmp_path / f"{i:06d}.jpg").touch()
    with pytest.raises(UserError, match=r"9 of 12 images .*annotations\.json are missing: 000003\.jpg, .*, \.\.\.$"):
        dataset.read(Source(file, tmp_path), LCR13)
    coco.write(tmp_path / "none.json", [])
    with pytest.raises(UserError, match=r"none\.json: no images in it"):
        dataset.read(Source(tmp_path / "none.json", tmp_path), LCR13)


@pytest.fixture
def spoilt(tmp_path: Path) -> Iterator[PoseDataset]:
    """An image of another size than its entry, one that is none, one that is not there."""
    cv2.imwrite(str(tmp_path / "turned.png"), np.zeros((40, 60, 3), np.uint8))
    (tmp_path / "text.jpg").write_text("no image")
    names = ["turned.png", "text.jpg", "gone.jpg"]
    images = [CocoImage(i + 1, name, 40, 60, None, People.empty(0, 13)) for i, name in enumerate(names)]
    yield PoseDataset(images, tmp_path, settings(train__batch=1), LCR13)


SPOILT = [
    (0, r"turned\.png: 60 x 40 pixels upright, but image 1 says 40 x 60$"),
    (1, r"text\.jpg: not an image of a known format; take image 2 out of the data set$"),
    (2, r"gone\.jpg: .*[Nn]o such file.*; take image 3 out of the data set$"),
]


@pytest.mark.parametrize(("index", "says"), SPOILT)
def test_images_that_are_no_good(index: int, says: str, spoilt: PoseDataset) -> None:
    with pytest.raises(UserError, match=says):
        spoilt[Key(index, 0, 1.0)]


def test_a_loader_process_says_the_same_in_one_line(spoilt: PoseDataset) -> None:
    spoilt.images = spoilt.images[1:2]
    for loaders in (0, 1):
        spoilt.config = settings(train__batch=1, data__loaders=loaders)
        with pytest.raises(UserError, match=SPOILT[1][1]) as error:
            next(dataset.loader(spoilt, 0, 1, 0))
        assert "\n" not in str(error.value)


def test_collate() -> None:
    """Padded with zeros on the right and below, to a whole multiple of the stride."""
    shots = [np.full((30, 50, 3), 9, np.uint8), np.full((65, 20, 3), 7, np.uint8)]
    people = [People.empty(2, 13), People.empty(0, 13)]
    batch = dataset.collate(
        [dataset.Sample(s, p, i + 5) for i, (s, p) in enumerate(zip(shots, people, strict=True))], 16
    )
    assert batch.images.shape == (2, 3, *image.padded((65, 50), 16)) and batch.images.dtype == torch.uint8
    assert image.padded((16, 17), 16) == (16, 32)
    assert batch.sizes.tolist() == [[30, 50], [65, 20]] and batch.ids == [5, 6]
    for shot, padded in zip(shots, batch.images, strict=True):
        height, width = shot.shape[:2]
        assert torch.equal(padded[:, :height, :width].permute(1, 2, 0), torch.from_numpy(shot))
        assert int(padded.sum()) == int(shot.sum()), "zeros elsewhere"
    assert [len(p) for p in batch.people] == [2, 0] and isinstance(batch.people[0].box, torch.Tensor)
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.images, batch.images) and moved.ids == [5, 6]


def test_loader(drawn: Path) -> None:
    """Batches of a worker from a step on are those of the whole run, decoded here or in another process."""
    images = dataset.read(Source(drawn / "annotations.json", drawn / "images"), LCR13)

    def batches(rank: int, world: int, start: int, loaders: int = 0) -> list[dataset.Batch]:
        asked = settings(data__flip=0.5, data__colour=0.2, data__loaders=loaders, train__batch=4, train__steps=4)
        return list(dataset.loader(PoseDataset(images, drawn / "images", asked, LCR13), rank, world, start))

    whole = batches(0, 1, 0)
    assert len(whole) == 4 and len(whole[0].ids) == 4
    assert sorted(i for batch in whole[:3] for i in batch.ids) == list(range(1, 13))
    for rank, loaders in ((0, 0), (1, 1)):
        for mine, all_of_it in zip(batches(rank, 2, 2, loaders), whole[2:], strict=True):
            mine_of_it = slice(2 * rank, 2 * rank + 2)
            assert mine.ids == all_of_it.ids[mine_of_it]
            assert torch.equal(mine.images, all_of_it.images[mine_of_it])
            for a, b in zip(mine.people, all_of_it.people[mine_of_it], strict=True):
                assert torch.equal(a.pose2d, b.pose2d)


def test_read_of_the_loader_is_that_of_the_labeller(drawn: Path) -> None:
    """One way to decode for training and for labelling."""
    images = dataset.read(Source(drawn / "annotations.json", drawn / "images"), LCR13)
    sample = PoseDataset(images, drawn / "images", settings(), LCR13)[Key(0, 0, 1.0)]
    assert np.array_equal(sample.image, image.read(drawn / "images" / images[0].file_name))
