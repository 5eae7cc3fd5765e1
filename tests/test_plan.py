"""Plans: how they are written, read and resolved, and what each mistake in one says."""

import json
from pathlib import Path

import numpy as np
import pytest

from graphclone.analysis import analyse
from graphclone.axes.axis import Axis, find, leaves, total
from graphclone.cut import project
from graphclone.dimensions import Dimension
from graphclone.errors import CutError, InputError
from graphclone.model import load
from graphclone.plan import Plan
from graphclone.resolution import resolve

FIXTURES = Path(__file__).parent / "fixtures" / "optimum"


@pytest.fixture(scope="module")
def gpt2():
    return analyse(load(FIXTURES / "gpt2" / "model.onnx"))


@pytest.fixture(scope="module")
def llama():
    return analyse(load(FIXTURES / "llama" / "model.onnx"))


def kept(analysis, plan: Plan, name: str) -> list[int]:
    """Return what a plan keeps of a dimension; all of it where it says nothing."""
    dimension = analysis.dimension(name)
    picks = resolve(plan, analysis).picks(dimension.axes[0])
    return list(range(dimension.size)) if picks is None else picks.tolist()


# files ----------------------------------------------------------------------------------------------------------


def test_a_plan_survives_its_file(tmp_path):
    plan = Plan(
        "f" * 64,
        {"hidden": (2, 0, 5), "blocks.*.ffn": (1,)},
        {"encoder": (0, 2), "decoder": (1,)},
        ("encoder.blocks.0.ffn",),
        {"w": 1.5},
        {"b": np.arange(3, dtype=np.float32)},
    )
    plan.save(tmp_path / "small.json")
    again = Plan.load(tmp_path / "small.json")
    assert again.with_(replace={}) == plan.with_(replace={})
    assert np.array_equal(again.replace["b"], plan.replace["b"])
    document = json.loads((tmp_path / "small.json").read_text())
    assert document["format"] == "graphclone.plan/1"
    assert document["replace"] == {"b": "small.safetensors#b"}


