"""Reads the text of a compiled XLA program: what runs, how often, and how much memory it moves.

XLA's own cost analysis counts the body of a loop once. Here it counts as often as the loop runs.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64}
_BITS |= {"u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
_BITS |= {name: 8 for name in ("f8e4m3fn", "f8e5m2", "f8e4m3b11fnuz", "f8e4m3", "f8e3m4", "f8e8m0fnu")}
_FUSIONS = ("fusion", "fusion-start")  # the second runs beside other work
_CALLED = re.compile(r"\b(?:calls|to_apply|body|called_computations)=\{?%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
        name: what others call its result.
        shape: the type of the result, as `f32[8,128]{1,0}` or a tuple of such.
        opcode: what it does, as `dot`.
        operands: the names of its inputs.
        rest: the attributes behind them.
        is_root: whether it is its computation's result.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    @property
    def called(self) -> str | None:
        """The computation that it runs, if any."""
        found = _CALLED.search(self.rest)
        return found[1] if found else None

    @property
    def target(self) -> str:
        """The library function of a custom call; empty for anything else."""
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def bytes(self) -> float:
        """Bytes of the result."""
        return size(self.shape)


Computation = dict[str, Instruction]


class Program:
    """The computations of a compiled module.

    Args:
        text: as `jax.stages.Compiled.as_text` gives it.

    Attributes:
        computations: the instructions of each by their names, in order.
        entry: the name of the one that runs first.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current: Computation = {}
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
                current = self.computations[head[2]] = {}
                self.entry = head[2] if head[1] else self.entry
            elif line.startswith(" ") and (found := _instruction(line)):
                current[found.name] = found

    @cached_property
    def runs(self) -> list["Run"]:
        """Everything that runs on its own, in loops as often as these go round."""
        return list(self._runs(self.entry, 1))

    def _runs(self, name: str, times: int) -> Iterator["Run"]:
        computation = self.computations[name]
        for one in computation.values():
            match one.opcode:
                case "while":
                    trips = _TRIPS.search(one.rest)
                    assert one.called is not None
                    yield from self._runs(one.called, times * (int(trips[1]) if trips else 1))
                case "conditional":
                    for branch in _branches(one.rest):
                        yield from self._runs(branch, times)
                case "call":
                    assert one.called is not None
                    yield from self._runs(one.called, times)
                case (
                    "parameter" | "tuple" | "get-tuple-element" | "bitcast" | "constant" | "after-all" | "partition-id"
                ):
                    continue
                case _ if one.opcode.endswith(("-done", "-update")):
                    continue
                case _:
                    yield Run(one, computation, times)

    def inside(self, one: Instruction) -> Iterator[Instruction]:
        """An instruction and all that the computations called by it hold."""
        yield one
        if one.called in self.computations and one.opcode in (*_FUSIONS, "async-start", "call"):
            for other in self.computations[one.called].values():
                yield from self.inside(other)

    def moved(self, run: "Run") -> float:
        """Bytes that one execution reads and writes: of an array that it takes a slice of, the slice's."""
        one = run.instruction
        if one.opcode in _FUSIONS and one.called is not None:
            fused = self.computations[one.called]
            read = sum(self._read(fused, parameter) for parameter in fused.values() if parameter.opcode == "parameter")
            return read + self._written(fused)
        if one.opcode == "dynamic-slice":
            return 2 * one.bytes
        if one.opcode == "dynamic-update-slice":
            return 2 * run.operand(1)
        return sum(map(run.operand, range(len(one.operands)))) + one.bytes

    def read(self, run: "Run", number: int) -> float:
        """Bytes that one execution reads of an operand."""
        one = run.instruction
        if one.opcode in _FUSIONS and one.called is not None:
            fused = self.computations[one.called]
            parameters = (each for each in fused.values() if each.opcode == "parameter" and _number(each) == number)
            return sum(self._read(fused, each) for each in parameters)
        return run.operand(number)

    def _read(self, computation: Computation, source: Instruction) -> float:
        """Bytes read of `source`, a parameter of a fused computation."""
        total = 0.0
        for use in computation.values():
            if source.name not in use.operands:
                continue
            first = use.operands[0] == source.name
            if use.opcode in ("dynamic-slice", "slice", "gather") and first:
                total += use.bytes
            elif use.opcode in ("dynamic-update-slice", "scatter") and first and use.operands.count(source.name) == 1:
                continue
            elif use.opcode == "bitcast":
                total += self._read(computation, use)
            elif use.opcode in _FUSIONS and use.called is not None:
                inner = list(self.computations[use.called].values())
                for place, operand in enumerate(use.operands):
                    if operand == source.name:
                        total += sum(self._read(self.computations[use.called], each) for each in inner
                                     if each.opcode == "parameter" and _number(each) == place)  # fmt: skip
            else:
                return source.bytes
        return min(total, source.bytes)

    def _written(self, computation: Computation) -> float:
        roots = [one for one in computation.values() if one.is_root]
        if roots and roots[0].opcode == "tuple":
            roots = [computation[name] for name in roots[0].operands]
        total = 0.0
        for root in roots:
            while root.opcode == "bitcast":
                root = computation[root.operands[0]]
            part = {"dynamic-update-slice": 1, "scatter": 2}.get(root.opcode)
            total += root.bytes if part is None else computation[root.operands[part]].bytes
        return total

    def flops(self, run: "Run") -> float:
        """FLOPs of the matrix products in one execution: 2 m n k each."""
        total = 0.0
        for name, computation in self.computations_of(run):
            for one in computation.values() if name else (run.instruction,):
                if one.opcode == "dot" or one.target.startswith("__cublas"):
                    total += _product_flops(one, computation)
        return total

    def computations_of(self, run: "Run") -> Iterator[tuple[str, Computation]]:
        """The computation of a run ("" before it), and those that it calls."""
        yield "", run.computation
        todo = [run.instruction.called] if run.instruction.opcode in (*_FUSIONS, "async-start") else []
        while todo:
            name = todo.pop()
            if name in self.computations:
                yield name, self.computations[name]
                todo += [one.called for one in self.computations[name].values() if one.opcode in _FUSIONS]


