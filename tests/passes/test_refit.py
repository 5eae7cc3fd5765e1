"""Refit lowers the error, tells where it does not, and leaves activations on the device."""

import json

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, numpy_helper

import graphclone
from graphclone import segments
from graphclone.errors import CutError, InputError
from graphclone.model import Model
from graphclone.pipeline import Pipeline
from graphclone.plan import Plan
from graphclone.precision import raised
from graphclone.surgery import apply
from graphclone.verify import verify

CUT = "width{hidden=8 ffn=12 by=uniform}"
BOTH = f"depth{{blocks=[0,3]}},{CUT}"
VARIANTS = ("", "{drift=false}", "{absorb=false}", "{only=readouts}", "{bias=true}", "{drift=false only=readouts}")


@pytest.mark.parametrize(
    "text, options", [(CUT, ""), ("depth{blocks=[0,2]}", ""), *((BOTH, options) for options in VARIANTS)]
)
def test_the_child_comes_closer_to_the_parent(make, samples, run_pipeline, outputs, apart, text, options):
    parent = make()
    wanted = outputs(parent)
    plain, fitted = (run_pipeline(each, parent, samples) for each in (text, f"{text},refit{options}"))
    assert apart(outputs(fitted.child), wanted) < 0.95 * apart(outputs(plain.child), wanted)
    assert fitted.plan.replace
    assert any("matrices fitted" in note for note in fitted.notes)


def test_with_nothing_cut_nothing_changes(make, samples, run_pipeline):
    parent = make()
    result = run_pipeline("width{hidden=16},refit", parent, samples)
    assert not result.plan.replace
    assert not result.plan.bias


def test_what_is_exact_already_stays(make, samples, run_pipeline, outputs, apart):
    """Units that give nothing are cut: every operator's slice is exact, so the fits must not move it."""
    parent = make()
    for i in range(4):
        for name, axis in ((f"h.{i}.up.weight", 1), (f"h.{i}.up.bias", 0)):
            constant = next(t for node in parent.graph.nodes for t in node.inputs if t.name == name)
            value = np.array(constant._values.load())
            value[(slice(None),) * axis + (slice(12, None),)] = 0
            constant._values = graphclone.weights.Weight.of(value)
    child = run_pipeline("width{ffn=12 by=first},refit", parent, samples).child
    assert apart(outputs(child), outputs(parent)) < 1e-5


def test_a_writer_absorbs_the_blocks_behind_it(make, samples, run_pipeline, outputs, apart):
    parent = make()
    wanted = outputs(parent)
    texts = (f"depth{{blocks=[0,3]}},refit{{absorb={absorb}}}" for absorb in ("true", "false"))
    with_, without = (run_pipeline(text, parent, samples) for text in texts)
    assert apart(outputs(with_.child), wanted) < apart(outputs(without.child), wanted)


def test_a_fit_to_the_parents_inputs_does_not_depend_on_the_fits_before_it(make, samples, run_pipeline):
    parent = make()
    whole = run_pipeline(f"{CUT},refit{{drift=false absorb=false}}", parent, samples).plan.replace
    part = run_pipeline(f"{CUT},refit{{drift=false absorb=false only=readouts}}", parent, samples).plan.replace
    assert part
    assert all(np.allclose(whole[name], value, atol=1e-5) for name, value in part.items())


def test_only_gram_matrices_leave_the_device(make, samples, run_pipeline, monkeypatch):
    """No array that comes back has as many rows as a batch has tokens; streams are asked to stay."""
    shapes, stayed = [], []
    plain = segments.run

    def spy(session, batch, device=False):
        found = plain(session, batch, device)
        (stayed if device else shapes).extend(each.shape if not device else each for each in found)
        return found

    monkeypatch.setattr(segments, "run", spy)
    monkeypatch.setattr("passes.refit.run", spy)
    run_pipeline(f"depth{{blocks=[0,2]}},{CUT},refit", make(), samples)
    assert shapes
    assert stayed
    assert not any(isinstance(value, np.ndarray) for value in stayed)
    assert all(len(shape) == 2 and shape[0] == shape[1] and shape[0] <= 8 + 1 + 24 for shape in shapes)


def test_a_tied_head_stays_tied_and_a_note_says_so(make, samples, run_pipeline):
    result = run_pipeline(f"{CUT},refit", make(tied=True), samples)
    assert "embed" not in result.plan.replace
    assert any("tied head" in note and "node_logits" in note for note in result.notes)


