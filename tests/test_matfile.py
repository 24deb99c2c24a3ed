"""MATLAB files: the same values as scipy reads; whatever is damaged is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from lcrnet import matfile
from lcrnet.config import UserError

NUMBERS = [np.arange(6, dtype=d).reshape(2, 3) for d in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8")]


@pytest.mark.parametrize("compressed", [False, True])
def test_same_as_scipy(tmp_path: Path, compressed: bool) -> None:
    cells = np.empty((3, 4), object)
    for n in range(12):
        cells[n // 4, n % 4] = {"a": NUMBERS[n % 10] + n, "long_name": np.float32(n), "flag": n % 2 == 0}
    values: dict[str, Any] = {f"n{n}": value for n, value in enumerate(NUMBERS)}
    values |= {"cells": cells, "empty": np.zeros((0, 3)), "cube": np.random.default_rng(0).normal(size=(2, 3, 4))}
    savemat(tmp_path / "a.mat", values, do_compression=compressed)
    scipy = loadmat(tmp_path / "a.mat")
    for name in values:
        got, want = matfile.read(tmp_path / "a.mat", name), scipy[name]
        assert got.shape == want.shape
        if name != "cells":
            assert got.dtype == want.dtype and np.array_equal(got, want)
            continue
        for a, b in zip(got.ravel(), want.ravel(), strict=True):
            assert list(a) == list(b.dtype.names)
            for field, value in a.items():
                inner = b[field][0, 0]
                assert np.array_equal(value, inner) and value.shape == inner.shape


def test_what_is_no_number_cell_or_struct_is_left_out(tmp_path: Path) -> None:
    savemat(tmp_path / "a.mat", {"word": "hello", "complex": np.array([1j]), "list": np.array([("x", 1)] * 2, "O,O")})
    for name in ("word", "complex", "list"):
        assert matfile.read(tmp_path / "a.mat", name) is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no .mat file of MATLAB 5 to 7"),
        (b"x" * 500, "no .mat file of MATLAB 5 to 7"),
        (b"MATLAB 7.3".ljust(124) + b"\x00\x02IM" + bytes(400), "a MATLAB 7.3 file; save it anew"),
        (b"MATLAB 5.0".ljust(124) + b"\x00\x01IM", "a: missing; it has nothing"),
        (b"MATLAB 5.0".ljust(124) + b"\x00\x01IM" + b"\x0e\0\0\0\xff\xff\xff\x7f", "larger than what holds it"),
    ],
)
def test_no_mat_file(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.mat").write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        matfile.read(tmp_path / "a.mat", "a")
    assert str(error.value).startswith(str(tmp_path / "a.mat"))


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.mat: No such file"):
        matfile.read(tmp_path / "a.mat", "a")
    savemat(tmp_path / "a.mat", {"b": 1, "c": 2})
    with pytest.raises(UserError, match="a: missing; it has b, c"):
        matfile.read(tmp_path / "a.mat", "a")


def test_damaged_bytes_are_told_or_harmless(tmp_path: Path) -> None:
    """Where scipy.io.loadmat crashes the interpreter."""
    cells = np.empty((2, 2), object)
    for n in range(4):
        cells[n // 2, n % 2] = {"a": np.ones((2, 17)), "b": n}
    rng = np.random.default_rng(0)
    told = 0
    for compressed in (False, True):
        savemat(tmp_path / "a.mat", {"cells": cells}, do_compression=compressed)
        good = (tmp_path / "a.mat").read_bytes()
        for n in range(240):
            data = bytearray(good[: int(rng.integers(len(good)))] if n % 3 == 0 else good)
            for at in rng.integers(0, max(len(data), 1), n % 5):
                if data:
                    data[at] = int(rng.integers(256))
            (tmp_path / "a.mat").write_bytes(data)
            try:
                matfile.read(tmp_path / "a.mat", "cells")
            except UserError:
                told += 1
    assert 160 < told < 480


def test_what_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    savemat(tmp_path / "a.mat", {"zeros": np.zeros((1000, 1000))}, do_compression=True)
    monkeypatch.setattr(matfile, "MOST_BYTES", 10**6)
    with pytest.raises(UserError, match="unpacks to more than 1000000 bytes"):
        matfile.read(tmp_path / "a.mat", "zeros")
    cells = np.empty((1, 1), object)
    cells[0, 0] = 1
    savemat(tmp_path / "b.mat", {"cells": cells})
    data = bytearray((tmp_path / "b.mat").read_bytes())
    at = data.index(np.array([5, 8, 1, 1], "<i4").tobytes()) + 8  # dimensions: an int32 element of 8 bytes
    data[at : at + 8] = np.array([2**15, 2**15], "<i4").tobytes()
    (tmp_path / "b.mat").write_bytes(data)
    with pytest.raises(UserError, match="more cells than there is room for"):
        matfile.read(tmp_path / "b.mat", "cells")