def test_a_plan_without_tensors_is_one_file(tmp_path):
    Plan(keep={"hidden": (0,)}).save(tmp_path / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_one_stack_lists_its_blocks():
    assert Plan(blocks={"": (0, 3)}).to_json()["blocks"] == [0, 3]
    assert Plan.from_json({"blocks": [0, 3]}).blocks == {"": (0, 3)}
    assert Plan.from_json({"blocks": {"encoder.": [1]}}).blocks == {"encoder": (1,)}


def test_keep_blocks_or_drop_suffice():
    for document in ({"keep": {}}, {"blocks": [0]}, {"drop": ["blocks.0.ffn"]}):
        Plan.from_json(document)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "is not a plan"),
        ({}, "decides nothing"),
        ({"format": "graphclone.plan/2", "keep": {}}, "this version reads 'graphclone.plan/1'"),
        ({"keeep": {}}, "unknown key 'keeep'"),
        ({"keep": {"hidden": "all"}}, r"keep\['hidden'\] must be a list of whole numbers"),
        ({"keep": {"hidden": [1.5]}}, "whole numbers"),
        ({"keep": {"hidden": [True]}}, "whole numbers"),
        ({"keep": {"hidden": [1 << 70]}}, "lists a number that no index can be"),
        ({"keep": [1]}, r"'keep' is \{name: \[indices\]\}"),
        ({"blocks": "0,1"}, "'blocks' is a list"),
        ({"drop": "blocks.0.ffn"}, "drop must be a list"),
        ({"scale": {"w": "half"}}, "scale must be"),
        ({"replace": {"w": "../w.safetensors#w"}}, "not a file beside the plan"),
        ({"replace": {"w": "missing.safetensors#w"}}, "cannot read replace"),
        ({"replace": ["w"]}, "replace must be"),
        ({"bias": {"w": "missing.safetensors#bias of w"}}, "cannot read bias"),
        ({"bias": 3}, "bias must be"),
        ({"untie": {"w": 3}}, "untie must be"),
    ],
)
def test_what_is_no_plan_says_why(document, message, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=message):
        Plan.load(tmp_path / "plan.json")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="cannot read the plan"):
        Plan.load(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("keep everything")
    with pytest.raises(InputError, match="is not a plan"):
        Plan.load(tmp_path / "text.json")


def test_a_damaged_file_of_tensors_says_so(tmp_path):
    Plan(replace={"w": np.zeros(3, np.float32)}).save(tmp_path / "plan.json")
    (tmp_path / "plan.safetensors").write_bytes(b"neither header nor tensors")
    with pytest.raises(InputError, match=r"cannot read replace\['w'\] from"):
        Plan.load(tmp_path / "plan.json")


# names ----------------------------------------------------------------------------------------------------------


def test_indices_keep_their_order(gpt2):
    assert kept(gpt2, Plan(keep={"hidden": (9, 0, 4)}), "hidden") == [9, 0, 4]


def test_a_star_is_every_block_and_an_explicit_name_beats_it(gpt2):
    plan = Plan(keep={"blocks.*.ffn": (1, 2), "blocks.1.ffn": (7,)})
    assert kept(gpt2, plan, "blocks.0.ffn") == kept(gpt2, plan, "blocks.2.ffn") == [1, 2]
    assert kept(gpt2, plan, "blocks.1.ffn") == [7]
    reversed_order = Plan(keep=dict(reversed(plan.keep.items())))
    assert kept(gpt2, reversed_order, "blocks.1.ffn") == [7]


def test_head_dim_speaks_of_values_too_unless_they_are_named(gpt2):
    plan = Plan(keep={"blocks.0.head_dim": (0, 3)})
    assert kept(gpt2, plan, "blocks.0.v_head_dim") == [0, 3]
    plan = Plan(keep={"blocks.0.head_dim": (0, 3), "blocks.0.v_head_dim": (5,)})
    assert kept(gpt2, plan, "blocks.0.v_head_dim") == [5]


def test_any_alias_names_a_shared_dimension(llama):
    pairs = (0, 1, 3, 4)
    assert kept(llama, Plan(keep={"blocks.2.head_dim": pairs}), "blocks.0.head_dim") == list(pairs)
    both = Plan(keep={"blocks.0.head_dim": pairs, "blocks.2.head_dim": pairs})
    assert kept(llama, both, "blocks.1.head_dim") == list(pairs)


def test_unequal_aliases_are_an_error(llama):
    plan = Plan(keep={"blocks.0.head_dim": (0, 3), "blocks.2.head_dim": (1, 4)})
    with pytest.raises(CutError, match=r"blocks.0.head_dim.*blocks.2.head_dim.*one dimension"):
        resolve(plan, llama)


def test_pairs_stay_in_pair_order(llama):
    cut = resolve(Plan(keep={"blocks.*.head_dim": (2, 0, 5, 3)}), llama)
    assert {len(cut.indices[id(leaf)]) for leaf in leaves(llama.dimension("blocks.0.head_dim").axes[0])} == {2}
    for torn in ((0, 1, 2), (0, 3, 1, 4), (0, 1, 4, 3), (0, 1, 2, 3)):
        with pytest.raises(CutError, match=r"both members of each pair|part"):
            resolve(Plan(keep={"blocks.*.head_dim": torn}), llama)


def test_names_of_dropped_blocks_are_ignored(gpt2):
    plan = Plan(keep={"blocks.1.ffn": (0,), "blocks.1.whatever": (0,)}, blocks={"": (0, 2)})
    resolve(plan, gpt2)


def test_keeping_everything_moves_nothing(gpt2):
    cut = resolve(Plan(keep={"hidden": tuple(range(32))}), gpt2)
    assert cut.indices == {}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(keep={"hiden": (0,)}), "no dimension is called 'hiden'; did you mean 'hidden'"),
        (Plan(keep={"blocks.9.ffn": (0,)}), "no dimension is called 'blocks.9.ffn'"),
        (Plan(keep={"hidden": ()}), "'hidden' keeps nothing"),
        (Plan(keep={"hidden": (0, 32)}), "'hidden' keeps index 32, but its indices run from 0 to 31"),
        (Plan(keep={"hidden": (-1,)}), "keeps index -1"),
        (Plan(keep={"hidden": (3, 3)}), "keeps an index twice"),
        (Plan(blocks={"": (1, 0)}), "must ascend"),
        (Plan(blocks={"": (0, 0)}), "must ascend"),
        (Plan(blocks={"": (0, 7)}), "run from 0 to 2"),
        (Plan(blocks={"": ()}), "at least one block"),
        (Plan(blocks={"encoder": (0,)}), "no stack is called 'encoder'"),
        (Plan(drop=("blocks.0.atention",)), "did you mean 'blocks.0.attention'"),
    ],
)
def test_what_the_model_does_not_admit(gpt2, plan, message):
    with pytest.raises(CutError, match=message):
        resolve(plan, gpt2)


