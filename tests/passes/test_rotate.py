"""Rotate keeps the norm operator exact, lowers the error, and names the node that forbids it."""

import numpy as np
import onnx
import onnxruntime
import pytest

from graphclone.analysis import analyse
from graphclone.errors import CutError
from graphclone.graphs import constants
from graphclone.pipeline import Context, Pipeline
from graphclone.plan import Plan
from graphclone.rotation import rotatable
from graphclone.verify import verify
from graphclone.weights import Weight, weight_of
from passes.rotate import _basis, mean_free_basis

CUT = "width{hidden=8 by=uniform}"


def layer_norm(x: np.ndarray, gain: np.ndarray, epsilon: float) -> np.ndarray:
    """Run onnxruntime's operator in double precision."""
    text = '<ir_version: 10, opset_import: ["" : 17]> n (double[T, D] x, double[D] g) => (double[T, D] y) '
    proto = onnx.parser.parse_model(f"{text} {{ y = LayerNormalization<axis=-1, epsilon={epsilon}>(x, g) }}")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x, "g": gain})[0]


@pytest.mark.parametrize("size, kept", [(48, 24), (48, 48), (7, 3)])
def test_layer_norm_is_exact_in_double_precision_on_what_is_kept(size, kept):
    """Of a stream in the kept directions, the child's operator makes what the parent's does, in the new basis."""
    random = np.random.default_rng(0)
    directions = random.standard_normal((kept - 1, size))
    x = random.standard_normal((200, kept - 1)) @ directions + random.standard_normal((200, 1))  # any mean
    normal = layer_norm(x, np.ones(size), 1e-30)
    basis = _basis(normal.T @ normal, kept, mean_free=True)
    child = x @ basis
    gain = np.sqrt(np.trace(basis.T @ normal.T @ normal @ basis) / len(x) / kept)
    assert np.abs(child.sum(axis=1)).max() < 1e-12 * np.abs(child).max() * size
    assert np.abs(layer_norm(child, np.full(kept, gain), 1e-30) - normal @ basis).max() < 1e-12 * np.abs(normal).max()


@pytest.mark.parametrize("size", [2, 3, 8, 65])
def test_the_mean_free_basis_is_orthonormal_to_double_precision(size):
    found = mean_free_basis(size)
    assert np.abs(found.T @ found - np.eye(size - 1)).max() < 1e-14 * size
    assert np.abs(found.sum(axis=0)).max() < 1e-14 * size


def test_rms_norms_take_an_orthonormal_basis_of_all_directions():
    random = np.random.default_rng(0)
    x = random.standard_normal((100, 12)) * np.arange(1, 13)
    basis = _basis(x.T @ x, 12, mean_free=False)
    assert np.abs(basis.T @ basis - np.eye(12)).max() < 1e-12


