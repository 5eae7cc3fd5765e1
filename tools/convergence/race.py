"""The race of one task: which trainings are needed, run by several processes, the missing ones only."""

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console

import graphclone
from convergence.arms import Arm
from convergence.children import Built, Nursery
from convergence.ledger import Ledger, digest
from convergence.settings import Setting
from convergence.tasks import open_task
from convergence.training import Job, run

EVALUATION = 30  # what loading and measuring a child costs, in training steps


@dataclass(frozen=True)
class Results:
    """What a race measured. untrained: a record per seed; trained: {budget: a record per seed, at the chosen rate}."""

    task: str
    title: str
    unit: str
    batch_tokens: int
    parent_loss: float
    rates: tuple[float, ...]
    arms: tuple[Arm, ...]
    built: dict[str, Built]
    untrained: dict[str, list[dict]]
    trained: dict[str, dict[int, list[dict]]]


class Race:
    """One task: its parent, its children, its trainings."""

    def __init__(
        self,
        name: str,
        setting: Setting,
        arms: tuple[Arm, ...],
        folder: Path,
        device: str,
        workers: int,
        console: Console,
    ):
        self.task = open_task(name, folder, device)
        self.setting = setting
        self.arms = tuple(arm for arm in arms if self.task.distillable or not arm.distil)
        self.folder, self.device, self.workers, self.console = folder, device, workers, console
        self.ledger = Ledger(folder / "runs.jsonl")
        self.rates = self.task.rates[: setting.rates]
        self.children: dict[tuple[str, int], Built] = {}
        self._fingerprint = ""

    # what runs --------------------------------------------------------------------------------------------------

    def run(self, train: bool = True) -> None:
        """Make the parent and the children, then train: first every rate with seed 0, then the best with the others."""
        if not self.task.parent_path.exists():
            self.task.make_parent(self.setting.parent_steps, self._say)
        nursery = Nursery(self.task)
        self._fingerprint = nursery.parent.fingerprint
        cut = (self._built(arm, nursery) for arm in self.arms)
        self.arms = tuple(arm for arm in cut if arm is not None)
        if not train:
            return
        pairs = [(arm, budget) for arm in self.arms for budget in self._budgets(arm)]
        first = [self._job(arm, budget, rate, 0) for arm, budget in pairs for rate in self.rates]
        self._finish([*self._untrained(), *first])
        best = ((arm, budget, self.best_rate(arm, budget)) for arm, budget in pairs)
        seeds = range(1, self.setting.seeds)
        self._finish([self._job(arm, budget, rate, seed) for arm, budget, rate in best if rate for seed in seeds])

    def _built(self, arm: Arm, nursery: Nursery) -> Arm | None:
        """Cut an arm's children; return the arm as it was cut, None where the parent refuses its pipeline."""
        for seed in range(self.setting.seeds) if arm.pipeline else ():
            try:
                self.children[arm.name, seed] = nursery.build(arm, seed)
            except graphclone.GraphcloneError as error:
                if arm.otherwise is not None:
                    self._say(f"{self.task.name}: '{arm.name}' goes without a pass: {error}")
                    return self._built(replace(arm, pipeline=arm.otherwise, otherwise=None), nursery)
                self._say(f"{self.task.name}: '{arm.name}' is left out: {error}")
                return None
        return arm

    def _budgets(self, arm: Arm) -> list[int]:
        budgets = self.setting.budgets if arm.main else self.setting.side_budgets
        return [budget for budget in budgets if budget]

    def _untrained(self) -> list[Job]:
        return [self._job(arm, 0, 0.0, seed) for arm in self.arms for seed in range(self.setting.seeds)]

    def _job(self, arm: Arm, budget: int, rate: float, seed: int) -> Job:
        built = self.children.get((arm.name, seed))
        child = built.path if built else None
        return Job(self.task.name, str(self.folder), self.device, arm, child, budget, rate, seed)

    def _finish(self, jobs: Iterable[Job]) -> None:
        """Run the jobs that the ledger lacks, the long ones first, so that no process waits at the end."""
        missing = {self._key(job): job for job in jobs if self.ledger.get(self._key(job)) is None}
        if not missing:
            return
        order = sorted(missing.items(), key=lambda item: (item[1].steps > 0, -item[1].steps))
        began, work, done = time.perf_counter(), sum(job.steps + EVALUATION for _, job in order), 0
        for key, job, measured in self._run(order):
            self._note(key, job, measured)
            done += job.steps + EVALUATION
            left = (time.perf_counter() - began) * (work - done) / done
            self._say(f"{self._line(key)}   [{done / work:.0%}, about {left / 60:.0f} min left]")

    def _run(self, order: list[tuple[str, Job]]) -> Iterator[tuple[str, Job, dict]]:
        """Yield what each job measured as it ends; without workers in this process."""
        if not self.workers:
            yield from ((key, job, run(job)) for key, job in order)
            return
        with ProcessPoolExecutor(min(self.workers, len(order)), mp_context=get_context("spawn")) as pool:
            running = {pool.submit(run, job): (key, job) for key, job in order}
            try:
                for future in as_completed(running):
                    yield *running[future], future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _key(self, job: Job) -> str:
        text = job.arm.text(self.task.layers, self.task.widths)
        recipe = (text, job.arm.optimiser, job.arm.distil, job.arm.calibration if text else 0)
        return digest(self._fingerprint, recipe, job.steps, job.rate, job.seed)

    def _note(self, key: str, job: Job, measured: dict) -> None:
        what = {"task": job.task, "arm": job.arm.name, "steps": job.steps, "rate": job.rate, "seed": job.seed}
        recipe = {"pipeline": job.arm.text(self.task.layers, self.task.widths), "optimiser": job.arm.optimiser}
        when = datetime.now(UTC).isoformat(timespec="seconds")
        self.ledger.add({"key": key, **what, **recipe, **measured, "device": job.device, "when": when})

    def _line(self, key: str) -> str:
        record = self.ledger.records[key]
        loss = f"{record['choose']['loss']:.4f} / {record['report']['loss']:.4f}"
        training = f"{record['steps']:>5} steps at {record['rate']:<7g} seed {record['seed']}"
        return f"{record['task']} {record['arm']:<24} {training}: {loss}"

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    # what came out ----------------------------------------------------------------------------------------------

    def best_rate(self, arm: Arm, budget: int) -> float | None:
        """Return the rate with the lowest loss on the split to choose by, seed 0; None where nothing was trained."""
        found = {}
        for rate in self.rates:
            record = self.ledger.get(self._key(self._job(arm, budget, rate, 0)))
            if record is not None:
                found[rate] = record["choose"]["loss"]
        return min(found, key=found.get) if found else None

    def results(self) -> Results:
        """Return the measurements that the ledger holds of this race."""
        untrained, trained = {}, {}
        for arm in self.arms:
            untrained[arm.name] = self._records(arm, 0, 0.0)
            rates = {budget: self.best_rate(arm, budget) for budget in self._budgets(arm)}
            trained[arm.name] = {budget: self._records(arm, budget, rate) for budget, rate in rates.items() if rate}
        metadata = Nursery(self.task).parent.metadata
        return Results(
            task=self.task.name,
            title=self.task.title,
            unit=self.task.unit,
            batch_tokens=self.task.batch_tokens,
            parent_loss=float(metadata["validation_loss"]),
            rates=tuple(sorted(self.rates)),
            arms=self.arms,
            built={name: built for (name, seed), built in self.children.items() if seed == 0},
            untrained=untrained,
            trained=trained,
        )

    def _records(self, arm: Arm, budget: int, rate: float) -> list[dict]:
        keys = (self._key(self._job(arm, budget, rate, seed)) for seed in range(self.setting.seeds))
        return [record for key in keys if (record := self.ledger.get(key)) is not None]
