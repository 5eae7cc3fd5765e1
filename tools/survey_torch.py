"""Judge a model as PyTorch: the module's outputs against onnxruntime's, its gradients, and its standalone source.

Where a model computes in 16 bits or rounds activations to few, a difference in the last bit of a sum becomes a whole
step. So the copy of it that does neither is what must agree to the last digits, and the model as it is must be as near
as its rounding lets two runs of it be.
"""

import importlib.util
import sys
import tempfile

import numpy as np
import torch
from onnx import TensorProto

from graphclone.analysis import Analysis
from graphclone.errors import GraphcloneError, InputError
from graphclone.model import Model
from graphclone.precision import is_low, raised
from graphclone.pytorch import to_torch, write_torch
from graphclone.verify.rounding import rounds, unrounded
from graphclone.verify.running import difference, first_run, run

Outputs = dict[str, np.ndarray]
TOLERANCE = 1e-5
SAME = 1e-6
"""Two runs of one source are as near as this: where weights lie in memory decides in what order torch sums."""
STEPS = 8
"""How many steps of 16-bit numbers outputs may be apart, relative to the largest."""


def judge(model: Model, analysis: Analysis) -> dict:
    """Return the worst relative difference from onnxruntime over two sizes of batch and sequence, and what fails.

    What fails: outputs that are off, Parameters whose gradient is no number or missing at both sizes, source that
    computes something else than the module. `as_is` is the difference of a model that rounds, with its rounding.
    """
    try:
        return _judged(model, analysis)
    except (GraphcloneError, RuntimeError, ValueError, TypeError, KeyError) as error:
        return {"worst": None, "bad": [f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"]}


def _judged(model: Model, analysis: Analysis) -> dict:
    rounding = is_low(model) or rounds(model)
    exact = unrounded(raised(model)) if rounding else model
    _, probes, _ = first_run(exact, analysis)
    module = to_torch(exact)
    given, wanted = outputs_of(module, exact, probes), run(exact, probes)
    worst = distance(given, wanted)
    bad = [] if worst <= TOLERANCE else [f"outputs differ by {worst:.1e}"]
    found = {"worst": worst, "bad": bad, "parameters": len(list(module.parameters()))}
    if rounding:
        module = to_torch(model)
        given = outputs_of(module, model, probes)
        found["as_is"], allowed = _rounded(model, given, probes, wanted)
        bad += [] if found["as_is"] <= allowed else [f"as it is, outputs differ by {found['as_is']:.1e}"]
    bad += gradients(module, model, probes)
    bad += standalone(module, model, probes, given)
    return found


def _rounded(model: Model, given: list[Outputs], probes: list[Outputs], exact: list[Outputs]) -> tuple[float, float]:
    """Return how far the module of a model that rounds is from onnxruntime, and how far it may be.

    May be: some steps of 16 bits, or what rounding activations to few bits moves onnxruntime's own outputs by.
    """
    step = max((2.0**-10 if kind == TensorProto.FLOAT16 else 2.0**-7 for kind in _low_kinds(model)), default=0.0)
    try:
        wanted = run(model, [_typed(model, feeds) for feeds in probes])
    except InputError:  # onnxruntime has no kernels
        return distance(given, exact), STEPS * step
    wanted = [{name: _wide(array) for name, array in outputs.items()} for outputs in wanted]
    moved = distance(wanted, exact) if rounds(model) else 0.0
    return distance(given, wanted), max(TOLERANCE, STEPS * step, moved)


def _low_kinds(model: Model) -> set[int]:
    kinds = {weight.onnx_dtype for weight in model.weights.values()}
    return kinds & {TensorProto.FLOAT16, TensorProto.BFLOAT16}


def _typed(model: Model, feeds: Outputs) -> Outputs:
    """Return feeds in the types of the model's inputs."""
    return {tensor.name: np.asarray(feeds[tensor.name]).astype(tensor.dtype) for tensor in model.inputs}


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype.itemsize == 2 and array.dtype.kind not in "iub" else array


def distance(given: list[Outputs], wanted: list[Outputs]) -> float:
    return max(difference(got, want) for got, want in zip(given, wanted, strict=True))


def tensors(model: Model, feeds: Outputs) -> list[torch.Tensor]:
    """Return the inputs in the graph's order and types; numpy has no bf16 that torch takes."""
    found = []
    for tensor in model.inputs:
        array = np.array(feeds[tensor.name])
        is_float = array.dtype.kind not in "iub"
        given = torch.from_numpy(_wide(array))
        found.append(given.to(getattr(torch, str(np.dtype(tensor.dtype)))) if is_float else given)
    return found


def several(outputs) -> list[torch.Tensor]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


@torch.no_grad()
def outputs_of(module: torch.nn.Module, model: Model, probes: list[Outputs]) -> list[Outputs]:
    """Return the module's outputs for each probe, 16 bits as fp32."""
    names = [tensor.name for tensor in model.outputs]
    found = []
    for feeds in probes:
        outputs = several(module(*tensors(model, feeds)))
        wide = [each.float() if each.dtype in (torch.float16, torch.bfloat16) else each for each in outputs]
        found.append({name: each.numpy() for name, each in zip(names, wide, strict=True)})
    return found


def gradients(module: torch.nn.Module, model: Model, probes: list[Outputs]) -> list[str]:
    """Return the Parameters without a gradient, and those whose gradient holds NaN or infinity."""
    for feeds in probes:
        generator = torch.Generator().manual_seed(0)
        outputs = [each for each in several(module(*tensors(model, feeds))) if each.requires_grad]
        if outputs:
            sum((each * torch.randn(each.shape, generator=generator)).sum() for each in outputs).backward()
    parameters = {name: each for name, each in module.named_parameters() if each.requires_grad}
    missing = [name for name, parameter in parameters.items() if parameter.grad is None]
    infinite = [name for name, each in parameters.items() if name not in missing and not each.grad.isfinite().all()]
    bad = [f"no gradient for {len(missing)} parameters, first {missing[0]}"] if missing else []
    return bad + ([f"gradients of {len(infinite)} parameters are no numbers, first {infinite[0]}"] if infinite else [])


def standalone(module: torch.nn.Module, model: Model, probes: list[Outputs], given: list[Outputs]) -> list[str]:
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
            own = distance(outputs_of(written, model, probes), given)
        finally:
            del sys.modules[spec.name]
    low = SAME if not _low_kinds(model) else 2.0**-7
    bad = [f"the source computes something else: {own:.1e}"] if own > low else []
    return bad + ([f"the source's names differ: {sorted(names)[0]}"] if names else [])
