"""Models: what a file said survives load and save, failures leave everything as it was, and errors say what to do."""

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from graphclone import atomic, model
from graphclone.errors import GraphcloneError, InputError
from graphclone.model import Model, load
from graphclone.weights import Weight

info = helper.make_tensor_value_info
rng = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def small(seed: int = 0) -> ModelProto:
    """Two linear layers of 48 -> 7 -> 5 on [batch, 48], with all that a file can say around them."""
    values = np.random.default_rng(seed)
    nodes = [
        helper.make_node("MatMul", ["x", "layer.0.weight"], ["h"], name="first"),
        helper.make_node("Identity", ["layer.0.bias"], ["alias"]),
        helper.make_node("Add", ["h", "alias"], ["h_biased"]),
        helper.make_node("Constant", [], ["axes"], value_ints=[1]),
        helper.make_node("Clip", ["h_biased", "", "top"], ["clipped"], name="clip"),
        helper.make_node("MatMul", ["clipped", "layer.1.weight"], ["m"], name="second"),
        helper.make_node("ReduceMean", ["m", "axes"], ["y"], keepdims=1, name="mean", doc_string="why"),
    ]
    nodes[0].metadata_props.add(key="namespace", value="model.layers.0")
    weights = {
        "unused": values.standard_normal((3, 5)),
        "layer.1.weight": values.standard_normal((7, 5)),
        "layer.0.weight": values.standard_normal((48, 7)),
        "layer.0.bias": values.standard_normal(7),
        "top": np.array(1.5),
    }
    initializers = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    initializers[1].metadata_props.add(key="trainable", value="yes")
    graph = helper.make_graph(
        nodes,
        "small",
        [info("x", TensorProto.FLOAT, ["batch", 48])],
        [info("y", TensorProto.FLOAT, ["batch", 1])],
        initializers,
        doc_string="graph doc",
        value_info=[info("h", TensorProto.FLOAT, ["batch", 7])],
    )
    graph.value_info[0].metadata_props.add(key="origin", value="linear")
    proto = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)],
        producer_name="tests",
        producer_version="1",
        ir_version=9,
        doc_string="model doc",
    )
    helper.set_model_props(proto, {"licence": "mit"})
    return proto


