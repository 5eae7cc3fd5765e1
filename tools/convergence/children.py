"""Children: cut from the parent by an arm's pipeline, timed, and kept in the run directory."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

import graphclone
from convergence.arms import Arm
from convergence.ledger import digest
from convergence.task import Task
from graphclone.model import Model


@dataclass(frozen=True)
class Built:
    """A child on disk, and what it cost: seconds of calibration and of the passes; `notes` are the passes' lines."""

    path: str
    calibration_seconds: float
    solve_seconds: float
    notes: tuple[str, ...] = ()


class Nursery:
    """Cut children of one task; the parent's statistics are measured once per seed and number of sequences."""

    def __init__(self, task: Task):
        self.task = task
        self._parent: Model | None = None
        self._statistics: dict[tuple, tuple] = {}

    @property
    def parent(self) -> Model:
        self._parent = self._parent or graphclone.load(self.task.parent_path)
        return self._parent

    def build(self, arm: Arm, seed: int) -> Built:
        """Return the arm's child for a seed, from the run directory where it is there."""
        text = arm.text(self.task.layers, self.task.widths)
        stem = digest(self.parent.fingerprint, text, arm.calibration, seed)
        path = self.task.folder / "children" / f"{self.task.name}-{stem}.onnx"
        record = path.with_suffix(".json")
        if record.exists():
            return Built(**json.loads(record.read_text()))
        batches, stats, seconds = self._calibrated(arm.calibration, seed)
        began = time.perf_counter()
        result = graphclone.Pipeline.parse(text).run(self.parent, stats, data=batches, seed=seed)
        solved = time.perf_counter() - began
        path.parent.mkdir(parents=True, exist_ok=True)
        result.child.save(path)
        built = Built(str(path), seconds, solved, result.notes)
        record.write_text(json.dumps(asdict(built)))
        return built

    def _calibrated(self, sequences: int, seed: int) -> tuple:
        if (sequences, seed) not in self._statistics:
            batches = self.task.calibration(sequences, seed)
            began = time.perf_counter()
            stats = graphclone.calibrate(self.parent, batches, progress=False)
            self._statistics[sequences, seed] = (batches, stats, time.perf_counter() - began)
        return self._statistics[sequences, seed]


def newborn(task: Task, child: str | Path | None, seed: int) -> nn.Module:
    """Return a child ready to train; without a file, the framework's own random weights, drawn with the seed."""
    torch.manual_seed(seed)
    if child is None:
        return task.fresh().to(task.device)
    return graphclone.to_torch(graphclone.load(child)).to(task.device)
