"""COCO pose data sets as training batches: order, augmentation, batching.

The order is a pure function of (seed, position): position p of the run shows image `order(p // n)[p % n]` of n, with
the augmentation of position p. So a run sees the same samples with any number of workers, and resumes by its step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lcrnet import coco, image
from lcrnet.config import Config, UserError
from lcrnet.pose import People, mirror2d, mirror3d
from lcrnet.skeleton import Skeleton


@dataclass(frozen=True)
class Source:
    """A COCO file and the folder that its file names are relative to."""

    annotations: Path
    images: Path


@dataclass(frozen=True)
class Key:
    """One sample of the run: which image, at which position, at which factor of size."""

    index: int
    position: int
    scale: float


@dataclass
class Sample:
    """image (H, W, 3) uint8 RGB, resized and augmented; people in its pixels; the id of the image in its file."""

    image: np.ndarray
    people: People
    id: int


@dataclass
class Batch:
    """images (B, 3, H, W) uint8, padded; sizes (B, 2) height and width; B people (tensors); B image ids."""

    images: torch.Tensor
    sizes: torch.Tensor
    people: list[People]
    ids: list[int]

    def to(self, device: torch.device) -> Batch:
        people = [p.tensors(device) for p in self.people]
        return Batch(self.images.to(device, non_blocking=True), self.sizes.to(device), people, self.ids)


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


class PoseDataset(Dataset[Sample]):
    """Samples by key."""

    def __init__(self, images: list[coco.CocoImage], folder: Path, config: Config, skeleton: Skeleton):
        self.images, self.folder, self.config, self.skeleton = images, folder, config, skeleton

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> Sample:
        entry = self.images[key.index]
        path = self.folder / entry.file_name
        try:
            pixels = image.read(path)
        except image.Unreadable as error:
            raise UserError(f"{path}: {error}; take image {entry.id} out of the data set") from None
        if pixels.shape[:2] != (entry.height, entry.width):
            height, width = pixels.shape[:2]
            raise UserError(
                f"{path}: {width} x {height} pixels upright, but image {entry.id} says {entry.width} x {entry.height}"
            )
        return augment(pixels, entry.people, key, self.config, self.skeleton, entry.id)


def augment(
    pixels: np.ndarray, people: People, key: Key, config: Config, skeleton: Skeleton, image_id: int = 0
) -> Sample:
    """The sample of an image (H, W, 3) uint8 and its people: resized, perhaps mirrored, perhaps recoloured."""
    rng = np.random.default_rng([config.train.seed, key.position])
    size = config.image
    short, longest = round(size.short_side * key.scale), round(size.max_side * key.scale)
    pixels, factor = image.resize(pixels, short, longest, size.resize)
    scale = factor.astype(np.float32)
    people = people.copy()
    people.box, people.pose2d = people.box * np.tile(scale, 2), people.pose2d * scale
    people.area = people.area * scale.prod()
    if rng.random() < config.data.flip:
        # About the middle of the pixels there are: coordinates are exact, only the border is rounded to whole pixels.
        width = pixels.shape[1]
        pixels = np.ascontiguousarray(pixels[:, ::-1])
        people.box = np.stack(
            [width - people.box[:, 2], people.box[:, 1], width - people.box[:, 0], people.box[:, 3]], 1
        )
        people.pose2d = mirror2d(people.pose2d, width, skeleton)
        people.pose3d = mirror3d(people.pose3d, skeleton)
        people.seen = people.seen[:, skeleton.mirror]
    if config.data.colour:
        pixels = recolour(pixels, rng, config.data.colour)
    return Sample(pixels, people, image_id)


def recolour(pixels: np.ndarray, rng: np.random.Generator, amount: float) -> np.ndarray:
    """Random brightness, contrast and balance of the colours, each at most `amount` away from 1."""
    gain = rng.uniform(1 - amount, 1 + amount) * rng.uniform(1 - amount / 2, 1 + amount / 2, 3)
    shift = rng.uniform(-amount, amount) * 64
    if pixels.dtype != np.uint8:
        return np.clip(pixels * gain + shift, 0, 255).astype(pixels.dtype)
    table = np.clip(np.arange(256)[:, None] * gain + shift, 0, 255).astype(np.uint8)
    return cv2.LUT(pixels, table[None])


@lru_cache(maxsize=2)
def order(seed: int, epoch: int, count: int) -> np.ndarray:
    """(count,) the order of the images in an epoch."""
    return np.random.default_rng([seed, epoch, 1]).permutation(count)


class Steps(Sampler[list[Key]]):
    """The samples of worker `rank` of `world`, step by step from step `start` to the last.

    All images of a step are taken at one factor of size, so that a batch needs no padding beyond its shapes'.
    """

    def __init__(self, config: Config, count: int, rank: int, world: int, start: int):
        self.config, self.count, self.rank, self.world, self.start = config.train, count, rank, world, start
        self.log_scale, self.grow = np.log(config.data.scale), config.data.grow

    def __len__(self) -> int:
        return self.config.steps - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        seed, batch = self.config.seed, self.config.batch
        share = batch // self.world
        for step in range(self.start, self.config.steps):
            scale = float(np.exp(np.random.default_rng([seed, step, 2]).uniform(*self.log_scale)))
            if self.grow:  # small images teach the coarse things sooner (progressive resizing, Howard 2018)
                scale *= self.grow + (1 - self.grow) * min(1, 2 * step / self.config.steps)
            first = step * batch + self.rank * share
            yield [
                Key(int(order(seed, p // self.count, self.count)[p % self.count]), p, scale)
                for p in range(first, first + share)
            ]


def collate(samples: list[Sample], multiple: int) -> Batch:
    """Samples -> one padded batch; people become tensors."""
    pixels, sizes = image.stack([s.image for s in samples], multiple)
    return Batch(pixels, sizes, [s.people.tensors() for s in samples], [s.id for s in samples])


def loader(dataset: PoseDataset, rank: int, world: int, start: int) -> Iterator[Batch]:
    """Batches of worker `rank` of `world` from step `start` on, decoded by `data.loaders` processes ahead of time."""
    config = dataset.config
    count = config.data.loaders
    options: dict[str, Any] = {"prefetch_factor": 4, "persistent_workers": False} if count else {}
    batches: DataLoader[Batch] = DataLoader(
        cast(Dataset[Any], dataset),
        batch_sampler=Steps(config, len(dataset), rank, world, start),
        num_workers=count,
        collate_fn=partial(collate, multiple=config.image.multiple),
        pin_memory=config.train.gpu,
        worker_init_fn=_quiet,
        **options,
    )
    try:
        yield from batches
    except UserError as error:  # that of a loader process comes with its traceback before it
        error.__traceback__ = None  # the frames in it keep the loader processes
        raise UserError(str(error).rpartition(f"{UserError.__name__}: ")[2].strip()) from None


def _quiet(_: int) -> None:
    """A loader is one process beside others: no threads of its own, and Ctrl-C belongs to the parent."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
