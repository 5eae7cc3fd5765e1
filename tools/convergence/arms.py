"""Arms: one row for each way to make the child's first weights. A new pass is one new row."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from string import Template

MIDDLE, UNIFORM = "depth{layers=$layers by=middle}", "depth{layers=$layers by=uniform}"
FIRST = "depth{layers=$layers by=first}"
RANKED, PLAIN, OBS = (f"width{{$widths by={metric}}}" for metric in ("mean_abs", "uniform", "obs"))
PAPER = f"{MIDDLE},{RANKED},rescale{{mode=paper}}"
SEARCHED = "search{layers=$layers}"
BEST, BEST_UNROTATED = f"{SEARCHED},{OBS},rotate,refit", f"{SEARCHED},{OBS},refit"


@dataclass(frozen=True)
class Arm:
    """One way to start: a pipeline that cuts the parent, or None for the framework's own random weights.

    pipeline: text with `$layers` and `$widths` for the task's targets. optimiser: adamw or muon. distil: whether the
    parent's outputs are half of the loss. calibration: sequences that the passes may see. otherwise: the pipeline for a
    parent that the first is refused for (a post-norm stack cannot be rotated). main: trained at every budget; others
    only at those of the setting that show one change.
    """

    name: str
    pipeline: str | None
    optimiser: str = "adamw"
    distil: bool = False
    calibration: int = 80
    otherwise: str | None = None
    main: bool = False

    def text(self, layers: int, widths: str) -> str | None:
        """Return the pipeline for one task's targets.

        Example:
            >>> Arm("first", "depth{layers=$layers},width{$widths}").text(4, "hidden=48")
            'depth{layers=4},width{hidden=48}'
        """
        return None if self.pipeline is None else Template(self.pipeline).substitute(layers=layers, widths=widths)


ARMS = (
    Arm("random", None, main=True),
    Arm("random, Muon", None, optimiser="muon", main=True),
    Arm("paper", PAPER, main=True),
    Arm("paper, no rescale", f"{MIDDLE},{RANKED}"),
    Arm("Weight Selection", f"{FIRST},{PLAIN}", main=True),
    Arm("first k", f"{FIRST},width{{$widths by=first}}"),
    Arm("random neurons", f"{MIDDLE},width{{$widths by=random}},rescale{{mode=paper}}"),
    # The paper's child with one thing changed.
    Arm("paper, blocks uniform", f"{UNIFORM},{RANKED},rescale{{mode=paper}}"),
    Arm("paper, output-aware", f"{MIDDLE},width{{$widths by=output_aware}},rescale{{mode=paper}}"),
    Arm("paper, OBS", f"{MIDDLE},{OBS},rescale{{mode=paper}}"),
    Arm("norm gain", f"{MIDDLE},{RANKED},rescale{{mode=norm_gain}}"),
    Arm("refit", f"{MIDDLE},{RANKED},refit"),
    Arm("refit, read-outs", f"{MIDDLE},{RANKED},rescale{{mode=paper}},refit{{only=readouts}}"),
    Arm("refit, no drift", f"{MIDDLE},{RANKED},refit{{drift=false}}"),
    Arm("refit, no absorption", f"{UNIFORM},{RANKED},refit{{absorb=false}}"),
    Arm("refit, blocks uniform", f"{UNIFORM},{RANKED},refit"),
    Arm("rotate", f"{MIDDLE},{RANKED},rotate"),
    # Together.
    Arm("best, 80 sequences", BEST, otherwise=BEST_UNROTATED),
    Arm("best, 1,280 sequences", BEST, calibration=1280, otherwise=BEST_UNROTATED),
    Arm("best, mean_abs", f"{SEARCHED},{RANKED},rotate,refit", calibration=320, otherwise=f"{SEARCHED},{RANKED},refit"),
    Arm("best, squares alone", f"{BEST}{{kl=false}}", calibration=320, otherwise=f"{BEST_UNROTATED}{{kl=false}}"),
    Arm("best, blocks uniform", f"{UNIFORM},{OBS},rotate,refit", calibration=320, otherwise=f"{UNIFORM},{OBS},refit"),
    Arm("best", BEST, calibration=320, otherwise=BEST_UNROTATED, main=True),
    Arm("best, Muon", BEST, optimiser="muon", calibration=320, otherwise=BEST_UNROTATED),
    # The parent as a teacher.
    Arm("random, distilled", None, distil=True),
    Arm("paper, distilled", PAPER, distil=True),
    Arm("best, distilled", BEST, distil=True, calibration=320, otherwise=BEST_UNROTATED),
)


def chosen(patterns: list[str], arms: tuple[Arm, ...] = ARMS) -> tuple[Arm, ...]:
    """Return the arms whose names match a pattern; `NAME=PIPELINE` makes a new one.

    Raises: SystemExit for a pattern that matches nothing.

    Example:
        >>> [arm.name for arm in chosen(["random*", "mine=depth{layers=2}"])][-2:]
        ['random, distilled', 'mine']
    """
    found: dict[str, Arm] = {}
    for pattern in patterns:
        name, given, text = pattern.partition("=")
        matches = [Arm(name, text, main=True)] if given else [arm for arm in arms if fnmatchcase(arm.name, pattern)]
        if not matches:
            raise SystemExit(f"no arm matches '{pattern}'; there are: {'; '.join(arm.name for arm in arms)}")
        found.update({arm.name: arm for arm in matches})
    return tuple(found.values())