def test_an_untied_head_gets_a_matrix_of_its_own(make, samples, run_pipeline, outputs, apart):
    parent = make(tied=True)
    wanted = outputs(parent)
    tied, untied = (run_pipeline(f"{CUT},refit{options}", parent, samples) for options in ("", "{untie=true}"))
    assert untied.plan.untie == {"embed": "embed_untied"}
    assert untied.plan.replace["embed_untied"].shape == (40, 8)
    assert "embed" not in untied.plan.replace
    assert apart(outputs(untied.child), wanted) < apart(outputs(tied.child), wanted)
    assert verify(untied.child, parent=parent, plan=untied.plan).ok


def test_a_shared_matrix_is_fitted_to_all_its_uses(make, samples, run_pipeline, outputs, apart):
    parent = make(shared=True)
    wanted = outputs(parent)
    plain, fitted = (run_pipeline(each, parent, samples) for each in (CUT, f"{CUT},refit"))
    assert {"all.up.weight", "all.up.bias", "all.down.weight"} <= set(fitted.plan.replace)
    assert apart(outputs(fitted.child), wanted) < 0.9 * apart(outputs(plain.child), wanted)


def test_biases_are_added_only_when_asked_for(make, samples, run_pipeline, outputs, apart):
    parent = make(bias=False)
    wanted = outputs(parent)
    without, with_ = (run_pipeline(f"{CUT},refit{options}", parent, samples) for options in ("", "{bias=true}"))
    assert not without.plan.bias
    assert not any(name.endswith("bias") for name in without.child.weights)
    assert "h.0.up.weight" in with_.plan.bias
    assert {"h.0.up.bias", "head.bias"} <= set(with_.child.weights)
    assert apart(outputs(with_.child), wanted) < apart(outputs(without.child), wanted)
    assert verify(with_.child, parent=parent, plan=with_.plan).ok


