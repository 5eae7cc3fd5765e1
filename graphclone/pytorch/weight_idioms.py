"""Idioms around weights: linear layers, embeddings."""

from graphclone.pytorch.program import Op, Program, Value
from graphclone.pytorch.rewriting import IDIOMS, Result, Uses, idiom, made_by, new_op, operands, reshape


def is_parameter(value: Value | None, rank: int) -> bool:
    return value is not None and value.parameter is not None and value.parameter.trainable and value.rank == rank


def linear(op: Op, uses: Uses) -> Result:
    """MatMul or Gemm with a weight: a linear layer."""
    if op.domain or op.type not in ("MatMul", "Gemm") or op[0].weight is not None:
        return None
    bias = None
    turned = op.type == "Gemm" and bool(op.attribute("transB", 0))
    if op.type == "Gemm":
        if op.attribute("transA", 0) or float(op.attribute("alpha", 1)) != 1 or float(op.attribute("beta", 1)) != 1:
            return None
        bias = op[2]
        if bias is not None and not is_parameter(bias, 1):
            return None
    weight = op[1]
    before = made_by(weight, "Transpose")
    if before is not None and is_parameter(before[0], 2) and list(before.attribute("perm") or (1, 0)) == [1, 0]:
        weight, turned = before[0], not turned
    if not is_parameter(weight, 2):
        return None
    if not turned and weight.parameter.may_transpose:
        weight, turned = weight.parameter.transpose(weight), True
    return new_op("Linear", [op[0], weight, bias], op.output, op, transposed=not turned)


def turn_readers(program: Program, value: Value) -> bool:
    """Let linear layers read a matrix in its other orientation; tell whether they alone read it, so that they can."""
    readers = [op for op in program.ops if value in op.inputs]
    if value in program.outputs or not all(op.key == (IDIOMS, "Linear") and op[1] is value for op in readers):
        return False
    for op in readers:
        op.attributes["transposed"] = not op.attributes.get("transposed", False)
    return True


def bias(op: Op, uses: Uses) -> Result:
    """Add a vector to a linear layer without one: its bias."""
    if op.type != "Add" or op.domain:
        return None
    pair = operands(op, lambda value: is_parameter(value, 1))
    layer = idiom(pair[1], "Linear") if pair else None
    if layer is None or layer[2] is not None or not uses.once(pair[1]) or pair[0].dims[0] != op.output.dims[-1]:
        return None
    return new_op("Linear", [layer[0], layer[1], pair[0]], op.output, op, **layer.attributes)


def linear_without_reshapes(op: Op, uses: Uses) -> Result:
    """Reshape to a matrix, linear layer, reshape back: a linear layer on more axes."""
    if op.type != "Reshape" or op.domain:
        return None
    layer = idiom(op[0], "Linear")
    flat = made_by(layer[0], "Reshape", "Flatten") if layer else None
    if flat is None or not uses.once(op[0]) or op.output.dims[-1] != op[0].dims[-1] or flat.output.rank != 2:
        return None
    wanted = (*op.output.dims[:-1], flat.output.dims[-1])
    source, ops = flat[0], []
    if tuple(source.dims) != wanted:
        ops.append(reshape(source, wanted, flat))
        source = ops[0].output
    return [*ops, new_op("Linear", [source, *layer.inputs[1:]], op.output, layer, **layer.attributes)]


def embedding(op: Op, uses: Uses) -> Result:
    """Gather rows of a weight: an embedding."""
    if op.type != "Gather" or op.domain or not is_parameter(op[0], 2) or op.axis(0) not in (0, -2):
        return None
    if op[1].known is not None:
        return None
    return new_op("Embedding", [op[1], op[0]], op.output, op)
