"""Files of torch.save are read as data: nothing in them runs, nothing is unpacked, nothing fills the memory."""

from __future__ import annotations

import builtins
import encodings.cp437  # noqa: F401  (zipfile imports it when it meets the first zip)
import functools
import gzip
import io
import os
import pickle
import resource
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import legacy_files as files
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcrnet import torchfile
from lcrnet.config import UserError

TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
         torch.uint8, torch.bool]  # fmt: skip


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    out: dict[str, torch.Tensor] = OrderedDict((str(t), (3 * torch.randn(2, 3)).to(t)) for t in TYPES)
    out |= {
        "base": base,
        "view": base[1:3, 2:],
        "turned": base.t(),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(7),
    }
    out |= {"parameter": torch.nn.Parameter(torch.randn(3)), "again": base}
    return out


WRITERS: dict[str, Callable[[Any], bytes]] = {
    "zip": functools.partial(files.torch_file, new=True),
    "legacy": files.torch_file,
    "pickle of protocol 2": lambda v: pickle.dumps(v, 2),
    "pickle of protocol 4": lambda v: pickle.dumps(v, 4),
    "tgz": lambda v: files.tgz(files.torch_file(v)),
    "gzip": lambda v: gzip.compress(files.torch_file(v, new=True), 1),
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_torch_writes(name: str) -> None:
    """torch's own reader is the witness."""
    given = {"model": state(), "size": torch.Size([2, 3]), "step": 7, "losses": [np.float32(1.5)]}
    found = torchfile.load(WRITERS[name](given), name)
    assert list(found["model"]) == list(given["model"])  # type: ignore[call-overload]
    for key, tensor in state().items():
        got = found["model"][key]
        want = tensor.detach().float() if tensor.dtype == torch.bfloat16 else tensor.detach()
        assert isinstance(got, np.ndarray) and got.dtype == want.numpy().dtype, key
        np.testing.assert_array_equal(got, want.numpy(), err_msg=key)
    assert (found["size"], found["step"], found["losses"]) == ((2, 3), 7, [1.5])
    if "pickle" not in name:
        assert np.shares_memory(found["model"]["base"], found["model"]["view"])


def test_storages_as_lists() -> None:
    """torch 0.3 pickled a storage as a list of its numbers."""
    data = (b"\x80\x02ctorch._utils\n_rebuild_tensor\n(ctorch\nFloatStorage\n](G?\xf8\0\0\0\0\0\0G@\0\0\0\0\0\0\0e\x85R"
            b"K\0K\1K\2\x86K\2K\1\x86tR.")  # fmt: skip
    np.testing.assert_array_equal(torchfile.load(data), np.float32([[1.5, 2.0]]))


@given(st.integers(0, 3000), st.binary(min_size=1, max_size=40))
@settings(max_examples=150, deadline=None)
def test_damage_is_a_user_error(at: int, junk: bytes) -> None:
    for write in (WRITERS["zip"], WRITERS["legacy"], WRITERS["tgz"]):
        whole = write({"a": torch.arange(30.0)})
        for data in (whole[:at], whole[:at] + junk + whole[at + len(junk) :]):
            try:
                torchfile.load(data, "f.pth")
            except UserError as error:
                assert str(error).startswith("f.pth: ") and "\n" not in str(error)


class Calls:
    def __init__(self, function: Any, *arguments: Any, state: Any = None):
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.parts


def rebuild(size: bytes, stride: bytes, offset: bytes = b"K\0", count: int = 4) -> bytes:
    """A zip file with one storage of `count` float32 and one tensor of it."""
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK" + bytes([count]) + b"tQ"
    return zipped(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + size + stride
                  + b"\x89ccollections\nOrderedDict\n)RtR.", {"0": b"\0" * 16})  # fmt: skip


def zipped(data: bytes, storages: dict[str, bytes], method: int = zipfile.ZIP_STORED, **more: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr("archive/data.pkl", data)
        for key, raw in storages.items():
            archive.writestr(f"archive/data/{key}", raw)
        for name, raw in more.items():
            archive.writestr(name, raw)
    return out.getvalue()


def tar(*members: tuple[str, bytes, bytes], link: str = "") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, kind, raw in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(raw), link
            archive.addfile(info, io.BytesIO(raw))
    return gzip.compress(out.getvalue())


def legacy(body: bytes, keys: list[str], storages: bytes = b"") -> bytes:
    parts = [torchfile.MAGIC, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    return b"".join(pickle.dumps(p, 2) for p in parts) + body + pickle.dumps(keys, 2) + storages


def storage_of(raw: bytes) -> bytes:
    """A plain pickle of one storage: torch.storage._load_from_bytes of any bytes."""
    return b"\x80\x03ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(raw)) + raw + b"\x85R."


def nested(depth: int) -> bytes:
    data = FLAT
    for _ in range(depth):
        inner = storage_of(data)[:-1] + b"."
        data = legacy(inner, [])
    return storage_of(data)


def evil(command: str) -> bytes:
    return pickle.dumps(Calls(os.system, command), 2)


def flat(tensor: torch.Tensor) -> bytes:
    """What a tensor's pickle holds of its storage."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TypedStorage is deprecated, and in every such file
        return files.torch_file(tensor.storage())


FLAT, ZEROS = flat(torch.arange(3.0)), flat(torch.zeros(250_000))
PID = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpu"
HUGE = b"\x8a\x08\0\0\0\0\0\0\0\x10"  # 2 ** 60
GOOD = files.torch_file({"a": torch.arange(3.0)})

ATTACKS: dict[str, Callable[[str], bytes]] = {
    # Names
    "os.system in a zip": lambda c: zipped(evil(c), {}),
    "os.system in a legacy file": lambda c: legacy(evil(c), []),
    "os.system for the magic number": lambda c: evil(c) + GOOD,
    "os.system for the machine": lambda c: pickle.dumps(torchfile.MAGIC, 2) + pickle.dumps(1001, 2) + evil(c),
    "os.system for the list of keys": lambda c: legacy(pickle.dumps({}, 2), [])[:-4] + evil(c),
    "os.system in a tgz": lambda c: files.tgz(zipped(evil(c), {})),
    "builtins.eval": lambda c: zipped(pickle.dumps(Calls(eval, f'__import__("os").system("{c}")'), 2), {}),
    "subprocess": lambda c: zipped(pickle.dumps(Calls(subprocess.Popen, ["sh", "-c", c]), 2), {}),
    "torch.load": lambda c: zipped(pickle.dumps(Calls(torch.load, c.split()[-1]), 2), {}),
    "torch.hub": lambda c: zipped(pickle.dumps(Calls(torch.hub.load, "a/b", "c"), 2), {}),
    "another name of torch._utils": lambda c: zipped(b"ctorch._utils\n_import_dotted_name\n(Nt.", {}),
    "a module": lambda c: files.torch_file(torch.nn.Linear(1, 1)),
    "a class as kind of storage": lambda c: zipped(PID.replace(b"torch\nFloatStorage", b"os\nsystem") + b"K\1tQ.", {}),
    "a known function as kind of storage": lambda c: zipped(
        PID.replace(b"torch\nFloatStorage", b"torch._utils\n_rebuild_tensor_v2") + b"K\1tQ.", {"0": b"\0" * 4}),
    "a legacy module's source": lambda c: legacy(b"(X\6\0\0\0modulectorch\nFloatStorage\nX\1\0\0\0aX\1\0\0\0btQ.", []),
    "a persistent id that is a call": lambda c: zipped(evil(c)[:-1] + b"Q.", {}),
    "a persistent id of text": lambda c: zipped(b"Pstorage\n.", {}),
    "state for a tensor": lambda c: rebuild(b"K\4\x85", b"K\1\x85")[:0] + zipped(
        b"\x80\x02ctorch._utils\n_rebuild_parameter\n(" + PID + b"K\4tQ\x89NtR}X\1\0\0\0aK\1sb.", {"0": b"\0" * 16}),
    "state for a storage": lambda c: zipped(PID + b"K\4tQ}X\1\0\0\0aK\1sb.", {"0": b"\0" * 16}),
    "reduce_ex with a reconstructor": lambda c: zipped(pickle.dumps(Calls(object.__reduce_ex__, 1, 2), 2), {}),
    "getattr": lambda c: zipped(pickle.dumps(Calls(getattr, "torch", "hub"), 2), {}),
    "a storage left in the result": lambda c: zipped(PID + b"K\4tQ.", {"0": b"\0" * 16}),
    "a class left in the result": lambda c: zipped(b"\x80\x02]ctorch\nFloatStorage\na.", {}),
    # Nested pickles
    "a pickle in a storage": lambda c: storage_of(evil(c)),
    "a legacy file with os.system in a storage": lambda c: storage_of(legacy(evil(c), [])),
    "a zip with os.system in a storage": lambda c: storage_of(zipped(evil(c), {})),
    "a gzip in a storage": lambda c: storage_of(gzip.compress(FLAT)),
    "a state dict in a storage": lambda c: storage_of(GOOD),
    "files in files in files": lambda c: nested(5),
    "lists in lists in lists": lambda c: zipped(b"\x80\x02" + b"]" * 50000 + b"a" * 49999 + b"u.", {}),
    "a size of nested tuples": lambda c: rebuild(b"K\4" + b"\x85" * 50000, b"K\1\x85"),
    # Storages and tensors
    "size beyond the storage": lambda c: rebuild(b"K\5\x85", b"K\1\x85"),
    "stride beyond the storage": lambda c: rebuild(b"K\2K\2\x86", b"K\3K\1\x86"),
    "offset beyond the storage": lambda c: rebuild(b"K\4\x85", b"K\1\x85", b"K\1"),
    "negative offset": lambda c: rebuild(b"K\1\x85", b"K\1\x85", b"J\xff\xff\xff\xff"),
    "negative stride": lambda c: rebuild(b"K\2\x85", b"J\xff\xff\xff\xff\x85", b"K\3"),
    "negative sizes of a positive product": lambda c: rebuild(b"J\xff\xff\xff\xffJ\xff\xff\xff\xff\x86", b"K\1K\1\x86"),
    "an expanded tensor": lambda c: rebuild(HUGE + b"\x85", b"K\0\x85"),
    "a stride that wraps round": lambda c: rebuild(b"K\2\x85", HUGE + b"\x85"),
    "fewer strides than sizes": lambda c: rebuild(b"K\2K\2\x86", b"K\1\x85"),
    "a size that is a float": lambda c: rebuild(b"G@\0\0\0\0\0\0\0\x85", b"K\1\x85"),
    "a hundred dimensions": lambda c: rebuild(b"(" + b"K\1" * 100 + b"t", b"(" + b"K\1" * 100 + b"t"),
    "storage smaller than its count": lambda c: rebuild(b"K\4\x85", b"K\1\x85", count=5),
    "storage larger than its count": lambda c: rebuild(b"K\1\x85", b"K\1\x85", count=3),
    "one storage with two counts": lambda c: zipped(PID + b"K\4tQ0" + PID + b"K\3tQ.", {"0": b"\0" * 16}),
    "a storage that is not there": lambda c: zipped(PID + b"K\4tQ.", {}),
    "a storage's key that climbs": lambda c: zipped(
        PID.replace(b"X\1\0\0\x000", b"X\x0b\0\0\0../data.pkl") + b"K\4tQ.", {}),
    "legacy storage of 2 ** 60 numbers": lambda c: legacy(PID + HUGE + b"NtQ.", ["0"], struct.pack("<Q", 2**60)),
    "legacy storage of another count": lambda c: legacy(
        PID + b"K\4NtQ0N.", ["0"], struct.pack("<Q", 3) + b"\0" * 16),
    "legacy storage that is cut": lambda c: legacy(PID + b"K\4NtQ0N.", ["0"], struct.pack("<Q", 4) + b"\0" * 8),
    "legacy keys of other storages": lambda c: legacy(PID + b"K\4NtQ0N.", ["1"], struct.pack("<Q", 4) + b"\0" * 16),
    "legacy part beyond its storage": lambda c: legacy(
        PID + b"K\4(X\1\0\0\0vK\2K\3ttQ0N.", ["0"], struct.pack("<Q", 4) + b"\0" * 16),
    # Archives
    "zip bomb": lambda c: zipped(b"N.", {"0": b"\0" * 10_000_000}, zipfile.ZIP_DEFLATED),
    "zip of overlapping parts": lambda c: overlapping(),
    "zip name that climbs": lambda c: zipped(b"N.", {}, **{"archive/../../x": b""}),
    "absolute zip name": lambda c: zipped(b"N.", {}, **{"/etc/x": b""}),
    "zip with files beside": lambda c: zipped(b"N.", {}, **{"other/data.pkl": b"N."}),
    "TorchScript": lambda c: zipped(b"N.", {}, **{"archive/constants.pkl": b"N."}),
    "gzip bomb": lambda c: gzip.compress(b"\0" * 200_000_000, 9),
    "gzip in gzip": lambda c: gzip.compress(gzip.compress(GOOD)),
    "tar path that climbs": lambda c: tar(("../../x.pth", tarfile.REGTYPE, GOOD)),
    "tar path that climbs on Windows": lambda c: tar(("a\\..\\x.pth", tarfile.REGTYPE, GOOD)),
    "absolute tar name": lambda c: tar(("/tmp/x.pth", tarfile.REGTYPE, GOOD)),
    "symlink in a tar": lambda c: tar(("x.pth", tarfile.SYMTYPE, b""), link="/etc/passwd"),
    "hard link in a tar": lambda c: tar(("x.pth", tarfile.LNKTYPE, b""), link="/etc/passwd"),
    "device in a tar": lambda c: tar(("x.pth", tarfile.CHRTYPE, b"")),
    "pipe in a tar": lambda c: tar(("x.pth", tarfile.FIFOTYPE, b"")),
    "two files in a tar": lambda c: tar(("a.pth", tarfile.REGTYPE, GOOD), ("b.pth", tarfile.REGTYPE, GOOD)),
    "empty tar": lambda c: tar(),
    # Memory
    "ndarray of 2 ** 60": lambda c: zipped(
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\1b\x87R(K\1" + HUGE
        + b"\x85cnumpy\ndtype\nX\2\0\0\0f4\x85R\x89C\0tb.", {}),
    "many storages of the same bytes": lambda c: many(ZEROS, 1000),
}  # fmt: skip


def many(raw: bytes, count: int) -> bytes:
    start = b"\x80\x03]B" + struct.pack("<I", len(raw)) + raw + b"q\x000ctorch.storage\n_load_from_bytes\nq\x010"
    return start + b"h\1h\0\x85R0" * count + b"."


def overlapping() -> bytes:
    """All entries of the directory point at the same bytes."""
    whole = zipped(b"N.", {"0": b"\0" * 100_000})
    at = whole.index(b"PK\x01\x02")
    entries, end = whole[at : whole.index(b"PK\x05\x06")], whole[whole.index(b"PK\x05\x06") :]
    second = entries[entries.index(b"PK\x01\x02", 4) :]
    more = b"".join(second.replace(b"data/0", b"data/" + bytes([65 + n])) for n in range(20))
    total = entries + more
    end = end[:8] + struct.pack("<HHII", 22, 22, len(total), at) + end[20:]
    return whole[:at] + total + end


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is refused in one line, in little memory; no file appears and nothing that runs is even looked up."""
    trace = tmp_path / "ran"
    data = ATTACKS[name](f"touch {trace}")
    monkeypatch.chdir(tmp_path)
    for runs in ("builtins.eval", "builtins.exec", "os.system", "posix.system", "subprocess.Popen", "pickle.loads",
                 "pickle.load", "torch.load", "torch.hub.load"):  # fmt: skip
        monkeypatch.setattr(runs, lambda *a, **k: trace.write_text("called"))
    modules = set(sys.modules)
    real = builtins.__import__
    monkeypatch.setattr(
        builtins, "__import__",
        lambda n, *a, **k: real(n, *a, **k) if n in modules else pytest.fail(f"imports {n}"),
    )  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with pytest.raises(UserError) as error:
            torchfile.load(data, "evil.pth")
    finally:
        monkeypatch.undo()
    assert str(error.value).startswith("evil.pth: ") and "\n" not in str(error.value) and len(str(error.value)) < 500
    assert list(tmp_path.iterdir()) == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


def test_enough_attacks() -> None:
    assert len(ATTACKS) >= 20


def test_attacks_are_attacks(tmp_path: Path) -> None:
    """torch's own reader, asked to trust them, does run them: the trace would be seen."""
    for i, name in enumerate(("os.system for the magic number", "os.system in a legacy file", "os.system in a zip")):
        trace = tmp_path / str(i)
        data = ATTACKS[name](f"touch {trace}")
        if name.endswith("zip"):
            data = zipped(evil(f"touch {trace}"), {}, **{"archive/version": b"3\n"})
        with suppress(Exception):  # whatever torch says once it has run
            torch.load(io.BytesIO(data), weights_only=False)
        assert trace.exists(), name


def test_good_relatives_of_the_attacks_load() -> None:
    """The attacks fail for what is bad in them, not for how they were made."""
    np.testing.assert_array_equal(torchfile.load(rebuild(b"K\4\x85", b"K\1\x85")), np.zeros(4, np.float32))
    np.testing.assert_array_equal(torchfile.load(rebuild(b"K\2K\2\x86", b"K\1K\2\x86")), np.zeros((2, 2), np.float32))
    assert torchfile.load(legacy(PID + b"K\4NtQ0N.", ["0"], struct.pack("<Q", 4) + b"\0" * 16)) is None
    np.testing.assert_array_equal(torchfile.load(tar(("a/x.pth", tarfile.REGTYPE, GOOD)))["a"], [0, 1, 2])
    tensor = b"\x80\x03ctorch._utils\n_rebuild_tensor_v2\n(" + storage_of(
        FLAT)[2:-1] + b"K\0K\3\x85K\1\x85\x89NtR."  # fmt: skip
    np.testing.assert_array_equal(torchfile.load(tensor), [0, 1, 2])


def test_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a folder"):
        torchfile.read(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a plain file"):
        torchfile.read(tmp_path / "pipe")
    with pytest.raises(UserError, match="No such file"):
        torchfile.read(tmp_path / "x")
