"""COCO pose data sets as training batches: order, mixing, batching. `augment` says what becomes of an image.

The order is a pure function of (seed, position): position p of the run shows image `Mix.image(seed, p)`, with the
augmentation of position p. So a run sees the same samples with any number of workers, and resumes by its step: no image
of an epoch comes twice or is left out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lcrnet import coco, image
from lcrnet.augment import augment, resized
from lcrnet.config import Config, UserError
from lcrnet.pose import People
from lcrnet.skeleton import Skeleton

BLOCK = 32
"""Steps whose images `data.group_aspect` sorts among themselves."""


@dataclass(frozen=True)
class Source:
    """A COCO file, the folder that its file names are relative to, and its share of the samples.

    Shares are relative to those of the other sources; without one, its number of images: as if all were one data set.
    """

    annotations: Path
    images: Path
    weight: float | None = None


@dataclass(frozen=True)
class Key:
    """One sample of the run: which image, at which position, at which factor of size."""

    index: int
    position: int
    scale: float


@dataclass
class Sample:
    """image (H, W, 3) RGB, resized and augmented; people in its pixels; the id of the image in its file; the file."""

    image: np.ndarray
    people: People
    id: int
    file: str = ""


@dataclass
class Batch:
    """images (B, 3, H, W), padded; sizes (B, 2) height and width; B people (tensors); B image ids, and files."""

    images: torch.Tensor
    sizes: torch.Tensor
    people: list[People]
    ids: list[int]
    files: list[str] = field(default_factory=list)

    def to(self, device: torch.device) -> Batch:
        """Copied while the host goes on, where memory is pinned."""
        people = [_each(p, partial(torch.Tensor.to, device=device, non_blocking=True)) for p in self.people]
        images, sizes = (t.to(device, non_blocking=True) for t in (self.images, self.sizes))
        return Batch(images, sizes, people, self.ids, self.files)

    def pin_memory(self) -> Batch:
        """What DataLoader calls for `pin_memory`; it knows tensors, and passes on other types as they are."""
        people = [_each(p, torch.Tensor.pin_memory) for p in self.people]
        return Batch(self.images.pin_memory(), self.sizes.pin_memory(), people, self.ids, self.files)


def _each(people: People, change: Any) -> People:
    return People(*(change(getattr(people, f.name)) for f in fields(People)))


def read(source: Source, skeleton: Skeleton, min_joints: int = 0) -> list[coco.CocoImage]:
    """The images of a source with their people; UserError for faults in the file and for images that are missing."""
    found = coco.read(source.annotations, skeleton, min_joints)
    if not source.images.is_dir():
        raise UserError(f"{source.images}: no such folder of images (--images)")
    missing = [i.file_name for i in found.images if not (source.images / i.file_name).is_file()]
    if missing:
        raise UserError(
            f"{source.images}: {len(missing)} of {len(found.images)} images of {source.annotations} are missing: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
        )
    if not found.images:
        raise UserError(f"{source.annotations}: no images in it")
    return found.images


def load(data: Source | Sequence[Source], config: Config, skeleton: Skeleton) -> PoseDataset:
    """The data set of one or several sources, mixed by their weights. UserError for what the user can mend."""
    sources = [data] if isinstance(data, Source) else list(data)
    if not sources:
        raise UserError("no data set to train on (--data)")
    given = [s.weight for s in sources if s.weight is not None]
    if 0 < len(given) < len(sources):
        raise UserError(f"{len(given)} of {len(sources)} data sets have a --weight: give one to each, or to none")
    for source in sources:
        if source.weight is not None and not 0 < source.weight < math.inf:
            raise UserError(
                f"{source.annotations}: --weight {source.weight:g} must be above 0; or leave its --data out"
            )
    parts = [read(source, skeleton, config.data.min_joints) for source in sources]
    folders = [source.images for source, part in zip(sources, parts, strict=True) for _ in part]
    weights = [source.weight or float(len(part)) for source, part in zip(sources, parts, strict=True)]
    images = [entry for part in parts for entry in part]
    return PoseDataset(images, folders, config, skeleton, Mix([len(part) for part in parts], weights))


class Mix:
    """Sources of `counts` images, of which the samples are taken in proportion to `weights`.

    Sample k of a source of share w is due at (k + 1/2) / w, and the samples of all come by what is due first (Webster's
    method): a source's part of any n samples is n w to within 1 + w S for S sources, whatever the seed. Within a source
    its images come epoch by epoch, each in another order.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float]):
        total = math.fsum(weights)
        self.counts, self.shares = list(counts), [weight / total for weight in weights]
        self._orders: dict[int, tuple[tuple[int, int], np.ndarray]] = {}

    def __len__(self) -> int:
        return sum(self.counts)

    def image(self, seed: int, position: int) -> int:
        """The index, among the images of all sources in their order, of what position `position` shows."""
        source, turn = self.turn(position)
        count = self.counts[source]
        epoch = turn // count
        if self._orders.get(source, ((-1, -1),))[0] != (seed, epoch):
            self._orders[source] = (seed, epoch), order(seed, epoch, count, source)
        return sum(self.counts[:source]) + int(self._orders[source][1][turn % count])

    def turn(self, position: int) -> tuple[int, int]:
        """(source, how many samples of it come before) of a position, without those before it."""
        if len(self.shares) == 1:
            return 0, position
        # By the time t each source has had t w samples to within a half, so all together t to within S / 2.
        time = position - len(self.shares)
        had = []
        for share in self.shares:
            count = max(0, math.floor(time * share))
            while (count + 0.5) / share < time:
                count += 1
            while count and (count - 0.5) / share >= time:
                count -= 1
            had.append(count)
        while True:
            source = min(range(len(had)), key=lambda s: (had[s] + 0.5) / self.shares[s])
            if sum(had) == position:
                return source, had[source]
            had[source] += 1


