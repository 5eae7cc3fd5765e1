"""The report of a race: a CSV of every training, tables in Markdown, plots as PNG and SVG."""

import csv
import json
import math
import platform
from pathlib import Path

import torch
from rich.console import Console
from rich.markdown import Markdown

from convergence.figures import Curve, equivalent, has_multiple, ratio, smallest_budget
from convergence.plots import draw
from convergence.race import Results

MULTIPLES = (4, 8, 16)
REFERENCES = ("random", "paper")


def write_report(results: Results, folder: Path, console: Console) -> None:
    """Write TASK.md, TASK.csv, TASK.png and TASK.svg into the run directory, and runs.csv of everything there."""
    text = "\n\n".join(
        (
            f"# {results.title}",
            _preface(results),
            losses_table(results),
            *(budgets_table(results, arm) for arm in REFERENCES),
            costs_table(results),
        )
    )
    (folder / f"{results.task}.md").write_text(text + "\n")
    _write_csv(results, folder / f"{results.task}.csv")
    _write_runs(folder)
    draw(results, folder / results.task)
    console.print(Markdown("\n\n".join((f"# {results.title}", _preface(results), losses_table(results)))))
    console.print(f"{folder}/: {results.task}.md, .csv, .png, .svg, runs.csv")


def losses(records: list[dict]) -> list[float]:
    return [record["report"]["loss"] for record in records]


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def curve_of(results: Results, arm: str) -> Curve:
    """Return {budget: mean loss over seeds on the split to report}."""
    return {budget: mean(losses(records)) for budget, records in results.trained[arm].items() if records}


def _preface(results: Results) -> str:
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"
    seeds = max((len(records) for curve in results.trained.values() for records in curve.values()), default=1)
    rates = ", ".join(f"{rate:g}" for rate in results.rates)
    when = max((r["when"] for curve in results.untrained.values() for r in curve), default="")[:10]
    return (
        f"Loss in {results.unit}; the parent's is {results.parent_loss:.3f}. Steps of {results.batch_tokens:,} tokens. "
        f"Learning rates {rates}; {seeds} seed{'s' if seeds > 1 else ''}; {machine}; {when}."
    )


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def losses_table(results: Results) -> str:
    """Return the loss at each budget: mean, and half the range over seeds where there are several."""
    budgets = sorted({budget for curve in results.trained.values() for budget in curve})
    rows = []
    for arm in results.arms:
        cells = [losses(results.untrained[arm.name]), *(losses(results.trained[arm.name].get(b, [])) for b in budgets)]
        row = [arm.name, *map(_spread, cells)]
        if "accuracy" in next((r["report"] for r in results.untrained[arm.name]), {}):
            last = results.trained[arm.name].get(budgets[-1], []) if budgets else []
            row.append(f"{mean([r['report']['accuracy'] for r in last]):.3f}" if last else "")
        rows.append(row)
    heads = ["loss after steps", "0", *map(str, budgets)]
    if rows and len(rows[0]) > len(heads):
        heads.append(f"accuracy after {budgets[-1] if budgets else 0}")
    return _table(heads, rows)


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    shown = f"{mean(values):.3f}" if mean(values) < 1e3 else "diverged"
    return shown if len(values) == 1 else f"{shown} ± {(max(values) - min(values)) / 2:.3f}"


def budgets_table(results: Results, reference: str) -> str:
    """Return what each arm saves against another: at each budget, and the smallest budget worth so many times more."""
    if reference not in results.trained or not curve_of(results, reference):
        return ""
    against = curve_of(results, reference)
    budgets = sorted(against)
    heads = [f"steps of '{reference}' to the same loss", "untrained", *map(str, budgets)]
    heads += [f"smallest budget worth {multiple}x" for multiple in MULTIPLES]
    rows = []
    for arm in results.arms:
        curve = curve_of(results, arm.name)
        if not curve:
            continue
        start = losses(results.untrained[arm.name])
        row = [arm.name, str(equivalent(against, mean(start))) if start else ""]
        for budget in budgets:
            if budget not in curve:
                row.append("")
                continue
            times = ratio(curve, against, budget)
            row.append(f"{'' if times.bound == '=' else times.bound}{times.steps:.1f}x")
        for multiple in MULTIPLES:
            smallest = smallest_budget(curve, against, multiple)
            missing = "none" if has_multiple(curve, against, multiple) else "not measured"
            row.append(str(smallest) if smallest else missing)
        rows.append(row)
    return _table(heads, rows)


def costs_table(results: Results) -> str:
    """Return the parameters of each child and the seconds its weights took."""
    rows = []
    for arm in results.arms:
        built = results.built.get(arm.name)
        records = results.untrained[arm.name]
        size = f"{records[0]['parameters']:,}" if records else ""
        seconds = [f"{built.calibration_seconds:.1f}", f"{built.solve_seconds:.1f}"] if built else ["", ""]
        rates = {b: records[0]["rate"] for b, records in results.trained[arm.name].items() if records}
        text = arm.pipeline or "the framework's own"
        rows.append([arm.name, size, *seconds, ", ".join(f"{b}: {r:g}" for b, r in sorted(rates.items())), f"`{text}`"])
    return _table(["arm", "parameters", "calibration, s", "passes, s", "best rate per budget", "weights"], rows)


def _write_csv(results: Results, path: Path) -> None:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["task", "arm", "steps", "seeds", "rate", "loss", "lowest", "highest", "accuracy"])
        for arm in results.arms:
            for budget, records in {0: results.untrained[arm.name], **results.trained[arm.name]}.items():
                values = losses(records)
                if values:
                    right = [r["report"]["accuracy"] for r in records if "accuracy" in r["report"]]
                    spread = [mean(values), min(values), max(values), mean(right) if right else ""]
                    table.writerow([results.task, arm.name, budget, len(values), records[0]["rate"], *spread])


def _write_runs(folder: Path) -> None:
    """Write every line of runs.jsonl as a row, learning rates that were not chosen included."""
    with (folder / "runs.csv").open("w", newline="") as file:
        table = csv.writer(file)
        names = ["task", "arm", "optimiser", "steps", "rate", "seed", "parameters", "seconds", "device", "when"]
        names.append("pipeline")
        table.writerow([*names, "loss_choose", "loss_report", "accuracy_report"])
        for line in (folder / "runs.jsonl").read_text().splitlines() if (folder / "runs.jsonl").exists() else ():
            record = json.loads(line)
            measured = [record["choose"]["loss"], record["report"]["loss"], record["report"].get("accuracy", "")]
            table.writerow([*(record[name] for name in names), *measured])
