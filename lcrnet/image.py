"""Image files -> upright RGB pixels, and the one rule of resizing: the same for training and labelling.

    pixels = read("photo.jpg")                                      # (H, W, 3) uint8 RGB
    small, scale = resize(pixels, short_side=800, max_side=1333)    # (x, y) of pixels is (x, y) * scale of small

Whatever is no whole picture (text, a cut file, a bomb, a folder) is `Unreadable`, with the reason in a few words.
"""

from __future__ import annotations

import glob
import io
import math
import os
import stat
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePath

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from lcrnet.config import UserError

MAX_PIXELS = 100_000_000
"""Pictures of more pixels are refused, by their header, before any pixel is decoded."""

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .bmp .dib .gif .tif .tiff .webp .avif .jp2 .ppm .pgm .pbm .pnm .heic .heif"
    .split()
)  # fmt: skip
"""What a folder of images is searched for. HEIC, which we cannot decode, becomes a recorded fact, not a silent loss."""

# Only plain pixel formats: Pillow would also run Ghostscript on an EPS that is named .jpg. JPEG includes MPO.
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM")


class Unreadable(ValueError):
    """Not a whole picture; the message is a short reason."""


def is_image_name(name: str | os.PathLike[str]) -> bool:
    """Whether a file of this name is taken for a picture: by its suffix, in upper or lower case."""
    return PurePath(name).suffix.lower() in IMAGE_SUFFIXES


def find(paths: Sequence[str]) -> tuple[dict[str, str], Counter[str]]:
    """The image files (by name) of folders with all below them, of files, and of glob patterns.

    -> {absolute path: "" or why it cannot be read}, in order; how many other files of each suffix there are.
    Links are followed; a folder is entered once. UserError if a path does not exist, or there is no image at all.
    """
    found: dict[str, str] = {}
    others: Counter[str] = Counter()
    for given in paths:
        if "://" in given:
            raise UserError(f"{given}: only folders that every machine mounts are read")
        matches = [given] if os.path.lexists(given) else glob.glob(given, recursive=True)
        if not matches:
            raise UserError(f"{given}: no such file or folder")
        for file in (f for match in matches for f in _walk(os.path.abspath(match))):
            if is_image_name(file):
                # A label table holds text; a name that is none must not stop the rest.
                text = os.fsencode(file).decode("utf-8", "backslashreplace")
                found[text] = "" if text == file else "file name is not UTF-8"
            else:
                others[PurePath(file).suffix.lower() or "no suffix"] += 1
    if not found:
        but = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
        raise UserError(f"{', '.join(paths)}: no image there{f' (but {but})' if but else ''}")
    return dict(sorted(found.items())), others


