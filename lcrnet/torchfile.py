"""Files of `torch.save` read as plain data: torch is not asked, and nothing that is named in them is ever run.

    zip      FOLDER/data.pkl and the bytes of its storages in FOLDER/data/0, 1, ...; not compressed (torch >= 1.6)
    legacy   pickles of a magic number, a version and the machine, the pickle, the storages' keys, and their bytes
    pickle   plain ones whose tensors hold such a file each, or a list of numbers (`pickle.dump` of a state dict)

each also within gzip and within a tar of one file, which DOPE's and INRIA's `.pth.tgz` may be; read in memory, never
unpacked to disk. Tensors become NumPy arrays, bfloat16 those of float32. Formats: torch/serialization.py, _utils.py.
"""

from __future__ import annotations

import io
import math
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from lcrnet import unpickle
from lcrnet.config import UserError
from lcrnet.unpickle import Dialect, Name, Part, Refused

MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
DEPTH = 2
"""Files within files: a tensor of a plain pickle holds one, whose storages hold none."""
MOST_DIMS = 16

_STORAGES = {
    "FloatStorage": "f4", "DoubleStorage": "f8", "HalfStorage": "f2", "BFloat16Storage": "bf16", "LongStorage": "i8",
    "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1", "ByteStorage": "u1", "BoolStorage": "b1",
}  # fmt: skip
_CLASSES = {(module, name): code for module in ("torch", "torch.cuda") for name, code in _STORAGES.items()}
_TENSOR, _TENSOR2 = ("torch._utils", "_rebuild_tensor"), ("torch._utils", "_rebuild_tensor_v2")
_PARAMETER, _SIZE = ("torch._utils", "_rebuild_parameter"), ("torch", "Size")
_BYTES = ("torch.storage", "_load_from_bytes")


class _Storage(Part):
    """The flat numbers of one or more tensors."""

    def __init__(self, code: str, array: np.ndarray):
        self.code, self.array = code, array

    @property
    def nbytes(self) -> int:
        return self.array.nbytes


class _Torch(Dialect):
    """torch's names.

    storage(key, code, count) -> the array (count,) of a storage beside the pickle; None: there is none
    """

    names = frozenset({_TENSOR, _TENSOR2, _PARAMETER, _SIZE, _BYTES, *_CLASSES})

    def __init__(self, storage: Callable[[str, str, int], np.ndarray] | None, depth: int):
        self.storage, self.depth = storage, depth
        self.found: dict[str, _Storage] = {}
        self.views: dict[tuple[str, int, int], _Storage] = {}

    def made(self, key: tuple[str, str], args: tuple[Any, ...]) -> Any:
        if (key == _TENSOR and len(args) == 4) or (key == _TENSOR2 and len(args) in (6, 7)):
            return _view(*args[:4])
        if key == _PARAMETER and len(args) == 3 and isinstance(args[0], np.ndarray):
            return args[0]
        if key == _SIZE and len(args) == 1:
            return _counts(args[0])
        if key == _BYTES and len(args) == 1 and isinstance(args[0], bytes):
            if self.depth >= DEPTH:
                raise Refused(f"refused: more than {DEPTH} files within each other")
            inner = _torch(args[0], self.depth + 1)
            if not isinstance(inner, _Storage):
                raise Refused("refused: the bytes of a storage are those of another thing")
            return inner
        if key in _CLASSES and len(args) == 1 and isinstance(args[0], list):
            code = _CLASSES[key]
            return _Storage(code, np.array(args[0], "f4" if code == "bf16" else code).reshape(len(args[0])))
        return super().made(key, args)

    def persistent(self, identity: Any) -> Any:
        """('storage', class, key, device, count), in legacy files with a part of it or None at the end."""
        if self.storage is None:
            return super().persistent(identity)
        if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
            raise Refused("refused: the pickle asks for something outside it that is no storage of numbers")
        kind, key, count = identity[1], identity[2], identity[4]
        if not isinstance(kind, Name) or kind.key not in _CLASSES:
            raise Refused("refused: a storage of an unknown kind")
        code = _CLASSES[kind.key]
        (count,) = _counts((count,))
        if not isinstance(key, str) or not re.fullmatch(r"\w{1,64}", key, re.ASCII):
            raise Refused(f"refused: a storage named {str(key)[:20]!a}")
        if key not in self.found:
            self.found[key] = _Storage(code, self.storage(key, code, count))
        whole = self.found[key]
        if whole.code != code or len(whole.array) != count:
            raise Refused(f"damaged: storage {key} has two kinds or two sizes")
        if len(identity) == 5 or identity[5] is None:
            return whole
        _, first, length = identity[5]
        first, length = _counts((first, length))
        if first + length > count:
            raise Refused(f"damaged: a part of storage {key} that reaches beyond it")
        return _Storage(code, whole.array[first : first + length])


