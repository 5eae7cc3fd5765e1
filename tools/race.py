"""Train one architecture from several starts, each at its own best learning rate, and say how soon one catches up."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from train_parent import Text, cosine, loss_of, optimiser_for, validate

RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
BATCH = 8  # windows of `context` characters
EVERY = 20  # steps between two validations; four times as often in the first 60, where curves fall fast

Start = Callable[[int], nn.Module]  # from a seed to the untrained module


@dataclass(frozen=True)
class Run:
    """One training: validation loss, nats per character, at each of `steps`, from 0 on."""

    rate: float
    seed: int
    steps: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Arm:
    """One way to start the small model, trained: a run for each rate, and for the best rate a run for each seed."""

    name: str
    searched: tuple[Run, ...]
    runs: tuple[Run, ...]

    @property
    def rate(self) -> float:
        return self.runs[0].rate

    @property
    def steps(self) -> tuple[int, ...]:
        return self.runs[0].steps

    @property
    def mean(self) -> tuple[float, ...]:
        """The validation curve, mean over seeds."""
        return tuple(np.mean([run.losses for run in self.runs], axis=0).tolist())


def steps_to(steps: tuple[int, ...], losses: tuple[float, ...], target: float) -> float | None:
    """Return the step at which a curve first reaches `target`, linear between validations; None if it never does.

    Example:
        >>> steps_to((0, 20, 40), (4.0, 3.0, 2.0), 2.5)
        30.0
    """
    for i, loss in enumerate(losses):
        if loss <= target:
            if i == 0:
                return float(steps[0])
            share = (losses[i - 1] - target) / (losses[i - 1] - loss)
            return steps[i - 1] + share * (steps[i] - steps[i - 1])
    return None


def validation_windows(text: Text, context: int, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the 64 windows of unseen text that every loss of the race is measured on, inputs and targets [64, T]."""
    inputs, targets = text.validation_windows(64, context)
    return inputs.to(device), targets.to(device)


def train(
    module: nn.Module, text: Text, context: int, rate: float, seed: int, steps: int, tick: Callable[[float], None]
) -> Run:
    """Train `module` in place on `steps` batches that depend on `seed` alone; call `tick(loss)` after each."""
    device = next(module.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    windows = validation_windows(text, context, device)
    optimiser = optimiser_for(module, rate)
    losses = {0: validate(module, windows)}
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * cosine(step, steps, warm_up=30)
        inputs, targets = text.batch(BATCH, context, generator)
        loss = loss_of(module, inputs.to(device), targets.to(device))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        done = step + 1
        if done % EVERY == 0 or (done < 60 and done % (EVERY // 4) == 0):
            losses[done] = validate(module, windows)
        tick(list(losses.values())[-1])
    return Run(rate, seed, tuple(losses), tuple(losses.values()))


def race(
    starts: dict[str, Start], text: Text, context: int, steps: int, seeds: int, console: Console
) -> tuple[list[Arm], dict[str, nn.Module]]:
    """Train every start: each rate with seed 0, then the best rate with the other seeds.

    The batches depend on the seed alone, so every arm sees the same ones. Returns the arms, and the module that each
    trained last.
    """
    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    arms, modules = [], {}
    with Progress(*columns, console=console) as progress:
        total = (len(RATES) + seeds - 1) * steps
        bars = {name: progress.add_task(name, total=total, start=False) for name in starts}
        for name, start in starts.items():
            progress.start_task(bars[name])

            def one(rate: float, seed: int, name=name, start=start) -> Run:
                def tick(loss: float) -> None:
                    progress.update(bars[name], advance=1, description=f"{name}, rate {rate:g}: {loss:.3f}")

                modules[name] = start(seed)
                return train(modules[name], text, context, rate, seed, steps, tick)

            searched = tuple(one(rate, 0) for rate in RATES)
            best = min(searched, key=lambda run: run.losses[-1])
            arm = Arm(name, searched, (best, *(one(best.rate, seed) for seed in range(1, seeds))))
            progress.update(bars[name], description=f"{name}, rate {best.rate:g}: {arm.mean[-1]:.3f}")
            arms.append(arm)
    return arms, modules


def verdict(reached: float | None, target: float, steps: int) -> str:
    """Say in one sentence what the race showed.

    Example:
        >>> verdict(200.0, 2.25, 600)
        'The subcloned child reaches loss 2.250, where the random child ends after 600 steps, in 200: 3.0 times fewer.'
    """
    where = f"loss {target:.3f}, where the random child ends after {steps} steps"
    if reached is None:
        return f"The subcloned child does not reach {where}."
    if reached == 0:
        return f"The subcloned child starts below {where}."
    return f"The subcloned child reaches {where}, in {reached:.0f}: {steps / reached:.1f} times fewer."
