"""Tensors that differ from the graph's weights: outside of it, folded into others, fused or split."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zoo
from safetensors.numpy import load_file, save_file

from graphclone.axes.axis import Axis
from graphclone.checkpoint import write_checkpoint
from graphclone.checkpoint.folded import find_folded
from graphclone.checkpoint.matching import Match, Part
from graphclone.checkpoint.outside import Outside
from graphclone.dimensions import Dimension
from graphclone.errors import CutError
from graphclone.model import load
from graphclone.weights import Weight


def test_tensors_outside_the_graph_are_cut_by_their_sizes(pretrained, tmp_path, planned):
    folder = shutil.copytree(pretrained("bert"), tmp_path / "more")
    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(0)
    tensors |= {"classifier.weight": rng.random((5, 48), np.float32), "classifier.bias": rng.random(5, np.float32)}
    save_file(tensors, folder / "model.safetensors")
    parent = load(zoo.export("bert", "legacy17"))
    plan = planned("bert", parent)
    report = write_checkpoint(parent, plan, folder, tmp_path / "small", check=False)
    small = load_file(tmp_path / "small" / "model.safetensors")
    assert report.typed == ["classifier.weight"] and report.kept == ["classifier.bias"]
    assert np.array_equal(small["classifier.weight"], tensors["classifier.weight"][:, list(plan.keep["hidden"])])
    assert sorted({name.split(".")[2] for name in small if name.startswith("encoder.layer")}) == ["0", "1", "2"]


def test_a_batch_norm_of_no_mean_is_found_beside_its_bias():
    rng = np.random.default_rng(0)
    weight, gain, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 3, 2, 2), (4,), (4,)))
    norm = {"bn.weight": gain, "bn.bias": bias, "bn.running_mean": 0 * bias, "bn.running_var": np.ones(4, np.float32)}
    tensors = {name: Weight.of(array) for name, array in {"conv.weight": weight, **norm}.items()}
    folded = weight * gain.reshape(4, 1, 1, 1) / np.float32(np.sqrt(1 + 1e-5))
    stored = {"w": Weight.of(folded), "b": tensors["bn.bias"]}
    missing = [name for name in tensors if name != "bn.bias"]
    found = {tensor: name for tensor, name, _ in find_folded(tensors, missing, stored, ["w"])}
    assert found == dict.fromkeys(missing, "w")


def test_two_widths_of_one_size_are_not_mistaken_for_each_other():
    """A tensor outside of the graph, as wide as two towers of which each keeps other indices."""
    axes = [Axis((4, 4)) for _ in range(2)]
    dimensions = [Dimension(f"{side}.hidden", 4, "hidden", (axis,)) for side, axis in zip("ab", axes, strict=True)]
    cut = SimpleNamespace(picks=lambda axis: np.array([0, 1]) if axis is axes[0] else np.array([2, 3]))
    outside = Outside(SimpleNamespace(dimensions=dimensions), cut, {})
    with pytest.raises(CutError, match="could be cut in 2 ways"):
        outside.cut("projection.weight", Weight.of(np.zeros((3, 4), np.float32)))


def test_a_bias_beside_an_uncut_weight_stays_whole():
    rows, columns = Axis((4, 4)), Axis((4, 4))
    uses = {"a.weight": SimpleNamespace(axes=(rows, Axis((3, 3)))), "b": SimpleNamespace(axes=(columns,))}
    matches = {name: Match(name, (Part(name, use),)) for name, use in uses.items()}
    cut = SimpleNamespace(picks=lambda axis: np.array([0, 1]) if axis is columns else None)
    outside = Outside(SimpleNamespace(dimensions=()), cut, matches)
    assert outside.cut("a.bias", Weight.of(np.zeros(4, np.float32))).shape == (4,)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_tensor_of_the_shape_of_the_one_beside_it_is_cut_like_it(swapped):
    """I-BERT keeps a `weight_integer` beside each weight, of as many rows as columns."""
    outs, ins = Axis((4, 4)), Axis((4, 4))
    axes = (ins, outs) if swapped else (outs, ins)
    match = Match("a.weight", (Part("w", SimpleNamespace(axes=axes), swapped),))
    cut = SimpleNamespace(picks=lambda axis: np.array([0, 2, 3]) if axis is outs else np.array([1, 3]))
    outside = Outside(SimpleNamespace(dimensions=()), cut, {"a.weight": match})
    values = np.arange(16, dtype=np.float32).reshape(4, 4)
    small = outside.cut("a.weight_integer", Weight.of(values))
    assert np.array_equal(small.load(), values[[0, 2, 3]][:, [1, 3]])
    with pytest.raises(CutError, match="could be cut in 2 ways"):
        outside.cut("b.weight_integer", Weight.of(values))


@pytest.fixture
def cut_file(planned):
    """Return a function that applies the usual plan to tensors in a lone file."""

    def cut(name: str, tensors: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / "parent.safetensors")
        parent = load(zoo.export(name, "legacy17"))
        write_checkpoint(parent, planned(name, parent), folder / "parent.safetensors", folder / "small")
        return load_file(folder / "small" / "parent.safetensors")

    return cut


def test_projections_that_the_graph_splits_stay_fused(pretrained, tmp_path, cut_file):
    tensors = load_file(pretrained("llama") / "model.safetensors")
    (tmp_path / "plain").mkdir()
    plain = cut_file("llama", tensors, tmp_path / "plain")
    parts = [f"model.layers.3.self_attn.{part}_proj.weight" for part in "qkv"]
    fused = tensors | {"model.layers.3.self_attn.qkv.weight": np.concatenate([tensors[part] for part in parts])}
    small = cut_file("llama", {name: value for name, value in fused.items() if name not in parts}, tmp_path)
    wanted = np.concatenate([plain[part.replace("3", "1")] for part in parts])
    assert np.array_equal(small["model.layers.1.self_attn.qkv.weight"], wanted)


def test_projections_that_the_graph_fuses_stay_split(pretrained, tmp_path, cut_file):
    tensors = load_file(pretrained("gpt2") / "model.safetensors")
    (tmp_path / "plain").mkdir()
    plain = cut_file("gpt2", tensors, tmp_path / "plain")
    whole, bias = (tensors.pop(f"transformer.h.3.attn.c_attn.{leaf}") for leaf in ("weight", "bias"))
    for part, columns, entries in zip("qkv", np.split(whole, 3, axis=1), np.split(bias, 3), strict=True):
        tensors |= {f"transformer.h.3.attn.{part}.weight": columns.T, f"transformer.h.3.attn.{part}.bias": entries}
    small = cut_file("gpt2", tensors, tmp_path)
    whole, bias = (plain[f"transformer.h.1.attn.c_attn.{leaf}"] for leaf in ("weight", "bias"))
    for part, columns, entries in zip("qkv", np.split(whole, 3, axis=1), np.split(bias, 3), strict=True):
        assert np.array_equal(small[f"transformer.h.1.attn.{part}.weight"], columns.T), part
        assert np.array_equal(small[f"transformer.h.1.attn.{part}.bias"], entries), part
