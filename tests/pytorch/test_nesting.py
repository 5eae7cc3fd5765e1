"""Nesting: models of exporters that keep no module names have a module for each block."""

import importlib.util
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import graphclone
from graphclone.pytorch import to_torch, write_torch
from graphclone.pytorch.nesting import align

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


@pytest.mark.parametrize("row", ["jax/nnx_decoder", "jax2tf/encoder", "tf/gpt2", "paddle/vit", "keras_jax/decoder"])
def test_blocks_are_modules_of_one_class_in_a_loop(row, tmp_path):
    model = graphclone.load(FIXTURES / f"{row}.onnx")
    module, again = to_torch(model), to_torch(model, checkpoint_blocks=True)
    blocks = list(module.blocks)
    assert len(blocks) > 1 and len({type(block) for block in blocks}) == 1
    assert "sqrt(" not in module.source and module.source.count("F.layer_norm(") == 3
    assert "for block in self.blocks:" in module.source and "checkpoint(block," in again.source
    held = [name for name, _ in (*module.named_parameters(), *module.named_buffers()) if name.startswith("blocks.")]
    assert len(held) == len(module.report["moved"])
    session = onnxruntime.InferenceSession(FIXTURES / f"{row}.onnx")
    with np.load(FIXTURES / f"{row}.npz") as stored:
        feeds = {name.removeprefix("input:"): stored[name] for name in stored if name.startswith("input:")}
    given = [torch.from_numpy(feeds[tensor.name]) for tensor in model.inputs]
    want = session.run(None, {each.name: feeds[each.name] for each in session.get_inputs()})[0]
    assert np.abs(module(*given).detach().numpy() - want).max() <= 1e-5 * np.abs(want).max()
    again(*given).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in again.parameters())
    spec = importlib.util.spec_from_file_location("standalone", write_torch(model, tmp_path) / "model.py")
    source = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source)
    assert torch.equal(source.load()(*given), module(*given))


@pytest.mark.parametrize(
    ("names", "aligned"),
    [
        ([["layer_0/q", "layer_0/k"], ["layer_1/q", "layer_1/k"]], ["layer_q", "layer_k"]),
        ([["linear_4.w_0", "linear_5.w_0"], ["linear_6.w_0", "linear_7.w_0"]], ["linear_0.w_0", "linear_1.w_0"]),
        ([["const_3", "const_11"], ["const_19", "const_20"]], ["const_0", "const_1"]),
        ([["a", "b"], ["c", "d"]], ["a", "b"]),
        ([['w"; import os #1'], ['w"; import os #2']], ["w_import_os"]),
    ],
)
def test_names_keep_all_but_the_numbers_that_tell_blocks_apart(names, aligned):
    assert align(names) == [aligned, aligned]


class Feeding(torch.nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.up, self.down = torch.nn.Linear(width, hidden), torch.nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


@pytest.mark.parametrize("names", [("0", "2", "5"), ("0", "1", "last")])
def test_blocks_may_be_numbered_with_gaps_and_stand_beside_named_modules(names, tmp_path):
    torch.manual_seed(0)
    layers = torch.nn.ModuleDict({name: torch.nn.LayerNorm(8) if name == "last" else Feeding(8, 12) for name in names})
    holder = torch.nn.Module()
    holder.layers = layers
    holder.forward = lambda x: [x := layer(x) for layer in layers.values()][-1]
    x = torch.randn(3, 5, 8)
    torch.onnx.export(holder, (x,), str(tmp_path / "gaps.onnx"), dynamo=True, verbose=False)
    module = to_torch(graphclone.load(tmp_path / "gaps.onnx"))
    assert module.state_dict().keys() == holder.state_dict().keys()
    assert len({type(module.get_submodule(f"layers.{name}")) for name in names if name.isdigit()}) == 1
    assert torch.allclose(module(x), holder(x), rtol=1e-5, atol=1e-6)
