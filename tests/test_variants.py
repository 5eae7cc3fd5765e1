"""Exports that other tools rounded, simplified or fused: the oracles and the framework's own smaller model judge each.

Few rows run each time, the others with --long; `tools/coverage` judges all of them, and more families.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import importlib.util  # noqa: E402

import survey  # noqa: E402
import survey_torch  # noqa: E402
import zoo  # noqa: E402
from zoo.native import cut_model  # noqa: E402
from zoo.rounded import places  # noqa: E402
from zoo.variants import VARIANTS  # noqa: E402

from graphclone.analysis import analyse  # noqa: E402
from graphclone.errors import CutError  # noqa: E402
from graphclone.model import load  # noqa: E402
from graphclone.plan import Plan  # noqa: E402
from graphclone.pytorch import to_torch  # noqa: E402
from graphclone.surgery import apply  # noqa: E402
from graphclone.verify import verify  # noqa: E402
from graphclone.verify.rounding import rounds, unrounded  # noqa: E402
from graphclone.verify.running import difference, run  # noqa: E402

QUICK = (
    ("gpt2", "fp16"), ("bert", "qdq_channel"), ("llama", "dynamic8"), ("llama", "int4"), ("vit", "ort_all"),
    ("bert", "eager_mha"),
)  # fmt: skip
FAMILIES = ("gpt2", "llama", "bert", "vit")

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("family", "route"),
    [*QUICK]
    + [
        pytest.param(family, route, marks=pytest.mark.long)
        for route in VARIANTS
        for family in FAMILIES
        if (family, route) not in QUICK
    ],
)
def test_a_variant_is_cut_like_the_framework_itself(family, route):
    if VARIANTS[route].needs and importlib.util.find_spec(VARIANTS[route].needs) is None:
        pytest.skip(f"{VARIANTS[route].needs} is not installed")
    found = survey.judge(f"{family}:{route}")
    if "unmade" in found:
        assert (family, route) not in QUICK, found["unmade"]
        pytest.skip(found["unmade"])
    assert "stopped" not in found
    assert found["unknown"] == []
    assert found["verify"]["ok"], found["verify"]["failed"]
    assert found["native"]["bad"] == {} and found["native"]["held"] >= 2
    assert found["blocks"]["bad"] == {} and found["blocks"]["held"] >= 4
    assert found["torch"]["bad"] == [] and found["torch"]["worst"] <= 1e-5


def test_a_file_far_from_its_model_is_the_tools_not_ours():
    """The lesser of two distances counts: what only leaving the rounding out sets apart is a mistake of ours."""
    assert "0.7 off" in survey.broken(own=0.85, written=0.74)
    assert survey.broken(own=1.5, written=0.1) == survey.broken(own=1e-6, written=0.74) == ""


def test_a_child_may_be_as_far_as_what_its_file_rounds_sets_apart():
    assert survey.tolerance_of("bf16", 1e-6) == survey.tolerance_of("few", 1e-5) == 1e-5
    assert survey.tolerance_of("bf16", 6e-5) == 2**-9 and survey.tolerance_of("fp16", 6e-5) == 8 * 6e-5
    assert survey.tolerance_of("few", 6e-5) == 8 * 6e-5 and survey.tolerance_of("few", 1.0) == 5e-2


def test_a_pooling_heads_widths_are_found_by_its_weights():
    model = load(zoo.export("siglip", "legacy17"))
    analysis = analyse(model)
    called = survey._called(model, analysis, "siglip")
    sizes = {"projection": 44, "pool_heads": 4, "pool_head_dim": 11, "pool_ffn": 104}
    assert {name: analysis.dimension(width).size for name, width in called.items()} == sizes
    assert len(set(called.values())) == 4 and sizes.keys() <= survey._widths("siglip", analysis, called).keys()


def test_what_a_tool_computed_ahead_stays_in_the_framework_too():
    given = [torch.from_numpy(array) for array in zoo.feeds("deberta_v2", 2, 7, padded=True).values()]
    layout = zoo.family("deberta_v2").layout

    def difference(cut: dict) -> float:
        whole, folded = (zoo.family("deberta_v2").build() for _ in range(2))
        for change in layout.folded.values():
            change(folded)
        one, other = (cut_model(model, layout, cut)(*given)[0] for model in (whole, folded))
        return float(((one - other).abs().max() / one.abs().max()).detach())

    assert difference({}) < 1e-5
    assert difference({"blocks.*.heads": [2, 0]}) < 1e-5
    assert difference({"hidden": range(32)}) > 1e-2


def test_a_width_of_the_framework_may_be_two_in_an_export(graph):
    """A table that is looked up by rows and multiplied by once more, stored twice, has a width of its own in each."""
    family = zoo.family("albert")
    table = family.build().get_parameter("albert.embeddings.word_embeddings.weight").detach().numpy()
    rows, width = table.shape
    model = graph(
        f"""(int64[B, S] ids, float[B, S, {width}] x) => (float[B, S, {width}] e, float[B, S, {rows}] y)
        <float[{rows}, {width}] table, float[{width}, {width}] w, float[{width}, {rows}] head>
        {{ e = Gather(table, ids)  h = MatMul(x, w)  t = Tanh(h)  y = MatMul(t, head) }}"""
    )
    for node in model.graph.nodes:
        for tensor in node.inputs:
            if tensor.name in ("table", "head"):
                tensor.values = table if tensor.name == "table" else np.ascontiguousarray(table.T) * 1.001
    assert {(name, turned) for _, name, turned in places(family.build(), model)} == {("table", False), ("head", True)}


def test_a_model_in_16_bits_is_judged_as_pytorch_by_its_exact_copy(graph):
    model = graph(
        """(float16[B, S, 12] x) => (float16[B, S, 12] y) <float16[12, 14] w1, float16[14, 12] w2>
        { h = MatMul(x, w1)  a = Tanh(h)  y = MatMul(a, w2) }"""
    )
    found = survey_torch.judge(model, analyse(model))
    assert found["bad"] == [] and found["worst"] <= 1e-5 < found["as_is"]


def test_a_fused_post_norm_stack_begins_where_its_embedding_ends():
    found = survey.judge("electra:fused")
    assert found["stacks"] == {"": 5}
    assert found["native"]["bad"] == {} and found["blocks"]["bad"] == {}


BLOCKWISE = """(float[B, 64] x) => (float[B, 64] y)
    <uint8[48, 4, 8] w, float[48, 4] s, uint8[64, 3, 8] v, float[64, 3] t> {
    h = com.microsoft.MatMulNBits <K = 64, N = 48, bits = 4, block_size = 16> (x, w, s)
    y = com.microsoft.MatMulNBits <K = 48, N = 64, bits = 4, block_size = 16> (h, v, t)
}"""


def test_widths_beside_blocks_have_the_names_of_widths(graph):
    """A width that is whole blocks is cut in blocks; a table's that is one and a half is fixed, and no positions."""
    model = graph(
        """(int64[B] ids) => (float[B, 15] y)
        <float[99, 24] table, uint8[48, 2, 8] w, float[48, 2] s, uint8[15, 3, 8] v, float[15, 3] t> {
        x = Gather(table, ids)  h = com.microsoft.MatMulNBits <K = 24, N = 48, bits = 4, block_size = 16> (x, w, s)
        a = Tanh(h)  y = com.microsoft.MatMulNBits <K = 48, N = 15, bits = 4, block_size = 16> (a, v, t) }"""
    )
    found = [(d.name, d.size, d.step, d.locked is not None) for d in analyse(model).dimensions]
    assert [each for each in found if "packing" not in each[0]] == [
        ("vocab", 99, 1, False), ("head_0", 24, 24, True), ("head_1", 48, 16, False), ("head_2", 15, 1, False)
    ]  # fmt: skip


