"""Probes: the few batches of the user's data that checks run on."""

from pathlib import Path

from graphclone.analysis import Analysis
from graphclone.calibration.data import open_data
from graphclone.calibration.feeds import Feeds, input_specs
from graphclone.errors import InputError
from graphclone.model import Model
from graphclone.plan import Plan
from graphclone.verify.running import first_run

COUNT = 2


def probes(data: Path | None, model: Model) -> list[Feeds] | None:
    """Return the first batches of data; None, where none is given, stands for made-up inputs."""
    return None if data is None else [batch.feeds for batch in open_data(data, model, batches=COUNT)]


def probes_of_child(data: Path | None, parent: Model, child: Model, plan: Plan) -> list[Feeds] | None:
    """Return the first batches of the parent's data if the child takes them as they are, else None."""
    same = input_specs(parent) == input_specs(child)
    return probes(data, parent) if same and not any("vocab" in name for name in plan.keep) else None


def runs(model: Model, analysis: Analysis) -> bool:
    """Tell whether onnxruntime can run a model on made-up inputs."""
    try:
        first_run(model, analysis, 0)
    except InputError:
        return False
    return True
