"""What shape arithmetic is evaluated to: onnxruntime computes the same."""

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphclone.axes.values import FUNCTIONS, evaluate
from graphclone.model import Model
from graphclone.op import Op

RAMP = np.array([[3, -1, 2], [0, 5, 4]])
LINE = np.array([5, -3, 2, 7])
TRUTHS = np.array([True, False, True, False])
HALVES = np.array([0.5, 1.5, -2.5, 3.7], np.float32)


def i(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


ROWS = [
    ("Identity", [LINE]),
    ("Cast", [HALVES], {"to": TensorProto.INT64}),
    ("Cast", [LINE], {"to": TensorProto.BOOL}),
    ("CastLike", [HALVES, LINE]),
    ("Gather", [LINE, i(-1, 0)]),
    ("Gather", [RAMP, np.array(1)], {"axis": 1}),
    ("GatherND", [RAMP, np.array([[1, 0], [0, 2]])]),
    ("GatherElements", [RAMP, np.array([[2, -3, 0], [1, 1, 2]])], {"axis": 1}),
    ("ScatterND", [LINE, np.array([[2], [0]]), i(9, 8)]),
    ("Concat", [LINE, i(1)], {"axis": 0}),
    ("Concat", [RAMP, RAMP], {"axis": -1}),
    ("Slice", [LINE, i(-1), i(-(1 << 62)), i(0), i(-1)]),
    ("Slice", [RAMP, i(1), i(1 << 62), i(-1)]),
    ("Slice", [LINE], {"starts": [1], "ends": [3]}, 9),
    ("Squeeze", [RAMP[None], i(0)]),
    ("Squeeze", [RAMP[None]]),
    ("Unsqueeze", [LINE, i(-1, 0)]),
    ("Reshape", [RAMP, i(0, -1)]),
    ("Reshape", [RAMP, i(-1)]),
    ("Transpose", [RAMP], {"perm": [1, 0]}),
    ("Flatten", [RAMP[None]], {"axis": 2}),
    ("Flatten", [RAMP[None]], {"axis": -1}),
    ("Expand", [i(4), i(3, 2)]),
    ("Tile", [LINE, i(2)]),
    ("Range", [np.array(7), np.array(1), np.array(-2)]),
    ("ConstantOfShape", [i(2, 3)]),
    ("OneHot", [i(0, -1, 3, 7), np.array(4), i(0, 1)]),
    ("OneHot", [i(0, -1, 3), np.array(4), i(5, 6)], {"axis": 0}),
    ("CumSum", [LINE, np.array(0)]),
    ("CumSum", [RAMP, np.array(-1)], {"exclusive": 1}),
    ("CumSum", [RAMP, np.array(1)], {"reverse": 1}),
    ("CumSum", [RAMP, np.array(0)], {"reverse": 1, "exclusive": 1}),
    *[(op, [LINE, i(2, 2, -3, 3)]) for op in ("Add", "Sub", "Mul", "Div", "Mod", "Min", "Max")],
    ("Mod", [LINE, i(2, 2, -3, 3)], {"fmod": 1}),
    ("Div", [HALVES, HALVES[::-1].copy()]),
    ("Pow", [LINE, i(2)]),
    ("Sum", [HALVES, HALVES]),
    *[(op, [LINE]) for op in ("Neg", "Abs", "Sign")],
    *[(op, [HALVES]) for op in ("Floor", "Ceil", "Round", "Reciprocal", "Exp")],
    *[(op, [np.abs(HALVES)]) for op in ("Sqrt", "Log")],
    *[(op, [LINE, i(2, -3, 2, 7)]) for op in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")],
    ("Not", [TRUTHS]),
    *[(op, [TRUTHS, TRUTHS[::-1].copy()]) for op in ("And", "Or")],
    ("Where", [TRUTHS, LINE, i(0)]),
    ("Clip", [LINE, np.array(0), np.array(4)]),
    ("Clip", [HALVES], {"min": 0.0, "max": 2.0}, 9),
    *[(op, [RAMP, i(-1)], {"keepdims": 0}) for op in ("ReduceProd", "ReduceSum", "ReduceMax", "ReduceMin")],
    ("ReduceMean", [HALVES]),
    ("ReduceSum", [RAMP, i()]),
    ("ReduceSum", [RAMP, i()], {"noop_with_empty_axes": 1}),
    ("ReduceSum", [RAMP], {"axes": [0]}, 11),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_values_are_those_that_onnxruntime_computes(row):
    op, inputs, attributes, opset = (*row, *({}, 18)[len(row) - 2 :])
    names = [f"x{n}" for n in range(len(inputs))]
    weights = [numpy_helper.from_array(value, name) for name, value in zip(names, inputs, strict=True)]
    node = helper.make_node(op, names, ["y"], **attributes)
    output = helper.make_empty_tensor_value_info("y")
    graph = helper.make_graph([node], "small", [], [output], weights)
    proto = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", opset)])
    wanted = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {})[0]
    imported = Model.from_proto(proto).graph.nodes[0]
    found = evaluate(Op(imported, opset, values=[(value, value) for value in inputs]))
    assert found is not None and len(found) == 2
    assert found[0].dtype == wanted.dtype and found[0].shape == wanted.shape
    np.testing.assert_allclose(found[0], wanted, rtol=1e-6)


def test_every_function_has_a_row():
    """Shape, Size and Split speak of sizes or of several outputs; the rules' tests judge them."""
    assert set(FUNCTIONS) - {row[0] for row in ROWS} == {"Shape", "Size", "Split"}


def test_batches_of_positions_are_not_evaluated():
    node = Model.from_proto(_batched()).graph.nodes[0]
    assert evaluate(Op(node, 18, values=[(RAMP, RAMP), (np.array([[1], [0]]),) * 2])) is None


def _batched():
    node = helper.make_node("GatherND", ["x", "i"], ["y"], batch_dims=1)
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, None) for name in ("x", "i")]
    graph = helper.make_graph([node], "small", inputs, [helper.make_empty_tensor_value_info("y")])
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 18)])