def test_what_shares_a_scale_stays_together(graph):
    model = graph(BLOCKWISE)
    analysis = analyse(model)
    inner = next(d for d in analysis.dimensions if d.size == 48 and not d.locked)
    rows = np.r_[0:16, 32:48]
    assert inner.step == 16
    child = apply(model, Plan(keep={inner.name: tuple(rows.tolist())}), analysis)
    assert [child.weights[name].shape for name in ("w", "s", "v", "t")] == [(32, 4, 8), (32, 4), (64, 2, 8), (64, 2)]
    assert [node.attrs[key] for node in child.graph.nodes for key in ("K", "N")] == [64, 32, 32, 64]
    assert (child.weights["w"].load() == model.weights["w"].load()[rows]).all()
    with pytest.raises(CutError, match=r"head_1"):
        apply(model, Plan(keep={inner.name: tuple(range(24))}), analysis)


ROUNDED = """(float[B, 12] x) => (float[B, 7] y) <float[12, 9] w, float[9, 7] v, float s = {0.05}, uint8 z = {128}> {
    h = MatMul(x, w)
    q = QuantizeLinear(h, s, z)
    d = DequantizeLinear(q, s, z)
    y = MatMul(d, v)
}"""


def test_unrounded_activations_are_what_they_were_before_rounding(graph):
    model = graph(ROUNDED)
    feeds = {"x": np.random.default_rng(0).standard_normal((5, 12)).astype(np.float32)}
    weights = {name: weight.load() for name, weight in model.weights.items()}
    wanted = {"y": feeds["x"] @ weights["w"] @ weights["v"]}
    assert rounds(model) and not rounds(unrounded(model))
    assert difference(run(unrounded(model), [feeds])[0], wanted) < 1e-6
    assert difference(run(model, [feeds])[0], wanted) > 1e-4


