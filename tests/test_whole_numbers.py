"""Streams that operators on whole numbers add to, as onnxruntime's quantizer writes them in its QOperator format."""

from collections.abc import Callable

import numpy as np
import pytest

from graphclone.analysis import analyse
from graphclone.calibration.masks import mask_inputs, sense
from graphclone.calibration.run import measure
from graphclone.calibration.session import open_session
from graphclone.calibration.taps import Tap
from graphclone.gates import GATES, gated
from graphclone.model import Model
from graphclone.plan import Plan
from graphclone.surgery import apply
from graphclone.taps import readings
from graphclone.verify import verify
from graphclone.verify.rounding import unrounded
from graphclone.verify.running import difference, run
from graphclone.weights import Weight

Graph = Callable[..., Model]
FEEDS = {"x": np.random.default_rng(3).standard_normal((2, 5, 12)).astype(np.float32)}


class Text:
    """A graph's text while it is written: whole numbers, each tensor by a scale of its own."""

    def __init__(self) -> None:
        self.nodes: list[str] = []
        self.constants = ["uint8 z = {128}", "int8 none = {0}", "float ws = {0.1}"]
        self.steps: dict[str, str] = {}

    def node(self, op: str, *inputs: str, attributes: str = "") -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(f"{name} = {op} {attributes}({', '.join(inputs)})")
        return name

    def step(self) -> str:
        name = f"s{len(self.constants)}"
        self.constants.append(f"float {name} = {{{0.04 + 0.0003 * len(self.constants):.4f}}}")
        return f"{name}, z"

    def weight(self, *shape: int, dtype: str = "int8") -> str:
        name = f"w{len(self.constants)}"
        self.constants.append(f"{dtype}[{', '.join(map(str, shape))}] {name}")
        self.steps[name] = "ws, none"
        return name

    def whole(self, op: str, *operands: str, attributes: str = "") -> str:
        step = self.step()
        name = self.node(op, *(f"{each}, {self.steps[each]}" for each in operands), step, attributes=attributes)
        self.steps[name] = step
        return name

    def real(self, x: str) -> str:
        return self.node("DequantizeLinear", x, self.steps[x])

    def quantized(self, x: str) -> str:
        step = self.step()
        self.steps[name := self.node("QuantizeLinear", x, step)] = step
        return name

    def linear(self, x: str, inner: int, outer: int) -> str:
        return self.whole("QLinearMatMul", x, self.weight(inner, outer))

    def norm(self, x: str) -> str:
        gain, shift = (self.weight(12, dtype="float") for _ in range(2))
        return self.quantized(self.node("LayerNormalization", self.real(x), gain, shift))

    def ffn(self, x: str, inner: int = 20) -> str:
        return self.linear(self.whole("com.microsoft.QLinearSigmoid", self.linear(x, 12, inner)), inner, 12)

    def attend(self, x: str, inner: int = 10) -> str:
        q, k, v = (self.linear(x, 12, inner) for _ in range(3))
        turned = self.node("Transpose", k, attributes="<perm = [0, 2, 1]> ")
        self.steps[turned] = self.steps[k]
        scores = self.whole("QLinearMatMul", q, turned)
        shares = self.whole("com.microsoft.QLinearSoftmax", scores, attributes="<axis = -1, opset = 13> ")
        return self.linear(self.whole("QLinearMatMul", shares, v), inner, 12)

    def add(self, x: str, y: str) -> str:
        return self.whole("com.microsoft.QLinearAdd", x, y)

    def finished(self, x: str) -> str:
        lines = "\n".join([*self.nodes, f"last = DequantizeLinear({x}, {self.steps[x]})", "y = Relu(last)"])
        return f"(float[B, S, 12] x) => (float[B, S, 12] y) <{', '.join(self.constants)}> {{ {lines} }}"


def in_a_row(count: int = 3) -> str:
    text = Text()
    x = text.linear(text.quantized("x"), 12, 12)
    for _ in range(count):
        x = text.add(x, text.attend(text.norm(x)))
        x = text.add(text.ffn(text.norm(x)), x)
    return text.finished(x)


def side_by_side(count: int = 3) -> str:
    text = Text()
    x = text.linear(text.quantized("x"), 12, 12)
    for _ in range(count):
        normed = text.norm(x)
        x = text.add(text.add(text.attend(normed), text.ffn(normed)), x)
    return text.finished(x)


def without(model: Model, half: str) -> Model:
    """Return a copy in which the last weight of a half block of block 1 is zero: the branch adds nothing."""
    copy = model.copy()
    products = [node for node in copy.graph.nodes if node.op == "QLinearMatMul" and not node.inputs[3].inputs]
    last = products[{"attention": 10, "ffn": 12}[half]].inputs[3]
    last.values = Weight.of(np.zeros(last.shape, np.int8))
    return copy


TEXTS = pytest.mark.parametrize("text", [in_a_row(), side_by_side()], ids=["in a row", "side by side"])