def test_a_locked_dimension_says_what_locks_it(graph):
    text = """(float[B, 12] x) => (float[B, 12] y) <float[7, 12] w, int64[2] two = {0, 3}>
        { a = Gather(w, two)  b = ReduceSum(a)  y = Mul(x, b) }"""
    analysis = analyse(graph(text))
    locked = next(dimension for dimension in analysis.dimensions if dimension.locked)
    with pytest.raises(CutError, match=rf"cannot cut '{locked.name}' \(7\): Gather node"):
        resolve(Plan(keep={locked.name: (0, 3)}), analysis)


def test_fewer_experts_than_the_graph_picks(graph):
    text = """(float[S, 12] x) => (float[S, 3] y) <float[12, 7] router, int64[1] three = {3}>
        { h = MatMul(x, router)  y, i = TopK(h, three) }"""
    analysis = analyse(graph(text))
    name = next(dimension.name for dimension in analysis.dimensions if dimension.size == 7)
    resolve(Plan(keep={name: (0, 2, 5)}), analysis)
    with pytest.raises(CutError, match="keeps 2, but the graph picks the top 3"):
        resolve(Plan(keep={name: (0, 2)}), analysis)


def test_a_part_of_one_entry_cannot_be_dropped():
    """As what lies before a slice: it has no atom of its own that could be cut."""
    axis = total((Axis((1, 1)), Axis((11, 11))))
    dimension = Dimension("tokens", 12, "free", (axis,))
    assert [picks.tolist() for _, picks in project(axis, np.array([0, 3, 5]), dimension, "tokens")] == [[2, 4]]
    with pytest.raises(CutError, match="drops a whole part of 12"):
        project(axis, np.array([3, 5]), dimension, "tokens")


# index vectors --------------------------------------------------------------------------------------------------


def test_index_vectors_of_products_and_sums(graph):
    text = """(float[B, 4] x) => (float[B, 4] y)
        <float[4, 30] w, float[30, 4] v, int64[2] parts = {12, 18}, int64[3] h = {0, 6, 3}>
        { qk = MatMul(x, w)  q, k = Split <axis = 1> (qk, parts)  r = Reshape(k, h)  t = Tanh(r)  f = Flatten(t)
          c = Concat <axis = 1> (q, f)  y = MatMul(c, v) }"""
    analysis = analyse(graph(text))
    fused = find(analysis.typing.types["qk"][1])
    six = next(leaf for leaf in leaves(fused) if leaf.size[0] == 6)
    name = next(d.name for d in analysis.dimensions if six in [find(axis) for axis in d.axes])
    cut = resolve(Plan(keep={name: (5, 1)}), analysis)
    assert cut.picks(fused).tolist() == [*range(12), *range(12 + 15, 12 + 18), *range(12 + 3, 12 + 6)]
    assert cut.size(fused) == (18, 18)
