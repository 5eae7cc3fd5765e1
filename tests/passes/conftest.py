"""A small residual network from text, and samples for it."""

import numpy as np
import onnx
import pytest

from graphclone.analysis import analyse
from graphclone.model import Model
from graphclone.pipeline import Pipeline

WIDTH, FFN, WORDS, BLOCKS = 16, 24, 40, 4


def network(norm: str = "LayerNormalization", bias: bool = True, tied: bool = False, shared: bool = False) -> Model:
    """Return token ids [B, T] to logits through blocks of norm, matrix, Relu, matrix, sum."""
    random = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {"embed": random.standard_normal((WORDS, WIDTH))}
    lines = ["x0 = Gather(embed, ids)"]

    def normed(name: str, x: str) -> str:
        weights[f"{name}.gain"] = 1 + 0.2 * random.standard_normal(WIDTH)
        if norm != "LayerNormalization":
            return f"{name} = {norm}<axis=-1, stash_type=1>({x}, {name}.gain)"
        weights[f"{name}.shift"] = 0.2 * random.standard_normal(WIDTH)
        return f"{name} = LayerNormalization<axis=-1>({x}, {name}.gain, {name}.shift)"

    def product(name: str, x: str, key: str, rows: int, columns: int) -> str:
        weights[f"{key}.weight"] = random.standard_normal((rows, columns)) / rows**0.5
        if not bias:
            return f"{name} = MatMul({x}, {key}.weight)"
        weights[f"{key}.bias"] = 0.3 * random.standard_normal(columns)
        return f"{name}_bare = MatMul({x}, {key}.weight)\n{name} = Add({name}_bare, {key}.bias)"

    for i in range(BLOCKS):
        key = "all" if shared else f"h.{i}"
        lines += [
            normed(f"norm{i}", f"x{i}"),
            product(f"up{i}", f"norm{i}", f"{key}.up", WIDTH, FFN),
            f"act{i} = Relu(up{i})",
            product(f"down{i}", f"act{i}", f"{key}.down", FFN, WIDTH),
            f"x{i + 1} = Add(x{i}, down{i})",
        ]
    lines.append(normed("last", f"x{BLOCKS}"))
    if tied:
        lines += ["turned = Transpose<perm=[1, 0]>(embed)", "logits = MatMul(last, turned)"]
    else:
        lines.append(product("logits", "last", "head", WIDTH, WORDS))
    body = "\n".join(lines)
    for name in sorted(weights, key=len, reverse=True):
        body = body.replace(name, name.replace(".", "_"))
    text = (
        f'<ir_version: 10, opset_import: ["" : 20]> net (int64[B, T] ids) => (float[B, T, {WORDS}] logits) {{ {body} }}'
    )
    proto = onnx.parser.parse_model(text)
    names = {name.replace(".", "_"): name for name in weights}
    for node in proto.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.name = f"node_{node.output[0]}"
    for name, value in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value.astype(np.float32), name))
    return Model.from_proto(proto)


def batches(count: int = 10, seed: int = 0) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    return [{"ids": random.integers(0, WORDS, (4, 10))} for _ in range(count)]


@pytest.fixture
def samples():
    return batches()


@pytest.fixture
def make():
    """Return `network`."""
    return network


@pytest.fixture
def run_pipeline():
    """Return a function that runs a pipeline's text on the CPU."""

    def run(text: str, parent: Model, data):
        return Pipeline.parse(text).run(parent, data=data, analysis=analyse(parent), provider="cpu")

    return run


@pytest.fixture
def outputs():
    """Return a function from a model to its outputs for batches that calibration has not seen."""
    from graphclone.calibration.session import open_session

    def run(model: Model, feeds=None):
        session = open_session(model, threads=1)
        return [session.run(None, dict(each)) for each in (feeds or batches(3, seed=9))]

    return run


@pytest.fixture
def apart():
    """Return a function that measures how far outputs are from others: root mean square, relative."""

    def distance(got, wanted) -> float:
        pairs = [(a, b) for one, other in zip(got, wanted, strict=True) for a, b in zip(one, other, strict=True)]
        pairs = [(a, b) for a, b in pairs if a.shape == b.shape and a.dtype.kind == "f"]
        assert pairs
        return float(np.sqrt(sum(((a - b) ** 2).sum() for a, b in pairs) / sum((b**2).sum() for _, b in pairs)))

    return distance
