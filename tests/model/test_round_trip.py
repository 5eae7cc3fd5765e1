"""What a file said survives load, copy and save, bit by bit and in little memory."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
from onnx import ModelProto, TensorProto, helper, numpy_helper

from graphclone import model
from graphclone.model import Model, load
from graphclone.weights import Weight

info = helper.make_tensor_value_info


def bits_of(proto: ModelProto) -> dict[str, bytes]:
    return {item.name: numpy_helper.to_array(item).tobytes() for item in proto.graph.initializer}


def test_identity_keeps_everything_the_file_said(stored, tmp_path, normal, run):
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


def test_saving_twice_gives_identical_bytes(stored, tmp_path, contents):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        load(stored).copy().save(tmp_path / folder / "out.onnx")
    load(tmp_path / "a" / "out.onnx").save(tmp_path / "in" / "out.onnx")
    again = {name: data for name, data in contents(tmp_path / "in").items() if name.startswith("out")}
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == again


def test_small_values_stay_in_the_proto(tmp_path, small, load_external):
    source = load_external(tmp_path, small())
    source.save(tmp_path / "out.onnx")
    proto = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    outside = [item.name for item in proto.graph.initializer if item.data_location == TensorProto.EXTERNAL]
    assert outside == ["layer.0.weight"]


def test_big_models_get_a_data_file(tmp_path, monkeypatch, small, contents):
    monkeypatch.setattr(model, "EMBEDDED_LIMIT", 1400)
    Model.from_proto(small()).save(tmp_path / "out.onnx")
    assert sorted(contents(tmp_path)) == ["out.onnx", "out.onnx.data"]
    assert bits_of(onnx.load(tmp_path / "out.onnx"))["layer.0.weight"] == bits_of(small())["layer.0.weight"]


def test_attributes_survive():
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


def test_fingerprint_is_of_the_content_not_of_the_file(tmp_path, small, load_external):
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


def test_proto_in_memory_with_and_without_data(stored, normal, small, run):
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


def test_graphsurgeon_itself_can_export_a_loaded_graph(stored, normal, run):
    x = normal(3, 48)
    exported = gs.export_onnx(load(stored).graph.cleanup().toposort())
    assert np.array_equal(run(exported, x=x)[0], run(stored, x=x)[0])


def test_a_file_may_hold_its_graph_in_parts(tmp_path, small):
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


def test_memory_stays_small(tmp_path, linear, run_script):
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
