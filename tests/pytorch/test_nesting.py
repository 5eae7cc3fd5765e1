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
