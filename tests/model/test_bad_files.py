"""Files that are no models, or damaged ones, end in an error that says what to do."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from graphclone.errors import GraphcloneError, InputError
from graphclone.model import Model, load

info = helper.make_tensor_value_info


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


def test_paths_that_are_no_files(tmp_path, small):
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


def test_truncated_files(tmp_path, small):
    data = small().SerializeToString()
    path = tmp_path / "cut.onnx"
    for length in range(1, len(data), 97):
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match=r"damaged or truncated|not an ONNX model"):
            load(path)


def test_damaged_files_never_end_in_a_traceback(tmp_path, small):
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
def test_opsets_before_9_or_none(opsets, normal, linear):
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


def test_graphs_that_are_not_well_formed(normal, linear):
    for inputs, message in ((["x", "nowhere"], "reads 'nowhere', which nothing defines"), (["x", "w"], "define 'y'")):
        proto = linear(numpy_helper.from_array(normal(48, 7), "w"))
        proto.graph.node.append(helper.make_node("MatMul", inputs, ["y"], name="second"))
        if inputs[1] != "w":
            proto.graph.node[1].output[0] = "z"
        with pytest.raises(InputError, match=message):
            Model.from_proto(proto)


def test_a_cycle_is_refused():
    nodes = [
        helper.make_node("Add", ["x", "b"], ["a"], name="first"),
        helper.make_node("Neg", ["a"], ["b"], name="back"),
    ]
    graph = helper.make_graph(nodes, "round", [info("x", 1, [2])], [info("b", 1, [2])])
    with pytest.raises(InputError, match="'first' reads what is made of its own output"):
        Model.from_proto(helper.make_model(graph))


def test_raw_data_of_the_wrong_length(tmp_path, normal, linear):
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


@pytest.fixture
def outside(tmp_path, linear):
    """Return a function that stores a linear model in a folder, whose weight [48, 7] names external data."""

    def store(**entries: object) -> Path:
        weight = TensorProto(name="w", dims=[48, 7], data_type=1, data_location=TensorProto.EXTERNAL)
        for key, value in entries.items():
            weight.external_data.add(key=key, value=str(value))
        path = tmp_path / "model" / "model.onnx"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(linear(weight).SerializeToString())
        return path

    return store


def test_external_data_is_checked(tmp_path, outside, normal):
    (tmp_path / "secret").write_bytes(bytes(1344))
    path = outside(location="w.data")
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
            load(outside(**entries))


def test_links_end_in_the_folder_of_the_resolved_model(tmp_path, outside, normal):
    path = outside(location="model.onnx_data")
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
