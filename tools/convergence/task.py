"""Tasks: what a parent learnt and its children are to learn, behind one face."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

REPOSITORY = Path(__file__).resolve().parent.parent.parent
TEMPERATURE = 2.0

Say = Callable[[str], None]


def data_file(name: str) -> Path:
    """Return the path of a data file: in $GRAPHCLONE_DATA, else in ../shared/data. Raises: SystemExit."""
    folders = [os.environ.get("GRAPHCLONE_DATA"), REPOSITORY.parent / "shared" / "data"]
    for folder in folders:
        if folder and (path := Path(folder) / name).exists():
            return path
    raise SystemExit(f"no {name}; set GRAPHCLONE_DATA to the folder that holds it")


class Task(ABC):
    """One parent, its data, and the size of its children.

    layers, widths: the targets that arms fill into their pipelines. rates: learning rates, the likelier ones first.
    outer: parts of parameter names that Muon leaves to AdamW (embeddings and the head). unit: of the loss.
    batch_tokens: tokens of one training step. parent_path: the ONNX file, once `make_parent` has run.
    """

    name: str
    title: str
    layers: int
    widths: str
    rates: tuple[float, ...]
    outer: tuple[str, ...]
    unit: str
    batch_tokens: int
    distillable = True

    def __init__(self, folder: Path, device: str = "cpu"):
        self.folder = folder
        self.device = device
        self.parent_path = folder / "parents" / f"{self.name}.onnx"
        self._held: dict[str, list] = {}

    @abstractmethod
    def make_parent(self, steps: int, say: Say) -> None:
        """Train the parent and write it as ONNX, with `validation_loss` among its metadata."""

    @abstractmethod
    def calibration(self, sequences: int, seed: int) -> list[dict[str, np.ndarray]]:
        """Return feeds of the parent from the training data, about `sequences` x 128 tokens."""

    @abstractmethod
    def fresh(self) -> nn.Module:
        """Return the child's architecture as the framework writes it, with the framework's own random weights."""

    @abstractmethod
    def batch(self, generator: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
        """Draw one training batch: inputs and target."""

    @abstractmethod
    def batches(self, split: str) -> list[tuple[tuple[Tensor, ...], Tensor]]:
        """Return the batches of a split, always the same: `choose` to pick learning rates on, `report` for results."""

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats; outputs [..., classes], target [...]."""
        return F.cross_entropy(outputs.flatten(0, -2), target.flatten())

    def taught(self, outputs: Tensor, target: Tensor, taught: Tensor) -> Tensor:
        """Return half the loss and half the divergence from the parent's outputs (Hinton et al., arXiv 1503.02531)."""
        student, teacher = (F.log_softmax(x.flatten(0, -2) / TEMPERATURE, -1) for x in (outputs, taught))
        divergence = F.kl_div(student, teacher, log_target=True, reduction="batchmean") * TEMPERATURE**2
        return 0.5 * self.loss(outputs, target) + 0.5 * divergence

    def accuracy(self, outputs: Tensor, target: Tensor) -> float | None:
        """Return the share of right answers, where the task counts them."""
        return None

    @torch.no_grad()
    def evaluate(self, module: nn.Module, split: str) -> dict[str, float]:
        """Return the mean loss over a split, and the accuracy where there is one."""
        module.eval()
        sums: dict[str, float] = {}
        count = 0
        if split not in self._held:
            self._held[split] = self.batches(split)
        for inputs, target in self._held[split]:
            outputs = module(*inputs)
            measured = {"loss": self.loss(outputs, target).item(), "accuracy": self.accuracy(outputs, target)}
            for name, value in measured.items():
                if value is not None:
                    sums[name] = sums.get(name, 0.0) + value * len(target)
            count += len(target)
        module.train()
        return {name: total / count for name, total in sums.items()}
