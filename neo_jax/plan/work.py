"""The work of an instruction of a compiled program: its kind, FLOPs and bytes of HBM."""

import math
import re

import numpy as np

from neo_jax.plan.hlo import Array, Computation, Instruction, Module
from neo_jax.plan.kernel_costs import moved_bytes
from neo_jax.plan.network import all_instructions

# Instructions that only name values, or change their type or layout on paper.
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
}
_MOVES = {
    "copy",
    "transpose",
    "slice",
    "dynamic-slice",
    "dynamic-update-slice",
    "pad",
    "concatenate",
}
_MOVES |= {"broadcast", "reshape", "iota", "reverse", "gather", "scatter", "convert", "select"}
_MOVES |= {"compare", "clamp", "and"} | FREE
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}  # the operand with the new values
_SLICES = {"slice", "dynamic-slice", "gather"}

# Parts of the model, by words in an instruction's op_name. The first match counts.
PARTS = {
    "loss": ("(loss)", "/loss/"),
    "patch embedding": ("patch_embed",),
    "attention: norms, rotation": ("norm_rope",),
    "attention: projections": ("attention/qkv", "attention/out"),
    "attention": ("/attention/",),
    "mlp": ("/mlp/",),
    "layers, rest": ("/while/body/",),
}
REST = "embedding, optimizer, rest"


def part(op_name: str) -> str:
    """The part of the model that an instruction computes."""
    found = [name for name, words in PARTS.items() if any(word in op_name for word in words)]
    return found[0] if found else REST


def phase(op_name: str) -> str:
    """forward, backward, recomputed (by rematerialisation) or update."""
    if "rematted_computation" in op_name:
        return "recomputed"
    if "transpose(" in op_name:
        return "backward"
    return "forward" if "jvp(" in op_name else "update"


def branches(one: Instruction) -> list[str]:
    """The names of a conditional's computations."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", one.attributes)
    if listed:
        return re.findall(r"%?([\w.\-]+)", listed[1])
    return [one.called(f"{which}_computation") for which in ("true", "false")]


def kind(module: Module, one: Instruction) -> str:
    """The kind of work: matmul, copy (nothing is computed), or elementwise and reductions."""
    ops = {one.op}
    if one.op == "fusion":
        ops = {inner.op for inner in all_instructions(module, module[one.called()])} - {"fusion"}
    if ops & {"convolution", "dot"}:
        return "matmul"
    return "copy" if ops <= _MOVES else "elementwise, reductions"


def products(module: Module, where: Computation, one: Instruction) -> float:
    """The FLOPs of the matrix products in an instruction, 2 for each multiply-add."""
    if one.op == "fusion":
        inner = module[one.called()]
        return sum(products(module, inner, each) for each in inner.instructions)
    if one.op == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)[1]
        left = where.operand(one, 0).arrays[0].shape
        summed = math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
        return 2.0 * math.prod(one.arrays[0].shape) * summed
    if one.op != "convolution":
        return 0.0
    return _convolution(where, one)


def _convolution(where: Computation, one: Instruction) -> float:
    """The FLOPs of a convolution. TPU programs use it for every product, heads as its windows."""
    left, right = (where.operand(one, i).arrays[0].shape for i in range(2))
    result = one.arrays[0].shape
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    lhs, rhs, out = labels[1], labels[2], labels[3]
    flops = 2.0 * result[out.index("b")] * result[out.index("f")] * right[rhs.index("i")]
    window = re.search(r"window=\{([^}]*)\}", one.attributes)
    settings = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = sum(letter.isdigit() for letter in lhs)

    def setting(name: str, axis: int, default: str) -> str:
        return settings[name].split("x")[axis] if name in settings else default

    for axis in range(spatial):
        letter = str(axis)
        low = int(setting("pad", axis, "0_0").split("_")[0])
        stride, lhs_dilation, rhs_dilation = (
            int(setting(name, axis, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        place = (
            np.arange(result[out.index(letter)])[:, None] * stride
            - low
            + np.arange(right[rhs.index(letter)])[None, :] * rhs_dilation
        )
        extent = (left[lhs.index(letter)] - 1) * lhs_dilation + 1
        is_inside = (place >= 0) & (place < extent) & (place % lhs_dilation == 0)
        flops *= np.count_nonzero(is_inside)
    return flops


def traffic(module: Module, where: Computation, one: Instruction) -> int:
    """The bytes of HBM that an instruction reads and writes, by the types and slices in it."""
    if one.op in FREE or one.op in ("while", "conditional", "call") or one.op.endswith("-done"):
        return 0
    operands = [where.by_name[name] for name in one.operands if name in where.by_name]
    if one.op == "copy-start":
        return sum(_in_hbm(array) for array in one.arrays[:2])
    if one.op == "slice-start":
        moved, source = one.arrays[-2], operands[0].arrays[0]
        return _in_hbm(moved) + (0 if source.is_in_vmem else moved.bytes)
    if one.op.endswith("-start"):
        return 0
    if one.op == "fusion":
        return _fusion_traffic(module, one, operands)
    if one.op in _IN_PLACE:
        new = operands[_IN_PLACE[one.op]].arrays[0]
        return _in_hbm(new) + (0 if one.arrays[0].is_in_vmem else new.bytes)
    if one.op == "custom-call":
        return moved_bytes(one, operands)
    reads = operands[:0] if one.op in _SLICES else operands
    total = sum(_in_hbm(array) for each in reads for array in each.arrays)
    if one.op in _SLICES and not operands[0].arrays[0].is_in_vmem:
        total += one.arrays[0].bytes
    return total + sum(_in_hbm(array) for array in one.arrays)


def _in_hbm(array: Array) -> int:
    return 0 if array.is_in_vmem else array.bytes


def _fusion_traffic(module: Module, one: Instruction, operands: list[Instruction]) -> int:
    """The bytes of a fusion: values that it only slices or updates in place count in part."""
    inner = module[one.called()]
    parameters = {each.operands[0]: each for each in inner.instructions if each.op == "parameter"}
    total = 0
    for number, operand in enumerate(operands):
        size = sum(_in_hbm(array) for array in operand.arrays)
        if size and (parameter := parameters.get(str(number))):
            total += min(size, _bytes_read(module, inner, parameter, size))
    root = inner.root
    results = [inner.operand(root, i) for i in range(len(root.operands))]
    for array, made in zip(one.arrays, results if root.op == "tuple" else [root], strict=False):
        where = inner
        while made.op in ("bitcast", "fusion"):
            if made.op == "fusion":
                where = module[made.called()]
                made = where.root
            else:
                made = where.operand(made, 0)
        if made.op in _IN_PLACE:
            new = where.operand(made, _IN_PLACE[made.op])
            total += 0 if array.is_in_vmem else new.arrays[0].bytes
        else:
            total += _in_hbm(array)
    return total


def _bytes_read(module: Module, inner: Computation, value: Instruction, size: int) -> int:
    """The bytes that a fused computation reads of one of its values, at most `size`."""
    total = 0
    for user in inner.instructions:
        if value.name not in user.operands:
            continue
        if user.op in _SLICES:
            total += user.arrays[0].bytes
        elif user.op in _IN_PLACE and user.operands[0] == value.name:
            continue
        elif user.op == "bitcast":
            total += _bytes_read(module, inner, user, size)
        elif user.op == "fusion":
            nested = module[user.called()]
            number = str(user.operands.index(value.name))
            parameter = next(
                each
                for each in nested.instructions
                if each.op == "parameter" and each.operands[0] == number
            )
            total += _bytes_read(module, nested, parameter, size)
        else:
            return size
    return total
