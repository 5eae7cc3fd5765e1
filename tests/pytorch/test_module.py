"""Converted modules: outputs of onnxruntime, names and gradients of the framework's own module."""

import copy
import functools
import pickle
import re

import numpy as np
import onnxruntime
import pytest
import torch
import zoo
from transformers.models.t5.modeling_t5 import T5LayerNorm

import graphclone
from graphclone.graphs import constants
from graphclone.pytorch import to_torch
from graphclone.verify.running import run
from graphclone.weights import Weight

FAMILIES = ("gpt2", "llama", "bert", "vit")
CASES = [(family, route) for family in FAMILIES for route in ("dynamo18", "dynamo23", "legacy17")]
CASES += [("t5", "dynamo18"), ("whisper", "dynamo18"), ("mixtral", "dynamo18")]


@functools.cache
def model_of(family: str, route: str):
    return graphclone.load(zoo.export(family, route))


def norm_in_full(self: T5LayerNorm, states: torch.Tensor) -> torch.Tensor:
    """Do what the framework's norm does, which takes the variance in float32 even of float64."""
    return self.weight * (states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def tensors(feeds: dict[str, np.ndarray], names: list[str]) -> list[torch.Tensor]:
    return [torch.from_numpy(feeds[name]) for name in names]


def expected(family: str, route: str, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(zoo.export(family, route), options, providers=["CPUExecutionProvider"])
    return session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})


@pytest.mark.parametrize(("family", "route"), CASES)
def test_outputs_are_those_of_onnxruntime_at_other_sizes(family, route):
    module = to_torch(model_of(family, route))
    names = [value.name for value in model_of(family, route).inputs]
    batch = 1 if (family, route) == ("llama", "dynamo23") else 3  # onnxruntime's RotaryEmbedding refuses more
    feeds = zoo.feeds(family, batch, 9, padded=batch > 1)
    with torch.no_grad():
        given = module(*tensors(feeds, names))
    for want, have in zip(expected(family, route, feeds), given if isinstance(given, tuple) else (given,), strict=True):
        assert np.abs(have.numpy() - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize(("family", "route"), CASES)
def test_state_dict_is_the_frameworks_own(family, route):
    module, native = to_torch(model_of(family, route)), zoo.family(family).build()
    assert {name for name, _ in module.named_parameters()} == {name for name, _ in native.named_parameters()}
    module, native = module.state_dict(), native.state_dict()
    assert set(module) == set(native)
    for name, value in native.items():
        assert torch.equal(module[name], value), name


@pytest.mark.parametrize(("family", "route"), [case for case in CASES if case[1] != "dynamo23"])
def test_gradients_are_the_frameworks_own(family, route, monkeypatch):
    monkeypatch.setattr(T5LayerNorm, "forward", norm_in_full)
    module = to_torch(model_of(family, route)).double()
    native = zoo.family(family).build().double()
    names = [value.name for value in model_of(family, route).inputs]
    feeds = {
        name: array.astype(np.float64) if array.dtype == np.float32 else array
        for name, array in zoo.feeds(family, 3, 9, padded=True).items()
    }
    for each, arguments in ((module, tensors(feeds, names)), (native, tensors(feeds, list(feeds)))):
        outputs = each(*arguments)
        generator = torch.Generator().manual_seed(0)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outputs).backward()
    have = dict(module.named_parameters(remove_duplicate=False))
    largest: dict[str, float] = {}
    wanted = {name: each.grad for name, each in native.named_parameters() if each.grad is not None}
    for name, gradient in wanted.items():
        block = re.sub(r"(\.\d+)\..*", r"\1", name)
        largest[block] = max(largest.get(block, 0.0), gradient.abs().max().item())
    for name, gradient in wanted.items():
        gap = (have[name].grad - gradient).abs().max().item()
        assert gap <= 1e-6 * largest[re.sub(r"(\.\d+)\..*", r"\1", name)], name


def test_tied_weights_are_one_parameter():
    module = to_torch(model_of("gpt2", "legacy17"))
    assert module.lm_head.weight is module.transformer.wte.weight
    assert len(list(module.parameters())) == len(list(zoo.family("gpt2").build().parameters()))