@pytest.mark.parametrize("norm", ["LayerNormalization", "SimplifiedLayerNormalization"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_child_comes_closer_to_the_parent(make, samples, run_pipeline, outputs, apart, norm, bias):
    parent = make(norm=norm, bias=bias)
    wanted = outputs(parent)
    plain, turned = (run_pipeline(each, parent, samples) for each in (CUT, f"{CUT},rotate"))
    assert apart(outputs(turned.child), wanted) < apart(outputs(plain.child), wanted)
    assert verify(turned.child, parent=parent, plan=turned.plan).ok
    both = run_pipeline(f"{CUT},rotate,refit", parent, samples)
    assert apart(outputs(both.child), wanted) < 0.9 * apart(outputs(turned.child), wanted)


@pytest.mark.parametrize("norm", ["LayerNormalization", "SimplifiedLayerNormalization"])
def test_the_whole_basis_changes_nothing(make, samples, outputs, apart, norm):
    """All channels stay, so that nothing but the basis changes: the outputs are the parent's."""
    parent = make(norm=norm)
    context = Context(parent, analyse(parent), data=samples, provider="cpu")
    moved = Plan(keep={"hidden": (*range(1, 16), 0)})  # a cut that keeps all, though not in place
    plan = Pipeline.parse("rotate").passes[0].run(parent, moved, None, context)
    assert plan.replace
    assert apart(outputs(context.materialise(plan)), outputs(parent)) < 1e-5


def _set(model, name: str, entries, value: float) -> None:
    constant = next(each for each in constants(model.graph) if each.name == name)
    values = weight_of(constant).load().copy()
    values[entries] = value
    constant._values = Weight.of(values)


@pytest.mark.parametrize("entries, error", [(3, 5e-3), (slice(None), 1e-5)])
def test_channels_that_a_norm_hides_are_no_obstacle(make, samples, outputs, apart, entries, error):
    """A weight of zero shows nothing of its channels; they get an equal share of the norm's energy."""
    parent = make()
    for name in ("norm1.gain", "norm1.shift"):
        _set(parent, name, entries, 0.0)
    context = Context(parent, analyse(parent), data=samples, provider="cpu")
    moved = Plan(keep={"hidden": (*range(1, 16), 0)})
    plan = Pipeline.parse("rotate").passes[0].run(parent, moved, None, context)
    assert apart(outputs(context.materialise(plan)), outputs(parent)) < error


def test_a_bias_without_a_weight_is_refused(make, samples, run_pipeline):
    parent = make()
    _set(parent, "norm1.gain", 3, 0.0)
    with pytest.raises(CutError, match=r"node_norm1.*scales channel 3 by nearly nothing and shifts it"):
        run_pipeline(f"{CUT},rotate", parent, samples)


def test_with_nothing_cut_nothing_changes(make, samples, run_pipeline):
    assert not run_pipeline("width{hidden=16},rotate", make(), samples).plan.replace


def test_a_tied_head_is_refused_and_told_how(make, samples, run_pipeline):
    with pytest.raises(CutError, match=r"node_last.*cannot fold into 'embed'.*rotate\{untie=true\}"):
        run_pipeline(f"{CUT},rotate", make(tied=True), samples)


def test_a_tied_head_that_parts_is_rotated(make, samples, run_pipeline, outputs, apart):
    parent = make(tied=True)
    wanted = outputs(parent)
    plain, turned = (run_pipeline(each, parent, samples) for each in (CUT, f"{CUT},rotate{{untie=true}}"))
    assert turned.plan.untie == {"embed": "embed_untied"}
    assert not np.allclose(turned.plan.replace["embed"], turned.plan.replace["embed_untied"])
    assert apart(outputs(turned.child), wanted) < apart(outputs(plain.child), wanted)
    assert verify(turned.child, parent=parent, plan=turned.plan).ok
    both = run_pipeline(f"{CUT},rotate{{untie=true}},refit", parent, samples)
    assert "embed_untied" in both.plan.replace
    assert apart(outputs(both.child), wanted) < apart(outputs(turned.child), wanted)


def test_a_fit_to_the_parents_inputs_sees_them_in_the_new_basis(make, samples, run_pipeline, outputs, apart):
    parent = make()
    wanted = outputs(parent)
    turned = run_pipeline(f"{CUT},rotate", parent, samples)
    fitted = run_pipeline(f"{CUT},rotate,refit{{drift=false}}", parent, samples)
    assert apart(outputs(fitted.child), wanted) < 0.9 * apart(outputs(turned.child), wanted)


def test_a_refusal_can_be_skipped_and_is_told(make, samples, run_pipeline):
    result = run_pipeline(f"{CUT},rotate{{skip=true}}", make(tied=True), samples)
    assert not result.plan.replace
    assert not result.plan.untie
    assert any("rotate: skipped" in note for note in result.notes)


STREAM = """(int64[B, T] ids) => (float[B, T, 40] logits)
    <float[40, 16] embed, float[16] g, float[16] s, float[16, 24] up, float[24, 16] down, float[16] layer,
     float[16, 24] rise, float[24, 16] fall, float[16, 40] head> {
    x = Gather(embed, ids)
    n0 = LayerNormalization<axis=-1>(x, g, s) u0 = MatMul(n0, up) a0 = Relu(u0) d0 = MatMul(a0, down) %s
    m = LayerNormalization<axis=-1>(y, g, s) v = MatMul(m, rise) w = Relu(v) z = MatMul(w, fall) q = Add(y, z)
    r = LayerNormalization<axis=-1>(q, g, s) logits = MatMul(r, head) }"""


@pytest.mark.parametrize(
    "middle, why",
    [
        ("t = Tanh(d0) y = Add(x, t)", "Tanh.*channel by channel"),
        ("k = Mul(n0, layer) l = Add(d0, k) y = Add(x, l)", "channel"),
        ("l = Add(d0, n0) y = Add(x, l)", "Add_.*is no matrix product"),
    ],
)
def test_an_operator_on_single_channels_forbids_it_by_name(graph, middle, why):
    analysis = analyse(graph(STREAM % middle))
    with pytest.raises(CutError, match=why):
        rotatable(analysis, analysis.dimension("hidden").axes[0])


def test_a_layer_scale_folds_into_what_writes_it(graph, samples, outputs, apart):
    model = graph(STREAM % "k = Mul(d0, layer) y = Add(x, k)")
    wanted = outputs(model)
    context = Context(model, analyse(model), data=samples, provider="cpu")
    plan = Pipeline.parse("rotate").passes[0].run(model, Plan(keep={"hidden": (*range(1, 16), 0)}), None, context)
    assert np.array_equal(plan.replace["layer"], np.ones(16, np.float32))
    assert apart(outputs(context.materialise(plan)), wanted) < 1e-4
