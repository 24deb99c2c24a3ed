"""Augmentation of training images for pose: pixels, boxes, 2D and 3D poses of a sample change together.

In this order: a random window, the size, a turn of the image, its mirror image, patches over people, colour. What is
drawn depends on (train.seed, position) alone, each kind by a generator of its own: to switch one on leaves the others.
The 3D pose never changes with the size or the window: it is in metres, its origin the torso's.
"""

from __future__ import annotations

import cv2
import numpy as np

from lcrnet import image
from lcrnet.config import Config
from lcrnet.pose import People, clip, mirror2d, mirror3d
from lcrnet.skeleton import Skeleton

KEPT = 0.25
"""Of whose box less than this part is left in the frame is an ignored region: nobody would label so little."""
PATCH = (0.2, 0.5)
"""Sides of a patch, in parts of the sides of the person's box: three quarters of a person stay in sight."""


def augment(
    pixels: np.ndarray, people: People, position: int, scale: float, config: Config, skeleton: Skeleton
) -> tuple[np.ndarray, People]:
    """The sample at a position of the run, `scale` times the size of `config.image`, of an image (H, W, 3) and its
    people; both are left as they are.
    """
    seed, size, data = config.train.seed, config.image, config.data
    rng = np.random.default_rng([seed, position])
    window, turn, patch = (np.random.default_rng([seed, position, kind]) for kind in (3, 4, 5))
    people = people.copy()
    if data.crop:
        pixels, people = crop(pixels, people, data.crop, window, data.min_joints)
    pixels, factor = image.resize(pixels, round(size.short_side * scale), round(size.max_side * scale), size.resize)
    people = resized(people, factor)
    if data.rotate:
        fill = [255 * mean for mean in size.mean]  # what is 0 to the network
        pixels, people = rotate(pixels, people, turn.uniform(-data.rotate, data.rotate), fill, data.min_joints)
    if rng.random() < data.flip:
        pixels, people = flip(pixels, people, skeleton)
    if data.occlude:
        pixels, people = occlude(pixels, people, data.occlude, patch)
    if data.colour:
        pixels = recolour(pixels, rng, data.colour)
    return pixels, people


def resized(people: People, factor: np.ndarray) -> People:
    """People of an image whose sides were multiplied by `factor` (2,), along x and y."""
    scale = factor.astype(np.float32)
    people = people.copy()
    people.box, people.pose2d = people.box * np.tile(scale, 2), people.pose2d * scale
    people.area = people.area * scale.prod()
    return people


def flip(pixels: np.ndarray, people: People, skeleton: Skeleton) -> tuple[np.ndarray, People]:
    """The mirror image: left and right joints change names, x of the 3D poses its sign."""
    # About the middle of the pixels there are: coordinates are exact, only the border is rounded to whole pixels.
    width, people = pixels.shape[1], people.copy()
    people.box = np.stack([width - people.box[:, 2], people.box[:, 1], width - people.box[:, 0], people.box[:, 3]], 1)
    people.pose2d = mirror2d(people.pose2d, width, skeleton)
    people.pose3d = mirror3d(people.pose3d, skeleton)
    people.seen = people.seen[:, skeleton.mirror]
    return np.ascontiguousarray(pixels[:, ::-1]), people


def crop(
    pixels: np.ndarray, people: People, most: float, rng: np.random.Generator, min_joints: int
) -> tuple[np.ndarray, People]:
    """A random window of whole pixels, of the image's proportions, its sides shorter by at most the part `most`."""
    height, width = pixels.shape[:2]
    part = rng.uniform(1 - most, 1)
    h, w = max(1, round(height * part)), max(1, round(width * part))
    x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    before, people, corner = _inside(people, height, width), people.copy(), np.array([x, y], np.float32)
    people.box, people.pose2d = people.box - np.tile(corner, 2), people.pose2d - corner
    return np.ascontiguousarray(pixels[y : y + h, x : x + w]), _framed(people, before, h, w, min_joints)


def rotate(
    pixels: np.ndarray, people: People, degrees: float, fill: list[float], min_joints: int
) -> tuple[np.ndarray, People]:
    """The image turned clockwise about its middle, in a frame of the same size; what comes into it is `fill`, RGB.

    A camera that rolls about its optical axis turns x and y of all that it sees, so the 3D poses turn by that angle.
    The middle need not be the principal point: a turn about another point differs by a shift, as a crop does.
    """
    height, width = pixels.shape[:2]
    middle = np.array([width, height]) / 2
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    matrix = np.array([[cos, -sin], [sin, cos]])  # y points down: clockwise as seen
    centre = middle - 0.5  # OpenCV counts from the centre of the first pixel
    affine = np.concatenate([matrix, (centre - matrix @ centre)[:, None]], 1)
    pixels = cv2.warpAffine(
        pixels, affine, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=fill
    )
    before, people = _inside(people, height, width), people.copy()
    box = people.box.astype(np.float64)
    # What of the body was in sight: the joints in the box.
    low, high = box[:, None, :2], box[:, None, 2:]
    held = (people.seen > 0) & ((people.pose2d >= low) & (people.pose2d <= high)).all(-1)
    people.pose2d = ((people.pose2d - middle) @ matrix.T + middle).astype(np.float32)
    people.pose3d = people.pose3d.copy()
    people.pose3d[..., :2] = (people.pose3d[..., :2] @ matrix.T).astype(people.pose3d.dtype)
    people.box = _turned_boxes(box, people.pose2d, held, people.crowd, matrix, middle).astype(np.float32)
    return pixels, _framed(people, before, height, width, min_joints)


