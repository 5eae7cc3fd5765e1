"""Loops over stacked layers become layers; what onnxruntime computes stays the same."""

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, parser

from graphclone.analysis import analyse
from graphclone.model import Model
from graphclone.weights import weight_of

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
LOOP = f"""{HEAD} g (float[N, 6] x) => (float[N, 6] y, float[3, N, 6] states) <
    int64 count = {{3}}, bool go = {{1}}, float[3, 6, 6] stack = {{{",".join(str(i % 7 / 10) for i in range(108))}}}> {{
    y, states = Loop (count, go, x) <body = b (int64 i, bool on, float[N, 6] h) => (bool still, float[N, 6] next, float[N, 6] seen) {{
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
COUNTED = f"""{HEAD} g (float[N, 6] x, int64 count, bool go) => (float[N, 6] y) {{
    y = Loop (count, go, x) <body = b (int64 i, bool on, float[N, 6] h) => (bool still, float[N, 6] next) {{
        still = Identity (on)
        next = Relu (h)
    }}>
}}"""


def outputs(proto: ModelProto) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)})


@pytest.mark.parametrize("text", [LOOP, SCAN], ids=["Loop", "Scan"])
def test_unrolled_computes_the_same(text: str) -> None:
    proto = parser.parse_model(text)
    model = Model.from_proto(proto)
    assert not {node.op for node in model.graph.nodes} & {"Loop", "Scan"}
    for before, after in zip(outputs(proto), outputs(model.to_proto())):
        np.testing.assert_array_equal(before, after)


def test_each_iteration_has_weights_of_its_own() -> None:
    model = Model.from_proto(parser.parse_model(LOOP))
    stacked = np.array([i % 7 / 10 for i in range(108)], np.float32).reshape(3, 6, 6)
    found = [weight_of(node.inputs[1]).load() for node in model.graph.nodes if node.op == "MatMul"]
    np.testing.assert_array_equal(found, stacked)


def test_a_loop_whose_count_is_data_stays_and_locks() -> None:
    model = Model.from_proto(parser.parse_model(COUNTED))
    assert [node.op for node in model.graph.nodes] == ["Loop"]
    assert "Loop" in analyse(model).typing.unknown[0]
