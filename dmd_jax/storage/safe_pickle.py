"""Pickles of strangers: a machine of our own that builds containers and calls nothing of theirs.

A pickle is a program. The standard library's pickletools.genops cuts it into opcodes without
running them; what they build here is lists, tuples, dicts, sets and plain values, and for a global
whatever the caller's table has under its exact name. Any other global ends the reading.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO

from dmd_jax.errors import UserError, first_line

# A pickle of the 296 M parameters of ImageNet-64 has fewer than a tenth of these; each may cost a
# few hundred bytes that the file does not have. Memo numbers, integer keys and the items that calls
# copy are held to the same bound.
_MOST_OPCODES = 1_000_000
_LONGEST_LINE = 10_000  # and the longest key
_LARGEST_SHOWN = 2**63

# Opcodes whose argument is the value.
# fmt: off
_VALUES = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4",
    "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
})
# fmt: on
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class OrderedDict(dict):
    """Stands in for collections.OrderedDict: a dict that lets go of the attributes it came with."""

    def __init__(self, items: Iterable[tuple[Any, Any]] = ()):
        super().__init__((_key(key), value) for key, value in _sequence(items))

    def pickle_state(self, state: Any) -> None:
        """PyTorch keeps `_metadata` here, which no reader of ours needs."""


def make_set(items: Iterable[Any] = ()) -> set:
    """Stands in for the built-in set."""
    return {_key(item) for item in _sequence(items)}


# The globals of containers, under the names of Python 3 and 2.
CONTAINERS = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): make_set,
    ("__builtin__", "set"): make_set,
}


def load(
    stream: BinaryIO | bytes,
    *,
    allowed: Mapping[tuple[str, str], Any],
    where: str,
    persistent_load: Callable[[Any], Any] | None = None,
) -> Any:
    """Reads one pickle and leaves the stream behind its end.

    Args:
      stream: bytes, or a seekable binary stream.
      allowed: what (module, name) stands for. It is ours, not theirs, and inert: REDUCE and NEWOBJ
        call it with whatever arguments the pickle has, BUILD calls `pickle_state(state)` of what it
        returned. A stand-in that is never called may be any object.
      where: the file, for messages.
      persistent_load: turns a persistent id into its object; without it such ids are refused.

    Returns:
      The object. Keys of dicts and members of sets are short texts, small integers or None.

    Raises:
      UserError: a global outside `allowed`, named; an opcode that has no business here; bytes that
        are damaged or cut short; more opcodes, or items that calls copy, than any checkpoint needs.
    """
    if isinstance(stream, bytes):
        stream = io.BytesIO(stream)
    machine = _Machine(allowed, where, persistent_load)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(_Bounded(stream))):
            if count >= _MOST_OPCODES:
                raise ValueError(f"more than {_MOST_OPCODES:,} opcodes")
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, argument)
        raise ValueError("no end")
    except UserError:
        raise
    except Exception as error:  # an empty stack, an unknown memo, bad UTF-8, no memory: all damage
        raise UserError(f"{where}: not a whole pickle ({first_line(error)})") from error


def shown(value: Any) -> str:
    """A name or a number out of a file, fit for one line of a message."""
    if isinstance(value, str):
        return ascii(value[:100])[1:-1][:100]
    # Longer numbers, and lists whose parts are shared, can take for ever to write out.
    if isinstance(value, float) or (isinstance(value, int) and abs(value) < _LARGEST_SHOWN):
        return str(value)
    return f"a {type(value).__name__}"


class _Machine:
    """The stack, the marks in it, and the memo."""

    def __init__(self, allowed, where, persistent_load):
        self.allowed, self.where, self.persistent_load = allowed, where, persistent_load
        self.stack, self.marks, self.memo = [], [], {}
        self.copied = 0  # items of the lists and tuples that calls were given

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            stack.append(tuple(self._pop(_TUPLES[name])))
        else:
            self._step(name, argument)

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                if argument >= _MOST_OPCODES:
                    raise ValueError("a memo number that no pickle needs")
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "MARK":
                self.marks.append(len(stack))
            case "POP_MARK":
                self._marked()
            case "POP":
                stack.pop()
            case "DUP":
                stack.append(stack[-1])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_SET":
                stack.append(set())
            case "TUPLE":
                stack.append(tuple(self._marked()))
            case "LIST":
                stack.append(self._marked())
            case "FROZENSET":
                stack.append(frozenset(make_set(self._marked())))
            case "DICT":
                stack.append({})
                self._set_items(self._marked(below=1))
            case "SETITEM":
                self._set_items(self._pop(2))
            case "SETITEMS":
                self._set_items(self._marked())
            case "APPEND":
                (item,) = self._pop(1)
                self._of(list).append(item)
            case "APPENDS":
                items = self._marked()
                self._of(list).extend(items)
            case "ADDITEMS":
                items = self._marked()
                self._of(set).update(make_set(items))
            case "GLOBAL":
                stack.append(self._global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(self._global(*self._pop(2)))
            case "REDUCE" | "NEWOBJ":
                stack.append(self._call(*self._pop(2)))
            case "BUILD":
                (state,) = self._pop(1)
                self._stand_in_of(stack[-1]).pickle_state(state)
            case "PERSID" | "BINPERSID":
                if self.persistent_load is None:
                    raise UserError(f"{self.where}: a persistent id where none is expected")
                identity = argument if name == "PERSID" else stack.pop()
                stack.append(self.persistent_load(identity))
            case "PROTO" | "FRAME":
                pass
            case _:
                raise UserError(f"{self.where}: the pickle uses {name}, which is refused")

    def _pop(self, count: int) -> list:
        start = len(self.stack) - count
        if start < 0:
            raise ValueError("an empty stack")
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _marked(self, *, below: int = 0) -> list:
        """Takes what is above the last mark; the top `below` items are not of it and stay."""
        start = self.marks.pop()
        stop = len(self.stack) - below
        items = self.stack[start:stop]
        del self.stack[start:stop]
        return items

    def _of(self, kind: type) -> Any:
        top = self.stack[-1]
        if not isinstance(top, kind):
            raise ValueError(f"a {type(top).__name__} in place of a {kind.__name__}")
        return top

    def _set_items(self, items: list) -> None:
        target = self._of(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def _global(self, module: Any, name: Any) -> Any:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a global whose name is no text")
        if (module, name) not in self.allowed:
            raise UserError(
                f"{self.where}: the pickle asks for {shown(module)}.{shown(name)}, which no file "
                "of this kind needs; nothing was run"
            )
        return self.allowed[module, name]

    def _call(self, function: Any, arguments: Any) -> Any:
        if not any(function is each for each in self.allowed.values()):
            raise ValueError(f"a call of a {type(function).__name__}")
        if not isinstance(arguments, tuple):
            raise ValueError(f"a call with a {type(arguments).__name__}")
        # The memo can hand one long list to every call.
        self.copied += sum(len(each) for each in arguments if isinstance(each, list | tuple))
        if self.copied > _MOST_OPCODES:
            raise ValueError(f"calls with more than {_MOST_OPCODES:,} items")
        return function(*arguments)

    def _stand_in_of(self, value: Any) -> Any:
        if not hasattr(type(value), "pickle_state"):
            raise ValueError(f"a state for a {type(value).__name__}")
        return value


def _key(value: Any) -> Any:
    # Hashing nested tuples that share their parts can take for ever, as can a dict of numbers that
    # were chosen to have one hash: small integers have hashes of their own, floats need not.
    if not isinstance(value, str | bytes | int | None):
        raise ValueError(f"a key of type {type(value).__name__}")
    if isinstance(value, int) and abs(value) > _MOST_OPCODES:
        raise ValueError("a number too large for a key")
    if isinstance(value, str | bytes) and len(value) > _LONGEST_LINE:
        raise ValueError(f"a key of length {len(value):,}")
    return value


def _sequence(items: Any) -> list | tuple:
    if not isinstance(items, list | tuple):
        raise ValueError(f"a container made of a {type(items).__name__}")
    return items


class _Bounded:
    """A stream that is never asked for more than it has, whatever length the pickle claims."""

    def __init__(self, stream: BinaryIO):
        position = stream.tell()
        self._stream, self._left = stream, stream.seek(0, io.SEEK_END) - position
        stream.seek(position)

    def read(self, count: int) -> bytes:
        if count > self._left:
            raise ValueError(f"{count:,} bytes expected, {self._left:,} left")
        self._left -= count
        return self._stream.read(count)

    def readline(self) -> bytes:
        line = self._stream.readline(_LONGEST_LINE)
        self._left -= len(line)
        return line
