"""The benchmark's figures are right, its ledger survives an interruption, and two arms run from parent to plot."""

import json
import math

import bench_convergence
import pytest
from convergence import gpt, training
from convergence.arms import ARMS, chosen
from convergence.figures import Budget, equivalent, ratio, smallest_budget
from convergence.ledger import Ledger
from convergence.tasks import TASKS

from graphclone.pipeline import Pipeline, passes

REFERENCE = {50: 3.0, 100: 2.6, 200: 2.4, 400: 2.2, 800: 2.0}


def test_a_curve_needs_as_many_steps_as_itself():
    for budget, loss in REFERENCE.items():
        assert equivalent(REFERENCE, loss).steps == pytest.approx(budget)
        assert ratio(REFERENCE, REFERENCE, budget).steps == pytest.approx(1)


def test_between_budgets_steps_are_linear_in_their_logarithm():
    assert equivalent(REFERENCE, 2.3).steps == pytest.approx(math.sqrt(200 * 400))


def test_beyond_the_longest_and_the_shortest_training_only_a_bound_is_known():
    assert equivalent(REFERENCE, 1.9) == Budget(800, ">")
    assert equivalent(REFERENCE, 3.5) == Budget(50, "<")
    assert str(ratio({100: 1.9}, REFERENCE, 100)) == ">8"


def test_the_first_budget_that_reaches_a_loss_counts_where_a_curve_rises_again():
    assert equivalent({50: 2.0, 100: 2.5, 200: 1.5}, 2.0).steps == 50


def test_the_smallest_budget_compares_only_what_was_trained():
    arm = {50: 2.5, 100: 2.15, 200: 1.99}
    assert smallest_budget(arm, REFERENCE, 4) == 100
    assert smallest_budget(arm, REFERENCE, 8) is None
    assert smallest_budget({50: 2.2}, REFERENCE, 8) == 50
    assert smallest_budget({300: 1.0}, REFERENCE, 4) is None


def test_the_ledger_skips_a_line_that_was_cut_short_and_goes_on(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"key": "a", "loss": 1}\n{"key": "b", "lo')
    ledger = Ledger(path)
    assert list(ledger.records) == ["a"]
    ledger.add({"key": "c", "loss": 2})
    assert list(Ledger(path).records) == ["a", "c"]


def test_every_arm_is_a_pipeline_of_passes_that_exist():
    for arm in ARMS:
        text = arm.text(4, "hidden=48 ffn=192 heads=3")
        if text and all(name.split("{")[0] in passes() for name in text.replace("},", "};").split(";")):
            assert Pipeline.parse(text).passes


def test_an_unknown_arm_is_refused_with_those_there_are():
    with pytest.raises(SystemExit, match=r"papre.*paper"):
        chosen(["papre"])


def test_the_rate_of_every_task_covers_a_grid():
    for task in TASKS.values():
        assert len(set(task.rates)) == len(task.rates) >= 5


@pytest.fixture
def tiny(monkeypatch):
    """A parent of two blocks, so that the whole benchmark takes seconds."""
    monkeypatch.setattr(gpt, "PARENT", gpt.Config(blocks=2, hidden=32, heads=2, ffn=64, context=32))
    monkeypatch.setattr(gpt, "CHILD", gpt.Config(blocks=1, hidden=16, heads=1, ffn=32, context=32))
    monkeypatch.setattr(gpt, "WINDOWS", {"choose": 8, "report": 16})
    monkeypatch.setattr(gpt.CharacterGPT, "layers", 1)
    monkeypatch.setattr(gpt.CharacterGPT, "widths", "hidden=16 ffn=32 heads=1")
    gpt._windows.cache_clear()
    yield
    gpt._windows.cache_clear()
    training._task.cache_clear()


def test_two_arms_run_from_parent_to_plot_and_are_not_trained_again(tiny, tmp_path):
    arguments = ["--tasks", "gpt", "--arms", "random", "refit", "--budgets", "5", "10", "--rates", "1", "--seeds", "2"]
    arguments += ["--parent-steps", "20", "--device", "cpu", "--workers", "0", "--out", str(tmp_path)]
    bench_convergence.main(arguments)
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 2 * 2 * 3, "two arms, two seeds, untrained and two budgets"
    assert {record["parameters"] for record in records} == {records[0]["parameters"]}, "both arms are one architecture"
    for name in ("gpt.md", "gpt.csv", "gpt.svg", "gpt.png", "runs.csv"):
        assert (tmp_path / name).stat().st_size > 100, name
    bench_convergence.main(arguments)
    assert (tmp_path / "runs.jsonl").read_text().splitlines() == lines
