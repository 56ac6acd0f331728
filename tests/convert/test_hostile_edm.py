"""Files that are made to harm, or that are no networks: one clear line, and nothing runs."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch_bytes
from commands import fails
from edm_pickle import module_state, numpy_scalar, persistent, stored
from torch_bytes import Call, Global, dumps, legacy_storage

from dmd_jax.convert.edm_pickle import read_edm_pickle
from dmd_jax.convert.torch_tensors import read_legacy
from dmd_jax.errors import UserError

LOAD = Global("torch.storage", "_load_from_bytes")
REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
KWARGS = {"img_resolution": 8, "img_channels": 1, "model_type": "SongUNet"}


def network(inner=None, kwargs=KWARGS, class_name="EDMPrecond", **changes):
    """An EDMPrecond around a SongUNet with these tensors or modules of its own."""
    inner = {} if inner is None else inner
    parameters = {k: v for k, v in inner.items() if not k.startswith("module")}
    modules = {k: v for k, v in inner.items() if k.startswith("module")}
    model = persistent("SongUNet", module_state(parameters, modules=modules))
    state = module_state(modules={"model": model}) | {"_init_args": (), "_init_kwargs": kwargs}
    return {"ema": persistent(class_name, state | changes.pop("state", {}), **changes)}


def weight(content=None, offset=0, size=(2,), stride=(1,)):
    """{"weight": a tensor}, of these storage bytes."""
    content = legacy_storage(np.ones(2, np.float32)) if content is None else content
    args = (Call(LOAD, (content,)), offset, size, stride, False, None)
    return {"weight": Call(REBUILD, args)}


def read(tmp_path, value, protocol=4):
    path = tmp_path / "net.pkl"
    path.write_bytes(value if isinstance(value, bytes) else dumps(value, protocol))
    return read_edm_pickle(path)


def test_the_smallest_file_is_read(tmp_path):
    kwargs, state_dict = read(tmp_path, network(weight()))
    assert kwargs == KWARGS
    np.testing.assert_array_equal(state_dict["model.weight"], [1, 1])


def hostile(victim):
    """What the message names -> a pickle that makes the file `victim`, were it run."""
    touch = f"touch {victim}"
    system = Call(Global("posix", "system"), (touch,))
    getattr_ = Call(Global("builtins", "getattr"), (Global("shutil", "os"), "system"))
    numpy_writes = Call(Global("numpy", "savetxt"), (str(victim), [1]))
    return {
        # In the network's place.
        "asks for posix.system": dumps({"ema": system}, 3),
        # The name of what is called is but a text.
        "asks for builtins.getattr": dumps({"ema": Call(getattr_, (touch,))}, 3),
        # Protocol 4 looks dots up as attributes.
        "asks for shutil.os.system": dumps(
            {"ema": Call(Global("shutil", "os.system"), (touch,))}, 4
        ),
        # NumPy's other functions.
        "asks for numpy.savetxt": dumps(numpy_writes, 4),
        # The opcodes of old that name and call at once.
        "uses INST": f"(S'{touch}'\nios\nsystem\n.".encode(),
        # The same inside a storage's bytes, at once and behind PyTorch's magic number.
        "in a storage: the pickle asks for posix.system": network(weight(dumps(system, 2))),
        "in a storage: the pickle asks for os.system": network(
            weight(dumps(torch_bytes.MAGIC, 2) + dumps(Call(Global("os", "system"), (touch,)), 2))
        ),
        # Dots into what is on the list, globals by number, PyTorch's own door, the text's own hook.
        "_reconstruct_persistent_obj.__globals__": {
            "ema": Global("torch_utils.persistence", "_reconstruct_persistent_obj.__globals__")
        },
        "uses EXT1": b"\x80\x02}X\x03\0\0\0ema\x82\x01)Rs.",
        "asks for torch.hub.load": {"ema": Call(Global("torch.hub", "load"), (touch,))},
        "asks for torch_utils.persistence.import_hook": {
            "ema": Call(Global("torch_utils.persistence", "import_hook"), ("x",))
        },
    }


@pytest.mark.parametrize("name", hostile("x"))
def test_hostile_pickles_are_named_and_not_run(tmp_path, capsys, name):
    victim, out, path = tmp_path / "ran", tmp_path / "out", tmp_path / "net.pkl"
    content = hostile(victim)[name]
    path.write_bytes(content if isinstance(content, bytes) else dumps(content, 4))
    line = fails(capsys, "convert", "edm", path, out)
    assert "net.pkl" in line and name in line
    assert not victim.exists() and not out.exists()


def test_five_of_them_would_run(tmp_path):
    for index, name in enumerate(list(hostile("x"))[:5]):
        victim = tmp_path / str(index)
        pickle.loads(hostile(victim)[name])
        assert victim.exists(), name


SOURCE = "open({!r}, 'w')"


def test_the_source_that_the_file_carries_is_not_run(tmp_path):
    victim = tmp_path / "ran"
    read(tmp_path, network(weight(), module_src=SOURCE.format(str(victim))))
    assert not victim.exists()


def loops():
    """A module that is its own submodule."""
    return (
        b"\x80\x03}X\x03\0\0\0emactorch.nn.modules.container\nModuleDict\n)\x81q\x00"
        b"}(X\x08\0\0\0_modules}X\x01\0\0\0ah\x00s"
        b"X\x0b\0\0\0_parameters}X\x08\0\0\0_buffers}ubs."
    )


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


def wide(times):
    """Lists of one list, twice each: small in the file, and without end when it is written out."""
    value = [1, 1]
    for _ in range(times):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    "value, message",
    [
        ({"net": 1}, "holds a dict; expected EDM's network under 'ema'"),
        ({"ema": 1}, "expected EDM's network under 'ema'"),
        ([], "holds a list"),
        (network(class_name="VPPrecond"), "is of the class VPPrecond; expected EDMPrecond"),
        (network(class_name="\x1b[2J\n"), "is of the class \\x1b[2J\\n; expected"),
        (network(class_name=3), "whose class has no name"),
        (network(version=7), "a persistent object of version 7"),
        (network(version=wide(60)), "a persistent object of version a list"),
        (network(state={"_non_persistent_buffers_set": [1]}), "a list in place of a set"),
        (network(type="module"), "a persistent object that is of no class"),
        (network(state={"_init_kwargs": None}), "no _init_kwargs"),
        (network(state={"_init_args": (1,) * 5}), "arguments without names"),
        (network(kwargs={"model_type": "DhariwalUNet"}), "model_type DhariwalUNet beside"),
        (network(kwargs=KWARGS | {"model_type": "UNet"}), "model_type UNet beside"),
        (network(kwargs=KWARGS | {"a b": 1}), "without a plain name"),
        (network(kwargs=KWARGS | {"x": nested(9)}), "keyword arguments beyond all measure"),
        (network(kwargs=KWARGS | {"x": list(range(999))}), "beyond all measure"),
        (network(kwargs=KWARGS | {"x": wide(60)}), "beyond all measure"),
        (network(kwargs=KWARGS | {"x": 2**90}), "a keyword argument of type int"),
        (network(kwargs=KWARGS | {"x": weight()["weight"]}), "a keyword argument of type Tensor"),
        (network(state={"_modules": {}}), "model_type SongUNet beside"),
        (network(state={"_modules": [1]}), "no _modules in EDMPrecond"),
        (network({"weight": 3}), "a int in place of a tensor"),
        (network({"a.b": weight()["weight"]}), "without a plain name"),
        (network({"module": 3}), "a int in place of a module"),
        (loops(), "is of the class ModuleDict"),
        (network({"weight": Call(LOAD, ("text",))}), "a storage that is not made of bytes"),
        (network(weight(dumps(3, 2))), "in a storage: not a file of PyTorch's"),
        (network(weight(torch_bytes.legacy_file({}))), "a OrderedDict in place of a storage"),
        (network(weight(size=(3,))), "beyond its storage of 2 elements"),
        (network(weight(size=(2**40,), stride=(0,))), "beyond its storage"),
        (network(weight(offset=-1)), "negative size"),
        (network(weight(size=(-1,))), "negative size"),
        (network(weight(size=(1,), stride=(-5,))), "negative size"),
        (network(weight(size=2)), "size and stride do not fit"),
    ],
)
def test_files_that_are_no_network(tmp_path, value, message):
    with pytest.raises(UserError) as error:
        read(tmp_path, value)
    assert str(tmp_path / "net.pkl") in str(error.value) and "\n" not in str(error.value)
    assert message in str(error.value)


def test_a_storage_that_is_asked_for_again_is_read_once(tmp_path, monkeypatch):
    """The memo hands the same bytes to every call."""
    reads = []

    def counted(content, where):
        reads.append(content)
        return read_legacy(content, where)

    monkeypatch.setattr("dmd_jax.convert.edm_pickle.read_legacy", counted)
    path = tmp_path / "net.pkl"
    start = dumps(legacy_storage(np.ones(2, np.float32)))[:-1]
    again = b"ctorch.storage\n_load_from_bytes\nh\0\x85R0"
    path.write_bytes(start + 1000 * again + dumps(network(weight()))[:-1] + b".")
    _, state_dict = read_edm_pickle(path)
    np.testing.assert_array_equal(state_dict["model.weight"], [1, 1])
    assert len(reads) == 2


def test_many_views_and_many_parts(tmp_path):
    """One tensor as five parameters by way of the memo, and one dictionary in many modules."""
    path = tmp_path / "net.pkl"
    tensor = dumps(weight()["weight"])[2:-1] + b"r\xff\xff\0\0" + b"0"
    for count in (4, 5):
        whole = dumps(network({f"w{each}": 77 for each in range(count)}))
        path.write_bytes(whole[:2] + tensor + whole[2:].replace(b"K\x4d", b"j\xff\xff\0\0"))
        if count == 4:
            assert len(read_edm_pickle(path)[1]) == 4
            continue
        with pytest.raises(UserError, match="tensors of 40 bytes in storages of 8"):
            read_edm_pickle(path)

    shared = {f"w{each}": None for each in range(1100)}
    modules = {f"module{each}": persistent("Linear", module_state()) for each in range(100)}
    for module in modules.values():
        module.args[0]["state"]["_parameters"] = shared
    with pytest.raises(UserError, match="modules of more than 100,000 parts"):
        read(tmp_path, network(modules))


def test_modules_in_two_places_and_too_deep(tmp_path):
    shared = persistent("Linear", module_state())
    both = {"module_a": lambda: shared, "module_b": lambda: shared}
    read(tmp_path, network(both))  # two modules that are alike
    path = tmp_path / "net.pkl"
    content = dumps(network({"module_a": shared, "module_b": 0}), 3)
    # ... and one that the memo brings back in place of the 0.
    position = content.index(b"X\x08\0\0\0module_b")
    index = content.rindex(b"Rq", 0, position) + 2
    zero = content.index(b"K\x00", position)
    path.write_bytes(content[:zero] + b"h" + content[index : index + 1] + content[zero + 2 :])
    with pytest.raises(UserError, match="a module inside itself, or in two places"):
        read_edm_pickle(path)
    deep = shared
    for _ in range(40):
        deep = persistent("Linear", module_state(modules={"a": deep}))
    with pytest.raises(UserError, match="a module inside itself"):
        read(tmp_path, network({"module_a": deep}))


def test_a_storage_that_claims_more_than_it_has(tmp_path):
    content = legacy_storage(np.ones(2, np.float32))
    two = (2).to_bytes(8, "little")
    for count in (3, -2, 2**61):
        # First where the tensor names its storage, then where the bytes begin, then both.
        named = content.replace(b"K\x02", b"\x8a\x09" + count.to_bytes(9, "little", signed=True))
        begun = content.replace(two, count.to_bytes(8, "little", signed=True))
        both = named.replace(two, count.to_bytes(8, "little", signed=True))
        assert len({content, named, begun, both}) == 4
        for damaged in (named, begun, both):
            with pytest.raises(UserError, match="in a storage|a storage of a negative size"):
                read(tmp_path, network(weight(damaged)))


@pytest.mark.parametrize("protocol", [3, 4])
def test_cut_short_anywhere(tmp_path, protocol):
    tensors = {"weight": stored(np.ones((3, 4), np.float32), parameter=True)}
    content = dumps(network(tensors, state={"sigma": numpy_scalar(0.5)}), protocol)
    read(tmp_path, content)
    for cut in range(0, len(content), 1 + len(content) // 150):
        with pytest.raises(UserError, match="net.pkl"):
            read(tmp_path, content[:cut])


def test_random_damage_is_never_another_exception(tmp_path):
    tensors = {"weight": stored(np.ones((3, 4), np.float32), parameter=True)}
    content = np.frombuffer(dumps(network(tensors), 3), np.uint8)
    rng = np.random.default_rng(2)
    for _ in range(250):
        damaged = content.copy()
        damaged[rng.integers(len(content), size=3)] = rng.integers(256, size=3)
        try:
            read(tmp_path, damaged.tobytes())
        except UserError as error:
            assert "net.pkl" in str(error) and "\n" not in str(error)


def test_a_folder_and_a_missing_file(tmp_path):
    for path, said in ((tmp_path, "is a folder"), (tmp_path / "no.pkl", "no such file")):
        with pytest.raises(UserError, match=said):
            read_edm_pickle(path)
