"""Judge a model as PyTorch: the module's outputs against onnxruntime's, its gradients, and its standalone source."""

import importlib.util
import sys
import tempfile

import numpy as np
import torch

from graphclone.analysis import Analysis
from graphclone.errors import GraphcloneError
from graphclone.model import Model
from graphclone.pytorch import to_torch, write_torch
from graphclone.verify.running import difference, first_run

Outputs = dict[str, np.ndarray]
TOLERANCE = 1e-5


def judge(model: Model, analysis: Analysis, tolerance: float = TOLERANCE) -> dict:
    """Return the worst relative difference from onnxruntime over two sizes of batch and sequence, and what fails.

    What fails: outputs that are off, Parameters whose gradient is no number or missing at both sizes, source that
    computes something else than the module.
    """
    try:
        return _judged(model, analysis, tolerance)
    except (GraphcloneError, RuntimeError, ValueError, TypeError, KeyError) as error:
        return {"worst": None, "bad": [f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"]}


def _judged(model: Model, analysis: Analysis, tolerance: float) -> dict:
    module = to_torch(model)
    names = [tensor.name for tensor in model.outputs]
    _, probes, wanted = first_run(model, analysis)
    given = [outputs_of(module, model, feeds) for feeds in probes]
    worst = max(difference(dict(zip(names, got, strict=True)), want) for got, want in zip(given, wanted, strict=True))
    bad = [] if worst <= tolerance else [f"outputs differ by {worst:.1e}"]
    bad += gradients(module, model, probes)
    bad += standalone(module, model, probes, given)
    return {"worst": worst, "bad": bad, "parameters": len(list(module.parameters()))}


def tensors(model: Model, feeds: Outputs) -> list[torch.Tensor]:
    """Return the inputs in the graph's order."""
    return [torch.from_numpy(np.array(feeds[tensor.name])) for tensor in model.inputs]


def several(outputs) -> list[torch.Tensor]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


@torch.no_grad()
def outputs_of(module: torch.nn.Module, model: Model, feeds: Outputs) -> list[np.ndarray]:
    return [output.numpy() for output in several(module(*tensors(model, feeds)))]


def gradients(module: torch.nn.Module, model: Model, probes: list[Outputs]) -> list[str]:
    """Return the Parameters without a gradient, and those whose gradient holds NaN or infinity."""
    for feeds in probes:
        generator = torch.Generator().manual_seed(0)
        outputs = [each for each in several(module(*tensors(model, feeds))) if each.requires_grad]
        if outputs:
            sum((each * torch.randn(each.shape, generator=generator)).sum() for each in outputs).backward()
    parameters = dict(module.named_parameters())
    missing = [name for name, parameter in parameters.items() if parameter.grad is None]
    infinite = [name for name, each in parameters.items() if name not in missing and not each.grad.isfinite().all()]
    bad = [f"no gradient for {len(missing)} parameters, first {missing[0]}"] if missing else []
    return bad + ([f"gradients of {len(infinite)} parameters are no numbers, first {infinite[0]}"] if infinite else [])


def standalone(module: torch.nn.Module, model: Model, probes: list[Outputs], given: list) -> list[str]:
    """Write the source and the weights, load them, and return how they differ from the module."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_torch(model, folder) / "model.py"
        spec = importlib.util.spec_from_file_location("survey_standalone", path)
        source = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = source
        try:
            spec.loader.exec_module(source)
            written = source.load()
            names = set(written.state_dict()) ^ set(module.state_dict())
            for feeds, want in zip(probes, given, strict=True):
                have = outputs_of(written, model, feeds)
                if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(have, want, strict=True)):
                    return ["the source computes something else"]
        finally:
            del sys.modules[spec.name]
    return [f"the source's names differ: {sorted(names)[0]}"] if names else []
