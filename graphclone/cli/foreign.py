"""Foreign: a plan made for one model, applied to another where its names fit."""

from pathlib import Path

from graphclone.analysis import Analysis
from graphclone.cli.terminal import err
from graphclone.errors import CutError
from graphclone.plan import Plan
from graphclone.resolution import half_names, match


def fitted(plan: Plan, analysis: Analysis, plan_path: Path, model_path: Path) -> Plan:
    """Return what of a plan has names in this model, and say what is left out.

    Raises: CutError where nothing fits.
    """
    stacks = {stack.prefix.rstrip(".") for stack in analysis.stacks}
    stacks |= {""} if len(stacks) == 1 else set()
    blocks = {name: kept for name, kept in plan.blocks.items() if name in stacks}
    halves = {name for stack in analysis.stacks for block in stack.blocks for name, _ in half_names(stack, block)}
    weights = analysis.typing.uses.keys()
    keep = {name: kept for name, kept in plan.keep.items() if _is_known(name, analysis)}
    drop = tuple(name for name in plan.drop if name in halves)
    scale = {name: factor for name, factor in plan.scale.items() if name in weights}
    replace = {name: value for name, value in plan.replace.items() if name in weights}
    untie = {name: own for name, own in plan.untie.items() if name in weights}
    bias = {name: value for name, value in plan.bias.items() if name in weights}
    replace |= {name: value for name, value in plan.replace.items() if name in untie.values()}
    found = plan.with_(keep=keep, blocks=blocks, drop=drop, scale=scale, replace=replace, bias=bias, untie=untie)
    absent = [*_absent(plan.keep, keep), *(f"blocks of '{name}'" for name in plan.blocks if name not in blocks)]
    absent += [*_absent(plan.drop, drop), *_absent(plan.scale, scale), *_absent(plan.replace, replace)]
    absent += [*_absent(plan.bias, bias), *_absent(plan.untie, untie)]
    if not (keep or blocks or drop or scale or replace):
        raise CutError(f"the plan '{plan_path}' was made for another model, and '{model_path}' has none of its names")
    err().print(
        f"warning: the plan '{plan_path}' was made for another model; it is applied where its names fit", style="yellow"
    )
    if absent:
        shown = ", ".join(absent[:6]) + (f" and {len(absent) - 6} more" if len(absent) > 6 else "")
        err().print(f"warning: not in '{model_path}', so left out: {shown}", style="yellow")
    return found


def _absent(names, known) -> list[str]:
    return [name for name in names if name not in known]


def _is_known(name: str, analysis: Analysis) -> bool:
    try:
        match(name, analysis, {stack.prefix: tuple(block.index for block in stack.blocks) for stack in analysis.stacks})
    except CutError:
        return False
    return True
