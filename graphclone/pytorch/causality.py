"""Causality: masks that forbid the future and nothing else become a flag, for the faster kernel."""

import torch

from graphclone.pytorch.code import Code, Marker, render
from graphclone.pytorch.probing import HELPERS
from graphclone.pytorch.program import Op, Program, Value
from graphclone.pytorch.sizes import PROBES, Size

FORBIDDEN = -1e30


def flag_causal(program: Program) -> None:
    """Replace a mask by `is_causal` where it depends on sizes alone and is the lower triangle in every probe."""
    verdicts: dict[Value, bool] = {}
    for op in program.ops:
        if op.type != "Attention" or op.domain not in ("", "graphclone") or op[3] is None or op[4] is not None:
            continue
        mask = op[3]
        if mask not in verdicts:
            verdicts[mask] = _is_causal(program, mask)
        if verdicts[mask]:
            op.inputs[3] = None
            op.attributes["causal" if op.domain else "is_causal"] = 1
    program.prune()


def _is_causal(program: Program, mask: Value) -> bool:
    needed = _ancestors(mask)
    if needed is None or mask.rank < 2 or mask.dims[-1] != mask.dims[-2] or isinstance(mask.dims[-1], int):
        return False
    order = [op for op in program.ops if op in needed]
    return all(_is_lower_triangle(_run(order, mask, index)) for index in range(PROBES))


def _ancestors(value: Value) -> set[Op] | None:
    """Return what computes a value, None if an input's content, a parameter or a choice is part of it."""
    needed: set[Op] = set()
    pending = [value]
    while pending:
        each = pending.pop()
        if each.known is not None or each.op in needed:
            continue
        if each.op is not None and each.op.key == ("", "If"):
            return None
        if each.op is None:
            if each.weight is None or (each.parameter is not None and each.parameter.trainable):
                return None
            continue
        needed.add(each.op)
        pending.extend(given for given in each.op.inputs if given is not None)
    return needed


def _run(ops: list[Op], wanted: Value, index: int) -> torch.Tensor:
    """Compute a value with the sizes of one probe."""
    results: dict[Value, torch.Tensor] = {}
    for op in ops:
        scope = dict(HELPERS)

        def leaf(operand, scope=scope) -> str:
            if isinstance(operand, Marker):
                return "'cpu'" if operand.name == "device" else "torch.float32"
            name = f"x{len(scope)}"
            scope[name] = _content(operand, results, index)
            return name

        codes = op.code if isinstance(op.code, tuple) else (op.code,)
        given = [eval(render(code, leaf), scope) for code in codes if isinstance(code, Code)]
        if len(op.outputs) > 1 and not isinstance(op.code, tuple):
            given = list(given[0])
        results.update(zip([output for output in op.outputs if output is not None], given, strict=False))
    return results[wanted]


def _content(operand, results: dict[Value, torch.Tensor], index: int):
    if isinstance(operand, Size):
        return operand.probe[index]
    if operand in results:
        return results[operand]
    if operand.known is not None:
        numbers = [_content(each, results, index) if isinstance(each, Size) else each for each in operand.known.flat]
        if operand.known.ndim == 0:
            return numbers[0]
        return torch.tensor(numbers, dtype=operand.dtype).reshape(operand.known.shape)
    return torch.from_numpy(operand.weight.load().copy())


def _is_lower_triangle(mask: torch.Tensor) -> bool:
    allowed = mask if mask.dtype == torch.bool else mask == 0
    square = torch.ones(mask.shape[-2:], dtype=torch.bool).tril()
    forbidden = ~mask if mask.dtype == torch.bool else mask <= FORBIDDEN
    return bool((allowed == square).all() and (forbidden == ~square).all())
