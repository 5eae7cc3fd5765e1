"""PyTorch rules of operators that read or write entries by index."""

from graphclone.pytorch.code import DEVICE, Code
from graphclone.pytorch.program import Op, Unsupported, Value
from graphclone.pytorch.registry import rule
from graphclone.pytorch.sizes import Size


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
        return Code("{}[" + ":, " * axis + "{}]", op[0], list(indices.known))
    if indices.rank == 0:
        place = Code("({}.reshape(1) % {})", indices, op[0].dims[axis])
        return Code("torch.index_select({}, {}, {}).squeeze({})", op[0], axis, place, axis)
    if axis == 0 and op[0].rank == 2 and op[0].dtype.is_floating_point and op[0].parameter is not None:
        return Code("F.embedding({}, {})", _from_start(op, axis), op[0])
    if axis == 0:
        return Code("{}[{}]", op[0], indices)
    if len(indices.dims) == 1:
        return Code("torch.index_select({}, {}, {})", op[0], axis, _from_start(op, axis))
    return Code("{}[" + ":, " * axis + "{}]", op[0], indices)


def _from_start(op: Op, axis: int) -> Value | Code:
    """Return indices, stored ones that count from the end made to count from the start, as torch wants them."""
    stored = op[1].weight.load() if op[1].weight is not None else op[1].known
    backwards = stored is not None and any(isinstance(each, Size) or each < 0 for each in stored.flat)
    return Code("({} % {})", op[1], op[0].dims[axis]) if backwards else op[1]


@rule("Embedding", domain="graphclone")
def embedding(op: Op) -> Code:
    """Look rows up; inputs are the indices and the table."""
    return Code("F.embedding({}, {})", op[0], op[1])


@rule("GatherElements")
def gather_elements(op: Op) -> Code:
    return Code("torch.gather({}, {}, {})", op[0], op.axis(0), _from_start(op, op.axis(0)))


@rule("GatherND")
def gather_nd(op: Op) -> Code:
    """Index with a tuple; its axes stand last in the index tensor, behind those that both inputs share."""
    rows = []
    for axis in range(int(op.attribute("batch_dims", 0))):
        shape = tuple(-1 if place == axis else 1 for place in range(op[1].rank - 1))
        row = Code("torch.arange({}, device={}.device)", op[0].dims[axis], op[0])
        rows.append(row if len(shape) == 1 else Code("{}.view({})", row, shape))
    if not rows:
        return Code("{}[tuple({}.unbind(-1))]", op[0], op[1])
    return Code("{}[(" + "{}, " * len(rows) + "*{}.unbind(-1))]", op[0], *rows, op[1])


@rule("ScatterElements", "Scatter")
def scatter_elements(op: Op) -> Code:
    how = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}.get(op.attribute("reduction", "none"))
    places = _from_start(op, op.axis(0))
    if how is None:
        return Code("torch.scatter({}, {}, {}, {})", op[0], op.axis(0), places, op[2])
    return Code("torch.scatter_reduce({}, {}, {}, {}, {})", op[0], op.axis(0), places, op[2], how)


@rule("ScatterND")
def scatter_nd(op: Op) -> Code:
    how = op.attribute("reduction", "none")
    if how not in ("none", "add"):
        raise Unsupported(f"reduction={how} has no PyTorch counterpart")
    return Code("{}.index_put(tuple({}.unbind(-1)), {}, accumulate={})", op[0], op[1], op[2], how == "add")


@rule("OneHot")
def one_hot(op: Op) -> Code:
    """Encode; `values` are (off, on), and an index outside of -depth to depth - 1 is nowhere on."""
    depth = op.integers(1)[0]
    depth = int(depth) if isinstance(depth, float) else depth
    if op[2].known is None:
        raise Unsupported("its values depend on data")
    off, on = op[2].known.reshape(-1)
    axis = op.axis(-1)
    places = Code("torch.arange({}, device={})", depth, DEVICE)
    code = Code("one_hot({}, {})", op[0], places)
    if axis not in (-1, op[0].rank):
        code = Code("{}.movedim(-1, {})", code, axis)
    if (off, on) == (0, 1):
        return Code("{}.to({})", code, op[2].dtype)
    return Code("torch.where({}, {}, {}).to({})", code, on, off, op[2].dtype)


@rule("NonZero")
def non_zero(op: Op) -> Code:
    return Code("torch.nonzero({}).t()", op[0])


@rule("Compress")
def compress(op: Op) -> Code:
    """Keep what a known condition says; it may end before the axis does."""
    if op[1].known is None:
        raise Unsupported("how many entries it keeps depends on data")
    kept = [place for place, wanted in enumerate(op[1].known.reshape(-1)) if wanted]
    if op.attribute("axis") is None:
        return Code("{}.flatten()[{}]", op[0], kept)
    return Code("{}[" + ":, " * (op.axis() % op[0].rank) + "{}]", op[0], kept)