def read(file: str | os.PathLike[str]) -> bytes:
    """The bytes of a plain file; UserError: there is none, or it is too large."""
    try:
        info = os.stat(file)
        if not stat.S_ISREG(info.st_mode):  # opening a pipe would wait for ever
            raise UserError(f"{file}: {'a folder' if stat.S_ISDIR(info.st_mode) else 'not a plain file'}")
        if info.st_size > unpickle.MOST_BYTES:
            raise UserError(f"{file}: {info.st_size} bytes are more than the {unpickle.MOST_BYTES} that are read")
        return Path(file).read_bytes()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None


def load(data: bytes, file: str = "file") -> Any:
    """What a file of torch.save, or a plain pickle, holds: as `unpickle.load`, but with tensors too, as arrays.

    The arrays of one storage share their memory. UserError: damaged, too large, no such file, or it names a thing that
    plain data does not need; nothing has been imported, called or written by then.
    """
    with unpickle.told(file):
        unpickle.check(data)
        return unpickle.value(_torch(unwrapped(data), 0))


def unwrapped(data: bytes) -> bytes:
    """The file within gzip or tar or both, or the bytes themselves; Refused: a bomb, or a name that climbs."""
    if data[:2] == b"\x1f\x8b":
        data = _inflated(data)
    return _only_member(data) if data[257:262] == b"ustar" else data


def _inflated(data: bytes) -> bytes:
    # Weights hardly shrink at all; a bomb shrinks a thousandfold.
    most = min(unpickle.MOST_BYTES, 64 * len(data) + 2**20)
    machine = zlib.decompressobj(wbits=31)
    try:
        out = machine.decompress(data, most)
    except zlib.error as error:
        raise Refused(f"damaged: gzip: {error}") from None
    if not machine.eof:
        raise Refused(
            f"{'refused: gzip of more than' if len(out) >= most else 'damaged: gzip ends after'} {len(out)} bytes"
        )
    return out


def _only_member(data: bytes) -> bytes:
    """The bytes of the one file of a tar."""
    files = []
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                _safe(member.name)
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise Refused(f"refused: {member.name[:60]!a} in the tar is a link or no plain file")
                files.append(member)
                if len(files) > 1:
                    raise Refused("refused: a tar of several files; it should hold one file of torch.save")
            if not files or files[0].size > len(data):
                raise Refused("damaged: the tar holds no whole file")
            stream = archive.extractfile(files[0])
            return stream.read() if stream else b""
    except tarfile.TarError as error:
        raise Refused(f"damaged: tar: {error}") from None


def _safe(name: str) -> None:
    """Refuses names that lead out of the folder they would be unpacked to. (Nothing is unpacked.)"""
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name):
        raise Refused(f"refused: the name {name[:60]!a} leads out of the archive")


def _torch(data: bytes, depth: int) -> Any:
    """The value of one file, which may be a `_Storage`."""
    if data[:4] == b"PK\x03\x04":
        return _zip(data, depth)
    if re.match(rb"\x80.(\x95.{8})?\x8a\x0a" + re.escape(MAGIC.to_bytes(10, "little")), data, re.DOTALL):
        return _legacy(data, depth)
    if depth:
        raise Refused("refused: the bytes of a storage are no file of torch.save")
    # Text of bytes (`_codecs.encode`) becomes bytes, and these a storage.
    return unpickle.run(io.BytesIO(data), 3 * len(data), _Torch(None, depth))


