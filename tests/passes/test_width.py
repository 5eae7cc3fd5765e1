"""Width: what it refuses, and what it makes of weights that are no real numbers."""

import numpy as np
import pytest

from graphclone.axes.axis import Axis, lock, product, total
from graphclone.errors import CutError
from graphclone.pipeline import Pipeline
from graphclone.subclone import calibrate
from passes.width import allocate

BLOCK = """
    h{n} = MatMul({x}, up{n})  t{n} = Relu(h{n})
    d{n} = com.microsoft.MatMulNBits <K = 64, N = 12, bits = 4, block_size = 16> (t{n}, down{n}, scale{n})
    {y} = Add({x}, d{n})"""
PACKED = (
    """(float[B, S, 12] x0) => (float[B, S, 12] x2)
    <float[12, 64] up0, uint8[12, 4, 8] down0, float[12, 4] scale0,
     float[12, 64] up1, uint8[12, 4, 8] down1, float[12, 4] scale1>
    {"""
    + "".join(BLOCK.format(n=n, x=f"x{n}", y=f"x{n + 1}") for n in (0, 1))
    + "}"
)


@pytest.mark.parametrize("target", ["hidden", "ffn", "heads", "kv_heads", "head_dim"])
def test_without_a_stream_no_width_has_a_name(graph, target):
    model = graph("(float[B, 12] x) => (float[B, 7] y) <float[12, 7] w> { y = MatMul(x, w) }")
    with pytest.raises(CutError, match="no residual stream"):
        Pipeline.parse(f"width{{{target}=4 by=first}}").plan(model)


@pytest.mark.parametrize("metric", ["obs", "output_aware"])
def test_packed_weights_are_not_taken_for_numbers(graph, metric):
    """Four bits to an entry, with scales beside them: units are ranked by what they hold alone."""
    samples = [{"x0": np.random.default_rng(0).standard_normal((3, 5, 12)).astype(np.float32)}]
    model = graph(PACKED)
    stats = calibrate(model, samples, provider="cpu", progress=False)
    result = Pipeline.parse(f"width{{ffn=32 by={metric}}}").run(model, stats, data=samples, provider="cpu")
    assert {name: len(kept) for name, kept in result.plan.keep.items()} == {"blocks.0.ffn": 32, "blocks.1.ffn": 32}


def test_pairs_that_stand_before_what_is_not_turned_are_cut_in_proportion():
    one, other, pair, rest, fixed = (Axis((size, size)) for size in (1, 1, 4, 8, 3))
    lock(fixed, "the test")
    partly = total((product((total((one, other)), pair)), rest))  # rotary over half of a head: 2 x 4 + 8
    counts = allocate(partly, 8)
    assert (counts[id(pair)], counts[id(rest)]) == (2, 4)
    counts = allocate(total((fixed, product((total((one, other)), pair)))), 7)
    assert (counts[id(fixed)], counts[id(pair)]) == (3, 2)
    assert allocate(total((fixed, product((total((one, other)), pair)))), 6) is None
