"""Apply a plan: the only code that changes a graph or a weight.

Weights are sliced by the index vectors of their axes. Stored sizes follow "freeze the sources, fix the sinks": what
`Shape` reports of a cut tensor keeps the old sizes, so all shape arithmetic keeps its values, and every slot that
consumes a size gets the one its axes require. Dropped blocks are bypassed; then what died is removed.
"""

import json
from collections.abc import Sequence

import onnx_graphsurgeon as gs

from graphclone.analysis import Analysis, analyse
from graphclone.axes.axis import Axis, find, is_static
from graphclone.bypass import bypass
from graphclone.cut import Cut
from graphclone.graphs import walk
from graphclone.model import Model
from graphclone.native import check_tables, nodes_in_pairs, use_native_constants
from graphclone.plan import Plan
from graphclone.resolution import resolve
from graphclone.surgery.child import Child
from graphclone.surgery.reports import REPORTS
from graphclone.surgery.stores import STORES
from graphclone.surgery.weights import add_biases, edit_weights


def apply(model: Model, plan: Plan, analysis: Analysis | None = None, native_constants: bool = False) -> Model:
    """Return the child a plan describes; the parent stays as it is, and no weight is read.

    analysis: of the model, where it is at hand. native_constants: scalars that depend on a size become what the
    framework's own smaller class computes, and neighbouring weights take the ratio (some are read for that).
    Raises: CutError for what the plan asks and the graph does not admit.

    Example:
        child = apply(parent, Plan(keep={"hidden": range(0, 768, 2)}, blocks={"": (0, 5, 11)}))
    """
    analysis = analysis or analyse(model)
    cut = resolve(plan, analysis)
    child = carry_out(cut, model, analysis, plan, native_constants=native_constants)
    if plan.parent or cut.indices or plan.blocks or plan.drop or plan.scale or plan.replace or plan.bias or plan.untie:
        child.metadata["graphclone.plan"] = json.dumps(_summary(plan), sort_keys=True)
        child.metadata["graphclone.parent"] = model.fingerprint
    return child


def carry_out(
    cut: Cut,
    model: Model,
    analysis: Analysis,
    plan: Plan = Plan(),  # noqa: B008
    onto: Model | None = None,
    native_constants: bool = False,
    renumber: bool = True,
) -> Model:
    """Return what a cut makes of a model.

    plan: its scales and replacements. onto: a copy of the model with other weights, which is cut in its place.
    native_constants: as in `apply`. renumber: whether kept blocks are numbered anew in names.
    """
    return carry_out_traced(cut, model, analysis, plan, onto, native_constants, renumber)[0]


def carry_out_traced(
    cut: Cut,
    model: Model,
    analysis: Analysis,
    plan: Plan = Plan(),  # noqa: B008
    onto: Model | None = None,
    native_constants: bool = False,
    renumber: bool = True,
    stored_tables: Sequence[str] = (),
) -> tuple[Model, dict[int, gs.Node]]:
    """Return the child, and {id of the model's node: the child's node}; a dropped node has no inputs.

    stored_tables: initializers that look like computed tables and are weights of a checkpoint. The rest: `carry_out`.
    """
    if native_constants:
        check_tables(analysis.typing, cut, stored_tables)
    copy = (onto or model).copy()
    child = Child(model, copy, analysis.typing, cut)
    edit_weights(child, plan)
    add_biases(child, plan)
    _edit_sites(child)
    child.place()
    _declare_shapes(child)
    bypass(copy, analysis, cut, renumber)
    if native_constants:
        use_native_constants(copy, nodes_in_pairs(analysis.typing, child.nodes))
    return copy, child.nodes


def _edit_sites(child: Child) -> None:
    """Give every slot that stores a size the one its axes have now; then keep what is reported of sizes as it was."""
    editors = {**STORES, **REPORTS}
    for site in sorted(child.typing.sites, key=lambda site: site.kind in REPORTS):
        editors[site.kind](child, site, child.nodes[id(site.op.node)])


def _declare_shapes(child: Child) -> None:
    """Update the shapes that graph inputs, outputs and other tensors declare; every graph output declares one."""
    _complete_outputs(child)
    for graph in walk(child.graph):
        tensors = [*graph.inputs, *graph.outputs, *(t for node in graph.nodes for t in node.outputs)]
        for tensor in tensors:
            axes = child.typing.types.get(tensor.name)
            if isinstance(tensor, gs.Constant) or tensor.shape is None or not axes or len(axes) != len(tensor.shape):
                continue
            tensor.shape = [_declared(child, axis, listed) for axis, listed in zip(axes, tensor.shape, strict=True)]


def _declared(child: Child, axis: Axis, listed: int | str | None) -> int | str | None:
    """Return what a tensor declares of an axis `listed` before; a symbol, as `3*batch`, is that of the size before."""
    size = child.cut.size(axis)
    if size == find(axis).size:
        return listed
    return size[0] if isinstance(listed, int) and len(set(size)) == 1 else None


def _complete_outputs(child: Child) -> None:
    """Give each graph output that declares no shape the one it has: the standard demands one, onnxruntime does not."""
    names: dict[int, str] = {}
    for tensor in child.graph.inputs:
        for axis, size in zip(child.typing.types.get(tensor.name) or (), tensor.shape or (), strict=False):
            if isinstance(size, str):
                names.setdefault(id(find(axis)), size)
    for tensor in child.graph.outputs:
        axes = child.typing.types.get(tensor.name)
        if axes is not None and tensor.shape is None and not hasattr(tensor, "type_proto"):
            found = [find(axis) for axis in axes]
            tensor.shape = [axis.size[0] if is_static(axis) else names.get(id(axis)) for axis in found]


def _summary(plan: Plan) -> dict:
    """Return what a slim model says of how it was made: the sizes and blocks kept, the half blocks dropped."""
    kept = {name: len(indices) for name, indices in plan.keep.items()}
    return {"keep": kept, "blocks": {name: list(v) for name, v in plan.blocks.items()}, "drop": list(plan.drop)}
