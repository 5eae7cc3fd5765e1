"""Check that calibration can be interrupted and taken up again."""

import numpy as np
import pytest

from graphclone.calibration.run import measure
from graphclone.calibration.statistics import Statistics
from graphclone.calibration.taps import Moment, Span, Tap
from graphclone.errors import InputError

TAPS, SPANS, MOMENTS = [Tap("x0"), Tap("hidden")], [Span("s", "x0", "x1")], [Moment("hidden")]


def quiet(model, batches, **options):
    return measure(model, batches, TAPS, SPANS, MOMENTS, provider="cpu", progress=False, **options)


@pytest.fixture
def batches(samples):
    return [{name: value[i : i + 2] for name, value in samples.items()} for i in range(0, 7, 2)]


def interrupted(batches, after):
    yield from batches[:after]
    raise KeyboardInterrupt


def same(got, want):
    assert (got.samples, got.tokens, got.batches, got.data) == (want.samples, want.tokens, want.batches, want.data)
    for key, sums in want.taps.items():
        for name in ("count", "value", "absolute", "square"):
            assert np.allclose(getattr(got.taps[key], name), getattr(sums, name), rtol=1e-13, atol=1e-13)
    for key, sums in want.moments.items():
        assert np.allclose(got.moments[key].matrix, sums.matrix, rtol=1e-13, atol=1e-13)
    for name, sums in want.spans.items():
        assert got.spans[name].ratio == pytest.approx(sums.ratio, rel=1e-13)
        assert got.spans[name].turn == pytest.approx(sums.turn, rel=1e-12)


def test_control_c_keeps_what_was_counted(attention, batches):
    model = attention()
    stats = quiet(model, interrupted(batches, 3))
    assert stats.interrupted and stats.batches == 3
    same(stats, quiet(model, batches[:3]))


def test_control_c_inside_a_run_loses_that_batch_alone(attention, batches, monkeypatch):
    from graphclone.calibration import meter

    model, plain, calls = attention(), meter.run_session, []

    def run(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(meter, "run_session", run)
    assert (quiet(model, batches).batches, len(calls)) == (2, 3)


def test_control_c_before_the_first_batch_is_control_c(attention, batches):
    with pytest.raises(KeyboardInterrupt):
        quiet(attention(), interrupted(batches, 0))


def test_a_checkpoint_is_taken_up_and_removed_at_the_end(attention, batches, tmp_path):
    model, path = attention(), tmp_path / "stats.partial"
    assert quiet(model, interrupted(batches, 2), checkpoint=path).interrupted
    assert Statistics.load(path).batches == 2
    runs = iter(batches)
    stats = quiet(model, runs, checkpoint=path)
    assert not stats.interrupted and not path.exists()
    same(stats, quiet(model, batches))


def test_a_checkpoint_is_written_every_few_batches(attention, batches, tmp_path):
    path = tmp_path / "stats.partial"

    def failing():
        yield from batches[:3]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        quiet(attention(), failing(), checkpoint=path, every=2)
    assert Statistics.load(path).batches == 2


def test_a_checkpoint_of_other_data_is_refused(attention, batches, tmp_path):
    model, path = attention(), tmp_path / "stats.partial"
    quiet(model, interrupted(batches, 2), checkpoint=path)
    with pytest.raises(InputError, match="counted other data; delete it"):
        quiet(model, batches[::-1], checkpoint=path)
    with pytest.raises(InputError, match="counted other data; delete it"):
        quiet(model, batches[:1], checkpoint=path)


def test_a_checkpoint_of_another_model_or_question_is_refused(attention, batches, tmp_path):
    model, path = attention(), tmp_path / "stats.partial"
    quiet(model, interrupted(batches, 2), checkpoint=path)
    with pytest.raises(InputError, match="another model"):
        quiet(attention(opset=18), batches, checkpoint=path)
    with pytest.raises(InputError, match="measured different tensors"):
        measure(model, batches, TAPS, provider="cpu", progress=False, checkpoint=path)
