"""Load a Hugging Face checkpoint with transformers, where it is installed, and run it."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from graphclone.errors import CheckFailed, InputError


def config_defaults(folder: Path | None) -> dict | None:
    """Return a folder's config with its class's defaults filled in, or None where transformers does not know it."""
    if folder is None:
        return None
    try:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
    except Exception:  # an unknown model type, a missing library: the config is read as it is
        return None


def outputs_of(
    folder: Path, feeds: Mapping[str, np.ndarray], shapes: Mapping[str, Sequence[int]]
) -> dict[str, np.ndarray]:
    """Return the outputs of the model in a folder that its class calls as `shapes` does; if there is none, in order.

    Raises: InputError where transformers is missing or has no class for it; CheckFailed where weights do not fit it.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise InputError(f"{error.name} is not installed") from None
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except ValueError as error:
        raise CheckFailed(f"transformers does not accept the new config: {error}; nothing was written") from error
    kinds = [getattr(transformers, name, None) for name in config.architectures or ()]
    kinds = [kind for kind in kinds if kind is not None] + [transformers.AutoModel]
    for kind in kinds:
        model = _loaded(kind, folder)
        accepted = inspect.signature(model.forward).parameters
        given = {name: torch.from_numpy(np.array(value)) for name, value in feeds.items() if name in accepted}
        if len(given) < len(feeds):
            continue
        extra = {"use_cache": False} if "use_cache" in accepted else {}
        with torch.no_grad():
            result = model(**given, **extra, return_dict=True)
        values = {name: value for name, value in result.items() if isinstance(value, torch.Tensor)}
        if not values.keys() & shapes.keys():
            values = dict(zip(shapes, values.values(), strict=False))
            if any(tuple(value.shape) != tuple(shapes[name]) for name, value in values.items()):
                raise InputError(f"{kind.__name__} has no outputs called {', '.join(shapes)}")
        return {name: value.float().numpy() for name, value in values.items()}
    raise InputError(f"its class takes other inputs than {', '.join(feeds)}")


def _loaded(kind, folder: Path):
    import torch

    choices = {"local_files_only": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = kind.from_pretrained(folder, dtype=torch.float32, **choices)
    except Exception as error:  # whatever transformers raises where weights do not fit the class
        raise CheckFailed(f"transformers cannot load the result: {error}; nothing was written") from error
    for name, *shapes in sorted(map(tuple, info.get("mismatched_keys", ())), key=str):
        stored, wanted = (list(shape) for shape in shapes)
        raise CheckFailed(
            f"the class {kind.__name__} cannot hold '{name}' {stored}: with this config it has {wanted} there; "
            f"nothing was written"
        )
    missing = sorted(info.get("missing_keys", ())) if kind.__name__ != "AutoModel" else []
    if missing:
        raise CheckFailed(f"{kind.__name__} does not find '{missing[0]}' in the result; nothing was written")
    return model.eval()
