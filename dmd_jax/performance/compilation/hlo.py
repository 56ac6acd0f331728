"""Reads the text of a compiled program: what its instructions cost, loops counted as they run.

XLA's own `cost_analysis` counts a loop's body once and adds -1 second for each kernel it cannot
see into, so that its sums mean little for a step with either. The TPU compiler writes its estimate
of an instruction's cycles beside the instruction; these are added up here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from dmd_jax.performance.compilation.kernels import kernel_of

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_CALLED = re.compile(r"\b(?:calls|body|condition|to_apply|called_computations)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CHANNEL = re.compile(r"\bchannel_id=\d+")
_OP_NAME = re.compile(r'op_name="([^"]+)"')
_OPERAND = re.compile(r"([\w.\-]+)(?=[,)])")
# What the TPU compiler calls the fusion of an all-reduce with the part that a device keeps of it.
_REDUCE_SCATTER = "all-reduce-scatter"
_CONSTANT = re.compile(r"^\((\d+)\)")
_KERNEL = 'custom_call_target="tpu_custom_call"'


class Instruction(NamedTuple):
    """A line of a computation."""

    name: str
    shape: str  # of its result, as HLO writes it
    opcode: str
    rest: str  # from the operands' opening parenthesis on


class Module(NamedTuple):
    """A compiled program's computations by their names."""

    computations: dict[str, list[Instruction]]
    entry: str


class Totals(NamedTuple):
    """What one run of a program takes on one device."""

    cycles: int  # of the instructions for which the compiler says them
    collective_bytes: Counter  # kind -> bytes of its larger side, operand or result
    kernels: Counter  # Pallas kernels, of which the compiler says no cycles
    operators: Counter  # cycles by what they are for: JAX's names, the numbers of blocks left out


def parse(text: str) -> Module:
    """The module of `compiled.as_text()`.

    Raises:
      ValueError: it is no such text.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line == "}":
            current = None
        elif current is not None and (name := _NAME.match(line)):
            shape, rest = _split_shape(line[name.end() :])
            opcode = _OPCODE.match(rest)
            current.append(Instruction(name[1], shape, opcode[1], rest[opcode.end() - 1 :]))
    if entry is None:
        raise ValueError("no ENTRY computation; expected the text of a compiled program")
    return Module(computations, entry)


def totals(module: Module) -> Totals:
    """The sums over one run: a loop's body as often as it runs, of branches the dearest.

    Raises:
      ValueError: a loop whose length is not a constant of its condition.
    """
    cost = _cost(module, module.entry, {})
    collective_bytes = Counter()
    for kind, size in cost.collectives.values():
        collective_bytes[kind] += size
    return Totals(cost.cycles, collective_bytes, cost.kernels, cost.operators)


def array_bytes(shape: str) -> list[int]:
    """The sizes of the arrays in a shape such as "(f32[8,128]{1,0}, s32[])", in its order."""
    sizes = []
    for dtype, dims in _ARRAY.findall(shape):
        bits = "8" if dtype == "pred" else "".join(re.findall(r"^[a-z]+(\d+)", dtype))
        if not bits:
            continue  # a token, which takes no memory
        size = int(bits) / 8
        for dim in filter(None, dims.split(",")):
            size *= int(dim)
        sizes.append(int(size))
    return sizes


def aliased(text: str) -> int:
    """How many results lie where an argument was, by the header of `compiled.as_text()`."""
    header = text.partition("\n")[0]
    return len(re.findall(r"\{[\d, ]*\}: \(\d+", header))


class _Cost(NamedTuple):
    cycles: int
    # Channel -> kind and bytes: an asynchronous collective is told of in each instruction that
    # works on it, by one channel.
    collectives: dict[str, tuple[str, int]]
    kernels: Counter
    operators: Counter


def _cost(module: Module, name: str, known: dict[str, _Cost]) -> _Cost:
    if name not in known:
        cycles, collectives, kernels, operators = 0, {}, Counter(), Counter()
        shapes = {one.name: one.shape for one in module.computations[name]}
        for instruction in module.computations[name]:
            own = _CYCLES.search(instruction.rest)
            if own:
                cycles += int(own[1])
                operators[_operator(instruction)] += int(own[1])
            kind = instruction.opcode.removesuffix("-start")
            channel = _CHANNEL.search(instruction.rest)
            if name.startswith(_REDUCE_SCATTER):
                kind = kind.replace("all-reduce", "reduce-scatter")
                channel = None  # all of these fusions have the same
            if kind in COLLECTIVES:
                size = _collective_bytes(instruction, shapes)
                collectives[channel[0] if channel else instruction.name] = kind, size
            if _KERNEL in instruction.rest:
                kernels[kernel_of(instruction.name, instruction.rest)] += 1
            for inner, times in _inner(module, instruction):
                found = max((_cost(module, each, known) for each in inner), key=lambda one: one[0])
                if own is None:  # a fusion's cycles are its own; what is fused has none
                    cycles += times * found.cycles
                    for operator, count in found.operators.items():
                        operators[operator] += times * count
                for channel, (kind, size) in found.collectives.items():
                    collectives[channel] = kind, times * size
                for kernel, count in found.kernels.items():
                    kernels[kernel] += times * count
        known[name] = _Cost(cycles, collectives, kernels, operators)
    return known[name]


def _collective_bytes(instruction: Instruction, shapes: dict[str, str]) -> int:
    """Of all its operands, which XLA combines to one instruction, or of all its results."""
    operands = _OPERAND.findall(instruction.rest[: _closing(instruction.rest)])
    taken = sum(sum(array_bytes(shapes[name])) for name in operands if name in shapes)
    given = sum(array_bytes(instruction.shape))
    if instruction.opcode.endswith("-start"):
        given -= taken  # its result has the operands as well
    return max(taken, given)


def _operator(instruction: Instruction) -> str:
    """The last words of its name in JAX, such as "resnets/conv1/conv_general_dilated"."""
    found = _OP_NAME.search(instruction.rest)
    if found is None:
        return instruction.opcode
    words = [re.sub(r"_\d+$", "", word) for word in found[1].split("/")]
    return "/".join(words[-3:])


def _inner(module: Module, instruction: Instruction) -> Iterator[tuple[list[str], int]]:
    """The computations that an instruction runs: those of which one runs, and how often."""
    if instruction.opcode == "while":
        called = dict(re.findall(r"\b(condition|body)=%?([\w.\-]+)", instruction.rest))
        yield [called["body"]], _trips(module, called["condition"])
    elif instruction.opcode == "conditional":
        branches = _BRANCHES.findall(instruction.rest)
        names = [name for both in branches for name in re.findall(r"[\w.\-]+", " ".join(both))]
        yield names, 1
    else:
        for name in _CALLED.findall(instruction.rest):
            yield [name], 1


def _trips(module: Module, condition: str) -> int:
    """The length of a loop that counts from 0, by the constant that its condition compares to."""
    instructions = module.computations[condition]
    constants = [_CONSTANT.match(one.rest) for one in instructions if one.opcode == "constant"]
    found = [int(match[1]) for match in constants if match]
    if len(found) != 1:
        raise ValueError(f"loop condition {condition} compares to {found}; expected one constant")
    return found[0]


def _split_shape(text: str) -> tuple[str, str]:
    """ "SHAPE OPCODE(…" in two; a tuple's shape has spaces."""
    end = _closing(text) if text.startswith("(") else text.index(" ")
    return text[:end], text[end:]


def _closing(text: str) -> int:
    """The position behind the parenthesis that closes the one at the beginning."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return position + 1
    return len(text)
