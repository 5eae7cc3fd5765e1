"""Hostile names: a graph cannot put code into the source, whatever it calls its tensors."""

import ast

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from graphclone.model import Model
from graphclone.pytorch import to_torch, write_torch
from graphclone.pytorch.safe_names import is_safe, local, safe

HOSTILE = [
    '"; import os; os.environ["PWNED"] = "1"; "',
    "'''\nimport os\nos.environ['PWNED'] = '1'\n'''",
    "__import__('os').environ.__setitem__('PWNED', '1')",
    "class", "self", "forward", "torch", "F", "training", "_parameters", "__class__", "None", "Model",
    "größe", "重み", "a b", "a-b", "a.b", "a_b", ".", "..", "a..b", ".weight", "weight.", "\\", "{0}", "{x}",
    "%s", "\t",
    "0", "00", "1.weight", "x" * 10_000, "\u202e", "load", "fill", "Group", "checkpoint",
    "a.forward.weight", "a.class.bias", "lambda", "print", "exec", "source", "report", "tie_weights",
]  # fmt: skip


def hostile_model() -> onnx.ModelProto:
    """Multiply and shift by a tensor of each name, then project by a matrix of a hostile name; five layers each."""
    random = np.random.default_rng(0)
    nodes, weights, last = [], [], HOSTILE[0] + "in"
    for number, name in enumerate(HOSTILE):
        weights.append(numpy_helper.from_array(random.standard_normal(6).astype(np.float32), name))
        out = f"{name}{HOSTILE[number % 4]}{number}"
        nodes.append(helper.make_node("Add" if number % 2 else "Mul", [last, name], [out], name=name + "node"))
        last = out
    for number in range(3):
        name = f"layers.{number}.{HOSTILE[number]}.weight"
        weights.append(numpy_helper.from_array(random.standard_normal((6, 6)).astype(np.float32), name))
        out = f"out{number}'\"\n"
        nodes.append(helper.make_node("MatMul", [last, name], [out], name=f"{number}\n__import__('os')"))
        last = out
    dims = ['"; batch', 6]
    graph = helper.make_graph(
        nodes, '"""\nimport os\nos.environ["PWNED"] = "1"\n"""',
        [helper.make_tensor_value_info(HOSTILE[0] + "in", TensorProto.FLOAT, dims)],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, dims)],
        weights,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_inputs_may_be_called_like_what_the_source_uses():
    """`quantize` is a helper, and `own` what a loop over blocks reads."""
    names = ["quantize", "own", "causal_mask", "device", "dtype", "block"]
    scale, zero = numpy_helper.from_array(np.float32(0.25), "s"), numpy_helper.from_array(np.uint8(3), "z")
    nodes = [helper.make_node("QuantizeLinear", [names[0], "s", "z"], ["q"])]
    nodes += [helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"])]
    nodes += [helper.make_node("Sum", ["d", *names], ["y"])]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in names]
    graph = helper.make_graph(nodes, "names", info, [helper.make_empty_tensor_value_info("y")], [scale, zero])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    x = np.random.default_rng(0).random((3, 4), np.float32)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    given = to_torch(Model.from_proto(proto))(*[torch.from_numpy(x)] * len(names))
    assert np.allclose(given.numpy(), session.run(None, dict.fromkeys(names, x))[0])


def test_hostile_names_give_valid_source_and_no_execution(monkeypatch, tmp_path):
    monkeypatch.delenv("PWNED", raising=False)
    proto = hostile_model()
    module = to_torch(Model.from_proto(proto))
    write_torch(Model.from_proto(proto), tmp_path / "out")
    ast.parse((tmp_path / "out" / "model.py").read_text())
    x = np.random.default_rng(1).standard_normal((4, 6)).astype(np.float32)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    want = session.run(None, {session.get_inputs()[0].name: x})[0]
    with torch.no_grad():
        have = module(torch.from_numpy(x)).numpy()
    assert np.abs(have - want).max() <= 1e-5 * np.abs(want).max()
    assert len(module.state_dict()) == len(HOSTILE) + 3
    import os

    assert "PWNED" not in os.environ
    called = {
        node.func.id
        for node in ast.walk(ast.parse(module.source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & {"__import__", "exec", "eval", "print"}


@pytest.mark.parametrize("name", HOSTILE)
def test_safe_names_are_identifiers(name):
    for word in (safe(name), local(name, set())):
        assert word.isdigit() or (word.isidentifier() and word.isascii() and len(word) <= 70)
    assert is_safe(safe(name))


def test_names_that_become_equal_stay_apart():
    taken: set[str] = set()
    for name in ("a-b", "a_b", "a b", "a\nb"):
        taken.add(safe(name, taken))
    assert len(taken) == 4
