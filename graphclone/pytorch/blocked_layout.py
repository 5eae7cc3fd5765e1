"""The layout in blocks of channels that onnxruntime saves for one processor, undone: weights and channels in order.

A blocked weight of shape (M, C, ...) lies in memory as [M / b][C / b][...][c in b][m in b], or, where the channels it
reads are not blocked, as [M / b][C][...][m in b]: in a first convolution of few channels, and with a group for each.
Channels are filled up with zeros to whole blocks. Source: `ReorderFilter...` and `nchwc_transformer.cc` of onnxruntime.
"""

from collections.abc import Mapping

import numpy as np

from graphclone.calibration.blocks_of_channels import block_size
from graphclone.errors import InputError
from graphclone.pytorch.program import Op, Program, Value
from graphclone.pytorch.rewriting import Result, known_value, new_op, new_value, rewrite
from graphclone.weights import Weight

DOMAIN = "com.microsoft.nchwc"
POOLS = ("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool")


def undo_blocks(program: Program) -> None:
    """Put the standard's operators in the place of those on blocks, with weights as the framework had them.

    Raises: InputError where this machine's onnxruntime has no such blocks, so that it could not run the file either.
    """
    if any(op.domain == DOMAIN for op in program.ops):
        wanted = _channels(program)
        made: dict[Value, Value] = {}
        rewrite(program, lambda op, uses: _plain(op, wanted, made))


def _plain(op: Op, wanted: Mapping[Value, int], made: dict[Value, Value]) -> Result:
    if op.domain != DOMAIN:
        return None
    last = bool(op.attribute("channels_last", 0))
    if op.type == "ReorderInput":
        order = {"perm": [0, 3, 1, 2]} if last else {}
        return new_op("Transpose" if last else "Identity", op.inputs, op.output, op, domain="", **order)
    if op.type == "ReorderOutput":
        cut, count = op[0], int(op.attribute("channels"))
        ops = []
        if cut.op is None or cut.op.type not in ("Conv", "FusedConv") or cut.op[1].weight.shape[0] != count:
            cut = new_value(op.output.name, (), None)
            ops = [new_op("Slice", [op[0], *(known_value([each]) for each in (0, count, 1))], cut, op, domain="")]
        if last:
            ops.append(new_op("Transpose", [cut], op.output, op, domain="", perm=[0, 2, 3, 1]))
        return ops or cut
    if op.type in POOLS:
        return new_op(op.type, op.inputs, op.output, op, domain="", **op.attributes)
    return _convolution(op, wanted, made) if op.type == "Conv" and op[1].weight is not None else None


def _convolution(op: Op, wanted: Mapping[Value, int], made: dict[Value, Value]) -> Op:
    kernel, groups = op[1], int(op.attribute("group", 1))
    count = wanted.get(op.output, kernel.weight.shape[0])
    alone = groups == kernel.weight.shape[0]
    if kernel not in made:
        values = in_order(kernel.weight.load(), groups, block_size())[:count]
        if groups == 1 and values.shape[1] >= block_size():
            filled_up = op[0].op is not None and op[0].op.type in ("Identity", "Transpose")
            values = values[:, : wanted.get(op[0], _used(values) if filled_up else None)]
        made[kernel] = Value(kernel.name, weight=Weight.of(np.ascontiguousarray(values)))
    bias = op[2]
    if bias is not None and bias.weight is not None and bias.weight.shape[0] != count:
        bias = made.setdefault(bias, Value(bias.name, weight=bias.weight.take(0, range(count))))
    attributes = {**op.attributes, "group": count if alone else groups}
    fused = op[3] is not None or op.attribute("activation", "")
    kind, domain = ("FusedConv", "com.microsoft") if fused else ("Conv", "")
    return new_op(kind, [op[0], made[kernel], bias, *op.inputs[3:]], op.output, op, domain=domain, **attributes)


def in_order(stored: np.ndarray, groups: int, block: int) -> np.ndarray:
    """Return a blocked weight (M, C, ...) with its entries where its shape says.

    Example:
        >>> in_order(np.array([[[0, 2, 1, 3]], [[4, 6, 5, 7]]]).reshape(4, 2), 1, 2).tolist()
        [[0, 1], [2, 3], [4, 5], [6, 7]]
    """
    outs, ins, *window = stored.shape
    if outs % block or (groups == 1 and ins >= block and ins % block):
        raise InputError(f"a blocked weight {list(stored.shape)} is of a processor with other blocks than {block}")
    places = range(2, 2 + len(window))
    if (groups == 1 and ins < block) or (groups == outs and ins == 1):
        apart = stored.reshape(outs // block, ins, *window, block)
        return apart.transpose(0, apart.ndim - 1, 1, *places).reshape(stored.shape)
    apart = stored.reshape(outs // block, ins // block, *window, block, block)
    return apart.transpose(0, apart.ndim - 1, 1, apart.ndim - 2, *places).reshape(stored.shape)


def _used(values: np.ndarray) -> int:
    """Return how many channels a kernel reads: what fills the last block up is zeros."""
    filled = np.flatnonzero(np.any(values, axis=(0, *range(2, values.ndim))))
    return max(int(filled[-1]) + 1 if len(filled) else 0, values.shape[1] - block_size() + 1)


def _channels(program: Program) -> dict[Value, int]:
    """Return how many channels there are in values whose last block is filled up, as far as what reads them tells."""
    users, found = program.users(), {}
    for op in reversed(program.ops):
        reading = users.get(op.output, []) if op.key == (DOMAIN, "Conv") else []
        told = {_read(each, op.output, found) for each in reading}
        if len(told) == 1 and None not in told:
            found[op.output] = told.pop()
    return found


def _read(op: Op, value: Value, found: Mapping[Value, int]) -> int | None:
    """Return how many channels of a value an operator reads, None if unknown."""
    if op.key == (DOMAIN, "ReorderOutput"):
        return int(op.attribute("channels"))
    if op.key != (DOMAIN, "Conv") or op[0] is not value or op[1].weight is None:
        return None
    if int(op.attribute("group", 1)) > 1:
        return found.get(op.output)
    return _used(in_order(op[1].weight.load(), 1, block_size()))
