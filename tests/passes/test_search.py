"""Search: the blocks it drops are those whose loss changes the outputs least, judged by children cut for real."""

import itertools

import numpy as np
import pytest

import graphclone
from graphclone.analysis import analyse
from graphclone.errors import CutError, InputError
from graphclone.pipeline import Pipeline
from graphclone.plan import Plan
from graphclone.surgery import apply

zoo = pytest.importorskip("zoo")

BLOCKS = 4


def log_probabilities(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def divergence(parent, plan, outputs, samples) -> float:
    """Return KL(parent || child) in nats per token, of the child that a plan really makes."""
    child = apply(parent, plan, analyse(parent))
    pairs = zip(outputs(parent, samples), outputs(child, samples), strict=True)
    logs = [(log_probabilities(p[0].astype(np.float64)), log_probabilities(q[0].astype(np.float64))) for p, q in pairs]
    return sum((np.exp(p) * (p - q)).sum() for p, q in logs) / sum(p[..., 0].size for p, _ in logs)


def told(result) -> float:
    """Return the divergence that the pass reports."""
    (line,) = [note for note in result.notes if note.startswith("search:")]
    return float(line.split("KL to the parent ")[1].split()[0])


def test_the_first_block_to_go_is_the_one_whose_loss_costs_least(make, samples, outputs, run_pipeline):
    parent = make()
    result = run_pipeline("search{layers=3}", parent, samples)
    stays = [tuple(i for i in range(BLOCKS) if i != gone) for gone in range(BLOCKS)]
    costs = [divergence(parent, Plan(blocks={"": kept}), outputs, samples) for kept in stays]
    assert result.plan.blocks[""] == stays[int(np.argmin(costs))]
    assert told(result) == pytest.approx(min(costs), rel=1e-3)


def test_swaps_find_the_best_of_all_choices_where_greed_does_not(make, samples, outputs, run_pipeline):
    parent = make()
    choices = list(itertools.combinations(range(BLOCKS), 2))
    costs = [divergence(parent, Plan(blocks={"": kept}), outputs, samples) for kept in choices]
    greedy = run_pipeline("search{layers=2}", parent, samples)
    swapped = run_pipeline("search{layers=2 generations=6}", parent, samples)
    assert told(greedy) >= told(swapped) == pytest.approx(min(costs), rel=1e-3)


def test_half_blocks_go_by_name(make, samples, run_pipeline):
    result = run_pipeline("search{halves=2}", make(), samples)
    assert len(result.plan.drop) == 2 and all(name.endswith(".ffn") for name in result.plan.drop)


PADDED = """(float[B, T, 4] x, int64[B, T] mask) => (float[B, T, 4] y)
    <float[4, 4] a, float[4, 4] b, float[4, 4] c, float one = {1}> {
    axis = Constant<value = int64[1] {2}>()
    column = Unsqueeze(mask, axis)
    real = Cast<to = 1>(column)
    gap = Sub(one, real)
    at_padding = MatMul(x, a)
    f0 = Mul(at_padding, gap)
    x1 = Add(x, f0)
    at_tokens = MatMul(x1, b)
    f1 = Mul(at_tokens, real)
    x2 = Add(x1, f1)
    f2 = MatMul(x2, c)
    y = Add(x2, f2) }"""


def test_padding_does_not_count(graph):
    """The first block changes padding alone: it goes, though without the mask its loss costs most."""
    model = graph(PADDED)
    assert [len(stack.blocks) for stack in analyse(model).stacks] == [3]
    mask = np.zeros((2, 5), np.int64)
    mask[:, 0] = 1
    random = np.random.default_rng(0)
    data = [{"x": random.standard_normal((2, 5, 4)).astype(np.float32), "mask": mask} for _ in range(3)]
    search = Pipeline.parse("search{layers=2}")
    assert search.run(model, data=data, provider="cpu").plan.blocks[""] != (1, 2)
    result = search.run(model, data=data, provider="cpu", mask="mask")
    assert result.plan.blocks[""] == (1, 2)
    assert any("relative squared error 0 " in note for note in result.notes)


def test_as_many_tokens_are_run_as_asked_for(make, monkeypatch, run_pipeline):
    """Ten batches of 4 x 10 tokens: 81 tokens take three of them. A whole step looks at a quarter first."""
    from passes import search

    counted = []

    class Counted(search._Bench):
        def __init__(self, *given):
            super().__init__(*given)
            counted.append(len(self.feeds))

    monkeypatch.setattr(search, "_Bench", Counted)
    samples = [{"ids": np.random.default_rng(i).integers(0, 40, (4, 10))} for i in range(10)]
    for tokens in (80, 81, 4000):
        run_pipeline(f"search{{layers=3 tokens={tokens}}}", make(), samples)
    assert counted == [2, 3, 10]


def test_where_outputs_are_many_every_few_rows_are_compared(make, samples, monkeypatch, run_pipeline):
    """Ten batches of 4 x 10 rows of 40 logits, 16,000 numbers: of 4,000 to keep, every 4th row counts."""
    from passes import search

    kept = []

    class Counted(search._Bench):
        def __init__(self, *given):
            super().__init__(*given)
            kept.append([len(each) for each in self.wanted])

    monkeypatch.setattr(search, "_Bench", Counted)
    wanted = run_pipeline("search{layers=3 tokens=400}", make(), samples)
    monkeypatch.setattr(search, "NUMBERS", 4000)
    found = run_pipeline("search{layers=3 tokens=400}", make(), samples)
    assert kept == [[40] * 10, [10] * 10]
    assert found.plan.blocks == wanted.plan.blocks and told(found) == pytest.approx(told(wanted), rel=0.2)


def test_nothing_is_run_where_nothing_goes(make, run_pipeline):
    assert run_pipeline("search{layers=4}", make(), None).plan.blocks[""] == (0, 1, 2, 3)


@pytest.mark.parametrize("text, match", [
    ("search", "give layers=N blocks to keep, or halves=N"),
    ("search{layers=2 halves=1}", "give layers=N blocks to keep, or halves=N"),
    ("search{halves=1 otherwise=uniform}", "leave it out"),
    ("search{layers=2}", "give them with --data"),
])  # fmt: skip
def test_what_is_missing_is_told(make, run_pipeline, text, match):
    with pytest.raises(InputError, match=match):
        run_pipeline(text, make(), None)


@pytest.mark.parametrize("layers", [0, 5])
def test_sizes_out_of_range_are_refused(make, samples, run_pipeline, layers):
    with pytest.raises(CutError, match="layers"):
        run_pipeline(f"search{{layers={layers}}}", make(), samples)


def test_branches_that_cannot_be_switched_off_leave_the_choice_to_a_rule():
    parent = graphclone.load(zoo.export("gpt2", "fused"))
    data = [zoo.feeds("gpt2", seed=i) for i in range(2)]
    with pytest.raises(CutError, match="cannot switch off"):
        Pipeline.parse("search{layers=3}").run(parent, data=data, provider="cpu")
    result = Pipeline.parse("search{layers=3 otherwise=uniform}").run(parent, data=data, provider="cpu")
    assert result.plan.blocks == Pipeline.parse("depth{layers=3 by=uniform}").run(parent).plan.blocks
    assert any("cannot switch off" in note and "'uniform'" in note for note in result.notes)
