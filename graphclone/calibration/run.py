"""Run calibration over all batches: progress, interruption, checkpoints."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from graphclone.calibration.data import Batches, Data, open_data
from graphclone.calibration.masks import chosen_masks
from graphclone.calibration.meter import Meter, Question, digest
from graphclone.calibration.session import resolve_provider, runnable
from graphclone.calibration.statistics import Statistics
from graphclone.calibration.taps import Moment, Span, Tap
from graphclone.errors import InputError
from graphclone.model import Model

CHECKPOINT_EVERY = 50


def measure(
    model: Model,
    batches: Batches | Data,
    taps: Iterable[Tap] = (),
    spans: Iterable[Span] = (),
    moments: Iterable[Moment] = (),
    *,
    provider: str = "auto",
    progress: bool = True,
    mask: str | Sequence[str] | None = None,
    threads: int | None = None,
    checkpoint: str | Path | None = None,
    every: int = CHECKPOINT_EVERY,
) -> Statistics:
    """Run the model over batches with onnxruntime, and return the statistics asked for.

    batches: what `open_data` returns, or any form of data that it takes.
    mask: the [batch, sequence] inputs that mark padding; left out, they are found in the graph. The graph also says
        whether it is zeros that mark it (as in Hugging Face's models) or ones (as in torch.nn.Transformer).
    progress: show a bar with samples per second and time left on the terminal's error stream.
    checkpoint: a file written every `every` batches and at Ctrl-C, taken up where it exists, and removed at the end.
    Ctrl-C returns what was counted so far, with `interrupted` set.
    Raises: InputError where data or model cannot be used, or activations hold NaN or Inf; KeyboardInterrupt where
        Ctrl-C comes before anything was counted.

    Example:
        >>> measure(model, [feeds], [Tap("gelu")], progress=False).mean_abs("gelu").shape
        (512,)
    """
    question = Question(
        _distinct(taps), _distinct(spans), _distinct(moments), provider=resolve_provider(provider), threads=threads
    )
    _check_names(question.spans)
    running = runnable(model, question.provider)
    source = open_data(batches, running)
    store = _Checkpoint(Path(checkpoint) if checkpoint is not None else None, every)
    empty = Statistics(model.fingerprint, question.provider)
    total = store.load(model)
    done = total.batches if total else 0
    skipped = empty
    meter = None
    with _Bar(question.provider, source.total, progress) as bar:
        try:
            for index, batch in enumerate(source):
                if index < done:
                    skipped = skipped.merge(replace(empty, batches=1, data=digest(batch.feeds)))
                    bar.advance(batch.samples)
                    continue
                if meter is None:
                    store.check(total, skipped)
                    masks = chosen_masks(model, mask, batch.feeds)
                    meter = Meter(running, replace(question, masks=masks), batch, empty.parent)
                counted = meter.read(batch)
                total = total.merge(counted) if total else counted
                store.save(total)
                bar.advance(batch.samples)
        except KeyboardInterrupt:
            if total is None:
                raise
            total = replace(total, interrupted=True)
            store.save(total, now=True)
            return total
    if total is None:
        raise InputError("the data is empty; give at least one batch")
    if meter is None:
        store.check(total, skipped)
    store.remove()
    return total


class _Checkpoint:
    """The file that lets a calibration go on where it stopped."""

    def __init__(self, path: Path | None, every: int):
        self.path = path
        self.every = max(1, every)

    def load(self, model: Model) -> Statistics | None:
        if self.path is None or not self.path.exists():
            return None
        statistics = Statistics.load(self.path)
        statistics.check(model)
        return replace(statistics, interrupted=False)

    def check(self, total: Statistics | None, skipped: Statistics) -> None:
        """Raise InputError where the batches counted before are not the first ones of this data."""
        if total is not None and total.data != skipped.data:
            raise InputError(f"the checkpoint '{self.path}' counted other data; delete it to start again")

    def save(self, total: Statistics, now: bool = False) -> None:
        if self.path is not None and (now or total.batches % self.every == 0):
            total.save(self.path)

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


class _Bar:
    """A progress bar in batches that tells samples per second."""

    def __init__(self, provider: str, total: int | None, shown: bool):
        self._progress = Progress(
            TextColumn(f"calibrating on {provider.upper()}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("batches, {task.fields[rate]} samples/s,"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not shown,
        )
        self._total = total
        self._samples = 0
        self._task: TaskID | None = None

    def __enter__(self) -> "_Bar":
        self._progress.__enter__()
        self._task = self._progress.add_task("", total=self._total, rate="?")
        return self

    def __exit__(self, *exception) -> None:
        self._progress.__exit__(*exception)

    def advance(self, samples: int) -> None:
        self._samples += samples
        task = self._progress.tasks[0]
        rate = f"{self._samples / task.elapsed:.1f}" if task.elapsed else "?"
        self._progress.update(self._task, advance=1, rate=rate)


def _distinct(items: Iterable) -> tuple:
    return tuple(dict.fromkeys(items))


def _check_names(spans: Sequence[Span]) -> None:
    names = [span.name for span in spans]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two spans are called '{name}'; give each its own name")
