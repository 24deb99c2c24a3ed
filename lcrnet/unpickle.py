"""Pickles of other people's models and anchor poses, read as data: nothing that is named in them is ever run.

A pickle is a program for a small stack machine, and some of its instructions call any function of any module. This is
that machine (the instructions as `pickletools` documents them) without that ability: it builds numbers, text, lists,
dicts and NumPy arrays of numbers, knows the few names by which NumPy, OrderedDict and the predecessor's AttrDict
appear in pickles, and refuses every other name and instruction before anything happens. A `Dialect` knows more names;
torchfile.py has that of torch's files.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from lcrnet.config import UserError

MOST_BYTES = 4 * 2**30
MOST_STEPS = 20_000_000

_ARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_RECONSTRUCT = {(m, "_reconstruct") for m in _ARRAY_MODULES}
_SCALAR = {(m, "scalar") for m in _ARRAY_MODULES}
_FROMBUFFER = {("numpy.core.numeric", "_frombuffer"), ("numpy._core.numeric", "_frombuffer")}
_NDARRAY, _DTYPE, _ENCODE = ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")
_BYTES = ("__builtin__", "bytes")
_DICTS = {("collections", "OrderedDict"), ("utils.collections", "AttrDict")}
_KNOWN = _RECONSTRUCT | _SCALAR | _FROMBUFFER | _DICTS | {_NDARRAY, _DTYPE, _ENCODE, _BYTES}
_NUMBERS = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16)")


class _Mark:
    """Where the items of a list begin on the stack."""


class Part:
    """What may stand in the arguments of a call only, never in the result."""


@dataclass(frozen=True)
class Name(Part):
    """A known name. It is compared, never looked up."""

    module: str
    name: str

    @property
    def key(self) -> tuple[str, str]:
        return self.module, self.name


@dataclass
class _Numbers(Part):
    """A dtype, whose byte order a pickle sets after it has made it."""

    code: str
    order: Any = "<"

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.code).newbyteorder(self.order)


class Dialect:
    """What a format adds to plain pickles: names, what a call of one of them stands for, and persistent ids."""

    names: frozenset[tuple[str, str]] = frozenset()

    def made(self, key: tuple[str, str], args: tuple[Any, ...]) -> Any:
        """The value of a call of one of `names`; Refused if it is called in another way than known."""
        raise Refused(f"refused: the pickle calls {key[0]}.{key[1]} in a way that plain data does not need")

    def persistent(self, identity: Any) -> Any:
        """The value that lies outside the pickle."""
        raise Refused("refused: the pickle has the instruction BINPERSID, which plain data does not need")


class Refused(Exception):
    """The message completes the sentence `FILE: ...`."""


def load(data: bytes, file: str = "pickle") -> Any:
    """What a pickle holds, as plain data.

    data  the file's bytes; Python 2's strings are read as latin-1
    file  its name, for messages
    -> None, bool, int, float, str, bytes, list, tuple, dict (OrderedDict and AttrDict too) and ndarrays of numbers.

    UserError: it is no whole pickle, is too large, or names a thing that plain data does not need. Nothing has been
    imported, called or written by then.
    """
    with told(file):
        return value(run(io.BytesIO(data), check(data)))


@contextmanager
def told(file: str) -> Iterator[None]:
    """Whatever goes wrong within, because of the bytes that are read, becomes a UserError of one line."""
    try:
        yield
    except Refused as error:
        raise UserError(f"{file}: {error}") from None
    except (
        ValueError,
        TypeError,
        IndexError,
        KeyError,
        AttributeError,
        OverflowError,
        EOFError,
        RecursionError,
        MemoryError,
        struct.error,
    ) as error:
        raise UserError(
            f"{file}: not a whole pickle ({' '.join(str(error).split())[:300] or type(error).__name__})"
        ) from None


def check(data: bytes) -> int:
    """The length of a file's bytes; Refused if they are too many."""
    if len(data) > MOST_BYTES:
        raise Refused(f"{len(data)} bytes are more than the {MOST_BYTES} that a pickle may have here")
    return len(data)


