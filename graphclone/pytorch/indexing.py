"""PyTorch rules of operators that read or write entries by index."""

from graphclone.pytorch.code import Code
from graphclone.pytorch.program import Op, Unsupported
from graphclone.pytorch.registry import rule


@rule("Gather")
def gather(op: Op) -> Code:
    """Select along an axis: an embedding, a plain index, or index_select."""
    axis = op.axis(0) % op[0].rank
    indices = op[1]
    if indices.scalar is not None and indices.known.ndim == 0:
        lead = ":, " * axis if axis < 3 or axis != op[0].rank - 1 else "..., "
        return Code("{}[" + lead + "{}]", op[0], indices.scalar)
    if indices.known is not None and indices.known.size == 1:
        lead = ":, " * axis
        return Code(
            "{}[" + lead + "{}]" + ".unsqueeze({})" * indices.known.ndim,
            op[0],
            indices.scalar,
            *[axis] * indices.known.ndim,
        )
    if indices.known is not None and len(indices.dims) == 1:
        return Code("{}[" + ":, " * axis + "{}]", op[0], [int(each) for each in indices.known])
    if axis == 0 and op[0].rank == 2 and op[0].dtype.is_floating_point and op[0].parameter is not None:
        return Code("F.embedding({}, {})", indices, op[0])
    if axis == 0:
        return Code("{}[{}]", op[0], indices)
    if len(indices.dims) == 1:
        return Code("torch.index_select({}, {}, {})", op[0], axis, indices)
    return Code("{}[" + ":, " * axis + "{}]", op[0], indices)


@rule("Embedding", domain="graphclone")
def embedding(op: Op) -> Code:
    """Look rows up; inputs are the indices and the table."""
    return Code("F.embedding({}, {})", op[0], op[1])


@rule("GatherElements")
def gather_elements(op: Op) -> Code:
    return Code("torch.gather({}, {}, {})", op[0], op.axis(0), op[1])


@rule("GatherND")
def gather_nd(op: Op) -> Code:
    """Index with a tuple; its axes stand last in the index tensor."""
    batch = int(op.attribute("batch_dims", 0))
    if batch == 0:
        return Code("{}[tuple({}.unbind(-1))]", op[0], op[1])
    if batch == 1 and op[1].dims[-1] == 1:
        if op[1].rank == 2:
            rows = Code("torch.arange({}, device={}.device)", op[0].dims[0], op[0])
            return Code("{}[{}, {}.squeeze(-1)]", op[0], rows, op[1])
        rows = Code("torch.arange({}, device={}.device)[:, None]", op[0].dims[0], op[0])
        return Code("{}[{}, {}.squeeze(-1).flatten(1)].unflatten(1, {})", op[0], rows, op[1], tuple(op[1].dims[1:-1]))
    raise Unsupported(f"batch_dims={batch} has no PyTorch counterpart")


@rule("ScatterElements", "Scatter")
def scatter_elements(op: Op) -> Code:
    how = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}.get(op.attribute("reduction", "none"))
    if how is None:
        return Code("torch.scatter({}, {}, {}, {})", op[0], op.axis(0), op[1], op[2])
    return Code("torch.scatter_reduce({}, {}, {}, {}, {})", op[0], op.axis(0), op[1], op[2], how)


@rule("ScatterND")
def scatter_nd(op: Op) -> Code:
    how = op.attribute("reduction", "none")
    if how not in ("none", "add"):
        raise Unsupported(f"reduction={how} has no PyTorch counterpart")
    return Code("{}.index_put(tuple({}.unbind(-1)), {}, accumulate={})", op[0], op[1], op[2], how == "add")


@rule("OneHot")
def one_hot(op: Op) -> Code:
    """Encode; `values` are (off, on)."""
    depth = op.integers(1)[0]
    if op[2].known is None:
        raise Unsupported("its values depend on data")
    off, on = op[2].known.reshape(-1)
    axis = op.axis(-1)
    code = Code("F.one_hot({} % {}, {})", op[0], depth, depth)
    if axis not in (-1, op[0].rank):
        code = Code("{}.movedim(-1, {})", code, axis)
    if (off, on) == (0, 1):
        return Code("{}.to({})", code, op[2].dtype)
    return Code("({}.to({}) * {} + {})", code, op[2].dtype, on - off, off)


@rule("NonZero")
def non_zero(op: Op) -> Code:
    return Code("torch.nonzero({}).t()", op[0])


@rule("Compress")
def compress(op: Op) -> Code:
    axis = op.attribute("axis")
    if axis is None:
        return Code("{}.flatten()[{}]", op[0], op[1])
    return Code("{}[" + ":, " * int(axis) + "{}]", op[0], op[1])