def order(seed: int, epoch: int, count: int, source: int = 0) -> np.ndarray:
    """(count,) the order of the images of a source in an epoch."""
    return np.random.default_rng([seed, epoch, 1] + [source] * (source > 0)).permutation(count)


class PoseDataset(Dataset[Sample]):
    """Samples by key, of images below a folder (or one each); `mix` says which comes when, without it all alike."""

    def __init__(
        self, images: list[coco.CocoImage], folder: Path | Sequence[Path], config: Config, skeleton: Skeleton,
        mix: Mix | None = None,
    ):  # fmt: skip
        self.images, self.config, self.skeleton = images, config, skeleton
        self.folders = [folder] * len(images) if isinstance(folder, Path) else folder
        self.mix = mix or Mix([len(images)], [1.0])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> Sample:
        entry = self.images[key.index]
        path = self.folders[key.index] / entry.file_name
        try:
            pixels, people = self._read(path, entry, key.scale)
        except image.Unreadable as error:
            raise UserError(f"{path}: {error}; take image {entry.id} out of the data set") from None
        pixels, people = augment(pixels, people, key.position, key.scale, self.config, self.skeleton)
        return Sample(pixels, people, entry.id, str(path))

    def _read(self, path: Path, entry: coco.CocoImage, scale: float) -> tuple[np.ndarray, People]:
        """The pixels of a file and its people in them; with data.decode reduced at 1/2, 1/4 or 1/8 of its size."""
        data, size = image.read_bytes(path), self.config.image
        if self.config.data.decode == "exact":
            pixels = image.decode(data)
            height, width = pixels.shape[:2]
        else:
            # What a crop takes is enlarged the more.
            enlarged = scale / (1 - self.config.data.crop)
            factor = image.factor((entry.height, entry.width), size.short_side * enlarged, size.max_side * enlarged)
            pixels = image.decode(data, at_least=factor)
            height, width = pixels.shape[:2]
            if (height, width) != (entry.height, entry.width):
                height, width = image.size(data)
        if (height, width) != (entry.height, entry.width):
            raise UserError(
                f"{path}: {width} x {height} pixels upright, but image {entry.id} says {entry.width} x {entry.height}"
            )
        people = entry.people
        if pixels.shape[:2] != (height, width):  # libjpeg rounds sides up, and places are exact: x / 2, x / 4, x / 8
            part = 2.0 ** -round(math.log2(max(height, width) / max(pixels.shape[:2])))
            people = resized(people, np.array([part, part]))
        return pixels, people