@TEXTS
def test_a_stream_of_whole_numbers_computes_what_it_did(
    graph: Graph, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    model = graph(text)
    monkeypatch.setattr("graphclone.model.make_explicit", lambda graph: None)
    as_written = graph(text)
    assert len(as_written.graph.nodes) < len(model.graph.nodes)
    assert np.array_equal(run(model, [FEEDS])[0]["y"], run(as_written, [FEEDS])[0]["y"])


@TEXTS
def test_a_stream_of_whole_numbers_has_blocks(graph: Graph, text: str) -> None:
    model = graph(text)
    analysis = analyse(model)
    (stack,) = analysis.stacks
    kinds = [[half.kind for half in block.parallel or block.halves] for block in stack.blocks]
    assert kinds == [["attention", "ffn"]] * 3
    names = [d.name for d in analysis.dimensions if d.name.startswith("blocks.1.")]
    assert names == ["blocks.1.head_dim", "blocks.1.v_head_dim", "blocks.1.ffn"]
    assert verify(model, analysis=analysis).ok


@TEXTS
@pytest.mark.parametrize("half", ["attention", "ffn"])
def test_a_branch_of_whole_numbers_is_dropped(graph: Graph, text: str, half: str) -> None:
    model = graph(text)
    child = apply(model, Plan(drop=(f"blocks.1.{half}",)))
    silent = without(model, half)
    assert difference(run(unrounded(child), [FEEDS])[0], run(unrounded(silent), [FEEDS])[0]) < 1e-5
    assert difference(run(child, [FEEDS])[0], run(silent, [FEEDS])[0]) < 0.3
    assert verify(child).ok


@TEXTS
def test_blocks_of_whole_numbers_are_dropped(graph: Graph, text: str) -> None:
    model = graph(text)
    child = apply(model, Plan(blocks={"": (0, 2)}))
    silent = without(without(model, "attention"), "ffn")
    assert difference(run(unrounded(child), [FEEDS])[0], run(unrounded(silent), [FEEDS])[0]) < 1e-5
    assert len(analyse(child).stacks[0].blocks) == 2


def test_a_gate_lets_a_stream_of_whole_numbers_pass(graph: Graph) -> None:
    model = graph(in_a_row())
    halves = [half for block in analyse(model).stacks[0].blocks for half in block.halves]
    session = open_session(gated(model, halves))
    (shut,) = session.run(None, FEEDS | {GATES: np.array([number != 3 for number in range(6)])})
    child = apply(model, Plan(drop=("blocks.1.ffn",)))
    assert np.array_equal(shut, run(child, [FEEDS])[0]["y"])


def test_whole_numbers_are_measured_as_what_they_stand_for(graph: Graph) -> None:
    model = graph(in_a_row())
    (reading,) = readings(analyse(model))["blocks.1.ffn"]
    makes = next(node for node in model.graph.nodes if node.outputs[0].name == reading.tap.tensor)
    assert makes.op == "QLinearSigmoid"
    (whole,) = open_session(model, outputs=[reading.tap.tensor]).run(None, FEEDS)[-1:]
    scale, zero = (float(tensor.values) for tensor in makes.inputs[3:5])
    rows = (whole.reshape(-1, 20).astype(np.float64) - zero) * scale
    stats = measure(model, [FEEDS], [reading.tap], provider="cpu", progress=False)
    assert np.allclose(stats.mean_abs(reading.tap), np.abs(rows).mean(0), rtol=1e-5)


def test_numbers_quantized_by_what_they_are_are_measured_as_well(graph: Graph) -> None:
    model = graph(
        """(float[B, 12] x) => (float[B, 7] y) <int8[12, 7] w> {
            q, s, z = DynamicQuantizeLinear(x)
            p = MatMulInteger(q, w, z)
            f = Cast<to = 1>(p)
            y = Mul(f, s)
        }"""
    )
    x = FEEDS["x"].reshape(10, 12)
    stats = measure(model, [{"x": x}], [Tap("q")], provider="cpu", progress=False)
    assert np.allclose(stats.mean_abs("q"), np.abs(x).mean(0), atol=0.02)


@pytest.mark.parametrize("low", [0, 255])
def test_a_mask_reaches_a_softmax_of_whole_numbers(graph: Graph, low: int) -> None:
    model = graph(
        f"""(float[b, s, 6] x, bool[b, s] shown) => (float[b, s, s] y)
        <float s = {{0.05}}, uint8 z = {{128}}, uint8 low = {{{low}}}, int64[1] axis = {{1}}> {{
            q = QuantizeLinear(x, s, z)
            keys = Transpose<perm = [0, 2, 1]>(q)
            scores = QLinearMatMul(q, s, z, keys, s, z, s, z)
            hidden = Not(shown)
            number = Cast<to = 1>(hidden)
            wide = Unsqueeze(number, axis)
            padding = QuantizeLinear(wide, s, z)
            bias = com.microsoft.QLinearMul(padding, s, z, low, s, z, s, z)
            masked = com.microsoft.QLinearAdd(scores, s, z, bias, s, z, s, z)
            weights = com.microsoft.QLinearSoftmax<axis = -1, opset = 13>(masked, s, z, s, z)
            y = DequantizeLinear(weights, s, z)
        }}"""
    )
    assert mask_inputs(model) == ("shown",)
    assert sense(model, "shown") is (low < 128)
