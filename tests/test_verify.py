"""What verify synthesises, what it reports, and what it finds wrong with a child."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from graphclone.analysis import analyse
from graphclone.calibration.synthesis import synthesise
from graphclone.errors import InputError
from graphclone.model import Model, load
from graphclone.plan import Plan
from graphclone.precision import raised
from graphclone.surgery import apply
from graphclone.surgery.stores import STORES
from graphclone.verify import bench as bench_module
from graphclone.verify import verify
from graphclone.verify.bench import Bench
from graphclone.verify.inputs import candidates
from graphclone.verify.running import difference, first_run
from graphclone.verify.structure import problem_of
from graphclone.verify.weights import perturbed
from graphclone.verify.zeros import summed_beside_zero
from graphclone.weights import Weight

FIXTURES = Path(__file__).parent / "fixtures"
EXPORTS = sorted(FIXTURES.glob("optimum/*/*.onnx"))

FFN = """({type}[B, S, 12] x) => ({type}[B, S, 15] y) <{type}[12, 14] w1, {type}[14] b1, {type}[14, 15] w2>
    {{ h = MatMul(x, w1)  a = Add(h, b1)  t = Tanh(a)  y = MatMul(t, w2) }}"""
FLOAT = FFN.format(type="float")


@pytest.mark.parametrize("path", EXPORTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_exports_pass(path):
    report = verify(load(path))
    assert report.ok, str(report)
    assert [check.name for check in report.checks] == ["checker", "run", "permutation", "zero", "half cut"]


def test_the_report_reads_well_and_is_json(graph):
    report = verify(graph(FLOAT))
    assert report.ok and str(report).endswith("5 of 5 checks passed")
    document = json.loads(json.dumps(report.to_json()))
    assert document["ok"] and document["checks"][2]["name"] == "permutation"
    assert document["checks"][2]["figure"] <= document["checks"][2]["tolerance"] == 1e-5


def test_operators_that_only_onnxruntime_knows_are_left_to_it(graph):
    model = graph("""(float[B, 12] x) => (float[B, 12] y) <float[12] g> { y = SimplifiedLayerNormalization(x, g) }""")
    report = verify(model)
    assert report.ok, str(report)


def test_what_the_checker_objects_to_is_said(graph):
    model = graph("(float[B, 12] x) => (float[B, 12] y) { y = Relu(x) }")
    model.graph.outputs[0].shape = ["B", 13]
    assert "12" in problem_of(model) and "13" in problem_of(model)


def test_a_child_may_have_the_fault_of_form_that_its_parent_has(graph):
    """Nothing is known of an output behind an operator without a rule, so it cannot be given a shape."""
    model = graph("""(float[B, S, 12] x) => (float[B, S, 13] y, float[B, S, 13] z)
        <float[12, 14] w, float[14, 13] v, int64 i = {0}>
        { h = MatMul(x, w)  a = Tanh(h)  y = MatMul(a, v)
          e = SequenceEmpty()  c = SequenceInsert(e, y)  z = SequenceAt(c, i) }""")
    model.graph.outputs[1].shape = None
    plan = Plan(keep={next(d.name for d in analyse(model).dimensions if d.size == 14): (0, 3)})
    assert not verify(model).ok
    report = verify(apply(model, plan), parent=model, plan=plan)
    assert report.ok and "as in the parent" in str(report)


def test_weights_of_four_bits_are_zeroed_as_the_file_packs_them(graph):
    model = graph(
        """(float[B, S, 12] x) => (float[B, S, 15] y) <int4[12, 14] q, float[14, 15] w2>
        { s = Constant<value = float {0.5}>()  w = DequantizeLinear(q, s)
          h = MatMul(x, w)  a = Tanh(h)  y = MatMul(a, w2) }""",
        opset=21,
    )
    report = verify(model)
    assert report.ok, str(report)


def test_what_is_looked_up_and_then_rounded_is_zeroed_to_zero(graph):
    """Experts' matrices are looked up as floats; the zero point behind the look-up is that of the activation."""
    model = graph(
        """(float[B, 12] x, int64[B] expert) => (float[B, 15] y) <float[3, 12, 14] up, float[3, 14, 15] down>
        { s = Constant<value = float {0.01}>()  z = Constant<value = uint8 {120}>()  axes = Constant<value_ints = [1]>()
          r = Gather(up, expert)  q = QuantizeLinear(r, s, z)  w = DequantizeLinear(q, s, z)
          t = Gather(down, expert)  p = QuantizeLinear(t, s, z)  v = DequantizeLinear(p, s, z)
          row = Unsqueeze(x, axes)  h = MatMul(row, w)  g = MatMul(h, v)  y = Squeeze(g, axes) }""",
        opset=21,
    )
    report = verify(model)
    assert report.ok, str(report)