def _legacy(data: bytes, depth: int) -> Any:
    stream = io.BytesIO(data)
    if unpickle.run(stream, 0) != MAGIC or unpickle.run(stream, 0) != _PROTOCOL:
        raise Refused("damaged: a file of torch.save of an unknown version")
    machine = unpickle.run(stream, 0)
    order = "<" if not isinstance(machine, dict) or machine.get("little_endian", True) else ">"
    room = len(data)

    def storage(key: str, code: str, count: int) -> np.ndarray:
        """Not yet filled: the bytes come after the pickle."""
        nonlocal room
        room -= count * _stored(code, order).itemsize
        if room < 0:
            raise Refused("damaged: its storages are larger than the file")
        return np.empty(count, "f4" if code == "bf16" else code)

    dialect = _Torch(storage, depth)
    out = unpickle.run(stream, len(data), dialect)
    keys = unpickle.run(stream, 0)
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(dialect.found):
        raise Refused("damaged: its storages are not those that its tensors name")
    for key in keys:
        found = dialect.found[key]
        dtype = _stored(found.code, order)
        if int.from_bytes(stream.read(8), "little" if order == "<" else "big") != len(found.array):
            raise Refused(f"damaged: storage {key} has another size than its tensors need")
        found.array[:] = _numbers(stream.read(len(found.array) * dtype.itemsize), found.code, order, len(found.array))
    return out


def _zip(data: bytes, depth: int) -> Any:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parts: dict[str, zipfile.ZipInfo] = {}
            for info in archive.infolist():
                _safe(info.filename)
                if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                    raise Refused(f"refused: {info.filename[:60]!a} in the zip is compressed, which torch never does")
                if info.filename in parts:
                    raise Refused(f"refused: {info.filename[:60]!a} is in the zip twice")
                parts[info.filename] = info
            if sum(info.file_size for info in parts.values()) > len(data):
                raise Refused("refused: its parts hold more than the file does")
            pickles = [name for name in parts if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise Refused("a zip, but not one of torch.save: it has no FOLDER/data.pkl")
            folder = pickles[0].removesuffix("data.pkl")
            if any(not name.startswith(folder) for name in parts):
                raise Refused("refused: the zip has files beside its folder")
            if f"{folder}constants.pkl" in parts:
                raise Refused("a TorchScript program; what is needed is the state_dict that its author saved")
            big = f"{folder}byteorder" in parts and archive.read(f"{folder}byteorder") == b"big"

            def storage(key: str, code: str, count: int) -> np.ndarray:
                name = f"{folder}data/{key}"
                if name not in parts or parts[name].file_size != count * _stored(code, "<").itemsize:
                    raise Refused(f"damaged: {name!a} is missing or has another size than its tensors need")
                return _numbers(archive.read(name), code, ">" if big else "<", count)

            return unpickle.run(io.BytesIO(archive.read(pickles[0])), len(data), _Torch(storage, depth))
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, OSError) as error:
        if isinstance(error, RecursionError):
            raise
        raise Refused(f"damaged: zip: {' '.join(str(error).split())[:100]}") from None


def _stored(code: str, order: str) -> np.dtype[Any]:
    """The dtype of a storage's bytes."""
    return np.dtype("u2" if code == "bf16" else code).newbyteorder(order)  # type: ignore[arg-type]


def _numbers(raw: bytes, code: str, order: str, count: int) -> np.ndarray:
    dtype = _stored(code, order)
    if len(raw) != count * dtype.itemsize:
        raise Refused("damaged: the file ends within a storage")
    flat = np.frombuffer(raw, dtype)
    if code == "bf16":  # the upper half of a float32
        return (flat.astype(np.uint32) << 16).view(np.float32)
    return flat != 0 if code == "b1" else flat.astype(dtype.newbyteorder("="))


def _view(storage: Any, offset: Any, size: Any, stride: Any) -> np.ndarray:
    """A tensor: the part of a storage that size and strides (in numbers) describe, and no number beyond it."""
    if not isinstance(storage, _Storage):
        raise Refused("refused: a tensor of something that is no storage")
    (offset,), size, stride = _counts((offset,)), _counts(size), _counts(stride)
    flat = storage.array
    if len(size) != len(stride):
        raise Refused("damaged: a tensor with more or fewer strides than dimensions")
    count = math.prod(size)
    # An expanded tensor (stride 0) would be a bomb for whoever copies it.
    if count > len(flat) or (
        count and offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) >= len(flat)
    ):
        raise Refused(f"damaged: a tensor of shape {size} reaches beyond its storage of {len(flat)} numbers")
    if count == 0:
        return flat[:0].reshape(size)
    return as_strided(flat[offset:], size, [s * flat.itemsize for s in stride])


def _counts(values: Any) -> tuple[int, ...]:
    """Whole numbers from 0 on."""
    if not isinstance(values, tuple | list) or len(values) > MOST_DIMS:
        raise Refused("refused: sizes that are none")
    if not all(type(n) is int and 0 <= n < 2**62 for n in values):
        raise Refused("refused: a size that is no whole number from 0 on")
    return tuple(values)
