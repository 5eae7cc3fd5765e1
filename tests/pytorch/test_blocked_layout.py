"""Blocked layout: what onnxruntime saves for one processor becomes the framework's weights again."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import zoo
from onnx import TensorProto, helper, numpy_helper

import graphclone
from graphclone.errors import InputError
from graphclone.model import Model
from graphclone.pytorch import blocked_layout, to_torch


def optimised(nodes, shape, weights, path) -> onnx.ModelProto:
    """Return what onnxruntime makes of a graph from x to y at the level all."""
    graph = helper.make_graph(
        nodes,
        "images",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath, options.log_severity_level = str(path), 4
    onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(path)


def node(kind, inputs, output, **attributes):
    return helper.make_node(kind, inputs, [output], **attributes)


PAD = {"pads": [1, 1, 1, 1]}
CASES = {
    "few channels, then each alone, then all": (
        [node("Conv", ["x", "a"], "p", **PAD), node("Conv", ["p", "b"], "q", group=20, **PAD),
         node("Conv", ["q", "c", "bias"], "r"), node("Relu", ["r"], "y")],
        {"a": (20, 3, 3, 3), "b": (20, 1, 3, 3), "c": (36, 20, 1, 1), "bias": (36,)},
    ),
    "read twice, a sum, and pools": (
        [node("Conv", ["x", "a"], "p", **PAD), node("Conv", ["p", "b"], "q", **PAD), node("Add", ["q", "p"], "s"),
         node("MaxPool", ["s"], "m", kernel_shape=[2, 2]), node("GlobalAveragePool", ["m"], "y")],
        {"a": (20, 3, 3, 3), "b": (20, 20, 3, 3)},
    ),
    "groups of whole blocks": (
        [node("Conv", ["x", "a"], "p"), node("Conv", ["p", "b"], "y", group=2)],
        {"a": (32, 3, 1, 1), "b": (32, 16, 3, 3)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_blocks_are_undone(name, tmp_path):
    """onnxruntime judges outputs; weights have their own values and shapes, but for those that are read with others."""
    random = np.random.default_rng(0)
    nodes, shapes = CASES[name]
    weights = {key: random.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    proto = optimised(nodes, ["n", 3, 8, 8], weights, tmp_path / "all.onnx")
    assert any(each.domain == "com.microsoft.nchwc" for each in proto.graph.node)
    module, x = to_torch(Model.from_proto(proto)), random.standard_normal((2, 3, 8, 8)).astype(np.float32)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (want,) = session.run(None, {"x": x})
    have = module(torch.from_numpy(x)).detach().numpy()
    assert have.shape == want.shape and np.abs(have - want).max() <= 1e-5 * np.abs(want).max()
    stored = [each.detach().numpy() for each in module.state_dict().values()]
    for key, weight in weights.items() if name != "read twice, a sum, and pools" else ():
        assert any(each.shape == weight.shape and (each == weight).all() for each in stored), key


def test_names_and_shapes_are_the_frameworks():
    module, native = to_torch(graphclone.load(zoo.export("convnext", "ort_all"))), zoo.family("convnext").build()
    wanted = native.state_dict()
    assert {name: value.shape for name, value in module.state_dict().items()} == {k: v.shape for k, v in wanted.items()}


def test_blocks_of_another_processor_are_an_error(tmp_path, monkeypatch):
    nodes, shapes = CASES["groups of whole blocks"]
    weights = {key: np.ones(shape, np.float32) for key, shape in shapes.items()}
    proto = optimised(nodes, ["n", 3, 8, 8], weights, tmp_path / "all.onnx")
    monkeypatch.setattr(blocked_layout, "block_size", lambda: 24)
    with pytest.raises(InputError, match="is of a processor with other blocks than 24"):
        to_torch(Model.from_proto(proto))
