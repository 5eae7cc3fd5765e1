"""Signatures: what every node does to axes, with the names of the dimensions its letters stand for."""

from graphclone.analysis import Analysis
from graphclone.axes.axis import describe, find, leaves
from graphclone.axes.typed import TypedNode
from graphclone.cli.terminal import out


def print_signatures(analysis: Analysis) -> None:
    """Print a line a node: the operator, its name, its signature, then what each name in it is."""
    names = axis_names(analysis)
    console = out()
    for node in analysis.typing.nodes:
        console.print(line(node, names), soft_wrap=True)


def line(node: TypedNode, names: dict[int, str]) -> str:
    """Return a node's line: `MatMul '/h.0/MatMul': ... m k, k n -> ... m n   [k: hidden, n: blocks.0.ffn]`."""
    bound = ", ".join(f"{name}: {describe(axis, names)}" for name, axis in node.bound.items())
    text = node.text or "no rule"
    head = node.op.where.replace(" node ", " ", 1)
    return f"{head}: {text}" + (f"   [{bound}]" if bound else "")


def axis_names(analysis: Analysis) -> dict[int, str]:
    """Return names of axes by id: each dimension's; an atom it repeats is `name/2`, one it joins `name.0`."""
    names: dict[int, str] = {}
    for dimension in analysis.dimensions:
        for axis in dimension.axes:
            every = list(leaves(axis))
            atoms = list({id(leaf): leaf for leaf in every}.values())
            for number, atom in enumerate(atoms):
                part = f"{dimension.name}/{len(every)}" if len(atoms) == 1 else f"{dimension.name}.{number}"
                names.setdefault(id(atom), part)
            names[id(find(axis))] = dimension.name
    return names
