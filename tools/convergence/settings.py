"""Settings: how much of the benchmark runs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """Tasks, arms (patterns), budgets in training steps, seeds, how many of a task's learning rates, parent's steps.

    side_budgets: those of the arms that change one thing only; `budgets` are those of the main arms.
    """

    tasks: tuple[str, ...]
    arms: tuple[str, ...]
    budgets: tuple[int, ...]
    side_budgets: tuple[int, ...]
    seeds: int
    rates: int
    parent_steps: int


SETTINGS = {
    "small": Setting(
        tasks=("gpt", "vit"),
        arms=("random", "random, Muon", "paper", "Weight Selection", "refit", "best"),
        budgets=(50, 100, 200, 400),
        side_budgets=(200,),
        seeds=1,
        rates=2,
        parent_steps=1500,
    ),
    "full": Setting(
        tasks=("gpt", "vit", "minilm"),
        arms=("*",),
        budgets=(50, 100, 200, 400, 800, 1600, 3200),
        side_budgets=(200, 800),
        seeds=3,
        rates=4,
        parent_steps=6000,
    ),
}
