"""Ask transformers, where it is installed, what the class of a checkpoint holds and computes; read pickled weights."""

import copy
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from graphclone.errors import CheckFailed, GraphcloneError, InputError


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors in a file of `torch.save`, read as tensors alone: torch refuses to unpickle anything else.

    Raises: InputError where torch is missing, and for what is damaged or would run code.
    """
    try:
        import torch
    except ImportError:
        raise InputError(f"'{path}' is read by torch, which is not installed; pip install torch") from None
    try:
        stored = dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # whatever torch raises for what is damaged, or is more than tensors
        raise InputError(
            f"cannot read '{path}' as tensors alone ({type(error).__name__}), and more can run code when it is read; "
            f"save the model's state_dict(), or use save_pretrained()"
        ) from None
    inner = next((stored[key] for key in ("state_dict", "model") if isinstance(stored.get(key), dict)), stored)
    tensors = {str(name): tensor for name, tensor in inner.items() if isinstance(tensor, torch.Tensor)}
    return {name: _array(tensor.detach().contiguous()) for name, tensor in tensors.items()}


def _array(tensor) -> np.ndarray:
    """Return torch's tensor as an array; the types that numpy lacks are of ml_dtypes."""
    import torch

    kind = str(tensor.dtype).removeprefix("torch.")
    if hasattr(ml_dtypes, kind):
        whole = {1: torch.uint8, 2: torch.int16}[tensor.element_size()]
        return tensor.view(whole).numpy().view(np.dtype(getattr(ml_dtypes, kind)))
    return tensor.numpy()


def config_defaults(folder: Path | None) -> dict | None:
    """Return a folder's config with its class's defaults filled in, or None where transformers does not know it."""
    if folder is None:
        return None
    try:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
    except Exception:  # an unknown model type, a missing library: the config is read as it is
        return None


def shapes_of(config: Mapping) -> dict[str, tuple[int, ...]]:
    """Return what a checkpoint of the class behind a config holds; nothing of the class is made in memory.

    Raises: InputError where transformers is missing or knows no class for it; CheckFailed where the class refuses.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError as error:
        raise InputError(f"{error.name} is not installed") from None
    model = _without_weights(config)
    try:
        tensors = revert_weight_conversion(model, model.state_dict())
    except Exception as error:  # whatever a class raises for sizes that do not fit each other
        raise _refused(error) from error
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def class_buffers(folder: Path) -> set[str]:
    """Return the buffers in the state dict of the class behind a folder's config; none where transformers has none."""
    file = folder / "config.json"
    try:
        model = _without_weights(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
    except (GraphcloneError, ValueError):
        return set()
    return set() if model is None else model.state_dict().keys() & dict(model.named_buffers()).keys()


def _without_weights(config: Mapping):
    """Return the model behind a config with nothing in memory. Raises: as shapes_of does."""
    try:
        import torch
        import transformers
        from transformers import initialization
    except ImportError as error:
        raise InputError(f"{error.name} is not installed") from None
    try:
        settings = transformers.CONFIG_MAPPING[config["model_type"]]
    except KeyError:
        raise InputError(f"transformers knows no '{config.get('model_type')}'") from None
    try:
        settings = settings.from_dict(copy.deepcopy(dict(config)))
        with initialization.no_init_weights(), initialization.meta_device_safe_creation_ops(), torch.device("meta"):
            kinds = _classes(config.get("architectures"))
            return kinds[0](settings) if kinds else transformers.AutoModel.from_config(settings)
    except Exception as error:  # whatever a class raises for sizes that do not fit each other
        raise _refused(error) from error


def _refused(error: Exception) -> CheckFailed:
    return CheckFailed(f"transformers does not accept it: {' '.join(str(error).split())}")


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
    for kind in (*_classes(config.architectures), transformers.AutoModel):
        model = _loaded(kind, folder)
        accepted = inspect.signature(model.forward).parameters
        given = {name: torch.from_numpy(np.array(value)) for name, value in feeds.items() if name in accepted}
        if len(given) < len(feeds):
            continue
        extra = {"use_cache": False} if "use_cache" in accepted else {}
        try:
            with torch.no_grad():
                result = model(**given, **extra, return_dict=True)
        except Exception as error:  # whatever a class meets that takes sizes for granted
            raise CheckFailed(
                f"the class {kind.__name__} does not run with this config: {' '.join(str(error).split())}; "
                f"nothing was written"
            ) from error
        values = {name: value for name, value in result.items() if isinstance(value, torch.Tensor)}
        if not values.keys() & shapes.keys():
            values = dict(zip(shapes, values.values(), strict=False))
            if any(tuple(value.shape) != tuple(shapes[name]) for name, value in values.items()):
                raise InputError(f"{kind.__name__} has no outputs called {', '.join(shapes)}")
        return {name: value.float().numpy() for name, value in values.items()}
    raise InputError(f"its class takes other inputs than {', '.join(feeds)}")


def _classes(names: Sequence[str] | None) -> list[type]:
    """Return the models of transformers among some names; a config may name anything."""
    import transformers

    kinds = [getattr(transformers, name, None) for name in names or ()]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)]


def _loaded(kind, folder: Path):
    import torch
    from transformers.utils import logging

    choices = {"local_files_only": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    showing = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = kind.from_pretrained(folder, dtype=torch.float32, **choices)
    except Exception as error:  # whatever transformers raises where weights do not fit the class
        raise CheckFailed(f"transformers cannot load the result: {error}; nothing was written") from error
    finally:
        if showing:
            logging.enable_progress_bar()
    for name, *shapes in sorted(map(tuple, info.get("mismatched_keys", ())), key=str):
        stored, wanted = (list(shape) for shape in shapes)
        raise CheckFailed(
            f"the class {kind.__name__} cannot hold '{name}' {stored}: with this config it has {wanted} there; "
            f"nothing was written"
        )
    missing = sorted(info.get("missing_keys", ())) if kind.__name__ != "AutoModel" else []
    if missing:
        raise CheckFailed(f"{kind.__name__} does not find '{missing[0]}' in the result; nothing was written")
    if getattr(model, "_can_set_experts_implementation", bool)():
        model.set_experts_implementation("eager")  # torch's grouped product wants rows of a multiple of 16 bytes
    return model.eval()