def test_a_head_that_is_stored_as_the_turned_embedding_trains_as_one_with_it(graph):
    """Some exporters fold the transpose of a tied embedding into a matrix with a name of its own."""
    model = graph("""(int64[B, T] ids) => (float[B, T, 11] y) <float[11, 8] words, float[8, 11] head> {
        x = Gather(words, ids)  h = Tanh(x)  y = MatMul(h, head) }""")
    stored = {each.name: each for each in constants(model.graph)}
    stored["head"]._values = Weight.of(np.ascontiguousarray(stored["words"]._values.load().T))
    module = to_torch(model)
    assert [tuple(each.shape) for each in module.parameters()] == [(11, 8)]
    ids = np.arange(6).reshape(2, 3)
    given = module(torch.from_numpy(ids))
    np.testing.assert_allclose(given.detach().numpy(), run(model, [{"ids": ids}])[0]["y"], rtol=1e-5, atol=1e-6)
    given.square().sum().backward()
    (parameter,) = module.parameters()
    assert (parameter.grad != 0).any(1).all()  # also of words that no id names: by the head


def test_tables_are_no_parameters():
    module = to_torch(model_of("llama", "legacy17"))
    assert [tuple(buffer.shape) for buffer in module.buffers()] == [(5,)]


def test_a_mask_that_is_only_compared_is_no_parameter(graph):
    """nanoGPT's causal mask holds ones and zeros as floats, and is compared with zero."""
    module = to_torch(
        graph("""(float[B, 5, 6] x) => (float[B, 5, 6] y) <float[6, 6] w, float[5, 6] low, float[5, 6] bias,
        float zero = {0}> { h = MatMul(x, w)  m = Equal(bias, zero)  y = Where(m, low, h) }""")
    )
    assert "bias" not in dict(module.named_parameters()) and len(list(module.parameters())) == 2
    assert {name: tuple(each.shape) for name, each in module.named_buffers()} == {"bias": (5, 6)}


@pytest.mark.parametrize(
    ("family", "route"), [("whisper", "dynamo18"), ("whisper", "legacy17"), ("marian", "dynamo18")]
)
def test_sinusoids_take_no_gradient_as_in_the_framework(family, route):
    """A looked up table and an added one; learned positions beside them train."""

    def frozen(module: torch.nn.Module) -> list[torch.Tensor]:
        return [each for each in module.parameters() if not each.requires_grad]

    module = to_torch(model_of(family, route))
    have, want = frozen(module), frozen(zoo.family(family).build())
    assert have and {tuple(each.flatten().tolist()) for each in have} == {tuple(w.flatten().tolist()) for w in want}
    assert len(frozen(pickle.loads(pickle.dumps(module)))) == len(have)


def test_attention_and_activations_are_torch_calls():
    source = to_torch(model_of("gpt2", "dynamo18")).source
    assert "F.scaled_dot_product_attention(q, " in source
    assert "approximate='tanh'" in source and "softmax" not in source and "tanh(" not in source


def test_grouped_queries_stay_grouped():
    for route in ("dynamo18", "legacy17", "dynamo23"):
        assert "enable_gqa=True" in to_torch(model_of("llama", route)).source


@pytest.mark.parametrize(
    ("family", "route"), [("bloom", "dynamo18"), ("bloom", "legacy17"), ("deberta_v2", "legacy17")]
)
def test_merged_heads_and_float_biases_are_attention_too(family, route):
    """ALiBi and disentangled biases are masks; batch and heads that products merge come apart."""
    module, feeds = to_torch(model_of(family, route)), zoo.feeds(family, 3, 9, padded=True)
    assert "F.scaled_dot_product_attention(" in module.source and "softmax" not in module.source
    names = [value.name for value in model_of(family, route).inputs]
    given, want = module(*tensors(feeds, names)), expected(family, route, feeds)[0]
    assert np.abs(given.detach().numpy() - want).max() <= 1e-5 * np.abs(want).max()