class Steps(Sampler[list[Key]]):
    """The samples of worker `rank` of `world`, step by step from step `start` to the last.

    All images of a step are taken at one factor of size, so that a batch needs no padding beyond its shapes'.
    aspects (n,): width / height of the images, where images of like shape are to share a batch.
    """

    def __init__(
        self, config: Config, mix: Mix, rank: int, world: int, start: int, aspects: Sequence[float] | None = None
    ):
        self.config, self.mix, self.rank, self.world, self.start = config.train, mix, rank, world, start
        self.log_scale, self.grow = np.log(config.data.scale), config.data.grow
        self.aspects = None if aspects is None else np.asarray(aspects)
        self._sorted: tuple[int, np.ndarray] = (-1, np.zeros(0))

    def __len__(self) -> int:
        return self.config.steps - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        seed = self.config.seed
        share = self.config.batch // self.world
        for step in range(self.start, self.config.steps):
            scale = float(np.exp(np.random.default_rng([seed, step, 2]).uniform(*self.log_scale)))
            if self.grow:  # small images teach the coarse things sooner (progressive resizing, Howard 2018)
                scale *= self.grow + (1 - self.grow) * min(1, 2 * step / self.config.steps)
            mine = self.positions(step)[self.rank * share : (self.rank + 1) * share]
            yield [Key(self.mix.image(seed, p), p, scale) for p in mine]

    def positions(self, step: int) -> list[int]:
        """The positions of the run that a step shows, those of one worker after those of another."""
        batch = self.config.batch
        positions = np.arange(step * batch, (step + 1) * batch)
        if self.aspects is not None:
            positions = self._alike(step)
        elif len(self.mix.counts) == 1:
            return positions.tolist()
        # Sources come in turns and shapes in order: unshuffled, one worker might always have the same ones.
        return np.random.default_rng([self.config.seed, step, 6]).permutation(positions).tolist()

    def _alike(self, step: int) -> np.ndarray:
        """The step's part of its BLOCK of steps, whose positions are sorted by the shape of their images, cut into
        batches, and these shuffled. Each position of the block is shown once, so an image still comes once an epoch.
        """
        seed, batch, block = self.config.seed, self.config.batch, step // BLOCK
        if self._sorted[0] != block:
            first, last = block * BLOCK, min((block + 1) * BLOCK, self.config.steps)
            positions = np.arange(first * batch, last * batch)
            shapes = cast(np.ndarray, self.aspects)[[self.mix.image(seed, p) for p in positions.tolist()]]
            batches = positions[np.argsort(shapes, kind="stable")].reshape(-1, batch)
            self._sorted = block, np.random.default_rng([seed, block, 7]).permutation(batches)
        return self._sorted[1][step - block * BLOCK]


def collate(samples: list[Sample], multiple: int) -> Batch:
    """Samples -> one padded batch; people become tensors."""
    pixels, sizes = image.stack([s.image for s in samples], multiple)
    people = [s.people.tensors() for s in samples]
    return Batch(pixels, sizes, people, [s.id for s in samples], [s.file for s in samples])


def loader(dataset: PoseDataset, rank: int, world: int, start: int) -> Iterator[Batch]:
    """Batches of worker `rank` of `world` from step `start` on, decoded by `data.loaders` processes ahead of time."""
    config = dataset.config
    count = config.data.loaders
    aspects = [entry.width / entry.height for entry in dataset.images] if config.data.group_aspect else None
    options: dict[str, Any] = {"prefetch_factor": 4, "persistent_workers": False} if count else {}
    batches: DataLoader[Batch] = DataLoader(
        cast(Dataset[Any], dataset),
        batch_sampler=Steps(config, dataset.mix, rank, world, start, aspects),
        num_workers=count,
        collate_fn=partial(collate, multiple=config.image.multiple),
        pin_memory=config.train.gpu,
        worker_init_fn=_quiet,
        **options,
    )
    # OpenCV's pool of threads does not outlive a fork: a process that then asks for one thread waits for it for ever.
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    ahead = iter(batches)
    cv2.setNumThreads(threads)
    try:
        yield from ahead
    except UserError as error:  # that of a loader process comes with its traceback before it
        error.__traceback__ = None  # the frames in it keep the loader processes
        raise UserError(str(error).rpartition(f"{UserError.__name__}: ")[2].strip()) from None


def _quiet(_: int) -> None:
    """A loader is one process beside others: no threads of its own, and Ctrl-C belongs to the parent."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
