"""Fixtures of calibration: a small attention model, samples for it, and what its activations are."""

import numpy as np
import pytest

from graphclone.calibration.session import open_session

# 23 ids, hidden 6, FFN 10; heads 2 x 3. All sizes differ.
ATTENTION = """(int64[{b}, {s}] ids, int64[{b}, {s}] mask) => ({t}[{b}, {s}, 7] logits)
<{t}[23, 6] table, {t}[6, 6] query, {t}[6, 6] out, {t}[6, 10] up, {t}[10, 6] down, {t}[6, 7] head {infos}>
{{
    x0 = Gather(table, ids)
    split = Constant<value = int64[4] {{0, 0, 2, 3}}>()
    q0 = MatMul(x0, query)
    q1 = Reshape(q0, split)
    heads = Transpose<perm = [0, 2, 1, 3]>(q1)
    keys = Transpose<perm = [0, 2, 3, 1]>(q1)
    raw = MatMul(heads, keys)
    real = Cast<to = {to}>(mask)
    one = Constant<value = {t}[1] {{1}}>()
    low = Constant<value = {t}[1] {{-9999}}>()
    axes = Constant<value = int64[2] {{1, 2}}>()
    padding = Sub(one, real)
    bias = Mul(padding, low)
    wide = Unsqueeze(bias, axes)
    scores = Add(raw, wide)
    weights = Softmax<axis = -1>(scores)
    mixed = MatMul(weights, heads)
    swapped = Transpose<perm = [0, 2, 1, 3]>(mixed)
    flat = Constant<value = int64[2] {{-1, 6}}>()
    context = Reshape(swapped, flat)
    written = MatMul(context, out)
    back = Shape(x0)
    branch = Reshape(written, back)
    x1 = Add(x0, branch)
    h0 = MatMul(x1, up)
    hidden = Relu(h0)
    h1 = MatMul(hidden, down)
    x2 = Add(x1, h1)
    logits = MatMul(x2, head)
}}"""

INFOS = ", {t}[{b}, {s}, 6] x0, {t}[{b}, {s}, 6] x1, {t}[{b}, {s}, 6] x2, {t}[{b}, {s}, 10] hidden"


@pytest.fixture
def attention(graph):
    """Return a function that builds the model; without `infos` the file says nothing of what is inside."""

    def build(b="batch", s="length", t="float", infos=True, opset=20):
        sizes = {"b": b, "s": s, "t": t}
        to = {"float": 1, "float16": 10, "bfloat16": 16}[t]
        text = ATTENTION.format(**sizes, to=to, infos=INFOS.format(**sizes) if infos else "")
        return graph(text, opset)

    return build


@pytest.fixture
def samples():
    """Return ids and a mask: 7 samples of 5 tokens, two of them padded, one on the left."""
    mask = np.ones((7, 5), np.int64)
    mask[2, 3:] = 0
    mask[6, :4] = 0
    return {"ids": np.random.default_rng(1).integers(0, 23, (7, 5)), "mask": mask}


@pytest.fixture
def activations():
    """Return a function that runs a model plainly and returns the tensors named, fp64."""

    def run(model, feeds, *names):
        outputs = open_session(model, outputs=names, threads=1).run(None, feeds)[-len(names) :]
        return [output.astype(np.float64) for output in outputs]

    return run
