"""Dropout: put back what exports leave out, where transformers have it."""

from graphclone.pytorch.code import Code
from graphclone.pytorch.program import Op, Program, Value
from graphclone.pytorch.registry import rule
from graphclone.pytorch.rewriting import IDIOMS, Result, Uses, idiom, made_by, new_op, new_value, rewrite


def add_dropout(program: Program, rate: float) -> None:
    """Drop attention weights, what blocks add to the residual stream, and the sum of embeddings, at one rate."""
    ends = _embedding_ends(program)
    for op in program.ops:
        if op.domain in (IDIOMS, "") and op.type == "Attention":
            op.attributes["dropout"] = rate

    def insert(op: Op, uses: Uses) -> Result:
        if op.type == "Add" and not op.domain:
            branches = [slot for slot in (0, 1) if _is_projection(op[slot])]
            if len(branches) == 1 and not _is_projection(op[1 - branches[0]]) and op[1 - branches[0]].rank >= 2:
                drop = _dropout(op[branches[0]], rate, op)
                op.inputs[branches[0]] = drop.output
                return [drop, op]
        if op.outputs[0] in ends:
            old = op.outputs[0]
            renamed = new_value(old.name, old.dims, old.dtype)
            op.outputs[0], renamed.op = renamed, op
            return [op, new_op("Dropout", [renamed], old, op, rate=rate)]
        return None

    rewrite(program, insert)


def _dropout(value: Value, rate: float, like: Op) -> Op:
    return new_op("Dropout", [value], new_value(value.name, value.dims, value.dtype), like, rate=rate)


def _is_projection(value: Value | None) -> bool:
    norm = idiom(value, "RMSNorm") or idiom(value, "LayerNorm")
    value = norm[0] if norm else value
    reshaped = made_by(value, "Reshape")
    return idiom(reshaped[0] if reshaped else value, "Linear") is not None and value.parameter is None


def _embedding_ends(program: Program) -> set[Value]:
    """Return the sums of embeddings, after their norm where one follows at once."""
    users = program.users()
    chain: set[Value] = set()
    for op in program.ops:
        inputs = [value for value in op.inputs if value is not None and value.known is None and value.parameter is None]
        if op.domain == IDIOMS and op.type == "Embedding" and op.output.rank == 3:
            chain.add(op.output)
        elif (
            op.type == "Add"
            and not op.domain
            and any(v in chain for v in inputs)
            and all(v in chain or v.is_table for v in inputs)
        ):
            chain.add(op.output)
        elif op.type == "Mul" and not op.domain and any(v in chain for v in inputs) and len(inputs) == 1:
            chain.add(op.output)
        elif op.type == "Add" and not op.domain and any(_is_table_of_positions(v) for v in op.inputs):
            chain.add(op.output)
        elif op.domain == IDIOMS and op.type in ("LayerNorm", "RMSNorm") and op[0] in chain and len(users[op[0]]) == 1:
            chain.add(op.output)
    return {value for value in chain if _ends(value, chain, users) and value not in program.outputs}


READERS = {"Add", "LayerNorm", "RMSNorm", "Linear", "Conv"}


def _ends(value: Value, chain: set[Value], users: dict[Value, list[Op]]) -> bool:
    reading = users.get(value, [])
    return any(op.type in READERS for op in reading) and not any(
        output in chain for op in reading for output in op.outputs
    )


def _is_table_of_positions(value: Value | None) -> bool:
    return value is not None and value.parameter is not None and value.parameter.trainable and value.rank >= 2


@rule("Dropout", domain="graphclone")
def dropout(op: Op) -> Code:
    return Code("F.dropout({}, {}, self.training)", op[0], float(op.attribute("rate")))