def linear(weight: TensorProto, **options) -> ModelProto:
    """One MatMul of [3, n] with a weight [n, m]."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", weight.name], ["y"], name="matmul")],
        "linear",
        [info("x", TensorProto.FLOAT, [3, None])],
        [info("y", TensorProto.FLOAT, [3, None])],
        [weight],
    )
    return helper.make_model(graph, **{"opset_imports": [helper.make_opsetid("", 17)], "ir_version": 8} | options)


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


def run(source: ModelProto | Path, **feeds: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    content = source.SerializeToString() if isinstance(source, ModelProto) else str(source)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def bits_of(proto: ModelProto) -> dict[str, bytes]:
    return {item.name: numpy_helper.to_array(item).tobytes() for item in proto.graph.initializer}


@pytest.fixture(params=["embedded", "external"])
def stored(request, tmp_path) -> Path:
    """The small model in a file, with and without external data."""
    path = tmp_path / "in" / "small.onnx"
    path.parent.mkdir()
    onnx.save(
        small(), path, save_as_external_data=request.param == "external", location="small.weights", size_threshold=100
    )
    return path


def test_identity_keeps_everything_the_file_said(stored, tmp_path):
    load(stored).save(tmp_path / "out.onnx")
    before, after = onnx.load(stored), onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(after, full_check=True)
    assert bits_of(before).items() <= bits_of(after).items()
    names = [item.name for item in before.graph.initializer]
    assert [item.name for item in after.graph.initializer][: len(names)] == names
    for field in ("ir_version", "producer_name", "producer_version", "doc_string", "metadata_props", "opset_import"):
        assert getattr(before, field) == getattr(after, field), field
    for field in ("name", "doc_string", "input", "output", "value_info"):
        assert getattr(before.graph, field) == getattr(after.graph, field), field
    assert after.graph.initializer[1].metadata_props == before.graph.initializer[1].metadata_props
    node = after.graph.node[0]
    assert (node.name, node.metadata_props[0].value) == ("first", "model.layers.0")
    assert after.graph.node[-1].doc_string == "why"
    x = normal(3, 48)
    assert run(stored, x=x)[0].tobytes() == run(tmp_path / "out.onnx", x=x)[0].tobytes()
    assert (tmp_path / "out.onnx.data").exists() == (stored.parent / "small.weights").exists()


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


def test_saving_twice_gives_identical_bytes(stored, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        load(stored).copy().save(tmp_path / folder / "out.onnx")
    load(tmp_path / "a" / "out.onnx").save(tmp_path / "in" / "out.onnx")
    again = {name: data for name, data in contents(tmp_path / "in").items() if name.startswith("out")}
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == again


def test_small_values_stay_in_the_proto(tmp_path):
    source = load_external(tmp_path, small())
    source.save(tmp_path / "out.onnx")
    proto = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    outside = [item.name for item in proto.graph.initializer if item.data_location == TensorProto.EXTERNAL]
    assert outside == ["layer.0.weight"]


def load_external(folder: Path, proto: ModelProto, **options) -> Model:
    path = folder / "external.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="external.weights", size_threshold=0)
    return load(path, **options)


def test_big_models_get_a_data_file(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "EMBEDDED_LIMIT", 1400)
    Model.from_proto(small()).save(tmp_path / "out.onnx")
    assert sorted(contents(tmp_path)) == ["out.onnx", "out.onnx.data"]
    assert bits_of(onnx.load(tmp_path / "out.onnx"))["layer.0.weight"] == bits_of(small())["layer.0.weight"]


def test_fingerprint_is_of_the_content_not_of_the_file(tmp_path):
    onnx.save(small(), tmp_path / "embedded.onnx")
    embedded = load(tmp_path / "embedded.onnx")
    external = load_external(tmp_path, small())
    external.save(tmp_path / "again.onnx")
    prints = {
        item.fingerprint
        for item in (embedded, external, load(tmp_path / "again.onnx"), Model.from_proto(small()), embedded.copy())
    }
    assert len(prints) == 1 and len(prints.pop()) == 64
    assert Model.from_proto(small(seed=1)).fingerprint != embedded.fingerprint
    renamed = embedded.copy()
    renamed.graph.nodes[0].name = "other"
    assert renamed.fingerprint != embedded.fingerprint


def test_copies_are_edited_apart(stored):
    parent = load(stored)
    before = parent.fingerprint
    child = parent.copy()
    assert child.fingerprint == before
    node = child.graph.nodes[0]
    assert isinstance(node.inputs[1]._values, Weight) and node.inputs[1]._values is parent.weights["layer.0.weight"]
    node.inputs[1]._values = node.inputs[1]._values.take(1, [0, 2, 4])
    node.outputs[0].shape[1] = 3
    child.graph.nodes[-1].attrs["keepdims"] = 0
    child.node_metadata["first"]["namespace"] = "changed"
    child.metadata["licence"] = "other"
    child.unused.clear()
    child.graph.nodes.pop()
    assert parent.fingerprint == before and child.fingerprint != before


def test_proto_in_memory_with_and_without_data(stored):
    loaded = load(stored)
    assert bits_of(small()).items() <= bits_of(loaded.to_proto()).items()
    outside = loaded.to_proto(external=True)
    big = [item for item in outside.graph.initializer if item.data_location == TensorProto.EXTERNAL]
    assert [item.name for item in big] == ["layer.0.weight"]
    options = onnxruntime.SessionOptions()
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(loaded.weights[item.name].load()) for item in big]
    options.add_external_initializers([item.name for item in big], values)
    session = onnxruntime.InferenceSession(outside.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = normal(3, 48)
    assert np.array_equal(session.run(None, {"x": x})[0], run(stored, x=x)[0])


def test_graphsurgeon_itself_can_export_a_loaded_graph(stored):
    x = normal(3, 48)
    exported = gs.export_onnx(load(stored).graph.cleanup().toposort())
    assert np.array_equal(run(exported, x=x)[0], run(stored, x=x)[0])


@pytest.mark.parametrize("external", [False, True])
def test_subgraphs_keep_their_weights_and_outer_ones(tmp_path, external):
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


def test_two_constants_of_one_name_are_refused():
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
def test_constant_nodes_of_every_form(form):
    node = helper.make_node("Constant", [], ["c"], **{form: VALUES[form]})
    body = [node, helper.make_node("Identity", ["c"], ["y"])]
    kind = {"value_f": TensorProto.FLOAT, "value_s": TensorProto.STRING}.get(form[:7], TensorProto.INT64)
    graph = helper.make_graph(body, "g", [], [info("y", kind, None)])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    loaded = Model.from_proto(proto)
    assert [item.op for item in loaded.graph.nodes] == ["Identity"]
    got, expected = run(loaded.to_proto())[0], run(proto)[0]
    assert got.dtype == expected.dtype and got.tolist() == expected.tolist()


def test_functions_are_inlined():
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


def test_initializers_that_are_inputs_or_outputs(tmp_path):
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


def test_attributes_survive(tmp_path):
    nodes = [
        helper.make_node(
            "Fancy", ["x", ""], ["", "y"], domain="custom", text="a", raw=b"\xff", numbers=[1.0, 2.0], one=1.0
        ),
        helper.make_node("ConstantOfShape", ["y"], ["z"], value=numpy_helper.from_array(np.array([3], np.int64))),
    ]
    nodes[0].attribute.append(onnx.AttributeProto(name="none", type=onnx.AttributeProto.INTS))
    sequence = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, [3, None])
    graph = helper.make_graph(nodes, "g", [info("x", 16, [None, "n", 3]), sequence], [info("z", 7, None)])
    opsets = [helper.make_opsetid("ai.onnx", 17), helper.make_opsetid("custom", 3)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    got = Model.from_proto(proto).copy().to_proto()
    for before, after in zip(proto.graph.node, got.graph.node, strict=True):
        assert {item.name: item.type for item in before.attribute} == {item.name: item.type for item in after.attribute}
        assert (list(before.input), list(before.output), before.domain) == (
            list(after.input),
            list(after.output),
            after.domain,
        )
    assert got.graph.node[0].attribute == proto.graph.node[0].attribute[:4] + proto.graph.node[0].attribute[4:]
    assert got.graph.input == proto.graph.input and got.graph.output == proto.graph.output
    assert {item.domain: item.version for item in got.opset_import} == {"": 17, "custom": 3}


def test_many_unnamed_nodes_get_names_quickly():
    nodes = [helper.make_node("Relu", [f"x{i}"], [f"x{i + 1}"]) for i in range(5000)]
    nodes[-1].name = nodes[-2].name = "Relu_7"
    graph = helper.make_graph(nodes, "g", [info("x0", 1, [3])], [info("x5000", 1, [3])])
    loaded = Model.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))
    names = [node.name for node in loaded.graph.nodes]
    assert len(set(names)) == 5000 and names[:2] == ["Relu", "Relu_1"] and names[-2:] == ["Relu_7", "Relu_7_1"]


def test_ties_are_found_without_reading_everything():
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


def test_a_file_may_hold_its_graph_in_parts(tmp_path):
    whole, parts = small(), []
    for index in range(2):
        part = ModelProto()
        part.CopyFrom(whole)
        part.graph.ClearField("initializer" if index else "node")
        part.graph.initializer.extend(whole.graph.initializer[3:] if index else ())
        if not index:
            del part.graph.initializer[3:]
        for field in ("input", "output", "value_info") if index else ():
            part.graph.ClearField(field)
        parts.append(part.graph.SerializeToString())
    whole.ClearField("graph")
    lengths = [bytes((7 << 3 | 2, len(part) & 127 | 128, len(part) >> 7)) for part in parts]
    path = tmp_path / "parts.onnx"
    path.write_bytes(lengths[0] + parts[0] + whole.SerializeToString() + lengths[1] + parts[1])
    assert bits_of(load(path).to_proto()) == bits_of(Model.from_proto(small()).to_proto())


def test_memory_stays_small(tmp_path):
    size = 1 << 28  # four sparse weights of 256 MB
    header = [
        TensorProto(name=f"w{i}", dims=[8192, 8192], data_type=1, data_location=TensorProto.EXTERNAL) for i in range(4)
    ]
    for index, tensor in enumerate(header):
        for key, value in (("location", "big.data"), ("offset", index * size), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
    proto = linear(header[0])
    proto.graph.initializer.extend(header[1:])
    (tmp_path / "big.onnx").write_bytes(proto.SerializeToString())
    with open(tmp_path / "big.data", "wb") as file:
        file.truncate(4 * size)
    script = (
        "import resource, sys; from graphclone.model import load; model = load(sys.argv[1])\n"
        "base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for name, weight in model.unused.items():\n"
        "    model.unused[name] = weight.take(0, range(0, 8192, 2)).take(1, range(0, 8192, 16))\n"
        "model.unused['whole'] = model.weights['w0'].take(0, range(1, 2048)); model.unused.pop('w1')\n"
        "model.fingerprint; model.save(sys.argv[2])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)\n"
    )
    grown = run_script(script, tmp_path / "big.onnx", tmp_path / "out.onnx")
    assert int(grown) < 96 << 10  # KB
    assert (tmp_path / "out.onnx.data").stat().st_size > size // 4


def run_script(script: str, *arguments: Path) -> str:
    """Run Python code in a process of its own; return what it prints."""
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(
        command, stdout=subprocess.PIPE, text=True, cwd=Path(model.__file__).parents[1], check=True
    ).stdout


# What goes wrong: the message says what to do, and nothing is left behind.

NOT_MODELS = {
    "empty.onnx": (b"", "is empty"),
    "page.onnx": (b"\n<!DOCTYPE html><html>", "is a web page"),
    "pointer.onnx": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "pickle.onnx": (b"\x80\x02}q\x00.", "Python pickle"),
    "checkpoint.onnx": (b"PK\x03\x04" + bytes(40), "PyTorch checkpoint"),
    "weights.onnx": (b"\x10\0\0\0\0\0\0\0" + b'{"a":{}}        ', "safetensors"),
    "text.onnx": (b"just some words", "is not an ONNX model"),
    "noise.onnx": (np.random.default_rng(5).bytes(4000), "not an ONNX model"),
    "tensor.onnx": (numpy_helper.from_array(np.zeros(3), "t").SerializeToString(), "damaged or truncated"),
    "graphless.onnx": (ModelProto(ir_version=8).SerializeToString(), "has no graph"),
}


@pytest.mark.parametrize("name", NOT_MODELS)
def test_files_that_are_no_models(tmp_path, name):
    content, message = NOT_MODELS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load(tmp_path / name)


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(InputError, match="no file at"):
        load(tmp_path / "missing.onnx")
    with pytest.raises(InputError, match=r"is a folder; it holds no \.onnx file"):
        load(tmp_path)
    onnx.save(small(), tmp_path / "small.onnx")
    with pytest.raises(InputError, match=r"is a folder; name a file in it: small\.onnx"):
        load(str(tmp_path))
    with pytest.raises(InputError, match="cannot read"):
        load(tmp_path / "small.onnx" / "below.onnx")
    with pytest.raises(InputError, match="device or pipe"):
        load("/dev/null")


def test_truncated_files(tmp_path):
    data = small().SerializeToString()
    path = tmp_path / "cut.onnx"
    for length in range(1, len(data), 97):
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match=r"damaged or truncated|not an ONNX model"):
            load(path)


def test_damaged_files_never_end_in_a_traceback(tmp_path):
    data = np.frombuffer(small().SerializeToString(), np.uint8)
    generator = np.random.default_rng(6)
    path = tmp_path / "damaged.onnx"
    head = np.flatnonzero(data == 48)[-1]
    for _ in range(400):
        changed = data.copy()
        places = generator.integers(0, len(data) if generator.integers(2) else min(700, head), generator.integers(1, 4))
        changed[places] = generator.integers(0, 256, len(places), np.uint8)
        path.write_bytes(changed.tobytes())
        try:
            loaded = load(path)
            assert loaded.fingerprint and loaded.ties is not None
        except GraphcloneError:
            continue


@pytest.mark.parametrize("opsets", [[("", 8)], [("com.microsoft", 1)], []])
def test_opsets_before_9_or_none(opsets):
    proto = linear(numpy_helper.from_array(normal(48, 7), "w"))
    del proto.opset_import[:]
    proto.opset_import.extend(helper.make_opsetid(*opset) for opset in opsets)
    with pytest.raises(InputError, match="opset"):
        Model.from_proto(proto)


def test_sparse_tensors_are_refused():
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("w", 1, [2], [1, 2]), helper.make_tensor("i", TensorProto.INT64, [2], [0, 3]), [48, 7]
    )
    graph = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["y"])], "g", [], [info("y", 1, None)], sparse_initializer=[sparse]
    )
    with pytest.raises(InputError, match="'w' is sparse"):
        Model.from_proto(helper.make_model(graph))


def test_graphs_that_are_not_well_formed():
    for inputs, message in ((["x", "nowhere"], "reads 'nowhere', which nothing defines"), (["x", "w"], "define 'y'")):
        proto = linear(numpy_helper.from_array(normal(48, 7), "w"))
        proto.graph.node.append(helper.make_node("MatMul", inputs, ["y"], name="second"))
        if inputs[1] != "w":
            proto.graph.node[1].output[0] = "z"
        with pytest.raises(InputError, match=message):
            Model.from_proto(proto)


def test_raw_data_of_the_wrong_length(tmp_path):
    weight = numpy_helper.from_array(normal(48, 7), "w")
    weight.raw_data = weight.raw_data[:-4]
    onnx.save(linear(weight), tmp_path / "short.onnx")
    with pytest.raises(InputError, match=r"'w' holds 1340 bytes, but its shape \[48, 7\] of FLOAT needs 1344"):
        load(tmp_path / "short.onnx")
    with pytest.raises(InputError, match="holds 1340 bytes"):
        Model.from_proto(linear(weight))
    typed = helper.make_tensor("w", 1, [2, 3], range(6))
    typed.dims[1] = 5
    with pytest.raises(InputError, match="holds 6 values"):
        Model.from_proto(linear(typed))
    typed.data_type = 99
    with pytest.raises(InputError, match="element type 99"):
        Model.from_proto(linear(typed))


def outside(folder: Path, **entries: object) -> Path:
    """A linear model in `folder / "model"` whose weight [48, 7] names external data."""
    weight = TensorProto(name="w", dims=[48, 7], data_type=1, data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        weight.external_data.add(key=key, value=str(value))
    (folder / "model").mkdir(exist_ok=True)
    path = folder / "model" / "model.onnx"
    path.write_bytes(linear(weight).SerializeToString())
    return path


def test_external_data_is_checked(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(1344))
    path = outside(tmp_path, location="w.data")
    with pytest.raises(InputError, match=r"no file '.*w\.data'; copy it beside model\.onnx"):
        load(path)
    data = path.parent / "w.data"
    data.write_bytes(bytes(1000))
    with pytest.raises(InputError, match="truncated or of another model"):
        load(path)
    data.write_bytes(normal(48, 7).tobytes())
    assert load(path).weights["w"].load().tobytes() == data.read_bytes()
    for entries, message in (
        ({"location": "../secret"}, "refusing"),
        ({"location": "sub/../../secret"}, "refusing"),
        ({"location": "..\\secret"}, "refusing"),
        ({"location": str(tmp_path / "secret")}, "refusing"),
        ({"location": "C:\\secret"}, "refusing"),
        ({"location": ""}, "refusing"),
        ({}, "refusing"),
        ({"location": "."}, "not a file"),
        ({"location": "w.data", "offset": 4}, "truncated"),
        ({"location": "w.data", "offset": -4}, "offset '-4'"),
        ({"location": "w.data", "offset": "x"}, "offset 'x'"),
        ({"location": "w.data", "length": 1340}, "needs 1344 bytes"),
        ({"location": "w.data", "offset": 1 << 62, "length": 1344}, "truncated"),
    ):
        with pytest.raises(InputError, match=message):
            load(outside(tmp_path, **entries))


def test_links_end_in_the_folder_of_the_resolved_model(tmp_path):
    path = outside(tmp_path, location="model.onnx_data")
    data = normal(48, 7).tobytes()
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc" / "onnx"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "11aa").write_bytes(path.read_bytes())
    (blobs / "22bb").write_bytes(data)
    for name, blob in (("model.onnx", "11aa"), ("model.onnx_data", "22bb")):
        (snapshot / name).symlink_to(f"../../../blobs/{blob}")
    assert load(snapshot / "model.onnx").weights["w"].load().tobytes() == data
    (path.parent / "model.onnx_data").symlink_to(blobs / "22bb")
    with pytest.raises(InputError, match="the link leads out of the model's folder"):
        load(path)


class FullDisk:
    """A file on a disk that is full after `room` bytes, or interrupted there."""

    def __init__(self, file, room: int, error: BaseException):
        self.file, self.room, self.error = file, room, error

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise self.error
        return self.file.write(data)


@pytest.mark.parametrize("room", [0, 500, 2000])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_failed_save_changes_nothing(stored, monkeypatch, room, error):
    loaded = load(stored)
    loaded.save(stored.with_name("out.onnx"))
    before = contents(stored.parent)
    loaded.metadata["more"] = "text" * 500
    monkeypatch.setattr(atomic, "open", lambda *args: FullDisk(open(*args), room, error), raising=False)
    expected, message = (InputError, "No space left") if isinstance(error, OSError) else (KeyboardInterrupt, None)
    with pytest.raises(expected, match=message):
        loaded.save(stored.with_name("out.onnx"))
    with pytest.raises(expected, match=message):
        loaded.save(stored)
    assert contents(stored.parent) == before


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_rename_restores_the_data_file(tmp_path, monkeypatch, failing):
    loaded = load_external(tmp_path, small())
    loaded.save(tmp_path / "out.onnx")
    before = contents(tmp_path)
    loaded.graph.nodes[0].inputs[1]._values = loaded.weights["layer.0.weight"].scaled(2)
    calls = []

    def replace(source, target):
        calls.append(target)
        if len(calls) == failing:
            raise OSError(errno.EIO, "Input/output error")
        os.rename(source, target)

    monkeypatch.setattr(atomic.os, "replace", replace)
    with pytest.raises(InputError, match="Input/output error"):
        loaded.save(tmp_path / "out.onnx")
    assert contents(tmp_path) == before


def test_a_file_size_limit_leaves_nothing_behind(stored, tmp_path):
    script = (
        "import resource, sys; from graphclone.model import load; model = load(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))\n"
        "from graphclone.errors import InputError\n"
        "try: model.save(sys.argv[2])\n"
        "except InputError as error: print(error)\n"
    )
    (tmp_path / "out").mkdir()
    assert "File too large" in run_script(script, stored, tmp_path / "out" / "out.onnx")
    assert not contents(tmp_path / "out")


def test_paths_that_cannot_be_written(tmp_path):
    loaded = Model.from_proto(small())
    (tmp_path / "file").write_bytes(b"kept")
    (tmp_path / "folder.onnx").mkdir()
    for path, message in (
        (tmp_path / "file" / "out.onnx", "'.*file' is a file, not a folder"),
        (tmp_path / "file" / "deeper" / "out.onnx", "part of its folder is a file"),
        (tmp_path / "missing" / "out.onnx", "there is no folder '.*missing'; create it first"),
        (tmp_path / "folder.onnx", "it is a folder; name a file in it"),
        (Path("/dev/null"), "device or pipe"),
    ):
        with pytest.raises(InputError, match=message):
            loaded.save(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.onnx"]


def test_saving_over_the_files_the_weights_are_mapped_from(stored):
    loaded = load(stored)
    before = hashlib.sha256(loaded.weights["layer.0.weight"].load().tobytes()).digest()
    for path in (stored, stored, stored.with_name("small.weights")):
        loaded.save(path)
        again = load(path)
        assert hashlib.sha256(again.weights["layer.0.weight"].load().tobytes()).digest() == before
        assert hashlib.sha256(loaded.weights["layer.0.weight"].load().tobytes()).digest() == before
    mode = os.umask(0)
    os.umask(mode)
    assert stored.stat().st_mode & 0o777 == 0o666 & ~mode


# the order of nodes ----------------------------------------------------------------------------------------------


def test_nodes_may_stand_before_what_they_read():
    proto = small()
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes[::-1]])
    known: set[str] = {tensor.name for tensor in proto.graph.input}
    for node in Model.from_proto(proto).graph.nodes:
        assert {t.name for t in node.inputs if isinstance(t, gs.Variable) and not t.is_empty()} <= known
        known |= {tensor.name for tensor in node.outputs}


def test_nodes_in_order_keep_it():
    loaded = Model.from_proto(small()).graph.nodes
    named = [node.name for node in small().graph.node if node.name in {each.name for each in loaded}]
    assert [node.name for node in loaded if node.name in named] == named


def test_a_cycle_is_refused():
    nodes = [
        helper.make_node("Add", ["x", "b"], ["a"], name="first"),
        helper.make_node("Neg", ["a"], ["b"], name="back"),
    ]
    graph = helper.make_graph(nodes, "round", [info("x", 1, [2])], [info("b", 1, [2])])
    with pytest.raises(InputError, match="'first' reads what is made of its own output"):
        Model.from_proto(helper.make_model(graph))
