"""Quantized models as modules: onnxruntime judges the outputs, the straight-through rule the gradients.

onnxruntime runs without its optimizer, which quantizes other tensors than the file says. Inputs lie away from ties
between two integers, except where the test is about ties: there both round half to even.
"""

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
import torch
import zoo
from onnx import ModelProto, TensorProto, helper, numpy_helper

import graphclone
from graphclone.errors import InputError
from graphclone.model import Model
from graphclone.pytorch import to_torch

random = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def same_numbers_in_any_order():
    random.bit_generator.state = np.random.default_rng(0).bit_generator.state


def f(*shape, low=-2.0, high=2.0):
    return random.uniform(low, high, shape).astype(np.float32)


def whole(dtype, *shape, low=0, high=16):
    return random.integers(low, high, shape).astype(dtype)


def build(nodes, constants, given=(3, 4), kind=TensorProto.FLOAT, result=TensorProto.FLOAT) -> ModelProto:
    """Return a model from x to y; nodes are (operator, inputs, outputs, attributes)."""
    graph = helper.make_graph(
        [
            helper.make_node(name.rpartition(".")[2], i, o, domain=name.rpartition(".")[0], **attributes)
            for name, i, o, attributes in nodes
        ],
        "quantized",
        [helper.make_tensor_value_info("x", kind, ["n", *given[1:]])],
        [helper.make_tensor_value_info("y", result, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def session(model) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def check(proto: ModelProto, x: np.ndarray) -> torch.nn.Module:
    """Compare with onnxruntime and return the module, with gradients of the sum."""
    module = to_torch(Model.from_proto(proto))
    given = torch.from_numpy(x).requires_grad_(x.dtype == np.float32)
    have, want = module(given), session(proto.SerializeToString()).run(None, {"x": x})[0]
    assert have.shape == want.shape and np.abs(have.detach().numpy() - want).max() <= 1e-5 * np.abs(want).max()
    have.sum().backward()
    assert all(torch.isfinite(each.grad).all() and each.grad.any() for each in module.parameters())
    module.given = given
    return module


DEQUANTIZED = {
    "per_tensor": (whole(np.uint8, 4, 6), np.float32(0.1), np.uint8(7), {}),
    "per_axis": (whole(np.int8, 4, 6, low=-9), f(6, low=0.1), whole(np.int8, 6), {"axis": 1}),
    "negative_axis": (whole(np.int8, 4, 6, low=-9), f(4, low=0.1), None, {"axis": -2}),
    "blocked": (whole(np.int8, 4, 6, low=-9), f(2, 6, low=0.1), whole(np.int8, 2, 6), {"axis": 0, "block_size": 2}),
    "int4": (whole(np.int8, 4, 6, low=-8, high=8).astype(ml_dtypes.int4), f(4, 2, low=0.1), None, {"axis": 1, "block_size": 3}),  # noqa: E501
    "uint4": (whole(np.uint8, 4, 6).astype(ml_dtypes.uint4), np.float32(0.3), np.uint8(5).astype(ml_dtypes.uint4), {}),
    "float8": (f(4, 6).astype(ml_dtypes.float8_e4m3fn), np.float32(0.3), None, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", DEQUANTIZED)
def test_a_dequantized_constant_is_a_float_parameter(name):
    data, scale, zero, attributes = DEQUANTIZED[name]
    constants = {"w": data, "w_scale": scale} | ({} if zero is None else {"w_zero": zero})
    nodes = [("DequantizeLinear", list(constants), ["v"], attributes), ("MatMul", ["x", "v"], ["y"], {})]
    module = check(build(nodes, constants), f(3, 4))
    assert list(module.state_dict()) == ["w"] and dict(module.named_buffers()) == {}


def test_an_int32_bias_is_a_float_parameter():
    nodes = [("DequantizeLinear", ["b", "s"], ["v"], {}), ("Add", ["x", "v"], ["y"], {})]
    module = check(build(nodes, {"b": whole(np.int32, 4, low=-(10**6), high=10**6), "s": np.float32(1e-6)}), f(3, 4))
    assert [name for name, _ in module.named_parameters()] == ["b"]


def test_a_constant_that_is_dequantized_twice_is_one_parameter():
    nodes = [
        ("DequantizeLinear", ["w", "s"], ["a"], {}),
        ("DequantizeLinear", ["w", "s"], ["b"], {}),
        ("MatMul", ["x", "a"], ["h"], {}),
        ("MatMul", ["h", "b"], ["y"], {}),
    ]
    module = check(build(nodes, {"w": whole(np.int8, 4, 4), "s": np.float32(0.1)}), f(3, 4))
    assert len(list(module.parameters())) == 1


def test_rows_are_picked_before_they_are_dequantized():
    nodes = [("Gather", ["w", "x"], ["r"], {}), ("DequantizeLinear", ["r", "s", "z"], ["y"], {})]
    constants = {"w": whole(np.uint8, 9, 4), "s": np.float32(0.1), "z": np.uint8(3)}
    module = check(build(nodes, constants, kind=TensorProto.INT64), whole(np.int64, 3, 4, high=9))
    assert "F.embedding" in module.source


def rounding(scale, zero, **attributes):
    there = ("QuantizeLinear", ["x", "s", "z"], ["q"], attributes)
    back = ("DequantizeLinear", ["q", "s", "z"], ["y"], attributes)
    return build([there, back], {"s": scale, "z": zero})


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.int16])
def test_ties_of_activations_round_half_to_even(kind):
    """A scale of 1/4 divides exactly, so that every second input is a tie."""
    x = np.arange(-600, 600, dtype=np.float32).reshape(-1, 4) / 8
    module = check(rounding(np.float32(0.25), kind(3)), x)
    assert list(module.state_dict()) == [] and "quantize(x, 0.25, 3.0, " in module.source


def test_gradients_pass_through_rounding_where_numbers_are_in_range():
    x = np.array([[-40.0, 0.04, 1.33, 40.0]], np.float32)
    assert check(rounding(np.float32(0.1), np.int8(0)), x).given.grad.tolist() == [[0, 1, 1, 0]]


@pytest.mark.parametrize("steep", ["Div", "Reciprocal", "Log", "root", "quotient"])
def test_gradients_are_numbers_where_rounding_makes_an_operand_zero(steep):
    """The quantizer behind cuts the infinity off; no gradient times an infinite slope would be no number."""
    steps = {
        "Div": [("Div", ["one", "d"], ["v"], {})],
        "Reciprocal": [("Reciprocal", ["d"], ["v"], {})],
        "Log": [("Log", ["d"], ["v"], {})],
        "root": [("Sqrt", ["d"], ["r"], {}), ("Div", ["one", "r"], ["v"], {})],
        "quotient": [("Add", ["x", "one"], ["e"], {}), ("Sqrt", ["d"], ["r"], {}), ("Div", ["e", "r"], ["v"], {})],
    }[steep]
    there = ("QuantizeLinear", ["x", "s", "z"], ["q"], {})
    back = [("DequantizeLinear", ["q", "s", "z"], ["d"], {})]
    clipped = [("QuantizeLinear", ["v", "s", "z"], ["w"], {}), ("DequantizeLinear", ["w", "s", "z"], ["y"], {})]
    proto = build([there, *back, *steps, *clipped], {"s": np.float32(0.25), "z": np.uint8(40), "one": np.float32(1)})
    gradient = check(proto, np.array([[0.01, 0.6, 1.3, 2.3]], np.float32)).given.grad
    assert torch.isfinite(gradient).all() and gradient[0, 0] == 0 and (gradient[0, 1:] != 0).all()


def test_activations_are_rounded_along_an_axis():
    check(rounding(f(4, low=0.1), whole(np.uint8, 4), axis=1), f(3, 4))


def test_a_mask_of_minus_infinity_stays_finite():
    x = np.array([[0, -np.inf, np.finfo(np.float32).min, 1]], np.float32)
    assert torch.isfinite(check(rounding(np.float32(0.1), np.uint8(200)), x).given.grad).all()


@pytest.mark.parametrize(("bits", "zeros"), [(4, "none"), (4, "packed"), (4, "float"), (8, "none"), (8, "packed")])
def test_a_matmul_by_blocks_is_a_linear_layer(bits, zeros):
    rows, width, blocks = 5, 48, 3
    data = whole(np.uint8, rows, blocks, 2 * bits, high=256)
    constants = {"w": data, "s": f(rows, blocks, low=0.1)}
    if zeros == "packed":
        constants["z"] = whole(np.uint8, rows, -(-blocks * bits // 8), high=256)
    if zeros == "float":
        constants["z"] = f(rows, blocks, low=5, high=9)
    attributes = {"K": width, "N": rows, "bits": bits, "block_size": 16}
    nodes = [("com.microsoft.MatMulNBits", ["x", *constants], ["y"], attributes)]
    module = check(build(nodes, constants, given=(2, 3, width)), f(2, 3, width))
    assert "F.linear(x, self.w)" in module.source and module.w.shape == (rows, width)


@pytest.mark.parametrize("zeros", [False, True])
def test_a_gather_of_blocks_is_an_embedding(zeros):
    data = whole(np.uint8, 9, 32).astype(ml_dtypes.uint4)
    constants = {"w": data, "s": f(9, 2, low=0.1)}
    if zeros:
        constants["z"] = whole(np.uint8, 9, 2).astype(ml_dtypes.uint4)
    attributes = {"block_size": 16, "gather_axis": 0, "quantize_axis": 1}
    nodes = [("com.microsoft.GatherBlockQuantized", ["w", "x", *list(constants)[1:]], ["y"], attributes)]
    module = check(build(nodes, constants, kind=TensorProto.INT64), whole(np.int64, 3, 4, high=9))
    assert "F.embedding(x, self.w)" in module.source


def test_integers_that_are_scaled_by_the_run_multiply_as_floats():
    nodes = [
        ("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], {}),
        ("MatMulInteger", ["q", "w", "z", "w_zero"], ["i"], {}),
        ("Cast", ["i"], ["c"], {"to": TensorProto.FLOAT}),
        ("Mul", ["c", "s"], ["y"], {}),
    ]
    x = f(3, 4)
    module = check(build(nodes, {"w": whole(np.int8, 4, 6, low=-9), "w_zero": whole(np.int8, 6)}), x)
    (weight,) = module.parameters()
    assert torch.equal(weight, weight.round())
    np.testing.assert_allclose(module.given.grad, weight.detach().sum(1).expand(3, 4), rtol=1e-5)


def test_integers_are_convolved_as_floats():
    nodes = [
        ("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], {}),
        ("ConvInteger", ["q", "w", "z", "w_zero"], ["i"], {"pads": [1, 1, 1, 1], "strides": [2, 1]}),
        ("Cast", ["i"], ["c"], {"to": TensorProto.FLOAT}),
        ("Mul", ["c", "s"], ["y"], {}),
    ]
    constants = {"w": whole(np.uint8, 5, 3, 3, 3), "w_zero": np.uint8(7)}
    module = check(build(nodes, constants, given=(2, 3, 6, 7)), f(2, 3, 6, 7))
    (weight,) = module.parameters()
    assert torch.equal(weight, torch.from_numpy(constants["w"]).float() - 7)


def test_a_product_of_integers_times_both_scales_is_a_linear_layer():
    nodes = [
        ("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], {}),
        ("MatMulInteger", ["q", "fc.weight_quantized", "z", "fc.weight_zero_point"], ["i"], {}),
        ("Cast", ["i"], ["c"], {"to": TensorProto.FLOAT}),
        ("Mul", ["s", "fc.weight_scale"], ["m"], {}),
        ("Mul", ["c", "m"], ["y"], {}),
    ]
    integers, scale, zero = whole(np.int8, 4, 6, low=-9), f(6, low=0.1), whole(np.int8, 6)
    constants = {"fc.weight_quantized": integers, "fc.weight_scale": scale, "fc.weight_zero_point": zero}
    module = check(build(nodes, constants), f(3, 4))
    assert list(module.state_dict()) == ["fc.weight"] and "F.linear(" in module.source
    weight = (integers.astype(np.float32) - zero) * scale
    assert np.allclose(module.fc.weight.detach(), weight)


@pytest.mark.parametrize("route", ["int4", "qdq_channel", "dynamic8"])
def test_a_quantized_export_has_the_frameworks_names(route):
    module = to_torch(graphclone.load(zoo.export("bert", route)))
    native = zoo.family("bert").build().state_dict()
    assert {name: value.shape for name, value in module.state_dict().items()} == {
        name: value.shape for name, value in native.items()
    }


STEP = {"s": np.float32(0.1), "z": np.uint8(120)}
KERNEL = {"w_s": np.float32(0.03), "w_z": np.int8(2)}
WHOLE = {
    "com.microsoft.QLinearSigmoid": (["q", "s", "z", "y_s", "y_z"], {}, {}),
    "com.microsoft.QLinearSoftmax": (
        ["q", "s", "z", "y_s", "y_z"],
        {"y_s": np.float32(1 / 256), "y_z": np.uint8(0)},  # what probabilities get; it loses halves of coarser steps
        {"axis": -1, "opset": 13},
    ),
    "com.microsoft.QLinearAdd": (["q", "s", "z", "w", "w_s", "w_z", "y_s", "y_z"], {"w": whole(np.uint8, 4)}, {}),
    "com.microsoft.QLinearMul": (["q", "s", "z", "w", "w_s", "w_z", "y_s", "y_z"], {"w": whole(np.uint8, 4)}, {}),
    "QLinearMatMul": (
        ["q", "s", "z", "w", "w_s", "w_z", "y_s", "y_z"],
        {"w": whole(np.int8, 4, 5, low=-90, high=90)},
        {},
    ),
    "com.microsoft.QGemm": (
        ["q", "s", "z", "w", "w_s", "w_z", "b", "y_s", "y_z"],
        {"w": whole(np.int8, 5, 4, low=-90, high=90), "b": whole(np.int32, 5, low=-900, high=900)},
        {"transB": 1},
    ),
    "com.microsoft.QLinearConcat": (["y_s", "y_z", "q", "s", "z", "q", "s", "z"], {}, {"axis": 1}),
}


@pytest.mark.parametrize("name", WHOLE)
def test_operators_on_integers_alone_are_float_operators_between_two_scales(name):
    """onnxruntime rounds the same numbers, so that few results, those near a tie, are a step apart."""
    inputs, constants, attributes = WHOLE[name]
    zero = {"w_z": np.uint8(7)} if any(each.dtype == np.uint8 for each in constants.values()) else {}
    constants = STEP | KERNEL | zero | {"y_s": np.float32(0.0437), "y_z": np.uint8(100)} | constants
    nodes = [
        ("QuantizeLinear", ["x", "s", "z"], ["q"], {}),
        (name, inputs, ["i"], attributes),
        ("DequantizeLinear", ["i", "y_s", "y_z"], ["y"], {}),
    ]
    proto, x = build(nodes, {key: each for key, each in constants.items() if key in {*inputs, "s", "z"}}), f(3, 4)
    module = to_torch(Model.from_proto(proto))
    have, want = module(torch.from_numpy(x)).detach().numpy(), session(proto.SerializeToString()).run(None, {"x": x})[0]
    assert have.shape == want.shape and np.abs(have - want).max() <= 0.0438
    assert np.mean(np.abs(have - want) > 1e-5) < 0.1


def test_a_convolution_of_integers_is_one_of_floats():
    constants = {"w": whole(np.int8, 5, 3, 3, 3, low=-9, high=9)}
    constants |= {"w_s": f(5, low=0.01, high=0.1), "w_z": np.zeros(5, np.int8)}
    constants |= STEP | {"b": whole(np.int32, 5, low=-90, high=90), "y_s": np.float32(0.1), "y_z": np.uint8(100)}
    nodes = [
        ("QuantizeLinear", ["x", "s", "z"], ["q"], {}),
        ("QLinearConv", ["q", "s", "z", "w", "w_s", "w_z", "y_s", "y_z", "b"], ["i"], {"pads": [1, 1, 1, 1]}),
        ("DequantizeLinear", ["i", "y_s", "y_z"], ["y"], {}),
    ]
    proto, x = build(nodes, constants, given=(2, 3, 6, 7)), f(2, 3, 6, 7)
    module = to_torch(Model.from_proto(proto))
    have, want = module(torch.from_numpy(x)).detach().numpy(), session(proto.SerializeToString()).run(None, {"x": x})[0]
    assert np.abs(have - want).max() <= 0.101 and np.mean(np.abs(have - want) > 1e-5) < 0.1
    assert sorted(tuple(each.shape) for each in module.parameters()) == [(5,), (5, 3, 3, 3)]


def test_an_operator_on_integers_alone_without_a_float_one_is_refused():
    nodes = [("com.microsoft.QLinearReduceMean", ["x", "s", "z", "s", "z"], ["y"], {"axes": [1]})]
    proto = build(nodes, {"s": np.float32(0.1), "z": np.uint8(0)}, kind=TensorProto.UINT8, result=TensorProto.UINT8)
    with pytest.raises(InputError, match=r"no PyTorch rule for 1 operator: com\.microsoft\.QLinearReduceMean"):
        to_torch(Model.from_proto(proto))


@pytest.mark.parametrize(("family", "route"), [("bert", "int4"), ("gpt2", "qdq_channel")])
def test_a_quantized_export_trains(family, route):
    module = to_torch(graphclone.load(zoo.export(family, route)))
    feeds = zoo.feeds(family, 3, 9, padded=True)
    given = module(*[torch.from_numpy(feeds[name]) for name in module.input_names])
    runner = session(zoo.export(family, route))
    wanted = runner.run(None, {value.name: feeds[value.name] for value in runner.get_inputs()})
    given = given if isinstance(given, tuple) else (given,)
    for have, want in zip(given, wanted, strict=True):
        assert np.abs(have.detach().numpy() - want).max() <= 1e-5 * np.abs(want).max()
    sum(each.sum() for each in given).backward()
    assert all(torch.isfinite(each.grad).all() for each in module.parameters())
