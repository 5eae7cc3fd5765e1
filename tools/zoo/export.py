"""Export a family's model to ONNX by one of the routes that files in the wild come from."""

import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from zoo.families import family
from zoo.family import DYNAMIC, Family
from zoo.feeds import feeds
from zoo.variants import VARIANTS

ROUTES = ("dynamo18", "dynamo20", "dynamo23", "legacy17", "fused")
"""`dynamoN`: torch's dynamo exporter at opset N; `legacy17`: the TorchScript one; `fused`: ORT's optimizer after it."""

MODULES = ("dynamo18_fp16", "dynamo18_bf16", "legacy17_fp16", "legacy17_bf16", "legacy17_eager")
"""The same exporters on modules in 16 bits, or with attention written out."""

FAILURES: dict[tuple[str, str], str] = {
    ("falcon", "dynamo23"): "torch's Attention lowering wants as many key heads as query heads, Falcon broadcasts one",
}
"""Exports that cannot be made, and why: (family, route) -> reason."""

_ROTARY = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "mixtral", "olmoe", "qwen3_moe"),
    *("gpt_neox", "modernbert"),
)
BATCH_OF_ONE: frozenset[tuple[str, str]] = frozenset((name, "dynamo23") for name in _ROTARY)
"""Exports that onnxruntime runs at batch 1 only: its RotaryEmbedding wants cosines of the same batch."""


def cache() -> Path:
    """Return the folder of exported files, `$GRAPHCLONE_ZOO` or one in the temporary folder."""
    folder = Path(os.environ.get("GRAPHCLONE_ZOO") or Path(tempfile.gettempdir()) / "graphclone-zoo")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def export(name: str, route: str = "dynamo18", seed: int | None = None) -> Path:
    """Return the path of the family's .onnx file, exporting it if it is not cached.

    name: family.
    route: one of `ROUTES`, `MODULES` or `VARIANTS`.
    seed: of the weights; None takes the family's own.

    Raises ValueError where `FAILURES` lists the pair.
    """
    if route not in (*_ROUTES, *VARIANTS):
        raise ValueError(f"no route is called {route!r}; there are {', '.join((*_ROUTES, *VARIANTS))}")
    path = cache() / f"{name}-{route}{'' if seed is None else f'-seed{seed}'}.onnx"
    if path.exists():
        return path
    if (name, route) in FAILURES:
        raise ValueError(f"{name} cannot be exported by {route}: {FAILURES[name, route]}")
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if route in VARIANTS:
            VARIANTS[route].make(name, export(name, VARIANTS[route].base, seed), partial)
        else:
            _ROUTES[route](family(name), seed, partial)
    os.replace(partial, path)
    return path


def _axes(shape: tuple[str | int, ...]) -> dict[int, str]:
    return {position: size for position, size in enumerate(shape) if size in DYNAMIC}


Change = Callable[[torch.nn.Module], object]


def _example(given: Family, model: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    """Return inputs to trace with, floats in the module's own type."""
    dtype = next(model.parameters()).dtype
    tensors = (torch.from_numpy(array) for array in feeds(given.name, padded=True).values())
    return tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors)


def _dynamo(opset: int, change: Change = torch.nn.Module.eval):
    def write(given: Family, seed: int | None, path: Path) -> None:
        model = given.build(seed)
        change(model)
        shapes = tuple(_axes(each.shape) for each in given.inputs.values())
        program = torch.onnx.export(
            model,
            _example(given, model),
            dynamo=True,
            opset_version=opset,
            input_names=list(given.inputs),
            output_names=list(given.outputs),
            dynamic_shapes=(shapes,),
            verbose=False,
        )
        program.save(path)

    return write


def _legacy(change: Change = torch.nn.Module.eval):
    def write(given: Family, seed: int | None, path: Path) -> None:
        model = given.build(seed)
        change(model)
        shapes = {name: _axes(each.shape) for name, each in given.inputs.items()}
        shapes |= {name: _axes(shape) for name, shape in given.outputs.items()}
        torch.onnx.export(
            model,
            _example(given, model),
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=list(given.inputs),
            output_names=list(given.outputs),
            dynamic_axes={name: axes for name, axes in shapes.items() if axes},
        )

    return write


def _attend_eagerly(model: torch.nn.Module) -> None:
    model.set_attn_implementation("eager")


def _fused(given: Family, seed: int | None, path: Path) -> None:
    from onnxruntime.transformers import optimizer

    sizes = given.layout.sizes
    heads = (
        sizes.get("heads") or sizes.get("encoder.heads") or sizes.get("kv_heads", 0) * sizes.get("queries_per_kv", 0)
    )
    hidden = sizes.get("hidden", 0) if heads else 0
    fused = optimizer.optimize_model(
        str(export(given.name, "legacy17", seed)),
        model_type=given.name if given.name in optimizer.MODEL_TYPES else "bert",
        num_heads=heads if hidden else 0,
        hidden_size=hidden,
        opt_level=0,
    )
    fused.save_model_to_file(str(path))


_ROUTES = {
    "dynamo18": _dynamo(18),
    "dynamo20": _dynamo(20),
    "dynamo23": _dynamo(23),
    "legacy17": _legacy(),
    "fused": _fused,
    "dynamo18_fp16": _dynamo(18, torch.nn.Module.half),
    "dynamo18_bf16": _dynamo(18, torch.nn.Module.bfloat16),
    "legacy17_fp16": _legacy(torch.nn.Module.half),
    "legacy17_bf16": _legacy(torch.nn.Module.bfloat16),
    "legacy17_eager": _legacy(_attend_eagerly),
}
