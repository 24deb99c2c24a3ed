"""MATLAB's .mat files (version 5 to 7) as data: numbers, cells and single structs; everything else is left out.

scipy.io.loadmat reads more, but trusts the sizes that stand in the file: one wrong byte can end the process (a
segmentation fault after about 100 damaged files). Here each part must lie within what holds it.
MathWorks, "MAT-File Format" (matfile_format.pdf), level 5.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from lcrnet.config import UserError

MOST_BYTES = 2**30

_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_MATRIX, _COMPRESSED = 14, 15
_CELL, _STRUCT, _NUMERIC = 1, 2, range(6, 16)
_COMPLEX = 0x0800
_DEEPEST = 8


class _Damaged(Exception):
    """The message completes the sentence `FILE: ...`."""


def read(file: str | os.PathLike[str], name: str) -> Any:
    """One variable: an ndarray of numbers, of objects for cells, a dict for a 1 x 1 struct, None for other things.

    UserError: no such file or variable, not whole, of version 4 or 7.3, or larger than MOST_BYTES.
    """
    try:
        if os.path.getsize(file) > MOST_BYTES:
            raise _Damaged(f"larger than the {MOST_BYTES} bytes that are read")
        return _variable(Path(file).read_bytes(), name)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    except _Damaged as error:
        raise UserError(f"{file}: {error}") from None
    except (struct.error, zlib.error, UnicodeDecodeError, ValueError, OverflowError, MemoryError) as error:
        raise UserError(f"{file}: no whole .mat file: {' '.join(str(error).split())[:200]}") from None


def _variable(data: bytes, name: str) -> Any:
    if data[124:128] in (b"\x00\x02IM", b"\x02\x00MI"):
        raise _Damaged("a MATLAB 7.3 file; save it anew in MATLAB with save(..., '-v7')")
    order = {b"\x00\x01IM": "<", b"\x01\x00MI": ">"}.get(data[124:128])
    if order is None:
        raise _Damaged("no .mat file of MATLAB 5 to 7")
    position, left, names = 128, MOST_BYTES, []
    while position < len(data):
        kind, start, stop = _tag(data, position, len(data), order)
        position = stop
        content = data
        if kind == _COMPRESSED:
            unpacker = zlib.decompressobj()
            content = unpacker.decompress(data[start:stop], left)
            if unpacker.unconsumed_tail:
                raise _Damaged(f"unpacks to more than {MOST_BYTES} bytes")
            left = max(left - len(content), 1)  # 0 would be no limit
            kind, start, stop = _tag(content, 0, len(content), order)
        else:
            position += -(stop - start) % 8
        if kind == _MATRIX:
            matrix = _Matrix(content, start, stop, order)
            names.append(matrix.name)
            if matrix.name == name:
                return matrix.value(0)
    raise _Damaged(f"{name}: missing; it has {', '.join(names)[:200] or 'nothing'}")


def _tag(data: bytes, position: int, end: int, order: str) -> tuple[int, int, int]:
    """(kind, start, stop) of the element at a position."""
    if position + 8 > end:
        raise _Damaged("no whole .mat file: it ends early")
    kind, size = struct.unpack_from(order + "II", data, position)
    start = position + 8
    if kind >> 16:  # up to four bytes stand in the tag
        kind, size, start = kind & 0xFFFF, kind >> 16, position + 4
        if size > 4:
            raise _Damaged("no whole .mat file: a small element of more than 4 bytes")
    if start + size > end:
        raise _Damaged("no whole .mat file: a part is larger than what holds it")
    return kind, start, start + size


class _Matrix:
    """One matrix element; its header is read at once."""

    def __init__(self, data: bytes, start: int, stop: int, order: str) -> None:
        self.data, self.position, self.stop, self.order = data, start, stop, order
        flags = self._numbers(2)
        self.kind, self.complex = int(flags[0]) & 0xFF, bool(int(flags[0]) & _COMPLEX)
        self.shape = tuple(int(n) for n in self._numbers())
        if not 2 <= len(self.shape) <= 8 or min(self.shape) < 0:
            raise _Damaged(f"no whole .mat file: a matrix of shape {self.shape}")
        self.name = self._numbers().tobytes().decode("ascii")

    def _next(self) -> tuple[int, int, int]:
        kind, start, stop = _tag(self.data, self.position, self.stop, self.order)
        self.position = min(start + -(-(stop - start) // 8) * 8 if start - self.position == 8 else start + 4, self.stop)
        return kind, start, stop

    def _numbers(self, count: int | None = None) -> np.ndarray:
        kind, start, stop = self._next()
        if kind not in _NUMBERS:
            raise _Damaged(f"no whole .mat file: an element of kind {kind} where numbers should be")
        out = np.frombuffer(self.data[start:stop], self.order + _NUMBERS[kind])
        if count is not None and len(out) != count:
            raise _Damaged(f"no whole .mat file: {len(out)} numbers where {count} should be")
        return out.astype(out.dtype.newbyteorder("="))

    def _inner(self, depth: int) -> Any:
        kind, start, stop = self._next()
        if kind != _MATRIX or depth > _DEEPEST:
            raise _Damaged("no whole .mat file: a cell or field that is no matrix, or too deep")
        return _Matrix(self.data, start, stop, self.order).value(depth) if stop > start else np.zeros((0, 0))

    def value(self, depth: int) -> Any:
        count = math.prod(self.shape)
        if self.kind in _NUMERIC and not self.complex:
            return self._numbers(count).reshape(self.shape, order="F")
        if self.kind == _CELL:
            if 8 * count > self.stop - self.position:
                raise _Damaged("no whole .mat file: more cells than there is room for")
            out = np.empty(count, object)
            for n in range(count):
                out[n] = self._inner(depth + 1)
            return out.reshape(self.shape, order="F")
        if self.kind == _STRUCT and count == 1:
            length = int(self._numbers(1)[0])
            text = self._numbers().tobytes()
            if length < 1:
                raise _Damaged("no whole .mat file: field names without length")
            names = [text[at : at + length].split(b"\0")[0].decode("ascii") for at in range(0, len(text), length)]
            return {name: self._inner(depth + 1) for name in names}
        return None
