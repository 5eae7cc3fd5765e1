"""Check that sessions compute what the model says, whatever its weights look like, and leave no trace."""

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphclone.calibration import session
from graphclone.calibration.session import open_session, resolve_provider
from graphclone.errors import InputError
from graphclone.model import Model, load


@pytest.fixture
def typed():
    """Return a model that casts weights of many types to float, inside a subgraph and out of it, and the weights."""
    random = np.random.default_rng(0)
    kinds = (np.float32, np.float16, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int8)
    weights = {np.dtype(kind).name: (10 * random.normal(size=(7, 300))).astype(kind) for kind in kinds}
    weights["small"] = np.arange(5, dtype=np.float32)
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    inner = numpy_helper.from_array(weights["float32"] + 1, "inner")
    output = helper.make_tensor_value_info("made", TensorProto.FLOAT, [7, 300])
    branch = helper.make_graph([helper.make_node("Neg", ["inner"], ["made"])], "branch", [], [output], [inner])
    nodes = [helper.make_node("Cast", [name], [f"{name}_out"], to=TensorProto.FLOAT) for name in weights]
    nodes.append(helper.make_node("If", ["yes"], ["chosen"], then_branch=branch, else_branch=branch))
    outputs = [helper.make_empty_tensor_value_info(node.output[0]) for node in nodes]
    yes = helper.make_tensor_value_info("yes", TensorProto.BOOL, [])
    graph = helper.make_graph(nodes, "typed", [yes], outputs, initializers)
    proto = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    return Model.from_proto(proto), weights


def test_weights_of_every_type(typed):
    model, weights = typed
    *results, chosen = open_session(model).run(None, {"yes": np.array(True)})
    for value, result in zip(weights.values(), results, strict=True):
        assert np.array_equal(value.astype(np.float32), result)
    assert np.array_equal(chosen, -(weights["float32"] + 1))


def test_sliced_weights_and_weights_on_disk(graph, tmp_path):
    model = graph("(float[B, 40] x) => (float[B, 50] y) <float[40, 50] w> { y = MatMul(x, w) }")
    x = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)
    (want,) = open_session(model).run(None, {"x": x})
    model.external = True
    model.save(tmp_path / "m.onnx")
    before = sorted(path.name for path in tmp_path.iterdir())
    loaded = load(tmp_path / "m.onnx")
    assert np.array_equal(open_session(loaded, threads=1).run(None, {"x": x})[0], want)
    node = loaded.graph.nodes[0]
    node.inputs[1]._values = loaded.weights["w"].take(1, [3, 1, 44])
    node.outputs[0].shape = ["B", 3]
    assert np.allclose(open_session(loaded).run(None, {"x": x})[0], want[:, [3, 1, 44]], rtol=1e-5, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_outputs_are_added_after_the_graphs_own(attention):
    model = attention()
    opened = open_session(model, outputs=["x1", "logits", "ids"])
    assert [output.name for output in opened.get_outputs()] == ["logits", "x1", "ids"]
    assert len(model.outputs) == 1


@pytest.mark.parametrize("optimize", ["all", "basic", "none"])
@pytest.mark.parametrize("mem_reuse", [True, False])
def test_options(attention, samples, optimize, mem_reuse):
    (want,) = open_session(attention()).run(None, samples)
    (got,) = open_session(attention(), optimize=optimize, mem_reuse=mem_reuse, threads=1).run(None, samples)
    assert np.allclose(got, want, rtol=1e-4, atol=1e-5)


def test_tensors_that_are_not_there(attention):
    with pytest.raises(InputError, match="cannot read 'nowhere': the graph has no such tensor"):
        open_session(attention(), outputs=["nowhere"])


def test_models_that_onnxruntime_cannot_run(graph):
    model = graph("(float[B, 4] x) => (float[B, 4] y) { y = com.microsoft.NoSuchOperator(x) }")
    with pytest.raises(InputError, match=r"onnxruntime cannot run the model: .*NoSuchOperator"):
        open_session(model)


def test_providers(monkeypatch):
    assert resolve_provider("cpu") == "cpu"
    with pytest.raises(InputError, match="no provider is called 'gpu'; write auto, cuda or cpu"):
        resolve_provider("gpu")
    resolve_provider.cache_clear()
    monkeypatch.setattr(session, "_cuda_works", lambda: False)
    assert resolve_provider("auto") == "cpu"
    with pytest.raises(InputError, match="CUDA was asked for, but onnxruntime cannot use it here"):
        resolve_provider("cuda")
    monkeypatch.setattr(session, "_cuda_works", lambda: True)
    resolve_provider.cache_clear()
    assert (resolve_provider("auto"), resolve_provider("cuda")) == ("cuda", "cuda")
    resolve_provider.cache_clear()


def test_looking_for_cuda_is_silent(capfd):
    resolve_provider.cache_clear()
    assert resolve_provider("auto") in ("cpu", "cuda")
    assert capfd.readouterr() == ("", "")
