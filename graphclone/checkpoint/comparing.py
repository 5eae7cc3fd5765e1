"""Load a written checkpoint with transformers, and compare its outputs with the slim model's."""

from collections.abc import Mapping
from pathlib import Path

from graphclone.analysis import analyse
from graphclone.errors import CheckFailed, InputError
from graphclone.model import Model

TOLERANCE = 1e-5


def compare(folder: Path, child: Model, config: Mapping | None, advice: str = "") -> tuple[float | None, str]:
    """Return the largest relative difference, or None and why there is none.

    advice: what to say where they differ. Raises: CheckFailed where the outputs differ, or the class does not run it.

    Example:
        difference, note = compare(Path("gpt2-small"), child, config)
    """
    from graphclone.pytorch.pretrained import outputs_of
    from graphclone.verify.running import difference, first_run

    if config is None:
        return None, "the weights alone, not compared: there is no config.json with a model_type to build a model from"
    _, probes, wanted = first_run(child, analyse(child))
    worst, where = -1.0, ""
    for feeds, outputs in zip(probes, wanted, strict=True):
        try:
            got = outputs_of(folder, feeds, {name: array.shape for name, array in outputs.items()})
        except InputError as error:
            return None, f"not compared: {error}"
        shared = [name for name in outputs if name in got]
        worst, where = max([(worst, where), *((difference(got, {name: outputs[name]}), name) for name in shared)])
    if not where:
        return None, f"not compared: its class returns none of {', '.join(wanted[0])}"
    if worst > TOLERANCE:
        raise CheckFailed(
            f"the checkpoint's output '{where}' differs from the slim model's by {worst:.1e} (at most "
            f"{TOLERANCE:.0e}){advice}; nothing was written"
        )
    return worst, ""
