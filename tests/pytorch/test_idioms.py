"""Idioms: what exporters write out becomes one torch call, and only where it is the same."""

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from graphclone.errors import InputError
from graphclone.model import Model
from graphclone.pytorch import to_torch

F, INT = TensorProto.FLOAT, TensorProto.INT64


def number(value, name):
    return numpy_helper.from_array(np.asarray(value), name)


def attention(offset: int = 0, low: float = float("-inf"), mask_input: bool = False) -> Model:
    """softmax(q k' / 4 + mask) v, where the mask forbids keys after the query's place plus `offset`."""
    node = helper.make_node
    nodes = [
        node("Shape", ["q"], ["length"], start=2, end=3),
        node("Squeeze", ["length"], ["n"]),
        node("Range", ["zero", "n", "one"], ["places"]),
        node("Unsqueeze", ["places", "last"], ["rows"]),
        node("Add", ["rows", "offset"], ["limit"]),
        node("LessOrEqual", ["places", "limit"], ["seen"]),
        node("Where", ["seen", "nothing", "low"], ["mask"]),
        node("Transpose", ["k"], ["turned"], perm=[0, 1, 3, 2]),
        node("MatMul", ["q", "turned"], ["product"]),
        node("Div", ["product", "four"], ["scaled"]),
        node("Add", ["scaled", "mask"], ["masked"]),
        *([node("Add", ["masked", "more"], ["scores"])] if mask_input else [node("Identity", ["masked"], ["scores"])]),
        node("Softmax", ["scores"], ["weights"], axis=-1),
        node("MatMul", ["weights", "v"], ["context"]),
    ]
    shape = ["batch", 3, "sequence", 16]
    inputs = [helper.make_tensor_value_info(name, F, shape) for name in "qkv"]
    if mask_input:
        inputs.append(helper.make_tensor_value_info("more", F, ["sequence", "sequence"]))
    constants = [
        number(np.int64(0), "zero"), number(np.int64(1), "one"), number([-1], "last"),
        number(np.int64(offset), "offset"),
        number(np.float32(0), "nothing"), number(np.float32(low), "low"), number(np.float32(4), "four"),
    ]  # fmt: skip
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("context", F, shape)], constants)
    return Model.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))


def agrees(model: Model, *inputs: np.ndarray) -> str:
    """Compare with onnxruntime; return the source."""
    module = to_torch(model)
    session = onnxruntime.InferenceSession(model.to_proto().SerializeToString(), providers=["CPUExecutionProvider"])
    want = session.run(None, {given.name: each for given, each in zip(session.get_inputs(), inputs, strict=True)})[0]
    with torch.no_grad():
        have = module(*map(torch.from_numpy, inputs)).numpy()
    assert np.abs(have - want).max() <= 1e-5 * np.abs(want).max()
    return module.source


QKV = [np.random.default_rng(n).standard_normal((2, 3, 7, 16)).astype(np.float32) for n in range(3)]


@pytest.mark.parametrize("low", [float("-inf"), -3.4028234663852886e38])
def test_a_lower_triangle_becomes_is_causal(low):
    assert "F.scaled_dot_product_attention(q, k, v, is_causal=True)" in agrees(attention(low=low), *QKV)


@pytest.mark.parametrize("offset", [1, -1])
def test_other_masks_stay(offset):
    low = -3.4028234663852886e38  # a first row with nothing to see must be the mean, as the graph says
    source = agrees(attention(offset, low), *QKV)
    assert "is_causal" not in source and "attn_mask=" in source


def test_a_small_penalty_is_no_prohibition():
    source = agrees(attention(low=-3.0), *QKV)
    assert "is_causal" not in source and "attn_mask=" in source


def test_a_mask_that_an_input_adds_to_stays():
    more = np.random.default_rng(5).standard_normal((7, 7)).astype(np.float32)
    source = agrees(attention(mask_input=True), *QKV, more)
    assert "is_causal" not in source and "attn_mask=" in source


def unary(nodes, constants) -> Model:
    shape = ["batch", 5, 12]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", F, shape)],
        [helper.make_tensor_value_info("y", F, shape)],
        constants,
    )
    return Model.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))


X = np.random.default_rng(1).standard_normal((4, 5, 12)).astype(np.float32)
SCALARS = [
    number(np.float32(v), n) for v, n in [(0.5, "half"), (1, "one"), (2**0.5, "root"), (1e-6, "eps"), (2, "two")]
]


def test_gelu_in_another_order_of_factors():
    node = helper.make_node
    nodes = [
        node("Div", ["x", "root"], ["a"]), node("Erf", ["a"], ["b"]), node("Add", ["one", "b"], ["c"]),
        node("Mul", ["half", "x"], ["d"]), node("Mul", ["d", "c"], ["y"]),
    ]  # fmt: skip
    assert "F.gelu(x)" in agrees(unary(nodes, SCALARS), X)


def test_something_like_gelu_is_left_alone():
    node = helper.make_node
    nodes = [
        node("Mul", ["x", "root"], ["a"]), node("Erf", ["a"], ["b"]), node("Add", ["one", "b"], ["c"]),
        node("Mul", ["half", "x"], ["d"]), node("Mul", ["d", "c"], ["y"]),
    ]  # fmt: skip
    assert "gelu" not in agrees(unary(nodes, SCALARS), X)


