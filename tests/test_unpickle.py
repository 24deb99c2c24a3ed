"""Pickles are read as data: whatever a pickle says, nothing runs."""

from __future__ import annotations

import builtins
import codecs
import copyreg
import functools
import importlib
import io
import os
import pickle
import pickletools
import posix
import struct
import subprocess
import types
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcrnet import unpickle
from lcrnet.config import UserError

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray | np.generic):
        same = type(a) is type(b) and a.shape == b.shape and a.dtype == b.dtype.newbyteorder("=")
        return same and np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_data_and_arrays(protocol: int) -> None:
    shared = np.arange(6, dtype=np.float32)
    values = {
        "numbers": [0, 1, 255, 65536, -1, 10**30, -(10**30), 1.5, float("inf"), True, False, None],
        "text": ["", "a", "é\n", "字" * 300], "bytes": [b"", b"\xff\0"], "tuples": [(), (1,), (1, (2, 3)), (1, 2, 3)],
        "arrays": [np.zeros((0, 3)), np.float32(3), np.array(2.5), np.arange(24).reshape(2, 3, 4), shared, shared,
                   np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.arange(6)[::2], np.array([True, False])],
        "types": [np.arange(3).astype(t) for t in "b B h H i I l L e f d F D".split()],
        "ordered": OrderedDict(b=1, a=OrderedDict()), 7: "a number", None: 1,
    }  # fmt: skip
    assert equal(unpickle.load(pickle.dumps(values, protocol)), values)


def test_byte_order_and_identity() -> None:
    big = np.arange(5, dtype=">i4")
    a, b = unpickle.load(pickle.dumps([big, big]))
    assert a is b and a.dtype == np.int32
    np.testing.assert_array_equal(a, big)
    a[0] = 9  # ours to change


def test_lists_that_hold_themselves() -> None:
    loop: list[Any] = []
    loop.append(loop)
    found = unpickle.load(pickle.dumps(loop))
    assert found[0] is found


def test_python_2() -> None:
    """cPickle's protocol 2 writes an array's bytes as a str: SHORT_BINSTRING."""
    head = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R(K\x01K\x02\x85"
    body = b"cnumpy\ndtype\nU\x02f4K\0K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89U\x08"
    data = head + body + struct.pack("<2f", 1.5, -2e-30) + b"tb."
    np.testing.assert_array_equal(unpickle.load(data), np.float32([1.5, -2e-30]))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
        max_leaves=20,
    ),
    st.sampled_from(PROTOCOLS),
)
@settings(max_examples=60, deadline=None)
def test_round_trip(value: Any, protocol: int) -> None:
    assert equal(unpickle.load(pickle.dumps(value, protocol)), value)


@given(st.binary(max_size=60), st.integers(0, 400))
@settings(max_examples=200, deadline=None)
def test_damage_is_a_user_error(junk: bytes, cut: int) -> None:
    whole = pickle.dumps({"a": np.arange(40.0), "b": [1, "x"]}, 2)
    for data in (junk, whole[:cut], whole[:cut] + junk + whole[cut + len(junk) :]):
        try:
            unpickle.load(data, "f.pkl")
        except UserError as error:
            assert str(error).startswith("f.pkl: ") and "\n" not in str(error)


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None):
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.parts


