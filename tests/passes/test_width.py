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


def in_stages(width: int) -> str:
    """Return a stream of two stages, of width 12 and this one: a matrix makes it anew, as in a Swin or a U-ViT."""

    def blocks(x: str, size: int, first: int) -> tuple[str, str]:
        places = range(first, first + 2)
        lines = [f"h{n} = MatMul({x if n == first else f'y{n - 1}'}, up{n})  t{n} = Relu(h{n})  d{n} = MatMul(t{n}, down{n}) "
                 f"y{n} = Add({x if n == first else f'y{n - 1}'}, d{n}) " for n in places]  # fmt: skip
        return "".join(lines), ", ".join(f"float[{size}, 64] up{n}, float[64, {size}] down{n}" for n in places)

    (early, these), (late, those) = blocks("x0", 12, 0), blocks("m", width, 2)
    return f"""(float[B, S, 3] x) => (float[B, S, 3] y) <float[3, 12] i, float[{width}, 3] o, float[12, {width}] j, {these},
        {those}> {{ x0 = MatMul(x, i) {early} m = MatMul(y1, j) {late} y = MatMul(y3, o) }}"""


@pytest.mark.parametrize(("width", "sizes", "kept"), [(12, "6", [6, 6]), (12, "[7,5]", [7, 5]), (9, "[7,5]", [7, 5])])
def test_a_stream_that_begins_anew_has_a_width_for_each_stage(graph, width, sizes, kept):
    plan = Pipeline.parse(f"width{{hidden={sizes} by=first}}").plan(graph(in_stages(width)))
    assert {name: len(found) for name, found in plan.keep.items()} == {"hidden_0": kept[0], "hidden_1": kept[1]}


@pytest.mark.parametrize("sizes", ["6", "[6,5,4]"])
def test_stages_of_several_widths_take_one_size_each(graph, sizes):
    with pytest.raises(CutError, match="hidden: the stream has 12, 9; give a list with one size for each stage"):
        Pipeline.parse(f"width{{hidden={sizes} by=first}}").plan(graph(in_stages(9)))
