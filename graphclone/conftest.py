"""Give the examples in docstrings what they speak of: `model`, `feeds`, `stats` and `encoder`."""

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

ROOT = Path(__file__).resolve().parents[1]
ENCODER = """<ir_version: 10, opset_import: ["" : 20]>
    encoder (int64[B, T] input_ids, int64[B, T] attention_mask, bool[B, T] ignored) => (float[B, T, 6] states)
    <float[23, 6] table, int64[1] axis = {1}, float one = {1}, float low = {-9999}> {
        x = Gather(table, input_ids)  turned = Transpose <perm = [0, 2, 1]> (x)  raw = MatMul(x, turned)
        real = Cast <to = 1> (attention_mask)  padding = Sub(one, real)  lower = Mul(padding, low)
        bias = Unsqueeze(lower, axis)  sum = Add(raw, bias)  where = Unsqueeze(ignored, axis)
        scores = Where(where, low, sum)  weights = Softmax <axis = -1> (scores)  states = MatMul(weights, x) }"""


@pytest.fixture(autouse=True)
def examples(request, doctest_namespace) -> Iterator[None]:
    """Load the examples' models before the first example that runs.

    model: the demo's parent, a character GPT of 8 blocks x 128. feeds: 2 x 5 tokens for it. stats: what they activate.
    encoder: attention of 6 channels over 23 ids, with a mask of ones where tokens are, and one of ones where none are.
    """
    if isinstance(request.node, pytest.DoctestItem):
        doctest_namespace.update(_examples())
    yield
    doctest_namespace.clear()  # outside this package `feeds` is a function


@functools.cache
def _examples() -> dict[str, object]:
    from graphclone.calibration.run import measure
    from graphclone.calibration.synthesis import synthesise
    from graphclone.calibration.taps import Tap
    from graphclone.model import Model, load

    proto = onnx.parser.parse_model(ENCODER)
    table = np.random.default_rng(0).standard_normal((23, 6)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(table, "table"))
    model = load(ROOT / "tools" / "demo_data" / "parent.onnx")
    feeds = synthesise(model, {"batch": 2, "time": 5})
    stats = measure(model, [feeds], [Tap("gelu")], progress=False)
    return {"model": model, "feeds": feeds, "stats": stats, "encoder": Model.from_proto(proto)}