def test_a_zero_point_at_the_least_integer_stays_a_relu(graph):
    """Quantizers drop the Relu before such a one."""
    model = graph(ROUNDED.replace("{128}", "{0}"))
    feeds = {"x": np.random.default_rng(0).standard_normal((5, 12)).astype(np.float32)}
    weights = {name: weight.load() for name, weight in model.weights.items()}
    wanted = {"y": np.maximum(feeds["x"] @ weights["w"], 0) @ weights["v"]}
    assert difference(run(unrounded(model), [feeds])[0], wanted) < 1e-6
    assert verify(model).ok


def test_a_number_that_is_quantized_is_one_in_pytorch(graph):
    """Without its rounding it goes through the Relu of a zero point at the least integer."""
    text = """(float[B, 12] x) => (float[B, 12] y) <float four = {4}, float s = {0.02}, uint8 z = {0}> {
        q = QuantizeLinear(four, s, z)  d = DequantizeLinear(q, s, z)  y = Mul(x, d) }"""
    x = torch.ones(2, 12)
    assert float(to_torch(unrounded(graph(text)))(x).max()) == 4


def test_verify_does_not_take_a_flipped_step_for_a_mistake(graph):
    for seed in range(5):
        model = graph(ROUNDED.replace("[12, 9]", "[12, 300]").replace("[9, 7]", "[300, 7]"), seed=seed)
        report = verify(model, seed=seed)
        assert report.ok, str(report)
        assert "activations not rounded" in str(report)


SPLIT_SIZES = """(float[B, S, 15] x) => (float[B, S, 3, 5] y) <int64 batch = {0}, int64[2] heads = {3, 5}> {
    sizes = Shape(x)
    first, second, third = Split <axis = 0, num_outputs = 3> (sizes)
    to = Concat <axis = 0> (first, second, heads)
    y = Reshape(x, to)
}"""


def test_sizes_may_be_read_by_a_split(graph):
    model = graph(SPLIT_SIZES)
    analysis = analyse(model)
    assert [len(list(analysis.typing.types["y"])), analysis.typing.unknown] == [4, []]
    assert verify(model, analysis=analysis).ok


def test_sizes_that_depend_on_data_are_said_where_they_arise(graph):
    model = graph(
        """(float[B, 12] x, int64[2] to) => (float[B, 14] y) <float[12, 14] w> {
            unknown = Reshape(x, to)
            same = Relu(unknown)
            y = MatMul(same, w)
        }"""
    )
    analysis = analyse(model)
    assert {leaf.lock for axis in analysis.typing.uses["w"][0].axes for leaf in [axis]} == {
        "Reshape node 'Reshape_0' has sizes that depend on data"
    }


WHOLE = """(float[B, 12] x) => (float[B, 7] y)
    <uint8[12, 9] w, uint8[9, 7] v, int32[7] b, float s = {0.05}, uint8 z = {128}> {
    q = QuantizeLinear(x, s, z)
    h = QLinearMatMul(q, s, z, w, s, z, s, z)
    d = com.microsoft.QLinearAdd(h, s, z, h, s, z, s, z)
    g = com.microsoft.QGemm(d, s, z, v, s, z, b, s, z)
    y = DequantizeLinear(g, s, z)
}"""


def test_operators_on_whole_numbers_are_float_operators_without_rounding(graph):
    model = graph(WHOLE)
    random = np.random.default_rng(0)
    held = {t.name: t for node in model.graph.nodes for t in node.inputs if t.name in ("w", "v", "b")}
    for name, (low, high) in {"w": (125, 132), "v": (125, 132), "b": (-90, 90)}.items():
        held[name].values = random.integers(low, high, held[name].shape).astype("int32" if name == "b" else "uint8")
    feeds = {"x": random.standard_normal((5, 12)).astype(np.float32)}
    w, v = (np.float32(0.05) * (held[name].values.astype(np.float32) - 128) for name in ("w", "v"))
    wanted = {"y": 2 * feeds["x"] @ w @ v + held["b"].values * np.float32(0.05) ** 2}
    assert rounds(model) and not rounds(unrounded(model))
    assert difference(run(unrounded(model), [feeds])[0], wanted) < 1e-6
    assert 1e-3 < difference(run(model, [feeds])[0], wanted) < 0.2
