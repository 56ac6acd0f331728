"""Pickles are read without running them; what asks for more is refused by name."""

from __future__ import annotations

import collections
import io
import os
import pickle

import numpy as np
import pytest
import torch_bytes

from dmd_jax.errors import UserError
from dmd_jax.storage.pickled_arrays import NUMPY, PickledArray
from dmd_jax.storage.safe_pickle import CONTAINERS, load

PLAIN = {
    "numbers": [0, -5, 255, 70_000, 2**90, -(2**40), 1.5, float("inf"), True, False, None],
    "texts": ["", "é\n", "a" * 300, "a" * 300],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, (2, (3, (4, 5, 6, 7))))],
    "ordered": collections.OrderedDict(b=1, a=[2]),
    "long": list(range(3000)),
}


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_of_every_protocol(protocol):
    value = PLAIN | {"bytes": b"\x00\xff" * 200, "set": {"b", "a"}} if protocol > 2 else PLAIN
    content = pickle.dumps(value, protocol)
    found = load(content, allowed=CONTAINERS, where="file")
    assert found == value
    assert found["texts"][2] is found["texts"][3] or protocol == 0


def test_frozen_sets_shared_objects_and_arrays_of_bytes():
    shared = ["x"]
    value = [frozenset({"a", "b"}), shared, shared]
    found = load(pickle.dumps(value, 5), allowed={}, where="file")
    assert found == value and found[1] is found[2]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_and_numbers_of_numpy(protocol):
    arrays = [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
        np.array(2.5, np.float16),
        np.zeros((0, 3), np.uint8),
        np.array([True, False]),
        np.arange(3, dtype=">f8"),
    ]
    value = {"arrays": arrays, "scalar": np.float64(0.7)}
    # NumPy writes the raw bytes of protocol 2 through _codecs.encode, which nothing here needs.
    if protocol == 2:
        with pytest.raises(UserError, match=r"asks for _codecs\.encode"):
            load(pickle.dumps(value, 2), allowed=NUMPY, where="file")
        return
    found = load(pickle.dumps(value, protocol), allowed=NUMPY, where="file")
    for ours, theirs in zip(found["arrays"], arrays, strict=True):
        assert isinstance(ours, PickledArray) and ours.array.dtype == theirs.dtype
        np.testing.assert_array_equal(ours.array, theirs)
        assert not ours.array.flags.writeable
    assert found["scalar"] == 0.7 and type(found["scalar"]) is float


def test_pickles_that_follow_each_other():
    stream = io.BytesIO(b"".join(torch_bytes.dumps(i, 2) for i in (7, 8)) + b"rest")
    assert [load(stream, allowed={}, where="file") for _ in range(2)] == [7, 8]
    assert stream.read() == b"rest"


def test_state_of_a_stand_in_and_persistent_ids():
    class Thing:
        def __init__(self, *args):
            self.args = args

        def pickle_state(self, state):
            self.state = state

    call = torch_bytes.Call(torch_bytes.Global("their", "Thing"), (1,), state={"a": 2}, new=True)
    content = torch_bytes.dumps([call, torch_bytes.PersistentId(("id", 3))])
    allowed = {("their", "Thing"): Thing}
    thing, persistent = load(content, allowed=allowed, where="file", persistent_load=lambda i: i[1])
    assert (thing.args, thing.state, persistent) == ((1,), {"a": 2}, 3)
    with pytest.raises(UserError, match="file: a persistent id where none is expected"):
        load(content, allowed=allowed, where="file")


