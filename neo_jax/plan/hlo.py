"""Parses the text of a compiled program: computations, instructions, types, trip counts of loops.

The text is XLA's HLO after all optimisations, in the order in which the device runs it.
"""

import dataclasses
import functools
import math
import re

ITEM_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2}
ITEM_BYTES |= {"f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "token": 0}
ITEM_BYTES |= {"f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3b11fnuz": 1, "c64": 8}

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\](\{[^{}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a type."""

    dtype: str
    shape: tuple[int, ...]
    is_in_vmem: bool  # otherwise in HBM, or too small to count

    @property
    def bytes(self) -> int:
        return int(math.prod(self.shape) * ITEM_BYTES.get(self.dtype, 4))


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of the result, flattened."""
        return arrays(self.type)

    def called(self, key: str = "calls") -> str | None:
        """The name of the computation that an attribute calls."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found and found[1]

    @functools.cached_property
    def cycles(self) -> int:
        """The compiler's own estimate of cycles; 0 if it makes none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else 0

    @functools.cached_property
    def op_name(self) -> str:
        """The place in the traced function, such as "jit(step)/mlp/dot"."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """The target of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {one.name: one for one in self.instructions}

    @property
    def root(self) -> Instruction:
        return next(one for one in reversed(self.instructions) if one.is_root)

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        return self.by_name[instruction.operands[index]]


@dataclasses.dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: str

    def __getitem__(self, name: str) -> Computation:
        return self.computations[name]

    def trips(self, loop: Instruction, where: Computation) -> int | None:
        """The trip count of a `while`; None if it depends on data."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        limit = _limit(self, self[loop.called("condition")])
        if limit is None:
            return None
        counter, bound = limit
        start = where.operand(loop, 0)
        if isinstance(bound, str):  # carried unchanged
            bound = _carried_constant(where, start, int(bound))
        first = _carried_constant(where, start, counter)
        if bound is None:
            return None
        step = _step(self, self[loop.called("body")], counter)
        return max(0, -(-(bound - (first or 0)) // step))


def parse(text: str) -> Module:
    """Parses the text of a program.

    Raises:
      ValueError: if it has no entry computation.
    """
    computations, entry, name, lines = {}, None, None, []
    for line in text.split("\n"):
        if name is None:
            header = _HEADER.match(line)
            if header:
                name, lines = header[2], []
                entry = name if header[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, tuple(lines))
            name = None
        elif (found := _instruction(line)) is not None:
            lines.append(found)
    if entry is None:
        raise ValueError("no entry computation: this is not the text of a compiled program")
    return Module(computations, entry)


def arrays(type_text: str) -> tuple[Array, ...]:
    """The arrays of a type: one array, or those of a tuple."""
    return tuple(
        Array(dtype, tuple(int(size) for size in shape.split(",") if size), "S(1)" in layout)
        for dtype, shape, layout in _ARRAY.findall(type_text)
        if dtype in ITEM_BYTES
    )


def _instruction(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(line)
    if not found:
        return None
    depth, end = 1, found.end()
    while depth and end < len(line):
        depth += {"(": 1, ")": -1}.get(line[end], 0)
        end += 1
    operands = line[found.end() : end - 1]
    names = tuple(_NAME.findall(operands))
    if found[4] in ("constant", "parameter"):
        names = (operands,)
    return Instruction(found[2], found[3], found[4], names, line[end:], bool(found[1]))


def _source(computation: Computation, one: Instruction) -> Instruction:
    """The instruction of which a value is a copy."""
    while one.op in ("bitcast", "copy", "convert", "reshape"):
        one = computation.operand(one, 0)
    return one


def _place(computation: Computation, one: Instruction) -> int | str | None:
    """The value of a constant, or (as text) the index of a value that the loop carries."""
    one = _source(computation, one)
    if one.op == "constant" and re.fullmatch(r"-?\d+", one.operands[0]):
        return int(one.operands[0])
    if one.op == "get-tuple-element":
        return re.search(r"index=(\d+)", one.attributes)[1]
    return None


def _limit(module: Module, condition: Computation) -> tuple[int, int | str] | None:
    """(index of the carried counter, bound) of a loop that counts up; None for other loops."""
    root = condition.root
    places = [_place(condition, condition.operand(root, i)) for i in range(len(root.operands))]
    compare = root
    if root.op == "fusion":
        inner = module[root.called()]
        compare = inner.root
        order = []
        for i in range(len(compare.operands)):
            one = _source(inner, inner.operand(compare, i))
            is_parameter = one.op == "parameter"
            order.append(places[int(one.operands[0])] if is_parameter else _place(inner, one))
        places = order
    direction = re.search(r"direction=(\w+)", compare.attributes)
    if compare.op != "compare" or not direction or None in places:
        return None
    counter, bound = places if direction[1] == "LT" else reversed(places)
    if direction[1] not in ("LT", "GT") or not isinstance(counter, str):
        return None
    return int(counter), bound


def _carried_constant(where: Computation, start: Instruction, index: int) -> int | None:
    """The constant with which a carried value starts; None if it is not one."""
    if start.op != "tuple":
        return None
    value = _place(where, where.operand(start, index))
    return value if isinstance(value, int) else None


def _step(module: Module, body: Computation, counter: int) -> int:
    """The increment of the counter; 1 if it cannot be read."""
    root = body.root
    if root.op != "tuple":
        return 1
    one = _source(body, body.operand(root, counter))
    where = body
    if one.op == "fusion":
        where = module[one.called()]
        one = _source(where, where.root)
    if one.op == "add":
        values = [_place(where, where.operand(one, i)) for i in range(2)]
        constants = [value for value in values if isinstance(value, int) and value > 0]
        if constants:
            return constants[0]
    return 1
