"""Samples: which, in what order, from which source, and what is said of images that are no good."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory

from lcrnet import coco, config, dataset, image
from lcrnet.coco import CocoImage
from lcrnet.config import Config, UserError
from lcrnet.dataset import BLOCK, Key, Mix, PoseDataset, Source, Steps
from lcrnet.pose import People
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
    orders = [dataset.order(0, epoch, 50) for epoch in range(3)] + [dataset.order(1, 0, 50), dataset.order(0, 0, 50, 1)]
    assert all(sorted(o) == list(range(50)) for o in orders)
    assert len({tuple(o) for o in orders}) == 5
    assert (dataset.order(0, 0, 50) == orders[0]).all()


ALONE = Mix([11], [1])


def keys(world: int, rank: int, start: int = 0, **fields: Any) -> list[list[Key]]:
    return list(Steps(settings(**fields), ALONE, rank, world, start))


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
    assert len(Steps(settings(), ALONE, 0, 1, 4)) == 2 == len(keys(1, 0, 4))


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


def seen(mix: Mix, positions: int, seed: int = 0) -> list[int]:
    return [mix.image(seed, p) for p in range(positions)]


def test_one_source_is_as_ever() -> None:
    """The first positions of a run of before there were several sources; its checkpoints go on."""
    assert seen(Mix([11], [3]), 25) == [int(dataset.order(0, p // 11, 11)[p % 11]) for p in range(25)]
    assert seen(ALONE, 11) == [int(i) for i in np.random.default_rng([0, 0, 1]).permutation(11)]


@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [1, 2, 7], [0.001, 1], [1 / 3, 1 / 3, 1 / 3, 1e-9], [1] * 9])
def test_a_mix_is_exact_over_any_window(weights: list[float]) -> None:
    mix = Mix([5] * len(weights), weights)
    turns = [mix.turn(p) for p in range(3000)]
    for s in range(len(weights)):
        assert [turn for source, turn in turns if source == s] == list(range(sum(source == s for source, _ in turns)))
        had = np.cumsum([0] + [source == s for source, _ in turns])
        for window in (1, 7, 100, 1000):
            off = had[window:] - had[:-window] - window * mix.shares[s]
            assert np.abs(off).max() <= 1 + len(weights) * mix.shares[s] + 1e-6
    far = Mix([5] * len(weights), weights).turn(10**9 + 7)  # at once, without those before it
    assert abs(far[1] - (10**9 + 7) * mix.shares[far[0]]) < len(weights)


def test_epochs_of_each_source() -> None:
    """Whatever its share, each image of a source once before any of them again."""
    mix = Mix([4, 30], [1, 2])
    shown = seen(mix, 600)
    small, large = [i for i in shown if i < 4], [i - 4 for i in shown if i >= 4]
    assert (len(small), len(large)) == (200, 400)
    for images, count in ((small, 4), (large, 30)):
        epochs = [images[n : n + count] for n in range(0, len(images) - count + 1, count)]
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 3
    assert [seen(mix, 600)[p] for p in (599, 3, 400)] == [mix.image(0, p) for p in (599, 3, 400)], "in any order"


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("counts", [[50], [13, 40]])
def test_restarts_with_other_workers_skip_and_repeat_nothing(counts: list[int], grouped: bool) -> None:
    """A run of several legs, each with another number of workers, shows what the uninterrupted run shows, each image
    of an epoch once, and each step's batch is the same.
    """
    asked = settings(train__steps=100, train__batch=12, data__scale=[0.8, 1.25])
    aspects = list(np.random.default_rng(0).choice([0.66, 0.75, 1.33, 1.5], sum(counts))) if grouped else None

    def leg(first: int, last: int, world: int) -> list[list[Key]]:
        ranks = [list(Steps(asked, Mix(counts, [1] * len(counts)), r, world, first, aspects)) for r in range(world)]
        return [[key for rank in ranks for key in rank[n]] for n in range(last - first)]

    whole = leg(0, 100, 1)
    assert leg(0, 7, 2) + leg(7, 40, 4) + leg(40, 41, 3) + leg(41, 100, 6) == whole
    keys = sorted((key for step in whole for key in step), key=lambda key: key.position)
    assert [key.position for key in keys] == list(range(1200)), "each position once"
    first = 0
    for count in counts:
        mine = [key.index - first for key in keys if first <= key.index < first + count]
        for epoch in range(len(mine) // count):
            assert sorted(mine[epoch * count : (epoch + 1) * count]) == list(range(count))
        first += count


def test_images_of_like_shape_share_a_batch() -> None:
    """All but one batch a block are of one orientation; both orientations come in every part of the run."""
    aspects = [0.75, 1.5] * 200
    asked = settings(train__steps=2 * BLOCK + 5, train__batch=8)
    steps = Steps(asked, Mix([400], [1]), 0, 1, 0, aspects)
    wide = np.array([[aspects[key.index] > 1 for key in batch] for batch in steps])
    mixed = ~(wide.all(1) | ~wide.any(1))
    for first in range(0, len(wide), BLOCK):
        assert mixed[first : first + BLOCK].sum() <= 1
    assert 0.3 < wide[:BLOCK].mean() < 0.7 and (np.diff(wide[:BLOCK, 0].astype(int)) != 0).sum() > 5, "in turns"
    loose = np.array([[aspects[key.index] > 1 for key in b] for b in Steps(asked, Mix([400], [1]), 0, 1, 0)])
    assert (~(loose.all(1) | ~loose.any(1))).mean() > 0.9


def test_no_worker_has_one_source_for_itself() -> None:
    """With two sources in turns and two workers of one image, the first is not always the first source's."""
    mine = [batch[0].index // 10 for batch in Steps(settings(train__steps=40, train__batch=2), Mix([10, 10], [1, 1]),
                                                    0, 2, 0)]  # fmt: skip
    assert 8 < sum(mine) < 32