@pytest.mark.parametrize("root", ["reciprocal", "divide", "power"])
def test_rms_norm_in_its_spellings(root):
    node = helper.make_node
    weight = number(np.random.default_rng(2).standard_normal(12).astype(np.float32), "norm.weight")
    last = {
        "reciprocal": [node("Sqrt", ["e"], ["r"]), node("Reciprocal", ["r"], ["i"]), node("Mul", ["x", "i"], ["n"])],
        "divide": [node("Sqrt", ["e"], ["r"]), node("Div", ["x", "r"], ["n"])],
        "power": [node("Pow", ["e", "minus"], ["i"]), node("Mul", ["i", "x"], ["n"])],
    }[root]
    nodes = [
        node("Mul", ["x", "x"], ["s"]), node("ReduceMean", ["s", "axis"], ["m"]), node("Add", ["m", "eps"], ["e"]),
        *last, node("Mul", ["n", "norm.weight"], ["y"]),
    ]  # fmt: skip
    constants = [*SCALARS, weight, number([-1], "axis"), number(np.float32(-0.5), "minus")]
    source = agrees(unary(nodes, constants), X)
    assert "nn.RMSNorm(12, eps=1e-06)" in source and "sqrt" not in source


def test_layer_norm_written_out():
    node = helper.make_node
    random = np.random.default_rng(3)
    constants = [
        *SCALARS, number([-1], "axis"), number(random.standard_normal(12).astype(np.float32), "norm.weight"),
        number(random.standard_normal(12).astype(np.float32), "norm.bias"),
    ]  # fmt: skip
    nodes = [
        node("ReduceMean", ["x", "axis"], ["m"]), node("Sub", ["x", "m"], ["c"]), node("Pow", ["c", "two"], ["s"]),
        node("ReduceMean", ["s", "axis"], ["v"]), node("Add", ["v", "eps"], ["e"]), node("Sqrt", ["e"], ["r"]),
        node("Div", ["c", "r"], ["n"]), node("Mul", ["n", "norm.weight"], ["w"]), node("Add", ["w", "norm.bias"], ["y"]),  # noqa: E501
    ]  # fmt: skip
    assert "nn.LayerNorm(12, eps=1e-06)" in agrees(unary(nodes, constants), X)


def test_statistics_that_a_norm_gives_and_nothing_reads():
    """Some tools name all the outputs that an operator can have."""
    node = helper.make_node
    constants = [number(np.linspace(0.5, 2, 12, dtype=np.float32), "norm.weight")]
    norm = node("LayerNormalization", ["x", "norm.weight"], ["n", "mean", "deviation"])
    dropped = [node("Dropout", ["n"], ["d", "mask"]), node("Neg", ["d"], ["y"])]
    assert "nn.LayerNorm(12" in agrees(unary([norm, *dropped], constants), X)
    with pytest.raises(InputError, match="'mean' has no PyTorch counterpart"):
        agrees(unary([norm, node("Add", ["n", "mean"], ["y"])], constants), X)


def test_a_threshold_is_no_parameter_and_a_factor_is():
    """What only decides a comparison or is rounded to whole numbers takes no gradient, whatever it is called."""
    node = helper.make_node
    nodes = [
        node("Mul", ["x", "logit_scale"], ["scaled"]),
        node("Greater", ["scaled", "threshold_cast"], ["large"]),
        node("Div", ["scaled", "log_1"], ["ratio"]),
        node("Cast", ["ratio"], ["whole"], to=INT),
        node("Cast", ["whole"], ["steps"], to=F),
        node("Where", ["large", "scaled", "steps"], ["y"]),
    ]
    constants = [
        number(np.float32(value), name) for name, value in (("logit_scale", 2), ("threshold_cast", 1), ("log_1", 3))
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "g", [value("x", F, ["n", 4])], [value("y", F, ["n", 4])], constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], producer_name="pytorch", ir_version=9)
    assert [name for name, _ in to_torch(Model.from_proto(proto)).named_parameters()] == ["logit_scale"]


@pytest.mark.parametrize(("groups", "scale", "fused"), [(2, 1.0, True), (6, 1.0, True), (3, 0.5, False)])
def test_a_group_norm_of_one_call_is_one_again(groups, scale, fused, graph):
    """Exporters norm (batch, groups, rest) as images and scale each channel; with a scale for groups it is no call."""
    model = graph(f"""(float[B, 6, T] x) => (float[B, 6, T] y) <float[6, 1] weight, float[6, 1] bias,
        float[{groups}] ones = {{{", ".join([str(scale)] * groups)}}},
        float[{groups}] zeros = {{{", ".join("0" * groups)}}},
        int64[3] apart = {{0, {groups}, -1}}> {{
        r = Reshape(x, apart)  n = InstanceNormalization <epsilon = 0.01> (r, ones, zeros)  s = Shape(x)
        b = Reshape(n, s)  m = Mul(b, weight)  y = Add(m, bias) }}""")
    source = agrees(model, np.random.default_rng(0).standard_normal((2, 6, 9)).astype(np.float32))
    assert ("F.group_norm(" in source) == fused
    assert {value.shape for value in to_torch(model).parameters()} >= ({(6,)} if fused else {(6, 1)})
