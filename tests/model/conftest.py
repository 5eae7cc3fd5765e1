"""Small models with all that a file can hold, stored and run."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from graphclone import model
from graphclone.model import Model, load

info = helper.make_tensor_value_info
rng = np.random.default_rng(0)


@pytest.fixture
def normal():
    """Return a function from a shape to normal values, fp32."""

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return draw


@pytest.fixture
def small():
    """Return a function that builds two linear layers, 48 -> 7 -> 5, with all that a file can say around them."""

    def build(seed: int = 0) -> ModelProto:
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

    return build


@pytest.fixture
def linear():
    """Return a function that builds one MatMul of [3, n] with a weight [n, m]."""

    def build(weight: TensorProto, **options) -> ModelProto:
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", weight.name], ["y"], name="matmul")],
            "linear",
            [info("x", TensorProto.FLOAT, [3, None])],
            [info("y", TensorProto.FLOAT, [3, None])],
            [weight],
        )
        return helper.make_model(graph, **{"opset_imports": [helper.make_opsetid("", 17)], "ir_version": 8} | options)

    return build


@pytest.fixture
def run():
    """Return a function from a model and its feeds to its outputs, on one thread."""

    def run_model(source: ModelProto | Path, **feeds: np.ndarray) -> list[np.ndarray]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        content = source.SerializeToString() if isinstance(source, ModelProto) else str(source)
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"]).run(None, feeds)

    return run_model


@pytest.fixture
def contents():
    """Return a function from a folder to the bytes of its files."""

    def read(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    return read


@pytest.fixture
def load_external():
    """Return a function that stores a model with external data, and loads it."""

    def store(folder: Path, proto: ModelProto, **options) -> Model:
        path = folder / "external.onnx"
        onnx.save(proto, path, save_as_external_data=True, location="external.weights", size_threshold=0)
        return load(path, **options)

    return store


@pytest.fixture
def run_script():
    """Return a function that runs Python code in a process of its own, and returns what it prints."""

    def start(script: str, *arguments: Path) -> str:
        command = [sys.executable, "-c", script, *arguments]
        return subprocess.run(
            command, stdout=subprocess.PIPE, text=True, cwd=Path(model.__file__).parents[1], check=True
        ).stdout

    return start


@pytest.fixture(params=["embedded", "external"])
def stored(request, tmp_path, small) -> Path:
    """The small model in a file, with and without external data."""
    path = tmp_path / "in" / "small.onnx"
    path.parent.mkdir()
    onnx.save(
        small(), path, save_as_external_data=request.param == "external", location="small.weights", size_threshold=100
    )
    return path
