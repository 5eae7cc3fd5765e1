"""Loops over stacked layers become layers, and a loop again where the layers stay alike."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, NodeProto, parser

from graphclone.analysis import Analysis, analyse
from graphclone.model import Model
from graphclone.plan import Plan
from graphclone.surgery import apply
from graphclone.verify import verify
from graphclone.weights import weight_of

STACKED = Path(__file__).parent / "fixtures" / "jax" / "scan.onnx"

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
LOOP = f"""{HEAD} g (float[N, 6] x) => (float[N, 6] y, float[3, N, 6] states) <
    int64 count = {{3}}, bool go = {{1}}, float[3, 6, 6] stack = {{{",".join(str(i % 7 / 10) for i in range(108))}}}> {{
    y, states = Loop (count, go, x) <
        body = b (int64 i, bool on, float[N, 6] h) => (bool still, float[N, 6] next, float[N, 6] seen) {{
        still = Identity (on)
        w = Gather <axis = 0> (stack, i)
        product = MatMul (h, w)
        next = Add (h, product)
        seen = Relu (next)
    }}>
}}"""
SCAN = f"""{HEAD} g (float[N, 6] x) => (float[N, 6] y, float[3, 6] rows) <
    float[3, 6, 6] stack = {{{",".join(str(i % 5 / 10) for i in range(108))}}}> {{
    y, rows = Scan <num_scan_inputs = 1, body = b (float[N, 6] h, float[6, 6] w) => (float[N, 6] next, float[6] row) {{
        axes = Constant <value_ints = [0]> ()
        product = MatMul (h, w)
        next = Add (h, product)
        row = ReduceSum <keepdims = 0> (w, axes)
    }}> (x, stack)
}}"""
LISTED = LOOP.replace("int64 i,", "int64[1] i,").replace(
    "w = Gather <axis = 0> (stack, i)",
    "row = Gather <axis = 0> (stack, i)  axes = Constant <value_ints = [0]> ()  w = Squeeze (row, axes)",
)
NONE = LOOP.replace("count = {3}", "count = {0}").replace("float[3, N, 6] states", "float[K, N, 6] states")
COUNTED = f"""{HEAD} g (float[N, 6] x, int64 count, bool go) => (float[N, 6] y) {{
    y = Loop (count, go, x) <body = b (int64 i, bool on, float[N, 6] h) => (bool still, float[N, 6] next) {{
        still = Identity (on)
        next = Relu (h)
    }}>
}}"""

RESHAPED = f"""{HEAD} g (float[N, 6] x) => (float[N, 6] y) <int64 count = {{3}}, bool go = {{1}},
    float[6, 6] stem = {{{",".join(str(i % 3 / 10) for i in range(36))}}},
    float[3, 6, 8] ups = {{{",".join(str(i % 7 / 10) for i in range(144))}}},
    float[3, 8, 6] downs = {{{",".join(str(i % 5 / 10) for i in range(144))}}}> {{
    entry = MatMul (x, stem)
    y = Loop (count, go, entry) <body = b (int64 i, bool on, float[N, 6] h) => (bool still, float[N, 6] next) {{
        still = Identity (on)
        up = Gather <axis = 0> (ups, i)
        down = Gather <axis = 0> (downs, i)
        wide = MatMul (h, up)
        flat = Constant <value_ints = [-1, 8]> ()
        shaped = Reshape (wide, flat)
        acted = Relu (shaped)
        product = MatMul (acted, down)
        next = Add (h, product)
    }}>
}}"""


def outputs(proto: ModelProto) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)})


@pytest.mark.parametrize("text", [LOOP, SCAN, LISTED], ids=["Loop", "Scan", "Loop that counts in a list"])
def test_unrolled_computes_the_same(text: str) -> None:
    proto = parser.parse_model(text)
    model = Model.from_proto(proto)
    assert not {node.op for node in model.graph.nodes} & {"Loop", "Scan"}
    for before, after in zip(outputs(proto), outputs(model.to_proto()), strict=True):
        np.testing.assert_array_equal(before, after)


def test_each_iteration_has_weights_of_its_own() -> None:
    model = Model.from_proto(parser.parse_model(LOOP))
    stacked = np.array([i % 7 / 10 for i in range(108)], np.float32).reshape(3, 6, 6)
    found = [weight_of(node.inputs[1]).load() for node in model.graph.nodes if node.op == "MatMul"]
    np.testing.assert_array_equal(found, stacked)


def test_a_loop_that_never_runs_stays() -> None:
    proto = parser.parse_model(NONE)
    model = Model.from_proto(proto)
    assert [node.op for node in model.graph.nodes] == ["Loop"]
    for before, after in zip(outputs(proto), outputs(model.to_proto()), strict=True):
        np.testing.assert_array_equal(before, after)


def test_a_loop_whose_count_is_data_stays_and_locks() -> None:
    model = Model.from_proto(parser.parse_model(COUNTED))
    assert [node.op for node in model.graph.nodes] == ["Loop"]
    assert "Loop" in analyse(model).typing.unknown[0]


# a loop again -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stacked() -> tuple[ModelProto, Model, Analysis]:
    proto = onnx.load(STACKED)
    model = Model.from_proto(proto)
    return proto, model, analyse(model)


def loop_of(proto: ModelProto) -> NodeProto | None:
    return next((node for node in proto.graph.node if node.op_type in ("Loop", "Scan")), None)


def stored(proto: ModelProto) -> dict[str, bytes]:
    return {item.name: onnx.numpy_helper.to_array(item).tobytes() for item in proto.graph.initializer}


def operators(proto: ModelProto) -> list[str]:
    body = next(attribute.g for attribute in loop_of(proto).attribute if attribute.name == "body")
    return [node.op_type for node in (*proto.graph.node, *body.node)]


@pytest.mark.parametrize("text", [LOOP, SCAN, None], ids=["Loop", "Scan", "jax"])
def test_a_plan_that_cuts_nothing_leaves_the_loop(text: str | None) -> None:
    proto = onnx.load(STACKED) if text is None else parser.parse_model(text)
    same = apply(Model.from_proto(proto), Plan()).to_proto()
    assert stored(same) == stored(proto)
    assert operators(same) == [kind for kind in operators(proto) if kind != "Constant"]
    assert list(loop_of(same).input) == list(loop_of(proto).input)
    assert list(loop_of(same).output) == list(loop_of(proto).output)


def test_dropping_layers_slices_the_stack_and_the_trip_count(stacked) -> None:
    proto, model, analysis = stacked
    child = apply(model, Plan(blocks={"": (0, 3)}), analysis).to_proto()
    trips, _, _, *stacks = loop_of(child).input
    whole, kept = ({i.name: onnx.numpy_helper.to_array(i) for i in p.graph.initializer} for p in (proto, child))
    assert kept[trips] == 2 and stacks
    for before, after in zip(loop_of(proto).input[3:], stacks, strict=True):
        np.testing.assert_array_equal(kept[after], whole[before][[0, 3]])
    assert operators(child) == operators(proto)


def test_layers_cut_to_one_size_by_other_indices_are_a_loop(stacked) -> None:
    _, model, analysis = stacked
    keep = {f"blocks.{i}.ffn": tuple(range(i, i + 40)) for i in range(4)}
    child = apply(model, Plan(keep=keep), analysis).to_proto()
    sizes = {tuple(item.dims) for item in child.graph.initializer}
    assert loop_of(child) is not None and {(4, 48, 40), (4, 40, 48), (4, 40)} <= sizes
    assert same_as_unrolled(apply(model, Plan(keep=keep), analysis))


@pytest.mark.parametrize(
    "plan",
    [
        Plan(keep={f"blocks.{i}.ffn": tuple(range(40 + i)) for i in range(4)}),
        Plan(drop=("blocks.1.attention",)),
    ],
    ids=["of their own sizes", "without a half"],
)
def test_layers_that_differ_stay_apart(stacked, plan: Plan) -> None:
    _, model, analysis = stacked
    child = apply(model, plan, analysis)
    assert loop_of(child.to_proto()) is None
    assert same_as_unrolled(child)


def test_a_child_written_as_a_loop_is_what_its_plan_gives() -> None:
    parent = Model.from_proto(parser.parse_model(RESHAPED))
    plan = Plan(keep={"blocks.*.ffn": (0, 2, 3, 5, 7)}, blocks={"": (0, 2)})
    written = apply(parent, plan).to_proto()
    assert loop_of(written) is not None
    child = Model.from_proto(written)
    report = verify(child, parent=parent, plan=plan)
    assert report.ok, str(report)
    other = Plan(keep={"blocks.*.ffn": (0, 2, 3, 5, 6)}, blocks={"": (0, 2)})
    assert not verify(child, parent=parent, plan=other).ok


def test_what_is_read_inside_keeps_the_loop_unrolled(stacked) -> None:
    _, model, _ = stacked
    child = model.copy()
    inside = next(node for node in child.graph.nodes if node.op == "Softmax")
    child.graph.outputs.append(inside.outputs[0])
    assert loop_of(child.to_proto()) is None


def same_as_unrolled(child: Model) -> bool:
    """Tell whether a model computes, as it is written, what its nodes do one by one."""
    unrolled = child.copy()
    unrolled.loops = ()
    results = []
    for model in (child, unrolled):
        session = onnxruntime.InferenceSession(model.to_proto().SerializeToString(), providers=["CPUExecutionProvider"])
        tokens = np.random.default_rng(0).integers(0, 101, (2, 7)).astype(np.int32)
        results.append(session.run(None, {session.get_inputs()[0].name: tokens})[0])
    return float(np.abs(results[0] - results[1]).max() / np.abs(results[1]).max()) < 1e-6