class Runs:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def hostile(path):
    """What the message names -> a pickle that would make the file `path`, were it run."""
    touch = f"touch {path}"
    python = pickle.dumps(Runs(eval, f"open({str(path)!r}, 'w')"), 2)
    return {
        "posix.system": pickle.dumps(Runs(os.system, touch)),
        "builtins.eval": python.replace(b"__builtin__", b"builtins"),
        # Protocol 4 resolves dots along attributes, here of a class that is on the list.
        "collections.OrderedDict.__reduce__": pickle.dumps(Runs(os.system, touch), 4)
        .replace(b"\x8c\x05posix", b"\x8c\x0bcollections")
        .replace(b"\x8c\x06system", b"\x8c\x16OrderedDict.__reduce__"),
        "builtins.getattr": b"\x80\x03cbuiltins\ngetattr\ncos\nsystem\n\x86R.",
        "numpy.load": b"\x80\x03cnumpy\nload\nX\x05\0\0\0x.npy\x85R.",
        # The older opcodes that name and call in one, and the registry of numbered globals.
        "INST": f"(S'{touch}'\nios\nsystem\n.".encode(),
        "OBJ": f"(cos\nsystem\nS'{touch}'\no.".encode().replace(b"cos\nsystem\n", b"N"),
        "EXT1": b"\x80\x02\x82\x01)R.",
    }


@pytest.mark.parametrize("name", sorted(hostile("x")))
def test_hostile_pickles_are_named_and_not_run(tmp_path, name):
    victim = tmp_path / "ran"
    with pytest.raises(UserError) as error:
        load(hostile(victim)[name], allowed=NUMPY | CONTAINERS, where="file.pkl")
    assert str(error.value).startswith("file.pkl: ") and name in str(error.value)
    assert not victim.exists()


def test_the_hostile_pickles_would_run(tmp_path):
    for index, name in enumerate(("posix.system", "builtins.eval", "INST")):
        victim = tmp_path / str(index)
        pickle.loads(hostile(victim)[name])
        assert victim.exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\x80\x03]K\x01\x85R.", "a call of a list"),
        (b"\x80\x03ccollections\nOrderedDict\nK\x01R.", "a call with a int"),
        (b"\x80\x03}}b.", "a state for a dict"),
        (b"\x80\x03ccollections\nOrderedDict\n}b.", "a state for a type"),
        (b"\x80\x03]}K\x01s.", "a list in place of a dict"),
        (b"\x80\x03}))s.", "a key of type tuple"),
        (b"\x80\x04\x8f()\x90.", "a key of type tuple"),
        (b"\x80\x03}(K\x02u.", "argument 2 is shorter"),
        (b"\x80\x04K\x01K\x02\x93.", "a global whose name is no text"),
        (b"\x80\x03h\x09.", "9"),
        (b"\x80\x03\x86.", "an empty stack"),
        (b"I" + b"9" * 5000 + b"\n.", "4300 digits"),
        (b"\x80\x03X\x02\0\0\0\xff\xff.", "codec can't decode"),
        # Lengths that the file does not have are not allocated.
        (
            b"\x80\x04\x8e" + b"\xff" * 7 + b"\x0f" + b"abc.",
            "1,152,921,504,606,846,975 bytes expected",
        ),
        (b"\x80\x03B\xff\xff\xff\xff.", "4,294,967,295 bytes expected, 1 left"),
        (b"\x80\x03" + b"]" * 1_000_001 + b".", "more than 1,000,000 opcodes"),
        (b"no pickle", "opcode"),
        (b"", "1 bytes expected, 0 left"),
    ],
)
def test_damage_is_one_clear_error(content, message):
    with pytest.raises(UserError) as error:
        load(content, allowed=CONTAINERS, where="file")
    assert str(error.value).startswith("file: not a whole pickle (")
    assert message in str(error.value)


def call_with(items, times):
    """OrderedDict(items), again and again with the one list that the memo has."""
    pickled = pickle.dumps(items, 2)[2:-1]
    again = b"h\xfeh\xff\x85R0" * times
    return pickled + b"q\xff0ccollections\nOrderedDict\nq\xfe0" + again + b"N."


def many_hashes(value, count):
    """A dict of `count` keys, all of the one hash."""
    keys = b"".join(b"I%d\nN" % (value + each * (2**61 - 1)) for each in range(1, count + 1))
    return b"}(" + keys + b"u."


def float_hashes(count):
    keys = b"".join(b"F%r\nN" % (2.0**each) for each in range(0, count, 61))
    return b"}(" + keys.replace(b"'", b"") + b"u."


