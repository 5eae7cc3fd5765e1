"""Check the native oracle against itself: nothing cut, everything permuted, one dimension cut, a smaller config."""

from functools import partial

import numpy as np
import pytest
import torch
import zoo

QUICK = ("gpt2", "llama", "bert", "vit")
FAMILIES = tuple(name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in zoo.FAMILIES)


def outputs(model, inputs) -> dict[str, np.ndarray]:
    with torch.no_grad():
        return [tensor.numpy() for tensor in model(*map(torch.from_numpy, inputs.values()))]


def relative(got, want) -> float:
    assert [array.shape for array in got] == [array.shape for array in want]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_keeping_everything_changes_nothing(name):
    inputs = zoo.feeds(name, padded=True)
    assert relative(outputs(zoo.native(name), inputs), outputs(zoo.family(name).build(), inputs)) < 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_a_permutation_of_every_dimension_changes_nothing(name):
    inputs = zoo.feeds(name, padded=True)
    keep = {
        dimension: zoo.choose(name, dimension, size, ordered=False)
        for dimension, size in zoo.dimensions(name).items()
        if not dimension.endswith("vocab")
    }
    want = outputs(zoo.family(name).build(), inputs)
    for position, shape in enumerate(zoo.family(name).outputs.values()):
        for axis, symbol in enumerate(shape):
            if symbol in keep:
                want[position] = want[position].take(keep[symbol], axis)
    assert relative(outputs(zoo.native(name, keep), inputs), want) < 3e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_every_dimension_can_be_cut_alone_and_matters(name):
    inputs = zoo.feeds(name, padded=True)
    want = outputs(zoo.family(name).build(), inputs)
    for dimension, size in zoo.dimensions(name).items():
        if ".blocks." in f".{dimension}" and ".blocks.1." not in f".{dimension}" and "*" not in dimension:
            continue
        keep = {dimension: zoo.choose(name, dimension, max(1, size * 2 // 3))}
        if dimension.endswith("vocab"):
            continue
        got = outputs(zoo.native(name, keep), inputs)
        assert all(np.isfinite(array).all() for array in got)
        same = [a.shape == b.shape for a, b in zip(got, want, strict=True)]
        assert not all(same) or relative(got, want) > 1e-6, dimension


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_and_halves_can_go(name):
    inputs = zoo.feeds(name, padded=True)
    want = outputs(zoo.family(name).build(), inputs)
    for stack in zoo.family(name).layout.stacks:
        total = stack.shared or len(zoo.family(name).build().get_submodule(stack.blocks))
        kept = [number + stack.start for number in range(1, total)]
        others = [
            number
            for other in zoo.family(name).layout.stacks
            if other.start != stack.start and not other.prefix
            for number in range(other.start, other.start + len(zoo.family(name).build().get_submodule(other.blocks)))
        ]
        blocks = {stack.prefix.rstrip("."): kept} if stack.prefix else sorted(kept + others)
        assert relative(outputs(zoo.native(name, blocks=blocks), inputs), want) > 1e-6
        for half in stack.halves:
            if not stack.shared:
                drop = [f"{stack.prefix}blocks.{stack.start}.{half}"]
                assert relative(outputs(zoo.native(name, drop=drop), inputs), want) > 1e-6
        if stack.halves and not stack.shared:
            every = [f"{stack.prefix}blocks.{stack.start}.{half}" for half in stack.halves]
            without = outputs(zoo.native(name, blocks=blocks), inputs)
            assert relative(outputs(zoo.native(name, drop=every), inputs), without) < 1e-6


SMALLER = {
    "gpt2": dict(n_embd=32, n_head=2, n_inner=80, n_layer=3),
    "llama": dict(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=80, num_hidden_layers=3
    ),
    "bert": dict(hidden_size=32, num_attention_heads=2, intermediate_size=80, num_hidden_layers=3),
    "vit": dict(hidden_size=36, num_attention_heads=3, intermediate_size=80, num_hidden_layers=3),
    "opt": dict(hidden_size=32, word_embed_proj_dim=32, num_attention_heads=2, ffn_dim=80, num_hidden_layers=3),
    "gpt_neox": dict(hidden_size=32, num_attention_heads=2, intermediate_size=80, num_hidden_layers=3),
    "falcon": dict(hidden_size=32, num_attention_heads=2, ffn_hidden_size=80, num_hidden_layers=3),
    "phi3": dict(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=80, num_hidden_layers=3
    ),
    "qwen3": dict(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=80, num_hidden_layers=3
    ),
    "mixtral": dict(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=80,
        num_local_experts=5,
        num_hidden_layers=3,
    ),
    "qwen3_moe": dict(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        moe_intermediate_size=40,
        num_experts=5,
        num_hidden_layers=3,
    ),
    "t5": dict(d_model=32, num_heads=2, d_ff=80, num_layers=3, num_decoder_layers=3),
    "roberta": dict(hidden_size=32, num_attention_heads=2, intermediate_size=80, num_hidden_layers=3),
    "distilbert": dict(dim=32, n_heads=2, hidden_dim=80, n_layers=3),
    "albert": dict(hidden_size=32, num_attention_heads=2, intermediate_size=80, num_hidden_layers=3),
    "electra": dict(hidden_size=32, num_attention_heads=2, intermediate_size=80, num_hidden_layers=3),
    "deberta_v2": dict(hidden_size=32, num_attention_heads=2, intermediate_size=80, num_hidden_layers=3),
    "modernbert": dict(hidden_size=32, num_attention_heads=2, intermediate_size=80, num_hidden_layers=3),
    "deit": dict(hidden_size=36, num_attention_heads=3, intermediate_size=80, num_hidden_layers=3),
    "beit": dict(hidden_size=36, num_attention_heads=3, intermediate_size=80, num_hidden_layers=3),
    "mamba": dict(hidden_size=32, intermediate_size=64, state_size=6, time_step_rank=4, num_hidden_layers=3),
}
COUNTS = {
    "hidden": 32,
    "heads": 2,
    "cross_heads": 2,
    "kv_heads": 2,
    "ffn": 80,
    "experts": 5,
    "head_0": 32,
    "inner": 6,
}
SPECIAL = {
    "vit": {"hidden": 36, "heads": 3},
    "deit": {"hidden": 36, "heads": 3},
    "beit": {"hidden": 36, "heads": 3},
    "qwen3_moe": {"ffn": 40},
    "mamba": {"ffn": 64, "ffn_0": 4},
}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in SMALLER]
)
def test_a_cut_that_a_smaller_config_expresses_equals_its_model(name):
    """Load the cut weights into the class of the smaller config: no attribute of the sliced module was forgotten."""
    given, counts = zoo.family(name), COUNTS | SPECIAL.get(name, {})
    keep = {
        dimension: zoo.choose(name, dimension, counts[dimension.split(".")[-1]])
        for dimension in zoo.dimensions(name)
        if dimension.split(".")[-1] in counts
    }
    chosen = [0, 3, 4] if name == "modernbert" else [0, 2, 3]  # its full and sliding attention alternate
    blocks = {stack.prefix.rstrip("."): chosen for stack in given.layout.stacks}
    cut = zoo.native(name, keep, blocks)
    smaller = type(given)(
        given.name,
        partial(given.make.func, *given.make.args, **(given.make.keywords | SMALLER[name])),
        given.inputs,
        given.outputs,
        given.layout,
        given.extra,
    ).build()
    smaller.load_state_dict(cut.state_dict())
    if name == "t5":
        smaller.model_dim = cut.model_dim  # the logits' scale keeps the parent's value
    inputs = zoo.feeds(name, padded=True)
    assert relative(outputs(smaller, inputs), outputs(cut, inputs)) < 1e-6


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
def test_values_are_cut_apart_from_queries(name):
    inputs = zoo.feeds(name, padded=True)
    parent = outputs(zoo.family(name).build(), inputs)
    size = zoo.family(name).layout.sizes["head_dim"]
    every = outputs(zoo.native(name, {"blocks.2.v_head_dim": range(size)}), inputs)
    some = outputs(zoo.native(name, {"blocks.2.v_head_dim": range(1, size)}), inputs)
    none = outputs(zoo.native(name, {"blocks.2.v_head_dim": []}), inputs)
    assert relative(every, parent) == 0
    assert relative(some, parent) > 1e-6
    assert relative(none, some) > 1e-6
