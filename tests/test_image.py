"""Any image file -> upright RGB, or Unreadable with a reason; the resize rule."""

from __future__ import annotations

import io
import json
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lcrnet.config import UserError
from lcrnet.image import Unreadable, decode, find, is_image_name, read, read_bytes, resize, size


def picture(height: int = 24, width: int = 40) -> np.ndarray:
    """Red grows to the right, green downwards, blue constant: every corner is known by its colour."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns * 255 // (width - 1), rows * 255 // (height - 1), np.full_like(rows, 90)], -1).astype(
        np.uint8
    )


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_hostile_files_come_out_as_expected(shared: Path) -> None:
    entries = json.loads((shared / "hostile" / "expected.json").read_text())["files"]
    assert len(entries) == 12
    for entry in entries:
        path = shared / "hostile" / "images" / entry["file"]
        if entry["outcome"] == "skipped":
            with pytest.raises(Unreadable, match=r"\w"):
                read(path)
        else:
            pixels = read(path)
            assert pixels.shape == (*entry["upright_size"][::-1], 3), entry["file"]
            assert pixels.dtype == np.uint8 and pixels.flags.writeable and pixels.flags.c_contiguous


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "GIF"])
def test_lossless_formats_keep_every_pixel(kind: str) -> None:
    pixels = picture() if kind != "GIF" else picture() // 128 * 128  # a palette of a few colours
    data = encoded(Image.fromarray(pixels), kind, **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(decode(data), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation(kind: str, orientation: int) -> None:
    upright = picture()
    # Inverse of each of the eight EXIF transforms (TIFF 6.0, tag 274), written with NumPy alone.
    stored = [
        lambda a: a, lambda a: a[:, ::-1], lambda a: a[::-1, ::-1], lambda a: a[::-1], lambda a: a.swapaxes(0, 1),
        lambda a: np.rot90(a), lambda a: a[::-1, ::-1].swapaxes(0, 1), lambda a: np.rot90(a, -1),
    ][orientation - 1](upright)  # fmt: skip
    exif = Image.Exif()
    exif[274] = orientation
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    out = decode(encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options))
    assert out.shape == upright.shape
    if kind != "PNG":  # whose EXIF may stand behind the pixels
        assert size(encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif)) == upright.shape[:2]
    assert np.abs(out.astype(int) - upright).mean() < 12  # lossy colours; a wrong turn differs by ~80


def test_broken_exif_does_not_lose_the_picture() -> None:
    assert decode(encoded(Image.fromarray(picture()), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")).shape == (
        24,
        40,
        3,
    )


def test_grey_and_palette() -> None:
    grey = picture()[..., 0]
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(grey), "PNG")), np.repeat(grey[..., None], 3, 2))
    bits = Image.fromarray(grey > 100)
    assert set(np.unique(decode(encoded(bits, "PNG")))) == {0, 255}
    palette = Image.fromarray(picture()).quantize(16)
    np.testing.assert_array_equal(decode(encoded(palette, "PNG")), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    deep = np.array([[0, 257, 32896, 65535]], np.uint16)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(deep), kind))[0, :, 0], [0, 1, 128, 255])


def test_pixels_without_a_range_are_refused() -> None:
    with pytest.raises(Unreadable, match="floating point"):
        decode(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))
    with pytest.raises(Unreadable, match="32 bit"):
        decode(encoded(Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), "TIFF"))


def test_transparency_is_laid_over_white() -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = (0, 128, 255)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(rgba), "PNG"))[0, :, 0], [255, 127, 0])
    la = Image.fromarray(rgba).convert("LA")
    np.testing.assert_array_equal(decode(encoded(la, "PNG"))[0, :, 0], [255, 127, 0])
    keyed = encoded(Image.fromarray(np.array([[0, 9]], np.uint8)), "PNG", transparency=0)
    np.testing.assert_array_equal(decode(keyed)[0, :, 2], [255, 9])


def test_cmyk_and_first_frame() -> None:
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # no cyan: red
    for kind in ("JPEG", "TIFF"):
        assert np.abs(decode(encoded(cmyk, kind))[4, 4].astype(int) - [255, 0, 0]).max() < 4
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "TIFF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        np.testing.assert_array_equal(decode(data)[0, 0], [255, 0, 0])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_cut_files_are_refused(kind: str, share: float) -> None:
    data = encoded(Image.fromarray(picture(200, 300)), kind)
    with pytest.raises(Unreadable):
        decode(data[: int(len(data) * share)])


def test_flipped_bytes_raise_nothing_but_unreadable() -> None:
    random = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        data = np.frombuffer(encoded(Image.fromarray(picture()), kind), np.uint8)
        for _ in range(40):
            broken = data.copy()
            broken[random.integers(len(data), size=4)] = random.integers(256, size=4)
            try:
                pixels = decode(broken.tobytes(), max_pixels=10_000_000)
            except Unreadable as error:
                assert 0 < len(str(error)) <= 200 and "\n" not in str(error)
            else:
                assert pixels.ndim == 3 and pixels.shape[2] == 3


def bomb(side: int) -> bytes:
    """A PNG that claims to be large and holds next to nothing."""
    chunks = {b"IHDR": struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b"IDAT": zlib.compress(b"\0" * 99)}
    out = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks.items():
        out += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return out


@pytest.mark.parametrize("side", [9_700, 10_001, 14_000, 50_000])  # below and above each limit of Pillow's and ours
def test_bombs_are_refused_without_a_warning(side: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Unreadable, match="pixels" if side > 10_000 else "broken"):
            decode(bomb(side))


def test_max_pixels_is_inclusive() -> None:
    data = encoded(Image.fromarray(picture(10, 10)), "PNG")
    assert decode(data, max_pixels=100).shape == (10, 10, 3)
    with pytest.raises(Unreadable, match="10 x 10"):
        decode(data, max_pixels=99)


@pytest.mark.parametrize(
    "data", [b"", b"a,b\n1,2\n", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\xff\xd8\xff"]
)
def test_no_image_at_all(data: bytes) -> None:
    with pytest.raises(Unreadable):
        decode(data)


def test_paths_that_are_no_plain_file(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.jpg")
    reasons = {"folder": "folder", "loop": "symbolic links", "dangling": "no such file", "pipe": "not a plain file"}
    for name, reason in reasons.items():
        with pytest.raises(Unreadable, match=reason):
            read(tmp_path / f"{name}.jpg")
    with open(tmp_path / "huge.jpg", "wb") as file:
        file.truncate(1 << 30)  # sparse
    with pytest.raises(Unreadable, match="too large"):
        read_bytes(tmp_path / "huge.jpg")


def test_image_names() -> None:
    assert all(is_image_name(n) for n in ("a.jpg", "été à la plage.JPEG", "x/y.PnG", "a.b.webp", "phone.HEIC"))
    assert not any(is_image_name(n) for n in ("a.json", "jpg", ".jpg", "a.jpg.txt", "x.jpg/notes"))


@pytest.mark.parametrize(
    ("size", "out", "scale"),
    [
        ((480, 640), (800, 1067), 800 / 480),  # the short side decides
        ((300, 1000), (400, 1333), 1.333),  # the long side would pass max_side
        ((1600, 1600), (800, 800), 0.5),
        ((800, 1000), (800, 1000), 1),
        ((5000, 1), (1333, 1), 0.2666),  # no side becomes 0
        ((1, 5000), (1, 1333), 0.2666),
        ((1, 1), (800, 800), 800),
    ],
)
def test_resize_rule(size: tuple[int, int], out: tuple[int, int], scale: float) -> None:
    result, factor = resize(np.zeros((*size, 3), np.uint8), 800, 1333)
    assert result.shape == (*out, 3)
    assert factor.tolist() == pytest.approx([scale, scale])


@pytest.mark.parametrize(
    ("height", "width", "short"), [(517, 333, 128), (97, 101, 128), (427, 640, 301), (64, 99, 128)]
)
def test_points_move_by_scale_exactly(height: int, width: int, short: int) -> None:
    y, x = np.mgrid[:height, :width] + 0.5  # continuous coordinates of the pixels' centres
    point = np.array([width * 0.7, height * 0.4])
    blob = 250 * np.exp(-((x - point[0]) ** 2 + (y - point[1]) ** 2) / 2 / (min(height, width) / 25) ** 2)
    out, scale = resize(np.repeat(blob.astype(np.uint8)[..., None], 3, 2), short, 10_000)
    weight = out[..., 0] / out[..., 0].sum()
    y, x = np.mgrid[: out.shape[0], : out.shape[1]] + 0.5
    np.testing.assert_allclose([(weight * x).sum(), (weight * y).sum()], point * scale, atol=0.02)


def test_find(tmp_path: Path) -> None:
    for name in ("b/1.jpg", "a/1.JPEG", "a/notes.txt", "a/deep/2.png", "folder.jpg/3.gif", "top.webp", "README"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "void.jpg").symlink_to("nowhere")
    expected = ["a/1.JPEG", "a/deep/2.png", "b/1.jpg", "folder.jpg/3.gif", "self.jpg", "top.webp", "void.jpg"]
    found, others = find([str(tmp_path)])
    assert found == {str(tmp_path / name): "" for name in expected}
    assert others == {".txt": 1, "no suffix": 1}
    assert list(find([str(tmp_path / "top.webp")])[0]) == [str(tmp_path / "top.webp")]
    assert len(find([str(tmp_path / "*" / "1.*")])[0]) == 2
    with pytest.raises(UserError, match="no such file or folder"):
        find([str(tmp_path / "missing")])
    with pytest.raises(UserError, match=r"no image there \(but 1 .txt\)"):
        find([str(tmp_path / "a" / "notes.txt")])
    with pytest.raises(UserError, match="mounts"):
        find(["s3://bucket/images"])


def test_find_relative_and_names_that_are_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        with open(os.fsencode(tmp_path) + b"/caf\xe9.jpg", "wb"):
            pass
    except OSError:
        pytest.skip("this file system has only UTF-8 names")
    Path("ok.jpg").touch()
    found, _ = find(["."])
    assert found == {f"{tmp_path}/caf\\xe9.jpg": "file name is not UTF-8", f"{tmp_path}/ok.jpg": ""}
