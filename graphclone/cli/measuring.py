"""Measuring: calibration with its progress bar and a line that says what was counted, and where."""

from pathlib import Path

from graphclone.analysis import Analysis
from graphclone.calibration.statistics import Statistics
from graphclone.cli.terminal import err, out, plural
from graphclone.model import Model
from graphclone.subclone import calibrate


def measured(
    model: Model,
    data: Path,
    analysis: Analysis | None = None,
    *,
    provider: str = "auto",
    batches: int | None = None,
    batch_size: int | None = None,
    mask: str | None = None,
) -> Statistics:
    """Calibrate and say how many samples were counted on which device."""
    sized = {} if batch_size is None else {"batch_size": batch_size}
    bar = err().is_terminal
    stats = calibrate(
        model, data, provider=provider, batches=batches, mask=mask, progress=bar, analysis=analysis, **sized
    )
    amount = f"{plural(stats.samples, 'sample')}, {plural(stats.tokens, 'token')}"
    out().print(f"measured  {amount} on {stats.provider}")
    return stats
