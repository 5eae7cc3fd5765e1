"""The operator of the logits comes to the least divergence there is, whatever bounds the work."""

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
import scipy.optimize
import scipy.special

from graphclone.segments import Joint
from passes import likelihood
from passes.likelihood import Probabilities, fit

INPUTS, WORDS, BATCHES, ROWS = 5, 7, 6, 200


@pytest.fixture
def problem():
    """Return batches of (x, parent's logits), and weights somewhere else."""
    random = np.random.default_rng(0)
    made = random.standard_normal((INPUTS + 1, WORDS))
    batches = []
    for _ in range(BATCHES):
        x = random.standard_normal((ROWS, INPUTS)) * np.arange(1, INPUTS + 1) / 3
        batches.append((x, np.hstack([x, np.ones((ROWS, 1))]) @ made + 0.7 * random.standard_normal((ROWS, WORDS))))
    return batches, made + 0.5 * random.standard_normal(made.shape)


class Rows(Joint):
    """Batches of x and t, without models."""

    def __init__(self, batches, mask=None):
        super().__init__([])
        self.x, self.t = self.given("x", np.float32, [None, INPUTS]), self.given("t", np.float32, [None, WORDS])
        self.fed = [{"x": x.astype(np.float32), "t": t.astype(np.float32)} for x, t in batches]
        for batch, real in zip(self.fed, mask or (), strict=False):
            batch["mask/real"] = real[:, None]

    def batches(self):
        yield from self.fed

    def open(self):
        for output in self._outputs:
            output.dtype = np.dtype(np.float32)
        proto = gs.export_onnx(gs.Graph(nodes=self._nodes, inputs=self._inputs, outputs=self._outputs, opset=17))
        proto.ir_version = 10
        return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def gram(batches, held):
    rows = np.vstack(
        [np.hstack([x, np.ones((len(x), 1))]) for (x, _), mine in zip(batches, held, strict=True) if not mine]
    )
    return rows.T @ rows


def divergence(weights, batches):
    """The mean of KL(p || q) and its slope, by numpy in double precision."""
    x = np.vstack([np.hstack([x, np.ones((len(x), 1))]) for x, _ in batches])
    taught = scipy.special.log_softmax(np.vstack([t for _, t in batches]), -1)
    told = scipy.special.log_softmax(x @ weights, -1)
    p, q = np.exp(taught), np.exp(told)
    return (p * (taught - told)).sum() / len(x), x.T @ (q - p) / len(x)


def best(batches, start):
    """What scipy finds where the slope vanishes."""

    def value(flat):
        loss, slope = divergence(flat.reshape(start.shape), batches)
        return loss, slope.ravel()

    return scipy.optimize.minimize(value, start.ravel(), jac=True, method="BFGS").x.reshape(start.shape)


def test_it_comes_to_the_least_divergence(problem):
    batches, start = problem
    held = [False] * BATCHES
    rows = Rows(batches)
    found = fit(
        Probabilities(rows, rows.x, rows.t, (INPUTS, WORDS), held, BATCHES * ROWS), gram(batches, held), start, True
    )
    least = divergence(best(batches, start), batches)[0]
    assert found.before == pytest.approx(divergence(start, batches)[0], rel=1e-5)
    assert found.after == pytest.approx(divergence(found.weights, batches)[0], rel=1e-4)
    assert found.after - least < 0.01 * (found.before - least)


def test_without_an_intercept_the_last_row_stays(problem):
    batches, start = problem
    held = [number == 2 for number in range(BATCHES)]
    rows = Rows(batches)
    found = fit(
        Probabilities(rows, rows.x, rows.t, (INPUTS, WORDS), held, BATCHES * ROWS), gram(batches, held), start, False
    )
    np.testing.assert_array_equal(found.weights[-1], start[-1].astype(np.float32))
    assert found.after < found.before
    assert found.after == pytest.approx(divergence(found.weights, [batches[2]])[0], rel=1e-4)


def test_where_the_rows_held_out_say_no_the_weights_stay(problem):
    batches, start = problem
    start = best(batches[:1], start)
    held = [number == 0 for number in range(2)]
    other = [batches[0], (batches[1][0], np.roll(batches[1][1], 1, axis=1))]
    rows = Rows(other)
    found = fit(Probabilities(rows, rows.x, rows.t, (INPUTS, WORDS), held, 2 * ROWS), gram(other, held), start, True)
    assert found.weights is None
    assert found.after == found.before


def test_padding_does_not_count(problem):
    batches, start = problem
    real = [np.arange(ROWS) % 3 != 0 for _ in batches]
    spoilt = [
        (np.where(r[:, None], x, 50.0), np.where(r[:, None], t, -9.0)) for (x, t), r in zip(batches, real, strict=True)
    ]
    rows = Rows(spoilt, real)
    with_ = Probabilities(rows, rows.x, rows.t, (INPUTS, WORDS), [False] * BATCHES, BATCHES * ROWS, "real")
    apart, slope = with_.divergence(start, held=False)
    wanted, steep = divergence(start, [(x[r], t[r]) for (x, t), r in zip(batches, real, strict=True)])
    assert apart == pytest.approx(wanted, rel=1e-5)
    np.testing.assert_allclose(slope, -steep, rtol=1e-3, atol=1e-5)


def test_where_there_is_too_much_every_kth_row_counts(problem, monkeypatch):
    batches, start = problem
    monkeypatch.setattr(likelihood, "LOGITS", ROWS * WORDS / 3)
    rows = Rows(batches)
    with_ = Probabilities(rows, rows.x, rows.t, (INPUTS, WORDS), [False] * BATCHES, BATCHES * ROWS)
    wanted = divergence(start, [(x[::3], t[::3]) for x, t in batches])[0]
    assert with_.divergence(start, held=False)[0] == pytest.approx(wanted, rel=1e-5)


def test_refit_brings_probabilities_closer_where_there_are_logits(make, samples, run_pipeline, outputs):
    parent = make()
    cut = "width{hidden=8 ffn=12 by=uniform},refit"
    with_, without = (run_pipeline(f"{cut}{{kl={kl}}}", parent, samples) for kl in ("true", "false"))

    def apart(child):
        taught, told = (scipy.special.log_softmax(np.vstack([b[0] for b in outputs(m)]), -1) for m in (parent, child))
        return (np.exp(taught) * (taught - told)).sum(-1).mean()

    assert apart(with_.child) < 0.98 * apart(without.child)
    assert any("fitted to the parent's probabilities" in note for note in with_.notes)
    assert not any("probabilities" in note for note in without.notes)
    others = [name for name in with_.plan.replace if not name.startswith("head")]
    assert all(np.array_equal(with_.plan.replace[name], without.plan.replace[name]) for name in others)
