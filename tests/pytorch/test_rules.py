"""Operator rules: onnxruntime judges each row's outputs, gradcheck its gradients."""

import re

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from graphclone.errors import InputError
from graphclone.model import Model
from graphclone.pytorch import Code, rule, to_torch
from graphclone.pytorch.registry import RULES, load_rules

random = np.random.default_rng(0)


def f(*shape, low=-2.0, high=2.0):
    return random.uniform(low, high, shape).astype(np.float32)


def i(*values):
    return np.array(values, np.int64)


X, ROW, POSITIVE = f(3, 5, 7), f(7), f(3, 5, 7, low=0.3)
MASK = random.uniform(size=(3, 5, 7)) < 0.5
IMAGE = f(2, 6, 9, 8)
Q, K, V = f(2, 6, 5, 8), f(2, 3, 7, 8), f(2, 3, 7, 4)
GROUPED = [f(2, 5, 64), f(2, 5, 32), f(2, 5, 32)]  # 4 heads of 16 over 2
GROUPS = {"num_heads": 4, "kv_num_heads": 2}
LENGTHS = [None, None, np.array([4, 4], np.int32), np.int32(5)]  # no past; each sample's last position, and the total
ANGLES = f(9, 8)
PAST, ONE_PAST = f(2, 3, 4, 4), f(1, 2, 3, 16)
CACHE, ONE_CACHE = [PAST, PAST + 1], [ONE_PAST, ONE_PAST + 1]
HIDDEN = [f(2, 5, 12), f(2, 5, 12), f(2, 5, 12)]
ALONE = [each[:1] for each in GROUPED]
FILLED = [np.array([7], np.int32), np.array(8, np.int32)]
PADDED = np.array([[1] * 9, [0, 0] + [1] * 7], np.int32)
INTEGERS = random.integers(-9, 9, (3, 5, 7)).astype(np.int32)
ENDLESS = np.array([[1, -np.inf, np.inf, np.nan]], np.float32)
IDS = np.array([[1, 0, 3], [2, 2, 4]], np.int64)