def test_a_matrix_of_whole_numbers_is_zeroed_to_its_zero_point_as_either_factor(graph):
    """An expert's matrix is looked up in whole numbers, and stands on the left of the product."""
    model = graph(
        """(float[B, 12] x, int64[B] expert) => (float[B, 15] y) <uint8[3, 14, 12] up, uint8[3, 15, 14] down>
        { s = Constant<value = float {0.01}>()  z = Constant<value = uint8 {120}>()
          c = Constant<value = float {0.1}>()  m = Constant<value = uint8 {128}>()  axes = Constant<value_ints = [2]>()
          p = Gather(up, expert)  q = Gather(down, expert)  column = Unsqueeze(x, axes)
          rounded = QuantizeLinear(column, c, m)  h = QLinearMatMul(p, s, z, rounded, c, m, c, m)
          g = QLinearMatMul(q, s, z, h, c, m, c, m)  real = DequantizeLinear(g, c, m)  y = Squeeze(real, axes) }""",
        opset=21,
    )
    assert any(d.size == 14 and d.locked is None for d in analyse(model).dimensions)
    report = verify(model)
    assert report.ok, str(report)


# inputs ---------------------------------------------------------------------------------------------------------


def first(model: Model) -> list[dict[str, np.ndarray]]:
    return next(candidates(model, analyse(model).typing))[1]


def test_symbols_agree_across_inputs(graph):
    model = graph("""(int64[B, S] ids, float[B, P, 12] past, float[B, "P + S", 1] seen) => (float[B, T, 12] y)
        <float[17, 12] table> { h = Gather(table, ids)  c = Concat <axis = 1> (past, h)  y = Mul(c, seen) }""")
    for feeds in first(model):
        (batch, length), (_, past, _) = feeds["ids"].shape, feeds["past"].shape
        assert feeds["seen"].shape == (batch, past + length, 1)
        assert feeds["past"].shape[0] == batch and feeds["ids"].max() < 17
    assert verify(model).ok


def test_computed_sizes_follow_those_that_were_made_smaller():
    whole, _ = first(load(FIXTURES / "optimum" / "gpt2" / "model.onnx"))
    past = whole["past_key_values.0.key"].shape[2]
    assert past < 20
    assert whole["attention_mask"].shape[1] == past + whole["input_ids"].shape[1]


IDS_AS_FLOATS = """(float[B, S] ids) => (float[B, S, 15] y) <float[23, 12] table, float[12, 14] w1, float[14, 15] w2>
    { i = Cast<to = 7>(ids)  e = Gather(table, i)  h = MatMul(e, w1)  a = Tanh(h)  y = MatMul(a, w2) }"""