def test_a_plan_with_biases_and_untied_heads_is_read_back(make, samples, run_pipeline, outputs, tmp_path):
    parent = make(bias=False, tied=True)
    result = run_pipeline(f"{CUT},refit{{bias=true untie=true}}", parent, samples)
    result.plan.save(tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["untie"] == {"embed": "embed_untied"}
    assert document["bias"]["h.0.up.weight"] == "plan.safetensors#bias of h.0.up.weight"
    again = apply(parent, Plan.load(tmp_path / "plan.json"))
    assert again.weights.keys() == result.child.weights.keys()
    for one, other in zip(outputs(again), outputs(result.child), strict=True):
        assert np.array_equal(one[0], other[0])


def test_added_biases_and_untied_heads_train(make, samples, run_pipeline, outputs):
    torch = pytest.importorskip("torch")
    parent = make(bias=False, tied=True)
    child = run_pipeline(f"{CUT},refit{{bias=true untie=true}}", parent, samples).child
    module = graphclone.to_torch(child)
    names = dict(module.named_parameters())
    assert names["h.0.up.bias"].shape == (12,)
    assert sum(tuple(value.shape) == (40, 8) for value in names.values()) == 2
    got = module(torch.from_numpy(samples[0]["ids"])).detach().numpy()
    assert np.abs(got - outputs(child, samples[:1])[0][0]).max() < 1e-4


@pytest.mark.parametrize("bias, why", [
    ({"embed": np.zeros(8)}, "not one operator alone"),
    ({"h.0.up.weight": np.zeros(5)}, r"needs \(24,\)"),
    ({"nothing": np.zeros(5)}, "does not have"),
])  # fmt: skip
def test_a_bias_that_has_no_place_is_refused(make, bias, why):
    with pytest.raises(CutError, match=why):
        apply(make(), Plan(keep={"hidden": tuple(range(8))}, bias=bias))


def test_untying_under_a_name_that_is_taken_is_refused(make):
    with pytest.raises(CutError, match="another initializer"):
        apply(make(tied=True), Plan(untie={"embed": "last.gain"}))


def test_what_mixes_rows_that_the_cut_takes_away_stays_a_slice(graph, run_pipeline):
    """A Mixer mixes tokens channel by channel: where the parent has 8 of these, the child has 5."""
    blocks = "".join(
        f"a{i} = Transpose <perm = [0, 2, 1]> (x{i})  b{i} = MatMul(a{i}, s{i})  c{i} = MatMul(b{i}, t{i}) "
        f"d{i} = Transpose <perm = [0, 2, 1]> (c{i})  m{i} = Add(x{i}, d{i})  e{i} = MatMul(m{i}, u{i}) "
        f"f{i} = Relu(e{i})  g{i} = MatMul(f{i}, v{i})  x{i + 1} = Add(m{i}, g{i}) "
        for i in range(2)
    )
    weights = ", ".join(f"float[4, 6] s{i}, float[6, 4] t{i}, float[8, 9] u{i}, float[9, 8] v{i}" for i in range(2))
    model = graph(f"(float[B, 4, 3] x) => (float[B, 4, 7] y) <float[3, 8] i, float[8, 7] o, {weights}> "
                  f"{{ x0 = MatMul(x, i)  {blocks} y = MatMul(x2, o) }}")  # fmt: skip
    random = np.random.default_rng(0)
    data = [{"x": random.standard_normal((3, 4, 3)).astype(np.float32)} for _ in range(4)]
    result = run_pipeline("width{hidden=5 by=uniform},refit", model, data)
    (note,) = (note for note in result.notes if "left alone" in note)
    assert "4 operators" in note and "the cut takes away rows of its input" in note
    assert verify(result.child).ok


OFFERS = """n{i} = SimplifiedLayerNormalization(x{i}, g{i})  h{i} = MatMul(n{i}, up{i})  a{i} = Relu(h{i})
    o{i} = Einsum <equation = "btf,fed->bted"> (a{i}, down{i})  r{i} = MatMul(n{i}, choose{i})  p{i} = Softmax(r{i})
    w{i} = Einsum <equation = "bte,bted->btd"> (p{i}, o{i})  x{j} = Add(x{i}, w{i})
"""


def test_an_axis_in_a_new_basis_may_stand_beside_another(graph, run_pipeline, outputs, apart):
    """Each unit writes several vectors into the stream, among which a softmax chooses."""
    blocks = "".join(OFFERS.format(i=i, j=i + 1) for i in range(2))
    weights = ", ".join(
        f"float[12] g{i}, float[12, 20] up{i}, float[20, 3, 12] down{i}, float[12, 3] choose{i}" for i in range(2)
    )
    parent = graph(f"""(int64[B, 9] ids) => (float[B, 9, 17] y) <float[17, 12] table, float[12] g, float[12, 17] head,
        {weights}> {{ x0 = Gather(table, ids)
        {blocks}  n = SimplifiedLayerNormalization(x2, g)  y = MatMul(n, head) }}""")
    draw = np.random.default_rng(0)
    samples = [{"ids": draw.integers(0, 17, (8, 9))} for _ in range(5)]
    text = "width{hidden=8 ffn=15 by=uniform}"
    plain, fitted = (run_pipeline(each, parent, samples) for each in (text, f"{text},rotate,refit"))
    assert {fitted.plan.replace[f"down{i}"].shape for i in range(2)} == {(15, 3, 8)}
    wanted = outputs(parent, samples[:1])
    assert apart(outputs(fitted.child, samples[:1]), wanted) < 0.95 * apart(outputs(plain.child, samples[:1]), wanted)


def test_a_single_batch_is_told(make, samples, run_pipeline):
    result = run_pipeline(f"{CUT},refit", make(), samples[:1])
    assert any("none is held out" in note for note in result.notes)


def test_samples_are_needed(make):
    with pytest.raises(InputError, match="--data"):
        Pipeline.parse(f"{CUT},refit").run(make())


def test_fits_that_few_samples_do_not_confirm_stay_slices_and_a_note_says_which(make, samples, run_pipeline):
    few = [{"ids": batch["ids"][:1, :3]} for batch in samples[:5]]
    result = run_pipeline("depth{blocks=[0,2]},width{ffn=23 by=uniform},refit{ridge=1e-6}", make(), few)
    assert any("stay plain slices" in note and "held out" in note and "node_" in note for note in result.notes)


def test_a_model_in_bf16_is_fitted_in_fp32(make, samples, run_pipeline, outputs, apart):
    """onnxruntime has no bf16 kernels on a CPU; the weights are stored in bf16 again."""
    proto = make().to_proto()
    for held in proto.graph.initializer:
        held.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(held).astype(ml_dtypes.bfloat16), held.name))
    proto.graph.output[0].type.tensor_type.elem_type = TensorProto.BFLOAT16
    parent = Model.from_proto(proto)
    plain, fitted = (run_pipeline(f"{CUT}{more}", parent, samples) for more in ("", ",rotate,refit"))
    assert {weight.dtype for weight in fitted.child.weights.values()} == {np.dtype(ml_dtypes.bfloat16)}
    wanted = outputs(raised(parent))
    assert apart(outputs(raised(fitted.child)), wanted) < 0.95 * apart(outputs(raised(plain.child)), wanted)