@pytest.mark.parametrize(
    "content, message",
    [
        (many_hashes(7, 50_000), "a number too large for a key"),
        (float_hashes(900), "a key of type float"),
        (b"(I10000000\nNd.", "a number too large for a key"),
        (b"(I-10000000\nNd.", "a number too large for a key"),
        (b"\x80\x03}X\x11\x27\0\0" + b"a" * 10_001 + b"Ns.", "a key of length 10,001"),
        # CPython's own machine makes an array of 2^32 pointers here.
        (b"\x80\x03K\x07r\xff\xff\xff\xff.", "a memo number that no pickle needs"),
        (b"I7\np2305843009213693951\n.", "a memo number that no pickle needs"),
        # 2,000 items in 6 bytes each time.
        (
            call_with([(str(n), n) for n in range(2000)], 501),
            "calls with more than 1,000,000 items",
        ),
        (call_with("text", 1), "a container made of a str"),
    ],
)
def test_little_bytes_that_would_cost_much(content, message):
    with pytest.raises(UserError) as error:
        load(content, allowed=CONTAINERS, where="file")
    assert message in str(error.value)


def test_small_numbers_are_keys():
    value = {0: "a", -3: "b", 1_000_000: "c", True: "d"}
    assert load(pickle.dumps(value), allowed={}, where="file") == value
    assert load(call_with([("a", 1)], 500), allowed=CONTAINERS, where="file") is None


def test_deep_nesting_is_no_recursion():
    found = load(b"\x80\x03" + b"N" + b"\x85" * 100_000 + b".", allowed={}, where="file")
    assert isinstance(found, tuple)


def test_cut_short_anywhere():
    value = PLAIN | {"array": np.arange(300.0), "set": {"a"}, "long": [1]}
    for protocol in (3, 5):
        content = pickle.dumps(value, protocol) if protocol == 3 else pickle.dumps(PLAIN, 5)
        load(content, allowed=NUMPY | CONTAINERS, where="file")
        for cut in range(0, len(content), 1 + len(content) // 500):
            with pytest.raises(UserError, match="file: not a whole pickle"):
                load(content[:cut], allowed=NUMPY | CONTAINERS, where="file")


@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
def test_random_damage_is_never_another_exception():
    rng = np.random.default_rng(0)
    value = PLAIN | {"array": np.arange(9.0), "set": {"a"}, "scalar": np.float64(2.0)}
    for protocol in [3, 5] * 150:
        content = np.frombuffer(pickle.dumps(value, protocol), np.uint8)
        damaged = content.copy()
        damaged[rng.integers(len(content), size=3)] = rng.integers(256, size=3)
        try:
            load(damaged.tobytes(), allowed=NUMPY | CONTAINERS, where="file")
        except UserError as error:
            assert str(error).startswith("file: ") and "\n" not in str(error)


@pytest.mark.parametrize(
    "dtype, shape, content",
    [
        ("O8", (1,), b"\0" * 8),
        ("V8", (1,), b"\0" * 8),
        ("f4", (-1,), b"\0" * 4),
        ("f4", (2**40,), b"\0" * 4),
        ("f4", (1,), b"\0" * 5),
        ("f4", (True,), b"\0" * 4),
        ("f4", (1,) * 33, b"\0" * 4),
        ("f4", (0, 2**63), b""),
    ],
)
def test_arrays_that_are_none(dtype, shape, content):
    core = "numpy.core.multiarray"
    kind = torch_bytes.Call(torch_bytes.Global("numpy", "dtype"), (dtype, False, True))
    made = torch_bytes.Call(
        torch_bytes.Global(core, "_reconstruct"),
        (torch_bytes.Global("numpy", "ndarray"), (0,), b"b"),
        state=(1, shape, kind, False, content),
    )
    with pytest.raises(UserError, match="file: not a whole pickle"):
        load(torch_bytes.dumps(made), allowed=NUMPY, where="file")
