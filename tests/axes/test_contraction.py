"""Convolutions in the layout of blocks of channels that onnxruntime saves for one processor."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto

from graphclone.analysis import analyse
from graphclone.model import load
from graphclone.plan import Plan
from graphclone.surgery import apply
from graphclone.verify import verify
from graphclone.verify.running import difference, run

FEEDS = {"x": np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(np.float32)}


def convnext(channels: int) -> str:
    """Return a network of three blocks of a convolution for each channel, a norm and an FFN."""
    c, last, first = channels, "<perm = [0, 2, 3, 1]> ", "<perm = [0, 3, 1, 2]> "
    weights, lines = [f"float[{c}, 3, 1, 1] stem"], ["x0 = Conv(x, stem)"]
    for i in range(3):
        weights += [f"float[{c}, 1, 3, 3] k{i}", f"float[{c}] g{i}", f"float[{c}] b{i}", f"float[{c}, 20] u{i}"]
        weights += [f"float[20, {c}] d{i}"]
        lines += [
            f"a{i} = Conv <group = {c}, pads = [1, 1, 1, 1]> (x{i}, k{i})",
            f"n{i} = LayerNormalization(t{i}, g{i}, b{i})",
            f"h{i} = MatMul(n{i}, u{i})  r{i} = Relu(h{i})  o{i} = MatMul(r{i}, d{i})",
            f"e{i} = Transpose {first}(o{i})  x{i + 1} = Add(x{i}, e{i})",
        ]
        lines.insert(-3, f"t{i} = Transpose {last}(a{i})")
    lines.append("m = GlobalAveragePool(x3)  y = Flatten(m)")
    return f"(float[B, 3, 6, 6] x) => (float[B, {c}] y) <{', '.join(weights)}> {{ {' '.join(lines)} }}"


def saved_by_onnxruntime(proto: ModelProto, path: Path) -> Path:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath, options.log_severity_level = str(path), 4
    onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return path


@pytest.mark.parametrize("channels", [24, 32])
def test_blocks_are_found_where_channels_are_in_blocks(graph, tmp_path, channels: int) -> None:
    plain = graph(convnext(channels), 17)
    model = load(saved_by_onnxruntime(plain.to_proto(), tmp_path / "all.onnx"))
    assert any(node.domain == "com.microsoft.nchwc" for node in model.graph.nodes)
    assert difference(run(model, [FEEDS])[0], run(plain, [FEEDS])[0]) < 1e-5
    analysis = analyse(model)
    assert analysis.typing.unknown == []
    sizes = {d.name: d.size for d in analysis.dimensions if not d.locked}
    assert [sizes.get(f"blocks.{i}.ffn") for i in range(4)] == [20, 20, 20, None]
    hidden = next(d for d in analysis.dimensions if d.role == "hidden")
    assert (hidden.locked is None) == (channels == 32)
    assert verify(model, analysis=analysis).ok
    plan = Plan(blocks={"": (0, 2)}, keep={"blocks.2.ffn": tuple(range(3, 17))})
    assert difference(run(apply(model, plan), [FEEDS])[0], run(apply(plain, plan), [FEEDS])[0]) < 1e-5


POOLED = """(float[B, 3, 6, 6] x) => (float[B, 32, 1, 1] y)
    <float[48, 3, 1, 1] a, float[48, 48, 3, 3] b, float[32, 48, 1, 1] c>
    { p = Conv(x, a)  q = Conv <pads = [1, 1, 1, 1]> (p, b)  s = Add(q, p)  m = MaxPool <kernel_shape = [2, 2]> (s)
      t = Conv(m, c)  y = GlobalAveragePool(t) }"""


def test_sums_and_pools_are_known_where_channels_are_in_blocks(graph, tmp_path) -> None:
    model = load(saved_by_onnxruntime(graph(POOLED, 17).to_proto(), tmp_path / "all.onnx"))
    assert {"MaxPool", "GlobalAveragePool"} <= {n.op for n in model.graph.nodes if n.domain == "com.microsoft.nchwc"}
    assert any(len(node.inputs) > 3 for node in model.graph.nodes if node.op == "Conv")
    analysis = analyse(model)
    assert analysis.typing.unknown == [] and verify(model, analysis=analysis).ok
