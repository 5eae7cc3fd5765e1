"""A loaded graph has one form: constants, functions, subgraphs, names, ties and the order of nodes."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from graphclone.errors import GraphcloneError
from graphclone.model import Model, load
from graphclone.weights import Weight

info = helper.make_tensor_value_info


def test_graph_has_one_form_of_everything(stored):
    loaded = load(stored)
    assert [node.op for node in loaded.graph.nodes] == ["MatMul", "Add", "Clip", "MatMul", "ReduceMean"]
    assert [node.name for node in loaded.graph.nodes] == ["first", "Add", "clip", "second", "mean"]
    assert list(loaded.weights) == ["layer.0.weight", "layer.0.bias", "top", "layer.1.weight", "axes"]
    assert loaded.aliases == {"alias": "layer.0.bias"} and list(loaded.unused) == ["unused"]
    assert loaded.node_metadata == {"first": {"namespace": "model.layers.0"}}
    assert loaded.value_metadata == {"layer.1.weight": {"trainable": "yes"}, "h": {"origin": "linear"}}
    assert loaded.metadata == {"licence": "mit"} and loaded.opset == 18 and loaded.path == stored
    assert [tensor.name for tensor in (*loaded.inputs, *loaded.outputs)] == ["x", "y"]
    assert all(isinstance(weight, Weight) for weight in loaded.weights.values())
    assert loaded.graph.nodes[2].inputs[1].is_empty()


def control_flow(outer: np.ndarray, inner: np.ndarray) -> ModelProto:
    """Two Ifs: branches that read an outer weight, own one, use the same names, and return constants."""
    sums = helper.make_node("Add", ["h", "h"], ["y"], name="add")
    left = helper.make_graph(
        [helper.make_node("MatMul", ["x", "outer"], ["h"], name="mm"), sums], "left", [], [info("y", 1, None)]
    )
    right = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"], name="mm"), sums],
        "right",
        [],
        [info("y", 1, None)],
        [numpy_helper.from_array(inner, "w")],
    )
    node = helper.make_node("Constant", [], ["z"], value=numpy_helper.from_array(np.full((1, 7), 1.5, np.float32)))
    constant = helper.make_graph([node], "constant", [], [info("z", 1, None)])
    stored = helper.make_graph(
        [], "stored", [], [info("z", 1, None)], [numpy_helper.from_array(np.full((1, 7), 2.5, np.float32), "z")]
    )
    nodes = [
        helper.make_node("If", ["c"], ["a"], then_branch=left, else_branch=right),
        helper.make_node("If", ["c"], ["b"], then_branch=constant, else_branch=stored),
        helper.make_node("Add", ["a", "b"], ["o"]),
    ]
    inputs = [info("x", 1, ["batch", 48]), info("c", TensorProto.BOOL, [])]
    graph = helper.make_graph(
        nodes, "flow", inputs, [info("o", 1, ["batch", 7])], [numpy_helper.from_array(outer, "outer")]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("external", [False, True])
def test_subgraphs_keep_their_weights_and_outer_ones(tmp_path, external, normal, run):
    outer, inner = normal(48, 7), normal(48, 7)
    proto = control_flow(outer, inner)
    onnx.save(proto, tmp_path / "in.onnx")
    loaded = load(tmp_path / "in.onnx")
    assert sorted(loaded.weights) == ["outer", "w", "z", "z_1"] and loaded.unused == {}
    loaded.external = external
    loaded.copy().save(tmp_path / "out.onnx")
    saved = onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(saved, full_check=True)
    assert [item.name for item in saved.graph.initializer] == ["outer"]
    inside = [item.name for node in saved.graph.node for graph in node.attribute for item in graph.g.initializer]
    assert inside == ["w", "z", "z_1"]
    for condition in (True, False):
        feeds = {"x": normal(3, 48), "c": np.array(condition)}
        assert np.array_equal(run(proto, **feeds)[0], run(tmp_path / "out.onnx", **feeds)[0])
    assert load(tmp_path / "out.onnx").fingerprint == loaded.fingerprint
    copied = loaded.copy()
    inner_nodes = copied.graph.nodes[0].attrs["then_branch"].nodes
    inner_nodes[0].inputs[1]._values = Weight.of(outer * 2)
    assert np.array_equal(copied.weights["outer"].load(), outer * 2)


def test_two_constants_of_one_name_are_refused(normal, small):
    loaded = Model.from_proto(small())
    loaded.graph.nodes[3].inputs[1] = gs.Constant("layer.0.weight", Weight.of(normal(7, 5)))
    with pytest.raises(GraphcloneError, match=r"two constants are called 'layer\.0\.weight'"):
        loaded.to_proto()


VALUES = {
    "value": numpy_helper.from_array(np.array([3, 5], np.int64)),
    "value_int": 7,
    "value_ints": [3, 5],
    "value_float": 0.1,
    "value_floats": [0.1, 0.5],
    "value_string": "s",
    "value_strings": ["s", "t"],
}


@pytest.mark.parametrize("form", VALUES)
def test_constant_nodes_of_every_form(form, run):
    node = helper.make_node("Constant", [], ["c"], **{form: VALUES[form]})
    body = [node, helper.make_node("Identity", ["c"], ["y"])]
    kind = {"value_f": TensorProto.FLOAT, "value_s": TensorProto.STRING}.get(form[:7], TensorProto.INT64)
    graph = helper.make_graph(body, "g", [], [info("y", kind, None)])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    loaded = Model.from_proto(proto)
    assert [item.op for item in loaded.graph.nodes] == ["Identity"]
    got, expected = run(loaded.to_proto())[0], run(proto)[0]
    assert got.dtype == expected.dtype and got.tolist() == expected.tolist()


def test_functions_are_inlined(normal, run):
    weight = normal(48, 7)
    relu = helper.make_node("LeakyRelu", ["h"], ["y"], name="relu")
    relu.attribute.append(onnx.AttributeProto(name="alpha", type=onnx.AttributeProto.FLOAT, ref_attr_name="alpha"))
    relu.metadata_props.add(key="namespace", value="inside")
    body = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weight)),
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        relu,
    ]
    function = helper.make_function("mine", "Block", ["x"], ["y"], body, [helper.make_opsetid("", 17)], ["alpha"])
    calls = [helper.make_node("Block", ["x"], [f"y{i}"], domain="mine", alpha=0.5 * i) for i in (1, 3)]
    outputs = [info(f"y{i}", 1, ["n", 7]) for i in (1, 3)]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    graph = helper.make_graph(calls, "g", [info("x", 1, ["n", 48])], outputs)
    proto = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=8)
    loaded = Model.from_proto(proto)
    assert [node.op for node in loaded.graph.nodes] == ["MatMul", "LeakyRelu"] * 2
    assert [node.attrs["alpha"] for node in loaded.graph.nodes[1::2]] == [0.5, 1.5]
    assert list(loaded.node_metadata.values()) == [{"namespace": "inside"}] * 2
    x = normal(3, 48)
    for got, expected in zip(run(loaded.to_proto(), x=x), run(proto, x=x), strict=True):
        assert got.tobytes() == expected.tobytes()


def test_initializers_that_are_inputs_or_outputs(tmp_path, normal, linear, run):
    weight = numpy_helper.from_array(normal(48, 7), "w")
    proto = linear(weight, ir_version=3)
    proto.graph.input.append(info("w", 1, [48, 7]))
    proto.graph.output.extend([info("w", 1, [48, 7]), info("x", 1, [3, None])])
    onnx.save(proto, tmp_path / "old.onnx")
    loaded = load(tmp_path / "old.onnx")
    assert [tensor.name for tensor in loaded.inputs] == ["x"]
    assert [tensor.name for tensor in loaded.outputs] == ["y", "w", "x"]
    loaded.save(tmp_path / "out.onnx")
    onnx.checker.check_model(tmp_path / "out.onnx")
    x = normal(3, 48)
    for got, expected in zip(run(tmp_path / "out.onnx", x=x), run(proto, x=x), strict=True):
        assert np.array_equal(got, expected)


def test_many_unnamed_nodes_get_names_quickly():
    nodes = [helper.make_node("Relu", [f"x{i}"], [f"x{i + 1}"]) for i in range(5000)]
    nodes[-1].name = nodes[-2].name = "Relu_7"
    graph = helper.make_graph(nodes, "g", [info("x0", 1, [3])], [info("x5000", 1, [3])])
    loaded = Model.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))
    names = [node.name for node in loaded.graph.nodes]
    assert len(set(names)) == 5000 and names[:2] == ["Relu", "Relu_1"] and names[-2:] == ["Relu_7", "Relu_7_1"]


def test_ties_are_found_without_reading_everything(normal):
    table, other = normal(48, 7), normal(7, 48)
    arrays = {
        "a": table,
        "b": table.copy(),
        "t": table.T.copy(),
        "other": other,
        "zeros": np.zeros((48, 7), np.float32),
        "nought": np.zeros((48, 7), np.float32),
        "vector": table[:, 0],
        "same": table[:, 0],
    }
    nodes = [helper.make_node("Sum", list(arrays), ["y"])]
    weights = [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in arrays.items()]
    proto = helper.make_model(helper.make_graph(nodes, "g", [], [info("y", 1, None)], weights))
    found = {(tie.first, tie.second, tie.transposed) for tie in Model.from_proto(proto).ties}
    assert found == {("a", "b", False), ("a", "t", True)}
    assert Model.from_proto(proto, retie=False).ties == ()


def test_nodes_may_stand_before_what_they_read(small):
    proto = small()
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes[::-1]])
    known: set[str] = {tensor.name for tensor in proto.graph.input}
    for node in Model.from_proto(proto).graph.nodes:
        assert {t.name for t in node.inputs if isinstance(t, gs.Variable) and not t.is_empty()} <= known
        known |= {tensor.name for tensor in node.outputs}


def test_nodes_in_order_keep_it(small):
    loaded = Model.from_proto(small()).graph.nodes
    named = [node.name for node in small().graph.node if node.name in {each.name for each in loaded}]
    assert [node.name for node in loaded if node.name in named] == named