# (operator, inputs that are activations, inputs that are constants, attributes, opset, number of outputs)
ROWS = [
    *[(name, [X], [], {}, 18, 1) for name in (
        "Neg Abs Exp Sin Cos Tanh Erf Sigmoid Softplus Softsign Relu Floor Ceil Round Sign Identity HardSwish Mish Atan "  # noqa: E501
        "Sinh Cosh"
    ).split()],
    *[(name, [POSITIVE], [], {}, 18, 1) for name in ("Sqrt", "Reciprocal", "Log")],
    *[(name, [X, f(5, 1)], [], {}, 18, 1) for name in ("Add", "Sub", "Mul", "Div", "Max", "Min")],
    *[(name, [X, f(5, 7)], [], {}, 18, 1) for name in ("Less", "Greater", "LessOrEqual", "GreaterOrEqual")],
    ("Pow", [POSITIVE, f(7, low=1.0)], [], {}, 18, 1),
    ("Pow", [X], [np.float32(3.0)], {}, 18, 1),
    ("Sum", [X, f(5, 7), f(7)], [], {}, 18, 1),
    ("Mean", [X, X + 1], [], {}, 18, 1),
    ("Max", [X], [np.float32(0.5)], {}, 18, 1),
    ("Where", [MASK, X, f(7)], [], {}, 18, 1),
    ("And", [MASK, MASK[::-1].copy()], [], {}, 18, 1),
    ("Not", [MASK], [], {}, 18, 1),
    ("IsNaN", [X], [], {}, 18, 1),
    ("Mod", [i(7, -7, 5), i(3, 3, -3)], [], {}, 18, 1),
    ("Mod", [X, f(7, low=0.5)], [], {"fmod": 1}, 18, 1),
    ("Div", [i(7, -7, 5), i(2, 2, -2)], [], {}, 18, 1),
    ("Cast", [X], [], {"to": TensorProto.INT64}, 18, 1),
    ("Clip", [X], [np.float32(-0.5), np.float32(1.0)], {}, 18, 1),
    ("Gelu", [X], [], {}, 20, 1),
    ("Gelu", [X], [], {"approximate": "tanh"}, 20, 1),
    ("LeakyRelu", [X], [], {"alpha": 0.2}, 18, 1),
    ("Elu", [X], [], {"alpha": 0.7}, 18, 1),
    ("Selu", [X], [], {}, 18, 1),
    ("HardSigmoid", [X], [], {}, 18, 1),
    ("ThresholdedRelu", [X], [], {"alpha": 0.7}, 18, 1),
    ("PRelu", [X, f(7)], [], {}, 18, 1),
    *[(name, [POSITIVE], [i(-1)], {}, 18, 1) for name in (
        "ReduceMean ReduceSum ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceSumSquare ReduceProd ReduceLogSumExp ReduceLogSum"  # noqa: E501
    ).split()],
    ("ReduceMean", [X], [], {"axes": [0, 2], "keepdims": 0}, 13, 1),
    ("ReduceSum", [X], [], {}, 18, 1),
    ("ArgMax", [X], [], {"axis": 1, "keepdims": 0}, 18, 1),
    ("Softmax", [X], [], {"axis": 1}, 18, 1),
    ("Softmax", [X], [], {"axis": 1}, 11, 1),
    ("LogSoftmax", [X], [], {}, 18, 1),
    ("CumSum", [X], [np.int64(1)], {}, 18, 1),
    ("CumSum", [X], [np.int64(1)], {"exclusive": 1, "reverse": 1}, 18, 1),
    ("LayerNormalization", [X, f(7), f(7)], [], {"epsilon": 1e-3}, 18, 1),
    ("LayerNormalization", [X, f(5, 7), f(5, 7)], [], {"axis": 1}, 18, 1),
    ("RMSNormalization", [X, f(7)], [], {"epsilon": 1e-3}, 23, 1),
    ("InstanceNormalization", [X, f(5), f(5)], [], {}, 18, 1),
    ("GroupNormalization", [IMAGE, f(6), f(6)], [], {"num_groups": 3}, 21, 1),
    ("BatchNormalization", [IMAGE, f(6), f(6)], [f(6), f(6, low=0.5)], {}, 18, 1),
    ("LpNormalization", [X], [], {"axis": -1}, 18, 1),
    ("TopK", [X], [i(3)], {"axis": -1}, 18, 2),
    ("GlobalAveragePool", [IMAGE], [], {}, 18, 1),
    ("GlobalMaxPool", [IMAGE], [], {}, 18, 1),
    ("MatMul", [X, f(3, 7, 4)], [], {}, 18, 1),
    ("MatMul", [X, f(7, 4)], [], {}, 18, 1),
    ("Gemm", [f(5, 7), f(4, 7), f(4)], [], {"transB": 1, "alpha": 0.5, "beta": 2.0}, 18, 1),
    ("Gemm", [f(7, 5), f(7, 4)], [], {"transA": 1}, 18, 1),
    ("Einsum", [X, f(7, 2, 3)], [], {"equation": "abc,cde->abde"}, 18, 1),
    ("Conv", [IMAGE, f(4, 3, 3, 2), f(4)], [], {"group": 2, "strides": [2, 1], "pads": [1, 0, 1, 0]}, 18, 1),
    ("Conv", [IMAGE, f(4, 6, 3, 3)], [], {"pads": [0, 1, 2, 1]}, 18, 1),
    ("Conv", [IMAGE, f(4, 6, 2, 3)], [], {"auto_pad": "SAME_UPPER"}, 18, 1),
    ("Conv", [X, f(4, 5, 3), f(4)], [], {"dilations": [2]}, 18, 1),
    ("ConvTranspose", [IMAGE, f(6, 4, 3, 2), f(4)], [], {"strides": [2, 2]}, 18, 1),
    ("MaxPool", [IMAGE], [], {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 0]}, 18, 1),
    ("AveragePool", [IMAGE], [], {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 0]}, 18, 1),
    ("Transpose", [X], [], {"perm": [2, 0, 1]}, 18, 1),
    ("Transpose", [X], [], {}, 18, 1),
    ("Reshape", [X], [i(0, -1)], {}, 18, 1),
    ("Reshape", [X], [i(-1, 7)], {}, 18, 1),
    ("Flatten", [IMAGE], [], {"axis": 2}, 18, 1),
    ("Squeeze", [f(3, 1, 5, 1)], [i(1, 3)], {}, 18, 1),
    ("Unsqueeze", [X], [i(0, -1)], {}, 18, 1),
    ("Concat", [X, f(3, 2, 7)], [], {"axis": 1}, 18, 1),
    ("Split", [X], [i(2, 3)], {"axis": 1}, 18, 2),
    ("Split", [IMAGE], [], {"axis": 1, "num_outputs": 3}, 18, 3),
    ("Slice", [X], [i(1, -4), i(2**63 - 1, -1), i(1, 2), i(2, 1)], {}, 18, 1),
    ("Slice", [X], [i(-1), i(-(2**63)), i(2), i(-1)], {}, 18, 1),
    ("Expand", [f(3, 1, 7)], [i(2, 1, 5, 1)], {}, 18, 1),
    ("Tile", [X], [i(1, 2, 3)], {}, 18, 1),
    ("Pad", [IMAGE], [i(0, 0, 1, 2, 0, 0, 3, 0), np.float32(1.5)], {}, 18, 1),
    ("Pad", [IMAGE], [i(0, 0, 1, 2, 0, 0, 3, 0)], {"mode": "reflect"}, 18, 1),
    ("Trilu", [X], [np.int64(1)], {"upper": 0}, 18, 1),
    ("DepthToSpace", [f(2, 12, 3, 5)], [], {"blocksize": 2}, 18, 1),
    ("DepthToSpace", [f(2, 12, 3, 5)], [], {"blocksize": 2, "mode": "CRD"}, 18, 1),
    ("SpaceToDepth", [f(2, 3, 4, 6)], [], {"blocksize": 2}, 18, 1),
    ("Gather", [X, IDS], [], {"axis": 1}, 18, 1),
    ("Gather", [f(5, 4), IDS], [], {}, 18, 1),
    ("Gather", [X], [np.int64(-2)], {"axis": 2}, 18, 1),
    ("Gather", [X], [i(-2, 0, 3)], {"axis": 2}, 18, 1),
    ("Gather", [X], [i(-2)], {"axis": 1}, 18, 1),
    ("GatherElements", [X, random.integers(0, 5, (3, 2, 7))], [], {"axis": 1}, 18, 1),
    ("GatherND", [X, np.array([[[0, 1], [2, 4]]], np.int64)], [], {}, 18, 1),
    ("GatherND", [X, random.integers(0, 5, (3, 2, 1))], [], {"batch_dims": 1}, 18, 1),
    ("ScatterElements", [X, random.permuted(np.tile(np.arange(5), (3, 1)), axis=1)[:, :2, None], f(3, 2, 1)], [], {"axis": 1}, 18, 1),  # noqa: E501
    ("ScatterND", [X, np.array([[0, 1], [2, 4]], np.int64), f(2, 7)], [], {"reduction": "add"}, 18, 1),
    ("OneHot", [IDS], [np.int64(5), f(2)], {}, 18, 1),
    ("NonZero", [MASK], [], {}, 18, 1),
    ("DFT", [f(2, 6, 5, 1)], [], {"axis": 2}, 18, 1),
    ("DFT", [f(2, 6, 5, 2)], [], {"axis": 1, "inverse": 1}, 18, 1),
    ("DFT", [f(2, 6, 5, 1)], [None, np.int64(-3)], {"onesided": 1}, 20, 1),
    ("Attention", [Q, K, V], [], {}, 23, 1),
    ("Attention", [Q, K, V, f(5, 7)], [], {"scale": 0.3}, 23, 1),
    ("Attention", [f(2, 5, 24), f(2, 5, 12), f(2, 5, 6)], [], {"q_num_heads": 6, "kv_num_heads": 3, "is_causal": 1}, 23, 1),  # noqa: E501
    ("RotaryEmbedding", [f(2, 3, 5, 8), f(2, 5, 4), f(2, 5, 4)], [], {}, 23, 1),
    ("RotaryEmbedding", [f(2, 3, 5, 8), f(2, 5, 3), f(2, 5, 3)], [], {"interleaved": 1, "rotary_embedding_dim": 6}, 23, 1),  # noqa: E501
    ("com.microsoft.BiasGelu", [X, ROW], [], {}, 18, 1),
    ("com.microsoft.FastGelu", [X, ROW], [], {}, 18, 1),
    ("com.microsoft.QuickGelu", [X], [], {"alpha": 1.3}, 18, 1),
    ("com.microsoft.SkipLayerNormalization", [X, X + 1, ROW, f(7), f(7)], [], {"epsilon": 1e-3}, 18, 1),
    ("com.microsoft.SkipSimplifiedLayerNormalization", [X, X + 1, ROW], [], {"epsilon": 1e-3}, 18, 1),
    ("com.microsoft.FusedMatMul", [X, f(3, 4, 7)], [], {"transB": 1, "alpha": 0.5}, 18, 1),
    ("com.microsoft.FusedGemm", [f(5, 7), f(4, 7), f(4)], [], {"transB": 1, "activation": "Tanh"}, 18, 1),
    ("com.microsoft.Attention", [f(2, 5, 12), f(12, 36), f(36)], [], {"num_heads": 3}, 18, 1),
    ("com.microsoft.Attention", [f(2, 5, 12), f(12, 36), f(36)], [], {"num_heads": 3, "unidirectional": 1}, 18, 1),
    ("com.microsoft.MultiHeadAttention", [f(2, 5, 12), f(2, 7, 12), f(2, 7, 12), f(36)], [], {"num_heads": 3}, 18, 1),
    *[("com.microsoft.GroupQueryAttention", GROUPED, constants, GROUPS | more, 18, 3)
        for constants, more in (
            (LENGTHS, {}),
            (LENGTHS, {"local_window_size": 2, "scale": 0.2}),
            (LENGTHS, {"softcap": 3.0}),
            ([*LENGTHS, np.cos(ANGLES), np.sin(ANGLES)], {"do_rotary": 1}),
            ([*LENGTHS, np.cos(ANGLES), np.sin(ANGLES)], {"do_rotary": 1, "rotary_interleaved": 1}),
        )],
    ("com.microsoft.GroupQueryAttention", [f(2, 5, 128)], [None, None, *LENGTHS], GROUPS, 18, 3),
    *[("com.microsoft.GroupQueryAttention", [*ALONE, *ONE_CACHE], [*FILLED, *constants], GROUPS | more, 18, 3)
        for constants, more in (
            ([], {}),
            ([], {"local_window_size": 3, "scale": 0.2}),
            ([], {"softcap": 3.0}),
            ([np.cos(ANGLES), np.sin(ANGLES)], {"do_rotary": 1}),
        )],
    ("com.microsoft.GroupQueryAttention", [*ALONE, *ONE_CACHE, FILLED[0], FILLED[1], None, None, None, f(1, 4, 5, 8)], [], GROUPS, 18, 3),  # noqa: E501
    ("com.microsoft.MultiHeadAttention", HIDDEN, [], {"num_heads": 3}, 18, 3),
    ("com.microsoft.MultiHeadAttention", HIDDEN, [], {"num_heads": 3, "unidirectional": 1}, 18, 3),
    ("com.microsoft.MultiHeadAttention", [f(2, 5, 12), f(2, 3, 7, 4), f(2, 3, 7, 4)], [], {"num_heads": 3}, 18, 1),
    ("com.microsoft.MultiHeadAttention", [*HIDDEN, f(36), None, None, *CACHE], [], {"num_heads": 3}, 18, 3),
    ("com.microsoft.MultiHeadAttention", [*HIDDEN, None, None, None, *CACHE], [], {"num_heads": 3, "unidirectional": 1}, 18, 3),  # noqa: E501
    ("com.microsoft.MultiHeadAttention", [*HIDDEN, None, PADDED, None, *CACHE], [], {"num_heads": 3, "unidirectional": 1}, 18, 3),  # noqa: E501
    ("com.microsoft.Attention", [f(2, 5, 12), f(12, 36), f(36)], [], {"num_heads": 3, "unidirectional": 1}, 18, 2),
    ("com.microsoft.Attention", [f(2, 5, 12), f(12, 36), f(36), PADDED, f(2, 2, 3, 4, 4)], [], {"num_heads": 3, "unidirectional": 1}, 18, 2),  # noqa: E501
    ("Attention", [*HIDDEN, None, *CACHE], [], {"q_num_heads": 3, "kv_num_heads": 3, "is_causal": 1}, 23, 3),
    ("Attention", [f(2, 6, 5, 4), f(2, 3, 5, 4), f(2, 3, 5, 4), f(5, 9), *CACHE], [], {}, 23, 3),
    ("Attention", [Q, K, V, None, None, None, np.array([7, 3], np.int64)], [], {}, 24, 1),
    *[(name, [INTEGERS], [], {"axes": [0, -1], "keepdims": 0}, 11, 1) for name in ("ReduceSum", "ReduceMean", "ReduceL1", "ReduceProd")],  # noqa: E501
    *[(name, [POSITIVE], [], {"noop_with_empty_axes": 1}, 18, 1) for name in ("ReduceSum", "ReduceLogSum", "ReduceSumSquare", "ReduceL1")],  # noqa: E501
    *[("CumSum", [INTEGERS], [np.int64(-1)], {"exclusive": exclusive}, 14, 1) for exclusive in (0, 1)],
    ("ArgMax", [np.array([[1, 3, 3], [5, 5, 5]], np.float32)], [], {"axis": 1, "select_last_index": 1}, 13, 1),
    *[("IsInf", [ENDLESS], [], {name: 0}, 20, 1) for name in ("detect_positive", "detect_negative")],
    ("Clip", [X], [], {}, 13, 1),
    ("Clip", [X, np.array(-0.5, np.float32)], [np.float32(0.2)], {}, 13, 1),
    ("Pow", [INTEGERS % 4], [np.float32(2.0)], {}, 13, 1),
    ("Pow", [INTEGERS % 4, (INTEGERS % 3).astype(np.float32)], [], {}, 13, 1),
    ("Where", [MASK], [np.float16(0), np.float16(-1)], {}, 16, 1),
    ("Where", [MASK], [np.int32(0), np.int32(-1)], {}, 16, 1),
    ("HardSigmoid", [X], [], {"alpha": 1 / 6}, 13, 1),
    ("LayerNormalization", [X, f(1, 1, 7), f(1)], [], {}, 17, 1),
    ("LayerNormalization", [X, f(7), f(7)], [], {"axis": 1}, 17, 1),
    ("RMSNormalization", [X, f(1)], [], {}, 23, 1),
    ("ConvTranspose", [IMAGE, f(6, 4, 3, 3)], [], {"pads": [1, 0, 0, 1], "strides": [2, 2], "output_padding": [1, 1]}, 11, 1),  # noqa: E501
    ("ConvTranspose", [IMAGE, f(6, 4, 3, 3)], [], {"strides": [2, 2], "output_shape": [18, 16]}, 11, 1),
    *[("ConvTranspose", [IMAGE, f(6, 4, 3, 3), f(4)], [], {"auto_pad": mode, "strides": [2, 3]}, 11, 1) for mode in ("SAME_UPPER", "SAME_LOWER", "VALID")],  # noqa: E501
    ("DFT", [f(3, 8, 5, 1)], [], {"axis": 1, "inverse": 1}, 17, 1),
    ("com.microsoft.FusedGemm", [f(5, 7), f(7, 4)], [], {"activation": "LeakyRelu", "activation_alpha": 0.2}, 18, 1),
    ("com.microsoft.FusedConv", [IMAGE, f(4, 6, 3, 3), f(4)], [], {"activation": "HardSigmoid", "activation_params": [0.2, 0.5]}, 18, 1),  # noqa: E501
    *[("Slice", [X], [i(start), i(end), i(2), i(step)], {}, 13, 1)
        for start, end, step in ((-1, -8, -1), (5, 1, -1), (-2, -6, -2), (100, 0, -3), (-1, -(2**63), -2))],
    ("Pad", [IMAGE], [i(0, 0, 1, 2, 0, 0, 3, 0), np.array([1.5], np.float32)], {}, 13, 1),
    ("Pad", [f(3, 4)], [i(1, 1, 0, 2)], {"mode": "edge"}, 13, 1),
    ("Flatten", [f(4)], [], {"axis": 0}, 13, 1),
    ("Split", [X], [i(5)], {"axis": 1}, 13, 1),
    *[("EyeLike", [f(4, 4)], [], more, 13, 1) for more in ({"k": 1}, {"dtype": TensorProto.INT64, "k": -2})],
    ("Gather", [X, np.array(-2)], [], {"axis": 2}, 13, 1),
    ("GatherElements", [X], [np.full((3, 5, 5), -2)], {"axis": 2}, 13, 1),
    ("GatherND", [X, random.integers(0, 5, (3, 4, 2))], [], {"batch_dims": 1}, 13, 1),
    ("GatherND", [X, random.integers(0, 7, (3, 5, 1))], [], {"batch_dims": 2}, 13, 1),
    *[("OneHot", [np.array([[0, 4, -1], [5, -5, -6]])], [np.int64(5), values], {"axis": axis}, 11, 1)
        for values in (np.array([0, 1], np.float32), np.array([-np.inf, 0], np.float32)) for axis in (-1, 0)],
    *[("Compress", [X], [np.array([True, False, True])], more, 11, 1) for more in ({}, {"axis": 1}, {"axis": -1})],
    *[("Resize", [IMAGE], [None, np.array([1, 1, *scales], np.float32)], {"mode": mode} | more, 18, 1)
        for scales in ((2, 3), (2.5, 1.3), (0.75, 0.5)) for mode, more in (
            ("nearest", {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
            ("nearest", {"nearest_mode": "round_prefer_ceil"}),
            ("linear", {}),
            ("linear", {"coordinate_transformation_mode": "align_corners"}),
            ("cubic", {}),
        )],
    ("Resize", [IMAGE], [None, np.array([1, 1, 2, 3], np.float32)], {}, 18, 1),
    ("Resize", [IMAGE], [np.array([1, 1, 2, 3], np.float32)], {}, 10, 1),
    ("Resize", [IMAGE], [None, None, i(5)], {"mode": "linear", "axes": [-1]}, 18, 1),
    *[("Resize", [IMAGE], [None, None, i(3, 5)], {"mode": mode, "axes": [2, 3], "antialias": 1, "exclude_outside": 1} | more, 18, 1)  # noqa: E501
        for mode, more in (("linear", {}), ("cubic", {"cubic_coeff_a": -0.5}))],
    *[("Attention", inputs, [], {"is_causal": 1} | more, 23, count)
        for more in ({}, {"softcap": 3.0}) for inputs, count in (
            ([Q, K, V], 1),
            ([Q, K, V, f(5, 7)], 1),
            ([Q, K, V, None, f(2, 3, 4, 8), f(2, 3, 4, 4)], 3),
        )],
    ("com.microsoft.MultiHeadAttention", [f(2, 5, 12), f(2, 3, 7, 4), f(2, 3, 7, 4), f(36)], [], {"num_heads": 3}, 18, 1),  # noqa: E501
    *[("com.microsoft.MultiHeadAttention", [f(2, queries, 12), f(2, keys, 12), f(2, keys, 12), *more], [], {"num_heads": 3, "unidirectional": 1}, 18, 3 if more[3:] else 1)  # noqa: E501
        for queries, keys in ((3, 5), (5, 3))
        for more in ([], [None, PADDED[:, 1 : keys + 1]], [None, None, None, *CACHE])],
    *[("com.microsoft.FusedMatMul", [f(2, 3, 4, 5), f(*right)], [], {"transBatchA": 1, "alpha": 0.5} | more, 18, 1)
        for right, more in (
            ((3, 4, 5, 6), {}),
            ((3, 4, 6, 5), {"transB": 1}),
            ((5, 3, 4, 6), {"transBatchB": 1}),
        )],
    *[("com.microsoft.RotaryEmbedding", [f(2, 5, 24), places], [np.cos(ANGLES)[:, :4], np.sin(ANGLES)[:, :4]], {}, 18, 1)  # noqa: E501
        for places in (i(2), random.integers(0, 9, (2, 5)))],
]  # fmt: skip

REFUSED = [
    ("MaxPool", [IMAGE], [], {"kernel_shape": [2, 2]}, 12, 2),
    ("AveragePool", [IMAGE], [], {"kernel_shape": [2, 2], "dilations": [2, 2]}, 19, 1),
    ("BatchNormalization", [IMAGE, f(6), f(6)], [f(6), f(6, low=0.5)], {"training_mode": 1}, 15, 1),
    ("Dropout", [X], [np.float32(0.5), np.bool_(True)], {}, 13, 1),
    ("Cast", [X], [], {"to": TensorProto.STRING}, 13, 1),
    ("Compress", [X, np.array([True, False, True])], [], {"axis": 0}, 13, 1),
    ("Resize", [IMAGE], [None, np.array([1, 1, 0.5, 0.5], np.float32)], {}, 18, 1),
    ("Resize", [IMAGE], [None, np.array([1, 2, 1, 1], np.float32)], {"mode": "linear"}, 18, 1),
    ("Resize", [IMAGE], [None, None, i(4, 4)], {"axes": [2, 3], "keep_aspect_ratio_policy": "not_larger"}, 18, 1),
    ("Resize", [IMAGE], [None, np.array([1, 1, 2, 2], np.float32)], {"mode": "linear", "antialias": 1}, 18, 1),
    ("com.microsoft.SkipLayerNormalization", [X, X + 1, ROW, f(7)], [], {}, 18, 2),
    ("com.microsoft.Attention", [f(2, 5, 12), f(12, 36), f(36), np.array([5, 4, 0, 1, 2], np.int32)], [], {"num_heads": 3}, 18, 1),  # noqa: E501
]  # fmt: skip
"""What has no counterpart, and must not be turned into something else."""


def build(row) -> tuple[Model, bytes]:
    name, inputs, constants, attributes, opset, count = row
    domain, _, kind = name.rpartition(".")
    both = any(each is not None and each.ndim == 5 for each in inputs)  # keys and values in one: batch is not first
    first = None if both else len(inputs[0])
    given = [
        helper.make_tensor_value_info(
            f"x{n}",
            helper.np_dtype_to_tensor_dtype(each.dtype),
            ["n" if size == first else size for size in each.shape[:1]] + list(each.shape[1:]),
        )
        for n, each in enumerate(inputs)
        if each is not None
    ]
    names = ["" if each is None else f"x{n}" for n, each in enumerate(inputs)]
    names += ["" if each is None else f"c{n}" for n, each in enumerate(constants)]
    outputs = [f"y{n}" for n in range(count)]
    graph = helper.make_graph(
        [helper.make_node(kind, names, outputs, name="node", domain=domain, **attributes)],
        "row",
        given,
        [helper.make_empty_tensor_value_info(output) for output in outputs],
        [numpy_helper.from_array(np.asarray(each), f"c{n}") for n, each in enumerate(constants) if each is not None],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return Model.from_proto(proto), proto.SerializeToString()


def label(row) -> str:
    return re.sub(r"\W+", "-", f"{row[0]}-{'x'.join(map(str, row[1][0].shape))}-{row[3]}")


@pytest.mark.parametrize("row", ROWS, ids=label)
def test_rules_agree_with_onnxruntime_and_have_true_gradients(row):
    model, data = build(row)
    module = to_torch(model)
    inputs = [torch.from_numpy(each) for each in row[1] if each is not None]
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    wanted = session.run(None, {f"x{n}": each for n, each in enumerate(row[1]) if each is not None})
    given = module(*inputs)
    given = given if isinstance(given, tuple) else (given,)
    for have, want in zip(given, wanted, strict=True):
        assert have.numpy().shape == want.shape and have.numpy().dtype == want.dtype
        np.testing.assert_allclose(have.numpy(), want, rtol=2e-5, atol=2e-5)
    doubles = [each.double().requires_grad_() if each.is_floating_point() else each for each in inputs]
    outputs = module.double()(*doubles)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    floats = [n for n, each in enumerate(outputs) if each.requires_grad]
    if floats and row[0] not in ("Floor", "Ceil", "Round", "Sign"):

        def only_floats(*arguments):
            results = module(*arguments)
            results = results if isinstance(results, tuple) else (results,)
            return tuple(results[n] for n in floats)

        assert torch.autograd.gradcheck(only_floats, doubles, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("row", REFUSED, ids=label)
def test_what_has_no_counterpart_is_an_error_that_names_the_node(row):
    with pytest.raises(InputError, match=f"cannot turn {row[0].rpartition('.')[2]} node 'node' into PyTorch"):
        to_torch(build(row)[0])


def run(nodes, x: np.ndarray, constants: dict[str, np.ndarray]) -> tuple[list, list]:
    """Return what the module and onnxruntime give for a graph from x (n, s) to y."""
    graph = helper.make_graph(
        [helper.make_node(kind, inputs, outputs, **attributes) for kind, inputs, outputs, attributes in nodes],
        "sizes",
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), ["n", "s"][: x.ndim])],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return to_torch(Model.from_proto(proto))(torch.from_numpy(x)), session.run(None, {"x": x})[0]


WIDTH = [("Shape", ["x"], ["sizes"], {}), ("Gather", ["sizes", "one"], ["width"], {})]
LAST = [*WIDTH, ("Sub", ["width", "one"], ["last"], {}), ("Unsqueeze", ["last", "zeros"], ["places"], {})]
FLOAT = ("Cast", ["q"], ["float"], {"to": TensorProto.FLOAT})
SIZES = {
    **{kind: [*WIDTH, (kind, ["width", "four"], ["test"], {}), ("Not", ["test"], ["not"], {}), ("Where", ["not", "x", "half"], ["y"], {})]  # noqa: E501
        for kind in ("Greater", "Less", "GreaterOrEqual", "LessOrEqual", "Equal")},
    "negative quotient": [*WIDTH, ("Sub", ["four", "width"], ["d"], {}), ("Div", ["d", "two"], ["q"], {}), FLOAT, ("Add", ["x", "float"], ["y"], {})],  # noqa: E501
    "signed remainder": [("Mod", ["minus", "two"], ["q"], {"fmod": 1}), FLOAT, ("Add", ["x", "float"], ["y"], {})],
    "root": [("Pow", ["four", "half"], ["q"], {}), FLOAT, ("Add", ["x", "float"], ["y"], {})],
    "last column": [*LAST, ("Concat", ["zeros", "places"], ["both"], {"axis": 0}), ("Gather", ["x", "both"], ["y"], {"axis": 1})],  # noqa: E501
    "float like": [*WIDTH, ("CastLike", ["width", "x"], ["float"], {}), ("Mul", ["x", "float"], ["y"], {})],
    "size": [("Size", ["x"], ["y"], {})],
    "constant": [("Identity", ["half"], ["y"], {})],
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_arithmetic_on_sizes_agrees_with_onnxruntime(name):
    constants = {"one": 1, "two": 2, "four": 4, "minus": -7, "zeros": [0]}
    constants = {key: np.array(value, np.int64) for key, value in constants.items()} | {"half": np.float32(0.5)}
    have, want = run(SIZES[name], f(3, 7), constants)
    assert isinstance(have, torch.Tensor) and have.dtype == torch.from_numpy(np.asarray(want)).dtype
    np.testing.assert_allclose(have.numpy(), want, rtol=1e-6)


@pytest.mark.parametrize("p", [1, 2])
def test_zeros_over_their_norm_are_zeros(p):
    have, want = run([("LpNormalization", ["x"], ["y"], {"p": p})], np.array([[0, 0], [3, 4]], np.float32), {})
    np.testing.assert_allclose(have.numpy(), want, rtol=1e-6)


def test_a_split_into_one_part_is_a_tensor():
    nodes = [("Split", ["x"], ["a"], {"num_outputs": 1}), ("Neg", ["a"], ["y"], {})]
    have, want = run(nodes, f(3, 4), {})
    assert np.array_equal(have.numpy(), want)


@pytest.mark.parametrize("packed", [False, True])
def test_each_sample_continues_its_own_cache(packed):
    """What lies behind the last place of a shorter sample is not defined."""
    past, last, total = [f(2, 2, 3, 16), f(2, 2, 3, 16)], np.array([3, 1], np.int32), np.array(4, np.int32)
    query = [f(2, 1, 128), None, None] if packed else [f(2, 1, 64), f(2, 1, 32), f(2, 1, 32)]
    inputs = [*query, *past, last]
    tables = [total, np.cos(ANGLES), np.sin(ANGLES)]
    model, data = build(("com.microsoft.GroupQueryAttention", inputs, tables, GROUPS | {"do_rotary": 1}, 18, 3))
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    want = session.run(None, {f"x{n}": each for n, each in enumerate(inputs) if each is not None})
    have = [each.numpy() for each in to_torch(model)(*[torch.from_numpy(each) for each in inputs if each is not None])]
    np.testing.assert_allclose(have[0], want[0], rtol=2e-5, atol=2e-5)
    for given, wanted in zip(have[1:], want[1:], strict=True):
        for sample, length in enumerate(last + 1):
            np.testing.assert_allclose(given[sample, :, :length], wanted[sample, :, :length], rtol=2e-5, atol=2e-5)


def node(kind: str, number: int, domain: str = ""):
    return helper.make_node(kind, [f"t{number}"], [f"t{number + 1}"], name=f"{kind}_{number}", domain=domain)


def chain(*kinds: tuple[str, str]) -> Model:
    shape = ["n", 4]
    graph = helper.make_graph(
        [node(kind, number, domain) for number, (kind, domain) in enumerate(kinds)],
        "chain",
        [helper.make_tensor_value_info("t0", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(f"t{len(kinds)}", TensorProto.FLOAT, shape)],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("my.ops", 1)]
    return Model.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=9))


def test_one_error_lists_all_operators_without_a_rule():
    with pytest.raises(InputError) as caught:
        to_torch(chain(("Det", ""), ("Twist", "my.ops"), ("Tanh", ""), ("Twist", "my.ops")))
    message = str(caught.value)
    assert message.startswith("no PyTorch rule for 2 operators: ")
    assert "Det (1 nodes" in message and "my.ops.Twist (2 nodes" in message and "graphclone.pytorch.rule" in message


@pytest.mark.parametrize("slots", [{8: np.array([3], np.int32)}, {3: f(36), 9: np.zeros((2, 3, 8), np.int32)}])
def test_a_cache_that_is_written_in_place_is_an_error(slots):
    inputs = [*HIDDEN, *(slots.get(slot) for slot in range(3, 6)), *CACHE, slots.get(8), slots.get(9)]
    with pytest.raises(InputError, match="a cache that is written in place has no PyTorch counterpart"):
        to_torch(build(("com.microsoft.MultiHeadAttention", inputs, [], {"num_heads": 3}, 18, 3))[0])


def test_the_rules_of_an_installed_package_are_loaded(tmp_path, monkeypatch):
    (tmp_path / "my_torch_rules.py").write_text(
        "from graphclone.pytorch import Code, rule\n\n\n"
        '@rule("Twist", domain="my.ops")\ndef twist(op):\n    return Code("torch.flip({}, ({},))", op[0], -1)\n'
    )
    info = tmp_path / "my_ops-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-ops\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[graphclone.torch_rules]\nmine = my_torch_rules\n")
    monkeypatch.syspath_prepend(tmp_path)
    load_rules.cache_clear()
    try:
        x = torch.arange(8.0).view(2, 4)
        assert torch.equal(to_torch(chain(("Twist", "my.ops"), ("Neg", "")))(x), -x.flip(-1))
    finally:
        RULES.pop(("my.ops", "Twist"), None)
        load_rules.cache_clear()


def test_a_user_registers_an_operator():
    @rule("Twist", domain="my.ops")
    def twist(op):
        return Code("torch.flip({}, ({},))", op[0], -1)

    try:
        x = torch.arange(8.0).view(2, 4)
        assert torch.equal(to_torch(chain(("Twist", "my.ops"), ("Neg", "")))(x), -x.flip(-1))
    finally:
        del RULES["my.ops", "Twist"]