def _walk(path: str) -> Iterator[str]:
    """A file itself, or the files of a folder and all below it."""
    rest, entered = [path], set()
    while rest:
        path = rest.pop()
        if not os.path.isdir(path):  # also a link to nowhere or to itself
            yield path
        elif (real := os.path.realpath(path)) not in entered:
            entered.add(real)
            try:
                rest += sorted((os.path.join(path, name) for name in os.listdir(path)), reverse=True)
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The picture of a file as `decode` gives it; Unreadable as well for what cannot be opened or is no plain file."""
    return decode(read_bytes(path, max_pixels), max_pixels)


def read_bytes(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> bytes:
    """The encoded bytes of a file; Unreadable for folders, pipes, dangling links, and more bytes than pixels need."""
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):  # opening a pipe would wait for ever
            raise Unreadable("a folder" if stat.S_ISDIR(info.st_mode) else "not a plain file")
        if info.st_size > 8 * max_pixels + 2**24:  # 8 bytes a pixel: RGBA of 16 bits, not compressed
            raise Unreadable(f"file of {info.st_size} bytes is too large for {max_pixels} pixels")
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise Unreadable((error.strerror or str(error)).lower()) from None


def decode(data: bytes, max_pixels: int = MAX_PIXELS, at_least: float = 1) -> np.ndarray:
    """An encoded picture -> (H, W, 3) uint8 RGB, writable, upright (EXIF orientation applied).

    Of an animation the first frame; 16 bit grey is scaled to 8; what is transparent is laid over white, as viewers
    show it. Raises Unreadable for anything that is no whole picture of at most `max_pixels` pixels (nor more than
    Pillow's own limit of 2 * PIL.Image.MAX_IMAGE_PIXELS); nothing is decoded before its size is known.

    at_least  below 1: a JPEG may come at 1/2, 1/4 or 1/8 of its size, sides rounded up, but not below this factor: what
              libjpeg does in the frequency domain, and far sooner. Pixels are not those of decoding and `resize`
    """
    with _opened(data, max_pixels) as image:
        if at_least < 1:
            image.draft(None, (math.ceil(image.width * at_least), math.ceil(image.height * at_least)))
        image.load()
        try:
            ImageOps.exif_transpose(image, in_place=True)
        except Exception:  # broken EXIF says nothing about the picture
            pass
        if image.mode == "F":
            raise Unreadable("floating point pixels have no agreed range")
        if image.mode.startswith("I"):  # I;16, I;16B, and I of a PGM: 16 bits
            grey = np.asarray(image)
            if grey.min() < 0 or grey.max() > 65535:
                raise Unreadable("32 bit pixels have no agreed range")
            return np.repeat(((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            white = Image.new("RGBA", rgba.size, "white")
            return np.array(Image.alpha_composite(white, rgba).convert("RGB"))
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def size(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of an encoded picture, upright, as far as its header tells without decoding: for planning.

    Raises Unreadable as `decode` does, but for what only decoding shows (a cut file, an orientation behind the pixels).
    """
    with _opened(data, max_pixels) as image:
        width, height = image.size
        # Pillow has turned a TIFF's size already, and would decode a PNG to look for EXIF.
        turned = image.format in ("JPEG", "MPO", "WEBP") and image.getexif().get(274, 1) >= 5
        return (width, height) if turned else (height, width)


@contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """The picture with its header read; what goes wrong here or within becomes Unreadable."""
    if not data:
        raise Unreadable("empty file")
    Image.init()  # loads the plugins, once
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bombs and broken metadata: what matters of them ends in Unreadable
            with Image.open(io.BytesIO(data), formats=[f for f in _FORMATS if f in Image.OPEN]) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise Unreadable(f"{width} x {height} is more than {max_pixels} pixels")
                yield image
    except Unreadable:
        raise
    except UnidentifiedImageError:
        raise Unreadable("not an image of a known format") from None
    except Image.DecompressionBombError:
        raise Unreadable(f"more than {max_pixels} pixels") from None
    except Exception as error:  # Pillow's plugins raise whatever broken bytes lead to: struct.error, SyntaxError, ...
        raise Unreadable(f"broken image: {' '.join(str(error).split()) or type(error).__name__}"[:200]) from None


def resize(image: np.ndarray, short_side: int, max_side: int, rule: str = "area") -> tuple[np.ndarray, np.ndarray]:
    """(H, W, 3) uint8 -> (the image times `scale`, scale (2,) along x and y), so that its short side is `short_side`,
    unless the long side would pass `max_side`.

    Continuous pixel coordinates (the corner of the image is 0, 0) times `scale` are those of the result exactly; only
    its border is rounded to whole pixels, and no side below 1.

    rule  area: linear when enlarging, area average when shrinking, uint8
          detectron: always linear, float32 (prep_im_for_blob there)
          torchvision: always linear, float32, sides rounded down, with a factor each (GeneralizedRCNNTransform)
    """
    height, width = image.shape[:2]
    scale = factor((height, width), short_side, max_side)
    if rule == "torchvision":
        size = max(1, int(height * scale)), max(1, int(width * scale))
        planes = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
        out = torch.nn.functional.interpolate(planes, size, mode="bilinear", align_corners=False)
        return out[0].permute(1, 2, 0).numpy(), np.array([size[1] / width, size[0] / height])
    if rule == "detectron":
        image = image.astype(np.float32)
        scale = short_side / min(height, width)
        if np.round(scale * max(height, width)) > max_side:
            scale = max_side / max(height, width)
    both = np.array([scale, scale])
    if scale == 1:
        return image, both
    how = cv2.INTER_AREA if scale < 1 and rule == "area" else cv2.INTER_LINEAR
    if min(height, width) * scale < 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        return cv2.resize(image, size, interpolation=how), both
    # By factor, not by size: OpenCV would take size / old size for the factor, a different one for each axis.
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=how), both


def factor(size: tuple[int, int], short_side: float, max_side: float) -> float:
    """How much larger an image of that height and width becomes by `resize`."""
    return min(short_side / min(size), max_side / max(size))


def padded(size: Sequence[int], multiple: int) -> tuple[int, ...]:
    """Sides rounded up to whole multiples of the network's stride."""
    return tuple(-(-side // multiple) * multiple for side in size)


def stack(images: Sequence[np.ndarray], multiple: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (H, W, 3) of one type -> one batch (B, 3, H', W') of it, padded with 0 on the right and below (`padded`),
    and their sizes (B, 2) int64 (height, width).
    """
    sizes = torch.tensor([image.shape[:2] for image in images])
    height, width = padded(sizes.max(0).values.tolist(), multiple)
    batch = torch.zeros(len(images), height, width, 3, dtype=torch.from_numpy(images[0][:0]).dtype)
    for slot, image in zip(batch, images, strict=True):
        slot[: image.shape[0], : image.shape[1]] = torch.from_numpy(image)
    return batch.permute(0, 3, 1, 2), sizes
