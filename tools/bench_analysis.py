"""Time the analysis of large graphs: a Llama export of 10,000 nodes, one of 50,000, an unrolled scan of 2,048 gathers.

    python tools/bench_analysis.py            10,000 nodes and the scan
    python tools/bench_analysis.py --large    50,000 nodes too (the export takes minutes)

Prints CPU seconds of this process, the median of five, since wall seconds on shared cores measure the neighbours.
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from graphclone.analysis import analyse
from graphclone.model import Model, load

NODES_PER_LAYER = 252


def llama(layers: int, folder: Path) -> Path:
    """Export a tiny Llama of many layers as the older exporter does, with all its shape arithmetic."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=48, num_attention_heads=6, num_key_value_heads=3, head_dim=10, intermediate_size=112,
        num_hidden_layers=layers, vocab_size=211, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    inner = LlamaForCausalLM(config).eval()

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids, attention_mask):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    ids = torch.ones(2, 7, dtype=torch.long)
    names, path = ["input_ids", "attention_mask"], folder / f"llama{layers}.onnx"
    axes = {name: {0: "batch", 1: "sequence"} for name in (*names, "logits")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Logits(), (ids, torch.ones_like(ids)), path, dynamo=False, opset_version=17,
            input_names=names, output_names=["logits"], dynamic_axes=axes,
        )  # fmt: skip
    return path


def scan(length: int, width: int = 48) -> onnx.ModelProto:
    """Return a graph that picks each position of a static axis by a constant Gather, and adds them up."""
    nodes, initializers, total = [], [], "start"
    weight = np.random.default_rng(0).normal(size=(width, width)).astype(np.float32)
    initializers.append(numpy_helper.from_array(weight, "weight"))
    nodes.append(helper.make_node("MatMul", ["x", "weight"], ["y"]))
    initializers.append(numpy_helper.from_array(np.zeros((1, width), np.float32), "start"))
    for i in range(length):
        initializers.append(numpy_helper.from_array(np.array(i), f"i{i}"))
        nodes.append(helper.make_node("Gather", ["y", f"i{i}"], [f"g{i}"], axis=1))
        nodes.append(helper.make_node("Add", [total, f"g{i}"], [f"t{i}"]))
        total = f"t{i}"
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", length, width])]
    outputs = [helper.make_tensor_value_info(total, TensorProto.FLOAT, ["batch", width])]
    graph = helper.make_graph(nodes, "scan", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def seconds(model: Model) -> float:
    """Return the median CPU seconds of five analyses."""
    times = []
    for _ in range(5):
        start = time.process_time()
        analyse(model)
        times.append(time.process_time() - start)
    return median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="also 50,000 nodes")
    large = parser.parse_args().large
    with tempfile.TemporaryDirectory() as folder:
        for target in (10_000, 50_000) if large else (10_000,):
            path = llama(round(target / NODES_PER_LAYER), Path(folder))
            count = len(onnx.load(path).graph.node)
            print(f"Llama, {count} nodes: {seconds(load(path)):.2f} s")
    proto = scan(2048)
    print(f"unrolled scan, {len(proto.graph.node)} nodes: {seconds(Model.from_proto(proto)):.2f} s")


if __name__ == "__main__":
    main()