class Run(NamedTuple):
    """Something that a program runs on its own: a kernel, a library's function, a collective, a copy.

    Attributes:
        instruction: what.
        computation: where its operands are defined.
        times: how often, in a run of the program.
    """

    instruction: Instruction
    computation: Computation
    times: int

    def operand(self, number: int) -> float:
        """Bytes of an operand."""
        known = self.computation.get(self.instruction.operands[number])
        return known.bytes if known else 0.0


def _instruction(line: str) -> Instruction | None:
    """The instruction that a line holds; None for a closing brace."""
    line = re.sub(r"/\*.*?\*/", "", line).strip()
    is_root = line.startswith("ROOT ")
    name, equals, text = line.removeprefix("ROOT ").partition(" = ")
    if not equals:
        return None
    end = _closed(text, 0) if text.startswith("(") else text.index(" ")
    shape, text = text[:end], text[end:].lstrip()
    opened = text.index("(")
    end = _closed(text, opened)
    inputs = text[opened + 1 : end - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", inputs))
    opcode = text[:opened]
    rest = text[end:] if opcode != "parameter" else inputs
    return Instruction(name.removeprefix("%"), shape, opcode, operands, rest, is_root)


def _closed(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` has closed."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return start + found.end()
    return len(text)


def _number(parameter: Instruction) -> int:
    return int(parameter.rest)


def _branches(rest: str) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", rest)
    if listed:
        return [name.strip().removeprefix("%") for name in listed[1].split(",")]
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", rest)


def dimensions(shape: str) -> tuple[int, ...]:
    """The sizes of the first array in a type."""
    found = re.search(r"\w+\[([\d,]*)\]", shape)
    return tuple(int(n) for n in found[1].split(",") if n) if found else ()


def size(shape: str) -> float:
    """Bytes of a type such as `f32[8,128]{1,0}` or a tuple of them; what is no array (a token) has none."""
    return sum(
        _BITS[dtype] / 8 * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
        if dtype in _BITS
    )


def _product_flops(one: Instruction, computation: Computation) -> float:
    contracted = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d",]*)', one.rest)
    left = computation.get(one.operands[0])
    if contracted is None or left is None:
        return 0.0
    sizes = dimensions(left.shape)
    inner = math.prod(sizes[int(axis)] for axis in contracted[1].replace('"', "").split(",") if axis)
    return 2.0 * inner * math.prod(dimensions(one.shape))


# ------------------------------------------------------------------------------------------------------- collectives


@dataclass(frozen=True)
class Traffic:
    """The collectives of one kind in a run of a program.

    Attributes:
        count: how many.
        bytes: what they hand to or take from each device, all together.
        asynchronous: how many of them run beside other work.
    """

    count: int
    bytes: float
    asynchronous: int = 0


def collectives(program: Program) -> dict[str, Traffic]:
    """The collectives of a run of a program, those in loops times their trips.

    Bytes are of the whole array: the result of a gather, the operand of a reduction. Groups of one device are left
    out: nothing travels.

    Returns:
        The traffic by the kind of collective, as "all-gather".
    """
    found: dict[str, list[tuple[int, float, bool]]] = defaultdict(list)
    for run in program.runs:
        if (one := collective(program, run)) is not None:
            found[one.kind].append((run.times, one.bytes, one.is_asynchronous))
    return {
        kind: Traffic(sum(n for n, _, _ in all_), sum(n * b for n, b, _ in all_), sum(n for n, _, a in all_ if a))
        for kind, all_ in found.items()
    }


class Collective(NamedTuple):
    """One collective: its kind, as "all-gather"; its bytes, as in `collectives`; its group's devices."""

    kind: str
    bytes: float
    devices: int
    is_asynchronous: bool


def collective(program: Program, run: Run) -> Collective | None:
    """What a run is as a collective; None where it is none, or of groups of one device."""
    own, computation = run.instruction, run.computation
    if own.opcode == "async-start" and own.called in program.computations:
        computation = program.computations[own.called]
        own = next(one for one in computation.values() if one.is_root)
    kind = own.opcode.removesuffix("-start")
    if kind not in COLLECTIVES or (devices := _group_size(own.rest)) < 2:
        return None
    starts = run.instruction.opcode.endswith("-start")
    is_asynchronous = starts and not re.search(r'is_sync"?:\s*true', run.instruction.rest + own.rest)
    operands = [computation[name].bytes for name in own.operands if name in computation]
    return Collective(kind, sum(operands) * (devices if kind == "all-gather" else 1), devices, is_asynchronous)


def _group_size(rest: str) -> int:
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(iota[2])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):  # XLA of jax 0.12
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    return 2  # all devices, or pairs of a permutation