def run(stream: BinaryIO, budget: int, dialect: Dialect | None = None) -> Any:
    """Runs the pickle that begins at the stream's position, up to its end, and gives its value, which may be a `Part`.

    budget  bytes that its arrays may have. Each array's stand in the file once: to use the same ones again and again
            would fill the memory
    """
    dialect = dialect or Dialect()
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    opcode: Any
    arg: Any

    def items() -> list[Any]:
        """Takes what lies above the topmost mark."""
        start = len(stack) - 1
        while stack[start] is not _Mark:  # IndexError: there is none
            start -= 1
        out = stack[start + 1 :]
        del stack[start:]
        return out

    for step, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
        if step > MOST_STEPS:
            raise Refused(f"more than {MOST_STEPS} instructions")
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "NONE":
                stack.append(None)
            case "NEWTRUE":
                stack.append(True)
            case "NEWFALSE":
                stack.append(False)
            case (
                "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "LONG4" | "FLOAT" | "BINFLOAT" | "STRING"
                | "BINSTRING" | "SHORT_BINSTRING" | "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8"
                | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8"
            ):  # fmt: skip
                stack.append(arg)
            case "BYTEARRAY8":
                stack.append(bytes(arg))
            case "MARK":
                stack.append(_Mark)
            case "POP":
                stack.pop()
            case "POP_MARK":
                items()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "EMPTY_LIST":
                stack.append([])
            case "LIST":
                stack.append(_values(items()))
            case "APPEND":
                item = stack.pop()
                _list(stack[-1]).append(value(item))
            case "APPENDS":
                values = _values(items())
                _list(stack[-1]).extend(values)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(_tuple(items()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                values = [stack.pop() for _ in range(int(opcode.name[-1]))]
                stack.append(_tuple(values[::-1]))
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                stack.append(_set({}, items()))
            case "SETITEM":
                item, key = stack.pop(), stack.pop()
                _set(stack[-1], [key, item])
            case "SETITEMS":
                values = items()
                _set(stack[-1], values)
            case "GLOBAL":
                stack.append(_name(dialect, *arg.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_name(dialect, module, name))
            case "REDUCE" | "NEWOBJ":
                args, function = stack.pop(), stack.pop()
                stack.append(_made(dialect, function, args))
                budget -= _size(stack[-1], known=isinstance(function, Name) and function.key in dialect.names)
            case "BUILD":
                state = stack.pop()
                _build(stack[-1], state)
                budget -= _size(stack[-1])
            case "BINPERSID":
                stack.append(dialect.persistent(stack.pop()))
            case other:
                raise Refused(f"refused: the pickle has the instruction {other}, which plain data does not need")
        if budget < 0:
            raise Refused("refused: its arrays hold more than the file does")
    raise ValueError("it does not end")


def _name(dialect: Dialect, module: Any, name: Any) -> Name:
    if not (isinstance(module, str) and isinstance(name, str)):
        raise TypeError("a name that is no text")
    if (module, name) not in _KNOWN and (module, name) not in dialect.names:
        wanted = ascii(f"{module}.{name}"[:100])
        raise Refused(f"refused: the pickle asks for {wanted}; only arrays of numbers and plain data are read")
    return Name(module, name)


def _made(dialect: Dialect, function: Any, args: Any) -> Any:
    """What the call of a known name stands for."""
    if not isinstance(function, Name) or not isinstance(args, tuple):
        raise Refused("refused: the pickle calls something that is no known name")
    key = function.key
    if key in dialect.names:
        return dialect.made(key, args)
    if key in _RECONSTRUCT and len(args) == 3 and args[0] == Name(*_NDARRAY):
        return np.empty(0, np.float32)  # filled by the BUILD that follows
    if key == _DTYPE and args and isinstance(args[0], str):
        if not _NUMBERS.fullmatch(args[0]):
            raise Refused(f"refused: an array of {args[0][:20]!a}; only arrays of numbers are read")
        return _Numbers(args[0])
    if key in _SCALAR and len(args) == 2 and isinstance(args[0], _Numbers):
        return _array((), args[0], False, args[1])[()]
    if key in _FROMBUFFER and len(args) == 4:
        return _array(args[2], args[1], args[3] == "F", args[0])
    if key in _DICTS and len(args) <= 1:
        return _set({}, [item for pair in (args[0] if args else []) for item in _pair(pair)])
    # How Python 3 writes bytes for Python 2, none and some.
    if key == _BYTES and args == ():
        return b""
    if key == _ENCODE and len(args) == 2 and isinstance(args[0], str) and args[1] == "latin1":
        return args[0].encode("latin-1")
    return Dialect().made(key, args)


def _build(target: Any, state: Any) -> None:
    """Gives a thing just made its state, as `__setstate__` would."""
    if isinstance(target, np.ndarray) and isinstance(state, tuple) and len(state) == 5:
        made = _array(state[1], state[2], state[3], state[4])
        # In place, for the memo may hold it. NumPy checks the sizes; type and length are checked above.
        order: Any = bool(state[3])
        target.__setstate__((1, made.shape, made.dtype, order, made.tobytes("F" if order else "C")))
    elif isinstance(target, _Numbers) and isinstance(state, tuple) and len(state) >= 5 and state[2:5] == (None,) * 3:
        if state[1] not in ("<", ">", "|", "="):
            raise Refused("refused: a byte order that is none")
        target.order = state[1]
    elif not isinstance(target, dict):  # the attributes of a dict (AttrDict's __immutable__) are of no use
        raise Refused(f"refused: the pickle sets the state of a {type(target).__name__}")


def _array(shape: Any, numbers: Any, fortran: Any, data: Any) -> np.ndarray:
    """An array of numbers from its bytes; what does not fit together is refused before memory is taken."""
    if isinstance(data, str):  # Python 2
        data = data.encode("latin-1")
    if not (isinstance(numbers, _Numbers) and isinstance(data, bytes) and isinstance(shape, tuple)):
        raise Refused("refused: an array of objects or of unknown layout; only arrays of numbers are read")
    if not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 32:
        raise Refused(f"refused: an array of shape {shape!r}")
    if math.prod(shape) * numbers.dtype.itemsize != len(data):
        raise Refused(f"damaged: an array of shape {shape!r} and {numbers.code} in {len(data)} bytes")
    flat = np.frombuffer(data, numbers.dtype).astype(numbers.dtype.newbyteorder("="))
    return flat.reshape(shape, order="F" if fortran else "C")


def _set(target: Any, pairs: list[Any]) -> dict[Any, Any]:
    """Sets keys and values that alternate."""
    if not isinstance(target, dict) or len(pairs) % 2:
        raise TypeError("items for what is no dict")
    for key, item in zip(pairs[::2], pairs[1::2], strict=True):
        # Nested tuples take exponentially long to hash.
        if not isinstance(key, str | int | float | bytes | None):
            raise Refused(f"refused: a key that is a {type(key).__name__}")
        target[key] = value(item)
    return target


def _list(target: Any) -> list[Any]:
    if not isinstance(target, list):
        raise TypeError("items for what is no list")
    return target


def _pair(given: Any) -> tuple[Any, Any]:
    key, item = given
    return key, item


def value(given: Any) -> Any:
    """A value that may stand in the result: no mark and no `Part`."""
    for part in given if isinstance(given, tuple) else (given,):
        if part is _Mark or isinstance(part, Part):
            raise Refused("refused: a class or function stands where data should")
    return given


def _tuple(values: list[Any]) -> tuple[Any, ...]:
    """A tuple, maybe of arguments: names directly in it and no deeper, so that `value` need not look deeper."""
    for item in values:
        if isinstance(item, tuple):
            value(item)
    return tuple(values)


def _size(made: Any, known: bool = False) -> int:
    """Bytes of memory that something just made takes. A dialect's own arrays are views of what its parts hold."""
    if isinstance(made, Part):
        return int(getattr(made, "nbytes", 0))
    if isinstance(made, np.ndarray) and not known:
        return made.nbytes
    return len(made) if isinstance(made, bytes) else 0


def _values(values: list[Any]) -> list[Any]:
    return [value(v) for v in values]