def test_load(drawn: Path, tmp_path: Path) -> None:
    """Several sources, each with its folder; samples are of the right file, and by weight."""
    first = Source(drawn / "annotations.json", drawn / "images")
    few = [replace(image, file_name=f"images/{image.file_name}") for image in dataset.read(first, LCR13)[:3]]
    coco.write(tmp_path / "few.json", few)
    second = Source(tmp_path / "few.json", drawn)
    both = dataset.load([first, second], settings(), LCR13)
    assert len(both) == 15 and both.mix.shares == [0.8, 0.2] and len(dataset.load(first, settings(), LCR13)) == 12
    got = both[Key(13, 0, 1.0)]
    assert got.file == str(drawn / "images" / "000001.jpg") and np.array_equal(got.image, both[Key(1, 0, 1.0)].image)
    weighed = dataset.load([replace(first, weight=1.0), replace(second, weight=3.0)], settings(), LCR13)
    ids = [i for batch in dataset.loader(weighed, 0, 1, 0) for i in batch.files]
    assert len(ids) == 48 and weighed.mix.shares == [0.25, 0.75]
    assert sum(Steps(settings(), weighed.mix, 0, 1, 0).mix.image(0, p) >= 12 for p in range(48)) == 36
    for wrong, says in (
        ([], "no data set"), ([first, replace(second, weight=2.0)], "1 of 2 data sets have a --weight"),
        ([replace(first, weight=0.0)], r"annotations\.json: --weight 0 must be above 0"),
        ([replace(first, weight=float("nan"))], "--weight nan"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            dataset.load(wrong, settings(), LCR13)


def photo(path: Path, width: int, height: int, orientation: int = 1) -> CocoImage:
    """A JPEG with soft content, stored so that it is `width` x `height` upright, and a person on it."""
    rng = np.random.default_rng(0)
    shot = cv2.resize(rng.integers(0, 256, (9, 12, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    stored = Image.fromarray(shot if orientation == 1 else np.rot90(shot))  # 6: to be turned clockwise
    exif = Image.Exif()
    exif[274] = orientation
    stored.save(path, quality=95, exif=exif)
    people = People.empty(1, 13)
    people.pose2d[0], people.seen[:] = rng.uniform(0, [width, height], (13, 2)), 2
    people.box[0], people.area[:] = [10, 20, width - 30, height - 5], width * height / 2
    return CocoImage(1, path.name, width, height, None, people)


@pytest.mark.parametrize("size", [(1001, 763), (640, 480), (763, 1001), (130, 129)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_reduced_decoding_keeps_places(size: tuple[int, int], orientation: int, tmp_path: Path) -> None:
    """The same picture to within its soft edges, the same places to within rounding, whatever libjpeg rounds up."""
    entry = photo(tmp_path / "a.jpg", *size, orientation)
    exact, reduced = (
        PoseDataset([entry], tmp_path, settings(data__decode=how), LCR13)[Key(0, 0, 1.0)]
        for how in ("exact", "reduced")
    )
    assert np.abs(np.subtract(exact.image.shape, reduced.image.shape)).max() <= 1
    height, width = np.minimum(exact.image.shape, reduced.image.shape)[:2]
    off = np.abs(exact.image[:height, :width].astype(int) - reduced.image[:height, :width])
    assert off.mean() < 3
    assert np.abs(exact.people.pose2d - reduced.people.pose2d).max() < 1
    assert np.abs(exact.people.box - reduced.people.box).max() < 1
    assert reduced.people.area[0] == pytest.approx(exact.people.area[0], rel=0.02)
    raw = image.decode((tmp_path / "a.jpg").read_bytes(), at_least=128 / max(size))
    assert min(size) < 2 * 129 or raw.shape[0] < size[1], "it was decoded at less"


def test_reduced_decoding_still_checks_sizes(tmp_path: Path) -> None:
    entry = replace(photo(tmp_path / "a.jpg", 1000, 800), width=2000, height=1600)
    with pytest.raises(UserError, match=r"1000 x 800 pixels upright, but image 1 says 2000 x 1600"):
        PoseDataset([entry], tmp_path, settings(data__decode="reduced"), LCR13)[Key(0, 0, 1.0)]
    Image.new("RGB", (500, 400)).save(tmp_path / "a.png")  # no JPEG: as it is
    same = replace(entry, file_name="a.png", width=500, height=400)
    assert PoseDataset([same], tmp_path, settings(data__decode="reduced"), LCR13)[Key(0, 0, 1.0)].image.shape[1] == 128


def test_pinned_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """DataLoader leaves objects that are no tensors unpinned unless they say how."""
    pinned: list[int] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: pinned.append(id(self)) or self.clone())
    shots = [dataset.Sample(np.full((8, 8, 3), 9, np.uint8), People.empty(n, 13), n, "x") for n in (2, 0)]
    batch = dataset.collate(shots, 16)
    got = pin_memory(batch)
    assert isinstance(got, dataset.Batch) and got is not batch and len(pinned) == 2 + 2 * 8
    assert torch.equal(got.images, batch.images) and (got.ids, got.files) == ([2, 0], ["x", "x"])
    assert [len(p) for p in got.people] == [2, 0]


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
    spoilt.images, spoilt.mix = spoilt.images[1:2], Mix([1], [1])
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
            assert mine.files == all_of_it.files[mine_of_it] and len(mine.files) == 2
            for a, b in zip(mine.people, all_of_it.people[mine_of_it], strict=True):
                assert torch.equal(a.pose2d, b.pose2d)


def test_loaders_start_after_threads_of_opencv(drawn: Path) -> None:
    """Its pool does not outlive a fork; a loader that touches it hangs."""
    images = dataset.read(Source(drawn / "annotations.json", drawn / "images"), LCR13)
    before = cv2.getNumThreads()
    for _ in range(5):
        cv2.resize(np.zeros((1500, 1500, 3), np.uint8), (700, 700), interpolation=cv2.INTER_CUBIC)
        asked = settings(data__loaders=2, train__batch=4, train__steps=2, image__short_side=100)
        assert len(list(dataset.loader(PoseDataset(images, drawn / "images", asked, LCR13), 0, 1, 0))) == 2
    assert cv2.getNumThreads() == before


def test_read_of_the_loader_is_that_of_the_labeller(drawn: Path) -> None:
    """One way to decode for training and for labelling."""
    images = dataset.read(Source(drawn / "annotations.json", drawn / "images"), LCR13)
    sample = PoseDataset(images, drawn / "images", settings(), LCR13)[Key(0, 0, 1.0)]
    assert np.array_equal(sample.image, image.read(drawn / "images" / images[0].file_name))
