"""Draw the cuts that every family is judged by: each role alone, blocks, halves, and everything at once."""

from collections.abc import Mapping

from zoo.choose import choose, dimensions
from zoo.families import family


def plans(name: str, seed: int = 0) -> dict[str, dict]:
    """Return arguments of `native` (and of a plan) by label; indices are random, sorted, and not prefixes.

    name: family.
    seed: of the indices.

    >>> list(plans("gpt2"))
    ['hidden', 'heads', 'head_dim', 'ffn', 'blocks', 'drop attention', 'drop ffn', 'all']
    """
    sizes = {dimension: size for dimension, size in dimensions(name).items() if not dimension.endswith("vocab")}
    roles: dict[str, dict[str, list[int]]] = {}
    for dimension, size in sizes.items():
        count = size // 2 if size > 3 else size - 1
        role = dimension.split(".")[-1]
        roles.setdefault(role, {})[dimension] = choose(name, dimension, max(1, count), seed)
    result = {role: {"keep": keep} for role, keep in roles.items()}
    chosen, halves = _blocks(name), _halves(name)
    if chosen:
        result["blocks"] = {"blocks": chosen}
    result |= {f"drop {kind}": {"drop": [half]} for kind, half in halves.items()}
    everything = {dimension: indices for keep in roles.values() for dimension, indices in keep.items()}
    result["all"] = {"keep": everything} | ({"blocks": chosen} if chosen else {})
    return result


def _blocks(name: str) -> Mapping[str, list[int]]:
    """Keep all blocks of each stack but the second (and the fourth, where there are five)."""
    given, chosen = family(name), {}
    model = given.build()
    for stack in given.layout.stacks:
        total = stack.shared or len(model.get_submodule(stack.blocks))
        kept = [stack.start + number for number in range(total) if number not in (1, 3) or total < 3]
        chosen.setdefault(stack.prefix.rstrip("."), []).extend(kept)
    return chosen


def _halves(name: str) -> dict[str, str]:
    stacks = [stack for stack in family(name).layout.stacks if not stack.shared]
    return {
        f"{stack.prefix}{half}": f"{stack.prefix}blocks.{stack.start + 1}.{half}"
        for stack in stacks
        for half in stack.halves
    }