def test_copies_pickles_and_state_dicts_round_trip():
    module = to_torch(model_of("llama", "dynamo18"))
    feeds = tensors(zoo.feeds("llama", 2, 5), ["input_ids", "attention_mask"])
    want = module(*feeds)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(*feeds), want)
    assert torch.equal(pickle.loads(pickle.dumps(module))(*feeds), want)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(*feeds), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_and_autocast_run(family):
    module = to_torch(model_of(family, "dynamo18"))
    names = [value.name for value in model_of(family, "dynamo18").inputs]
    feeds = tensors(zoo.feeds(family, 2, 7, padded=True), names)

    def first(outputs):
        return outputs[0] if isinstance(outputs, tuple) else outputs

    want = first(module(*feeds))
    with torch.autocast("cpu", torch.bfloat16):
        assert (first(module(*feeds)) - want).abs().max() <= 0.1 * want.abs().max()
    half = [each.to(torch.bfloat16) if each.is_floating_point() else each for each in feeds]
    given = first(module.to(torch.bfloat16)(*half))
    assert given.dtype == torch.bfloat16 and (given - want).abs().max() <= 0.1 * want.abs().max()


LENGTHS_NAMED_APART = """(int64[B, T] ids, int64[A, S] read, float[C, D] seen) => (float[B, T, 12] y) <
    float[17, 12] table, float[12, 18] q, float[12, 18] k, float[18, 12] o, int64[2] split = {3, 6},
    int64[1] free = {-1}, int64[3] joined = {0, 0, 18},
    int64[2] flat = {-1, 12}, int64[1] zero = {0}, int64[1] one = {1}, int64[2] lead = {1, 2}> {
    x = Gather(table, ids)  e = Gather(table, read)  s = Shape(ids)  b = Slice(s, zero, one)
    to = Concat <axis = 0> (b, free, split)
    a = MatMul(x, q)  c = Reshape(a, to)  d = Transpose <perm = [0, 2, 1, 3]> (c)
    i = Reshape(e, flat)  f = MatMul(i, k)  g = Reshape(f, to)
    h = Transpose <perm = [0, 2, 3, 1]> (g)  l = Transpose <perm = [0, 2, 1, 3]> (g)
    z = Shape(read)  zeros = ConstantOfShape(z)  both = Add(seen, zeros)  w = Unsqueeze(both, lead)
    m = MatMul(d, h)  r = Add(m, w)  p = Softmax(r)  n = MatMul(p, l)
    t = Transpose <perm = [0, 2, 1, 3]> (n)  u = Reshape(t, joined)  v = MatMul(u, o)  y = Add(x, v) }"""


@pytest.mark.parametrize("positions", [6, 9, 13])
def test_a_short_table_of_positions_of_which_the_graph_takes_the_first(graph, positions: int) -> None:
    model = graph(f"""(int64[B, T] ids) => (float[B, T, 8] y) <float[11, 8] table, float[{positions}, 8] places,
        int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}> {{
        x = Gather(table, ids)  shape = Shape(ids)  length = Slice(shape, one, two)
        first = Slice(places, zero, length, zero)  y = Add(x, first) }}""")
    module = to_torch(model)
    for length in (positions, 1):
        ids = np.arange(2 * length).reshape(2, length) % 11
        want = run(model, [{"ids": ids}])[0]["y"]
        np.testing.assert_allclose(module(torch.from_numpy(ids)).detach().numpy(), want, rtol=1e-6)


def test_lengths_that_the_file_names_apart_are_equal_only_where_operators_make_them(graph):
    model = graph(LENGTHS_NAMED_APART)
    module, random = to_torch(model), np.random.default_rng(0)
    feeds = {"read": random.integers(0, 17, (2, 5)), "seen": random.standard_normal((2, 5)).astype(np.float32)}
    feeds["ids"] = random.integers(0, 17, (2, 3))
    (want,) = run(model, [feeds])
    with torch.no_grad():
        have = module(**{name: torch.from_numpy(array) for name, array in feeds.items()})
    assert np.abs(have.numpy() - want["y"]).max() <= 1e-5 * np.abs(want["y"]).max()
