"""The tasks by name."""

from pathlib import Path

from convergence.gpt import CharacterGPT
from convergence.minilm import SentenceEncoder
from convergence.task import Task
from convergence.vit import VisionTransformer

TASKS = {task.name: task for task in (CharacterGPT, VisionTransformer, SentenceEncoder)}


def open_task(name: str, folder: Path, device: str = "cpu") -> Task:
    """Return a task whose parent and caches live in a run directory."""
    if name not in TASKS:
        raise SystemExit(f"no task is called '{name}'; there are {', '.join(TASKS)}")
    return TASKS[name](folder, device)
