"""Modules: run generated source and give it the model's weights."""

import hashlib
import linecache
import sys
import types

import ml_dtypes
import numpy as np
import torch

from graphclone.errors import InputError
from graphclone.model import Model
from graphclone.pytorch.checkpoints import Checkpoint
from graphclone.pytorch.conversion import convert
from graphclone.pytorch.initialization import initialize, norm_vectors
from graphclone.pytorch.parameters import Stored
from graphclone.pytorch.source import Source, write_source

VIEWS = {
    np.dtype(ml_dtypes.bfloat16): (np.int16, torch.bfloat16),
    np.dtype(ml_dtypes.float8_e4m3fn): (np.uint8, torch.float8_e4m3fn),
    np.dtype(ml_dtypes.float8_e5m2): (np.uint8, torch.float8_e5m2),
}


def to_torch(
    model: Model,
    *,
    dropout: float = 0.0,
    checkpoint_blocks: bool = False,
    init: str | None = None,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
) -> torch.nn.Module:
    """Return the model as a module that trains, under the framework's own parameter names.

    Its `forward` takes the graph's inputs in order and returns its output, or a tuple of them; `input_names` and
    `output_names` are what the graph calls them. A cache is inputs and outputs like others: pass what was returned on.
    `source` is the text it runs, `report` lists what was doubtful: parameters whose role or name is a guess, those the
    graph lacks, and those the checkpoint has with other values.

    Learned positions train; sinusoids are parameters without gradient, as frameworks list them; other tables are
    buffers.

    An If is a Python `if`, and both of its ways share one set of weights; `torch.compile` and `torch.export` follow it
    where its input (`use_cache_branch`) is given as a Python bool instead of a tensor.

    dropout: rate to put back where transformers drop in training: embeddings, attention weights, residual branches.
    checkpoint_blocks: whether blocks compute their activations again in the backward pass, which saves memory.
    init: "random" for fresh weights of the same shapes, drawn with `seed`; None keeps the model's.
    checkpoint: the framework's state dict, a .safetensors file or a folder of them, to recover lost names by value.
        Weights that the exporter computed from its tensors, as exp(logit_scale), are computed anew from those (running
        statistics of a batch norm stay what they are); what the graph lacks is kept for the state dict as buffers, and
        as parameters that nothing reads and that take no gradient. A model of other sizes than the checkpoint's keeps
        nothing that it lacks. Buffers are told from parameters by a folder's config, where transformers knows its
        class, or a state dict of `keep_vars=True`. The module has the graph's types: one in 16 bits takes a
        checkpoint's fp32 numbers by `module.float().load_state_dict(checkpoint)`.

    Raises: InputError that lists every operator without a PyTorch rule.

    Example:
        >>> to_torch(encoder).table.shape
        torch.Size([23, 6])
    """
    if not 0.0 <= dropout < 1.0:
        raise InputError(f"dropout={dropout} is no rate; write a number from 0 up to but without 1")
    converted = convert(model, dropout, checkpoint)
    source = write_source(converted, f"{model.graph.name or 'model'}, from ONNX", checkpoint_blocks)
    if checkpoint_blocks and "checkpoint(" not in source.text:
        raise InputError("checkpoint_blocks=True needs repeated blocks, and this graph has none; leave it out")
    scope = run(source.text)
    with torch.device("meta"):
        module = scope.Model()
    scope.fill(module, tensors(source))
    if init is not None:
        places = source.tree.slots
        starts = norm_vectors(converted.program).items()
        norms = {".".join(slot.path): start for stored, start in starts for slot in places[stored]}
        initialize(module, init, seed, norms)
    module.input_names = [tensor.name for tensor in model.inputs]
    module.output_names = converted.outputs
    module.source = source.text
    module.report = converted.report
    return module


def run(text: str) -> types.ModuleType:
    """Execute generated source as a module of its own, so that its classes can be copied and pickled."""
    name = f"graphclone_generated_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    module = types.ModuleType(name)
    module.__file__ = f"<{name}>"
    linecache.cache[module.__file__] = (len(text), None, text.splitlines(keepends=True), module.__file__)
    sys.modules[name] = module
    try:
        exec(compile(text, module.__file__, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def tensors(source: Source) -> dict[str, torch.Tensor]:
    """Return the stored tensors by their names in the module, in the framework's orientation."""
    return {name: to_tensor(slot.stored) for name, slot in source.tensors.items()}


def to_tensor(stored: Stored) -> torch.Tensor:
    """Load one tensor."""
    array = np.asarray(stored.weight.load())
    array = array.reshape(array.shape[stored.lead :])
    kind = VIEWS.get(array.dtype)
    if kind is not None:
        array = array.view(kind[0])
    array = array.T if stored.transposed else array
    tensor = torch.empty(array.shape, dtype=torch.from_numpy(np.empty(0, array.dtype)).dtype)
    tensor.numpy()[...] = (
        array  # into torch's own memory, which begins at a multiple of 64 bytes: kernels read it faster
    )
    return tensor if kind is None else tensor.view(kind[1])