def test_ids_that_a_file_declares_as_floats_are_ids(graph):
    """Keras gives an input without a type its float type and casts inside."""
    model = graph(IDS_AS_FLOATS)
    for feeds in first(model):
        assert feeds["ids"].dtype == np.float32 and feeds["ids"].max() > 5
        assert (feeds["ids"] == feeds["ids"] % 23 // 1).all()
    report = verify(model)
    assert report.ok, str(report)
    assert synthesise(model)["ids"].max() > 5


def test_the_length_of_ids_declared_as_floats_is_the_datas(graph):
    model = graph("""(float[B, 9] ids) => (float[B, 9, 12] y) <float[23, 12] table, float[9, 12] places>
        { i = Cast<to = 7>(ids)  e = Gather(table, i)  y = Add(e, places) }""")
    (length,) = [d for d in analyse(model).dimensions if d.size == 9]
    assert length.locked == "axis 1 of graph input 'ids'"


def test_masks_are_ones_and_then_padded(graph):
    model = graph("""(int64[B, S] ids, int64[B, S] attention_mask) => (float[B, S, 12] y)
        <float[17, 12] table, int64[1] last = {-1}>
        { h = Gather(table, ids)  m = Cast <to = 1> (attention_mask)  u = Unsqueeze(m, last)  y = Mul(h, u) }""")
    whole, padded = first(model)
    assert whole["attention_mask"].min() == 1
    assert padded["attention_mask"].min() == 0 and padded["attention_mask"][:, 0].min() == 1
    assert whole["ids"].shape != padded["ids"].shape


def test_batch_one_where_nothing_larger_runs(graph):
    model = graph("""(float[B, 5] x) => (float[B, 12] y) <float[1, 7] w> { y = Concat <axis = 1> (x, w) }""")
    report = verify(model)
    assert report.ok and "batch 1" in report.checks[1].where


def test_a_model_that_does_not_run_is_an_input_error(graph):
    model = graph("(float[B, 12] x) => (float[B, 12] y) { y = com.microsoft.NoSuchOperator(x) }")
    with pytest.raises(InputError, match="onnxruntime cannot run") as caught:
        verify(model)
    assert caught.value.exit_code == 2


def test_nan_in_an_output_is_named(graph):
    report = verify(graph("(float[B, 12] x) => (float[B, 12] y) { a = Abs(x)  n = Neg(a)  y = Log(n) }"))
    assert not report.ok
    assert report.failed[0].name == "run" and "'y'" in report.failed[0].where


def test_given_data_is_used(graph):
    random = np.random.default_rng(0)
    feeds = [{"x": random.standard_normal((2, 3, 12)).astype(np.float32)} for _ in range(3)]
    assert verify(graph(FLOAT), data=feeds).ok
    with pytest.raises(InputError, match="no values for the input 'x'"):
        verify(graph(FLOAT), data=[{"z": feeds[0]["x"]}])
    with pytest.raises(InputError, match="the data is empty"):
        verify(graph(FLOAT), data=[])


# weights --------------------------------------------------------------------------------------------------------


def test_perturbing_reads_nothing_until_it_is_used(graph, monkeypatch):
    model = graph(FLOAT)
    monkeypatch.setattr(Weight, "load", lambda weight: pytest.fail("a weight was read"))
    perturbed(model)


def test_perturbed_weights_hide_no_permutation_and_stay_near(graph):
    model = graph("""(float[B, 12] x) => (float[B, 12] y)
        <float[12] ones = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, float[3] counts = {0, 1, 2},
         float[2] masked = {-1e30, 0}>
        { a = Mul(x, ones)  b = ReduceSum(counts)  c = ReduceSum(masked)  d = Mul(b, c)  y = Add(a, d) }""")
    weights = perturbed(model).weights
    ones = weights["ones"].load()
    assert len(np.unique(ones)) == 12 and np.abs(ones - 1).max() < 0.21
    for name in ("counts", "masked"):
        assert np.array_equal(weights[name].load(), model.weights[name].load())


@pytest.mark.parametrize("type", ["float16", "bfloat16"])
def test_16_bits_are_raised_to_32(graph, type):
    model = graph(FFN.format(type=type))
    assert {str(weight.dtype) for weight in raised(model).weights.values()} == {"float32"}
    report = verify(model)
    assert report.ok, str(report)
    assert report.checks[2].figure < 1e-5


def test_sizes_in_floats_are_not_perturbed(graph):
    model = graph("""(float[B, 6, 5, 7] x) => (float[B, 6, 10, 14] y) <float[4] scales = {1.0, 1.0, 2.0, 2.0}>
        { y = Resize(x, , scales) }""")
    assert np.array_equal(perturbed(model).weights["scales"].load(), [1, 1, 2, 2])


def test_differences_are_relative_to_the_largest_value():
    assert difference({"y": np.float32([1, 100])}, {"y": np.float32([1, 101])}) == pytest.approx(1 / 101)
    assert difference({"y": np.float32([0, -np.inf])}, {"y": np.float32([0, -np.inf])}) == 0
    assert difference({"y": np.float32([np.nan])}, {"y": np.float32([1])}) == float("inf")
    assert difference({"y": np.zeros((2, 1))}, {"y": np.zeros((1, 2))}) == float("inf")
    assert difference({"y": np.int64([1])}, {"y": np.int64([2])}) == float("inf")


def test_a_large_model_is_judged_by_its_first_blocks(monkeypatch):
    monkeypatch.setattr(bench_module, "LARGE_BYTES", 0)
    monkeypatch.setattr(bench_module, "JUDGED_BLOCKS", 2)
    report = verify(load(FIXTURES / "optimum" / "llama" / "model.onnx"))
    assert report.ok, str(report)
    assert all("first blocks" in check.where for check in report.checks[2:])


def test_an_atom_is_called_by_its_dimension(graph):
    model = load(FIXTURES / "optimum" / "gpt2" / "model.onnx")
    analysis = analyse(model)
    bench = Bench.of(model, analysis, first_run(model, analysis)[1])
    names = [bench.name(atom) for atom in bench.atoms()]
    assert "hidden" in names and "blocks.0.ffn" in names


# children -------------------------------------------------------------------------------------------------------


def cut(model: Model) -> tuple[Model, Plan]:
    analysis = analyse(model)
    hidden = next(d for d in analysis.dimensions if d.role == "hidden")
    scale = next(name for name, weight in model.weights.items() if len(weight.shape) == 2 and weight.dtype.kind == "f")
    plan = Plan(
        keep={"hidden": tuple(range(0, hidden.size, 2)), "blocks.0.ffn": (3, 1, 5)},
        blocks={"": (0,)},
        scale={scale: 1.25},
    )
    return apply(model, plan, analysis), plan


@pytest.fixture(scope="module")
def parent() -> Model:
    return load(FIXTURES / "optimum" / "gpt2" / "model.onnx")


def test_a_child_is_what_its_plan_makes(parent, tmp_path):
    child, plan = cut(parent)
    child.save(tmp_path / "child.onnx")
    report = verify(load(tmp_path / "child.onnx"), parent=parent, plan=plan)
    assert report.ok, str(report)
    assert [check.name for check in report.checks][-3:] == ["slices", "outputs", "plan"]


def test_a_changed_weight_is_found(parent):
    child, plan = cut(parent)
    proto = child.to_proto()
    changed = next(item for item in proto.graph.initializer if len(item.dims) == 2 and item.data_type == 1)
    values = onnx.numpy_helper.to_array(changed).copy()
    values[:, 0] += 1
    changed.CopyFrom(onnx.numpy_helper.from_array(values, changed.name))
    report = verify(Model.from_proto(proto), parent=parent, plan=plan)
    assert [check.name for check in report.failed] == ["slices", "outputs"]
    assert changed.name in report.failed[0].where


def test_other_slices_are_found(parent):
    child, plan = cut(parent)
    report = verify(child, parent=parent, plan=plan.with_(keep={**plan.keep, "blocks.0.ffn": (3, 1, 6)}))
    assert [check.name for check in report.failed] == ["slices", "outputs"]


def test_another_size_is_found(parent):
    child, plan = cut(parent)
    report = verify(child, parent=parent, plan=plan.with_(keep={**plan.keep, "blocks.0.ffn": (3, 1)}))
    assert report.failed[0].name == "slices"


def test_a_cut_that_changes_a_scale_is_found(graph, monkeypatch):
    """Carrying the plan out again makes the same mistake; the parent with its slices zeroed does not."""
    parent = graph(
        """(float[B, S, 12] x) => (float[B, S, 12] y) <float[12, 18] w, float[18, 12] o>
        { q = MatMul(x, w)  k = Tanh(q)  v = Sigmoid(q)
          c = Attention <q_num_heads = 3, kv_num_heads = 3> (q, k, v)  y = MatMul(c, o) }""",
        opset=23,
    )
    analysis = analyse(parent)
    plan = Plan(keep={next(d.name for d in analysis.dimensions if d.size == 6): (0, 1, 4)})
    assert verify(apply(parent, plan), parent=parent, plan=plan).ok
    monkeypatch.setitem(STORES, "scale", lambda child, site, node: None)
    report = verify(apply(parent, plan), parent=parent, plan=plan)
    assert "plan" in [check.name for check in report.failed]
    assert "slices" not in [check.name for check in report.failed]


FEATURES = """(float[B, S, 12] x) => (float[B, S, 9] y) <float[12, 8] q, float[12, 8] k, float[12, 7] v, float[7, 9] o,
    float one = {1}> {
    a = MatMul(x, q)  b = MatMul(x, k)  c = MatMul(x, v)  QUERIES  KEYS  t = Transpose <perm = [0, 2, 1]> (n)
    d = MatMul(t, c)  e = MatMul(m, d)  y = MatMul(e, o) }"""


@pytest.mark.parametrize(
    ("queries", "keys", "judged"),
    [
        ("l = Elu(a) m = Add(l, one)", "r = Elu(b) n = Add(r, one)", False),
        ("m = Exp(a)", "n = Sigmoid(b)", False),
        ("m = Exp(a)", "n = Relu(b)", True),
        ("m = Relu(a)", "n = Tanh(b)", True),
    ],
)
def test_zero_does_not_judge_what_zeroed_weights_leave_in_a_sum(graph, queries, keys, judged):
    model = graph(FEATURES.replace("QUERIES", queries).replace("KEYS", keys))
    analysis = analyse(model)
    summed = summed_beside_zero(analysis.typing)
    assert [axis.size[0] for axis in summed] == ([] if judged else [8])
    report = verify(model, analysis=analysis)
    assert report.ok, str(report)
