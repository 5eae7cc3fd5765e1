"""Measure how many training steps a child saves, by how its first weights were made.

    ./tools/bench_convergence                        # the small setting: ten minutes on two idle CPU cores
    ./tools/bench_convergence --setting full         # every arm, three tasks, three seeds: hours, or a GPU
    ./tools/bench_convergence --tasks gpt --arms paper "refit*" "mine=depth{layers=$layers},width{$widths},refit" random

Every arm gets the same grid of learning rates and, for each budget of steps, a cosine schedule of its own. The rate is
chosen on one split with seed 0; all seeds then train with it, and the tables show another split. Each finished training
is a line of runs.jsonl in the run directory: what is there is not trained again.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path

import torch
from convergence.arms import chosen
from convergence.race import Race
from convergence.report import write_report
from convergence.settings import SETTINGS, Setting
from convergence.tasks import TASKS
from rich.console import Console


def options_and_setting(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Setting]:
    """Read the command line; what is given there replaces the setting's own."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setting", choices=SETTINGS, default="small")
    parser.add_argument("--tasks", nargs="+", choices=TASKS)
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="patterns of names, or NAME=PIPELINE")
    parser.add_argument("--budgets", nargs="+", type=int, metavar="STEPS", help="0 measures the untrained child alone")
    parser.add_argument("--side-budgets", nargs="+", type=int, metavar="STEPS", help="of arms that change one thing")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--rates", type=int, help="how many of each task's learning rates")
    parser.add_argument("--parent-steps", type=int)
    parser.add_argument("--out", type=Path, default=Path("bench-output"), help="the run directory")
    parser.add_argument(
        "--workers", type=int, default=max(1, os.cpu_count() or 1), help="trainings at a time; 0: in this process"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--report-only", action="store_true", help="write tables and plots of what is there")
    options = parser.parse_args(arguments)
    options.side_budgets = options.side_budgets or options.budgets
    names = ("tasks", "arms", "budgets", "side_budgets", "seeds", "rates", "parent_steps")
    given = {name: getattr(options, name) for name in names}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v is not None}
    return options, replace(SETTINGS[options.setting], **given)


def main(arguments: list[str] | None = None) -> None:
    options, setting = options_and_setting(arguments)
    console = Console()
    arms = chosen(list(setting.arms))
    for name in setting.tasks:
        race = Race(name, setting, arms, options.out.resolve(), options.device, options.workers, console)
        race.run(train=not options.report_only)
        write_report(race.results(), options.out, console)


if __name__ == "__main__":
    main()