def _turned_boxes(
    box: np.ndarray, pose2d: np.ndarray, held: np.ndarray, crowd: np.ndarray, matrix: np.ndarray, middle: np.ndarray
) -> np.ndarray:
    """(P, 4) boxes round what boxes (P, 4) hold, turned.

    The box of a turned box is too large: nothing is in its corners. A body is taken for the ellipse in its box, which
    is right without a turn and at every quarter; with its joints (P, J, 2), turned already, of which it held `held`;
    within the turned box. Of an ignored region nothing is known, so all of it.
    """
    centre = ((box[:, :2] + box[:, 2:]) / 2 - middle) @ matrix.T + middle
    half = (box[:, 2:] - box[:, :2]) / 2
    ellipse, whole = np.sqrt(half**2 @ (matrix**2).T), half @ np.abs(matrix).T
    low = np.minimum(centre - ellipse, np.where(held[..., None], pose2d, np.inf).min(1, initial=np.inf))
    high = np.maximum(centre + ellipse, np.where(held[..., None], pose2d, -np.inf).max(1, initial=-np.inf))
    low = np.where(crowd[:, None], centre - whole, np.maximum(low, centre - whole))
    high = np.where(crowd[:, None], centre + whole, np.minimum(high, centre + whole))
    return np.concatenate([low, high], 1)


def _inside(people: People, height: float, width: float) -> np.ndarray:
    """(P, J) joints within the image."""
    return ((people.pose2d >= 0) & (people.pose2d <= np.array([width, height]))).all(-1)


def _framed(people: People, before: np.ndarray, height: int, width: int, min_joints: int) -> People:
    """People after the frame has changed, with `before` (P, J) the joints within it till then.

    Boxes are cut to it. Joints outside stay known, and count as hidden: the network is to say where they are. People
    with little of their box left, or with fewer labelled joints in it than a person needs, become ignored regions, as
    they would be in a file of that image; those without anything in it are gone.
    """
    labelled, inside = people.seen > 0, _inside(people, height, width)
    cut = clip(people.box, height, width)
    sides = cut[:, 2:] - cut[:, :2]
    left = sides.prod(1) / np.maximum((people.box[:, 2:] - people.box[:, :2]).prod(1), 1e-6)
    needed = np.minimum((labelled & before).sum(1), min_joints)
    people.crowd = people.crowd | (left < KEPT) | ((labelled & inside).sum(1) < needed)
    people.seen = np.where(inside, people.seen, np.minimum(people.seen, 1))
    people.box, people.area = cut, people.area * left.clip(0, 1).astype(np.float32)
    return people[(sides >= 1).all(1)]


def occlude(pixels: np.ndarray, people: People, share: float, rng: np.random.Generator) -> tuple[np.ndarray, People]:
    """A patch of random texture over a part of each person, with the probability `share`; joints under it are hidden.

    Textures, not pieces of photographs: those hold people and limbs, and nobody has labelled them there.
    """
    pixels, people = pixels.copy(), people.copy()
    height, width = pixels.shape[:2]
    hidden = np.zeros((height, width), np.uint8)
    for box in people.box[~people.crowd]:
        if rng.random() >= share:
            continue
        side = (box[2:] - box[:2]) * rng.uniform(*PATCH, 2)
        centre = rng.uniform(box[:2] + side / 2, box[2:] - side / 2)
        cells = rng.integers(0, 256, (*rng.integers(1, 9, 2), 3), np.uint8)
        round_one = rng.random() < 0.5
        low = np.floor(centre - side / 2).astype(int).clip(0, [width - 1, height - 1])
        high = np.ceil(centre + side / 2).astype(int).clip(low + 1, [width, height])
        (x1, y1), (x2, y2) = low.tolist(), high.tolist()
        mask = np.zeros((y2 - y1, x2 - x1), np.uint8)
        if round_one:
            cv2.ellipse(mask, (centre - low).round().astype(int).tolist(), (side / 2).astype(int).tolist(),
                        0, 0, 360, 255, -1)  # fmt: skip
        else:
            mask[:] = 255
        texture = cv2.resize(cells, (x2 - x1, y2 - y1), interpolation=cv2.INTER_CUBIC)
        pixels[y1:y2, x1:x2][mask > 0] = texture[mask > 0]
        hidden[y1:y2, x1:x2] |= mask
    at = np.floor(people.pose2d).astype(np.int64).clip(0, [width - 1, height - 1])
    under = _inside(people, height, width) & (hidden[at[..., 1], at[..., 0]] > 0)
    people.seen = np.where(under, np.minimum(people.seen, 1), people.seen)
    return pixels, people


def recolour(pixels: np.ndarray, rng: np.random.Generator, amount: float) -> np.ndarray:
    """Random brightness, contrast and balance of the colours, each at most `amount` away from 1."""
    gain = rng.uniform(1 - amount, 1 + amount) * rng.uniform(1 - amount / 2, 1 + amount / 2, 3)
    shift = rng.uniform(-amount, amount) * 64
    if pixels.dtype != np.uint8:
        return np.clip(pixels * gain + shift, 0, 255).astype(pixels.dtype)
    table = np.clip(np.arange(256)[:, None] * gain + shift, 0, 255).astype(np.uint8)
    return cv2.LUT(pixels, table[None])
