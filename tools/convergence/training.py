"""Training: one child, one learning rate, one seed, one budget with a cosine schedule of its own."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn
from train_parent import cosine, optimiser_for

import graphclone
from convergence.arms import Arm
from convergence.children import newborn
from convergence.task import Task
from convergence.tasks import open_task

DECAY, WARM_UP = 0.1, 30


@dataclass(frozen=True)
class Job:
    """One training, as a worker gets it. child: an ONNX file, or None. steps: 0 measures the untrained child."""

    task: str
    folder: str
    device: str
    arm: Arm
    child: str | None
    steps: int
    rate: float
    seed: int


def run(job: Job) -> dict[str, object]:
    """Train and return the measurements of both splits: loss, accuracy where there is one, parameters, seconds."""
    if job.device == "cpu":
        torch.set_num_threads(1)
    task = _task(job.task, job.folder, job.device)
    module = newborn(task, job.child, job.seed)
    began = time.perf_counter()
    if job.steps:
        train(module, task, job)
    seconds = time.perf_counter() - began
    parameters = sum(parameter.numel() for parameter in module.parameters())
    measured = {split: _finite(task.evaluate(module, split)) for split in ("choose", "report")}
    return {**measured, "parameters": parameters, "seconds": round(seconds, 2)}


def train(module: nn.Module, task: Task, job: Job) -> None:
    """Train in place on batches that depend on the seed alone."""
    generator = torch.Generator().manual_seed(job.seed)
    optimisers = optimisers_for(module, task, job)
    teacher = _teacher(job.task, job.folder, job.device) if job.arm.distil else None
    warm_up = min(WARM_UP, job.steps // 4 + 1)
    for step in range(job.steps):
        inputs, target = task.batch(generator)
        outputs = module(*inputs)
        if teacher is None:
            loss = task.loss(outputs, target)
        else:
            with torch.no_grad():
                taught = teacher(*inputs)
            loss = task.taught(outputs, target, taught)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = job.rate * cosine(step, job.steps, warm_up)
            optimiser.step()
        module.zero_grad(set_to_none=True)


def optimisers_for(module: nn.Module, task: Task, job: Job) -> Sequence[torch.optim.Optimizer]:
    """Return AdamW for all parameters, or Muon for the matrices between embedding and head and AdamW for the rest.

    Muon (Jordan et al. 2024) with updates of AdamW's size (arXiv 2502.16982), so that one grid of rates serves both.
    """
    if job.arm.optimiser == "adamw":
        return [optimiser_for(module, job.rate, DECAY)]
    inner, rest = [], nn.Module()
    for number, (name, parameter) in enumerate(module.named_parameters()):
        if parameter.dim() == 2 and not any(part in name for part in task.outer):
            inner.append(parameter)
        else:
            rest.register_parameter(f"p{number}", parameter)
    muon = torch.optim.Muon(inner, lr=job.rate, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    return [muon, optimiser_for(rest, job.rate, DECAY)]


@cache
def _task(name: str, folder: str, device: str) -> Task:
    return open_task(name, Path(folder), device)


@cache
def _teacher(name: str, folder: str, device: str) -> nn.Module:
    return graphclone.to_torch(graphclone.load(_task(name, folder, device).parent_path)).to(device).eval()


def _finite(measured: dict[str, float]) -> dict[str, float]:
    """Let a training that diverged count as the worst possible, in numbers that JSON knows."""
    return {name: value if math.isfinite(value) else 1e9 for name, value in measured.items()}