class Persistent(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return "secret" if isinstance(value, Path) else None


def persistent(protocol: int) -> bytes:
    out = io.BytesIO()
    Persistent(out, protocol).dump([Path("x")])
    return out.getvalue()


def extension() -> bytes:
    """A pickle that names os.system by a number of copyreg's registry."""
    copyreg.add_extension("posix", "system", 0x31337)
    try:
        return pickle.dumps([posix.system], 2)
    finally:
        copyreg.remove_extension("posix", "system", 0x31337)


def objects(value: Any) -> np.ndarray:
    out = np.empty(1, object)
    out[0] = value
    return out


ATTACKS: dict[str, Callable[[str], bytes]] = {
    "os.system": lambda c: pickle.dumps(Calls(os.system, c)),
    "os.system protocol 0": lambda c: f"cos\nsystem\n(S'{c}'\ntR.".encode(),
    "posix.system by INST": lambda c: f"(S'{c}'\niposix\nsystem\n.".encode(),
    "builtins.eval by OBJ": lambda c: f"(cbuiltins\neval\nS'{py(c)}'\no.".encode(),
    "builtins.eval": lambda c: pickle.dumps(Calls(builtins.eval, py(c))),
    "builtins.exec": lambda c: pickle.dumps(Calls(builtins.exec, py(c))),
    "__builtin__.eval": lambda c: f"c__builtin__\neval\n(S'{py(c)}'\ntR.".encode(),
    "subprocess.Popen": lambda c: pickle.dumps(Calls(subprocess.Popen, ["sh", "-c", c])),
    "subprocess.check_output": lambda c: pickle.dumps(Calls(subprocess.check_output, ["sh", "-c", c])),
    "getattr of a module": lambda c: pickle.dumps(Calls(getattr, Calls(importlib.import_module, "os"), "system")),
    "dotted name below numpy": lambda c: b"\x80\x04\x8c\x05numpy\x8c\x13core.os.system_alias\x93.",
    "os through numpy": lambda c: b"\x80\x04\x8c\x05numpy\x8c\x08f2py.os.\x93" + pickle.dumps((c,))[2:-1] + b"R.",
    "numpy.load": lambda c: pickle.dumps(Calls(np.load, c)),
    "numpy.savetxt": lambda c: pickle.dumps(Calls(np.savetxt, c.split()[-1], [1])),
    "pickle in a pickle": lambda c: pickle.dumps(Calls(pickle.loads, pickle.dumps(Calls(os.system, c)))),
    "array of objects": lambda c: pickle.dumps(objects(Calls(os.system, c))),
    "array of harmless objects": lambda c: pickle.dumps(objects([1])),
    "record with an object field": lambda c: pickle.dumps(np.zeros(2, [("a", "O"), ("b", "f4")])),
    "object scalar": lambda c: b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O8'\ntRS'x'\ntR.",
    "dtype from a call": lambda c: pickle.dumps(Calls(np.dtype, Calls(os.system, c))),
    "codecs.decode": lambda c: pickle.dumps(Calls(codecs.decode, pickle.dumps(1), "zlib")),
    "_codecs.encode to another codec": lambda c: b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.",
    "copyreg.add_extension": lambda c: pickle.dumps(Calls(copyreg.add_extension, "os", "system", 5)),
    "an object of another class": lambda c: pickle.dumps(types.SimpleNamespace(a=1), 0),
    "extension code": lambda c: extension(),
    "persistent id": lambda c: persistent(4),
    "persistent id protocol 0": lambda c: persistent(0),
    "functools.partial": lambda c: pickle.dumps(functools.partial(os.system, c)),
    "a class as data": lambda c: pickle.dumps([np.ndarray]),
    "a class in a tuple in a tuple": lambda c: pickle.dumps((((np.ndarray,),),)),
    "a dict's class called with a class": lambda c: b"ccollections\nOrderedDict\n(ccollections\nOrderedDict\ntR.",
    "new attributes for a class": lambda c: b"ccollections\nOrderedDict\n(N}S'evil'\nK\1stb.",
    "state for a list": lambda c: b"](K\1K\2tb.",
    "a set": lambda c: pickle.dumps({1, 2}),
    "a key of nested tuples": lambda c: b"}" + b"N" + b"2\x86" * 60 + b"Ns.",
    "out-of-band buffer": lambda c: pickle.dumps(pickle.PickleBuffer(bytearray(9)), 5, buffer_callback=lambda b: None),
    "huge claimed bytes": lambda c: b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
    "huge claimed string": lambda c: b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"x.",
    "huge claimed frame": lambda c: b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N",
    "huge array": lambda c: array(b"J\xff\xff\xff\x7f\x85"),
    "negative array": lambda c: array(b"J\xff\xff\xff\xff\x85"),
    "array of 0 x 2**62": lambda c: array(b"K\0\x8a\x08\0\0\0\0\0\0\0\x40\x86", b""),
    "array with real flags": lambda c: array(b"K\2\x85", state=b"(K\3S'<'\nN(S'a'\nt}K\4K\1K\x3ft"),
    "one buffer, many arrays": lambda c: many(2000),
}  # fmt: skip


def py(command: str) -> str:
    return f'__import__("os").system("{command}")'


def array(
    shape: bytes, data: bytes = b"\0" * 8, state: bytes = b"(K\3S'<'\nNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0t"
) -> bytes:
    """A float32 array of any shape and dtype state."""
    head = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0tC\1btR(K\1" + shape
    return head + b"cnumpy\ndtype\n(S'f4'\ntR" + state + b"b\x89C" + bytes([len(data)]) + data + b"tb."


def many(count: int) -> bytes:
    """A small file that asks for `count` arrays of the same 60 kB."""
    start = (
        b"\x80\x02]B"
        + struct.pack("<I", 60000)
        + b"\0" * 60000
        + b"q\0"
        + b"0cnumpy\ndtype\nX\2\0\0\0u1\x85Rq\1"
        + b"0"
    )
    one = b"cnumpy._core.numeric\n_frombuffer\n(h\0h\1M\x60\xea\x85X\1\0\0\0CtRa"
    return start + one * count + b"."


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is refused in one line; no file appears, no module is imported, nothing that runs is even looked up."""
    trace = tmp_path / "ran"
    data = ATTACKS[name](f"touch {trace}")
    for runs in ("builtins.eval", "builtins.exec", "os.system", "posix.system", "subprocess.Popen", "pickle.loads"):
        monkeypatch.setattr(runs, lambda *a, **k: trace.write_text("called"))
    monkeypatch.setattr(builtins, "__import__", lambda *a, **k: pytest.fail(f"imports {a[0]}"))
    try:
        with pytest.raises(UserError) as error:
            unpickle.load(data, "evil.pkl")
    finally:
        monkeypatch.undo()
    assert str(error.value).startswith("evil.pkl: ") and "\n" not in str(error.value)
    assert not trace.exists()
    assert np.dtype("f4").itemsize == 4 and np.dtype("f4").names is None and "evil" not in vars(OrderedDict)


def test_attacks_are_attacks(tmp_path: Path) -> None:
    """The ordinary unpickler does run them: the trace would be seen."""
    for i, name in enumerate(
        ["os.system", "posix.system by INST", "builtins.eval", "pickle in a pickle", "array of objects"]
    ):
        trace = tmp_path / str(i)
        with suppress(TypeError):  # of NumPy, once it has run
            pickle.loads(ATTACKS[name](f"touch {trace}"))  # noqa: S301
        assert trace.exists(), name


def test_the_refused_name_is_told() -> None:
    with pytest.raises(UserError, match=r"evil.pkl: refused: the pickle asks for 'posix.system'"):
        unpickle.load(pickle.dumps(Calls(os.system, "true")), "evil.pkl")


def test_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    data = pickle.dumps(list(range(1000)))
    monkeypatch.setattr(unpickle, "MOST_BYTES", len(data) - 1)
    with pytest.raises(UserError, match="bytes are more than"):
        unpickle.load(data)
    monkeypatch.undo()
    monkeypatch.setattr(unpickle, "MOST_STEPS", 100)
    with pytest.raises(UserError, match="more than 100 instructions"):
        unpickle.load(data)


def test_every_instruction_is_known_or_refused() -> None:
    """A new Python with new instructions must not slip through."""
    for opcode in pickletools.opcodes:
        try:
            unpickle.load(opcode.code.encode("latin1") + b"\0\0\0\0\0\0\0\0\0\n\n.")
        except UserError:
            pass


def test_released_bundles(shared: Path) -> None:
    for name, scale in (("DEMO_ECCV18", 320), ("InTheWild-ResNet50", 800)):
        bundle = unpickle.load((shared / "legacy" / f"{name}_anchor_cfg.pkl").read_bytes(), name)
        assert sorted(bundle) == ["anchor_poses", "cfg", "ppi_params"]
        assert bundle["anchor_poses"].shape == (20, 65) and bundle["anchor_poses"].dtype == np.float32
        assert type(bundle["cfg"]) is dict and bundle["cfg"]["TEST"]["SCALE"] == scale
        assert set(bundle["ppi_params"]) == {"th_pose3D", "th_iou", "iou_func", "min_mode_score", "th_persondetect"}
