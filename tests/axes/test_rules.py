"""Each operator's row: a small graph, the signature it must have, and onnxruntime as the judge of it.

A graph's first node is the one its signature speaks of. Float inputs carry dimensions, so permuting and halving them
judges a rule without any weight.
"""

# ruff: noqa: E501  (one row a line)

import numpy as np
import pytest

from graphclone.analysis import analyse
from graphclone.axes.axis import is_static, leaves
from graphclone.axes.steps import atom_steps
from graphclone.calibration.taps import Tap
from graphclone.plan import Plan
from graphclone.subclone import calibrate
from graphclone.surgery import apply
from graphclone.verify import verify

ROWS = [
    # entry by entry
    ("Relu", "(float[B, 12] x) => (float[B, 12] y) { y = Relu(x) }", "... -> ..."),
    ("Clip", "(float[B, 12] x) => (float[B, 12] y) <float low = {-1.0}, float high = {1.0}> { y = Clip(x, low, high) }", "..., ., . -> ..."),
    ("Gelu", '(float[B, 12] x) => (float[B, 12] y) { y = Gelu <approximate = "tanh"> (x) }', "... -> ..."),
    ("Add", "(float[B, 5, 12] x) => (float[B, 5, 12] y) <float[12] w> { y = Add(x, w) }", "..., ... -> ..."),
    ("Mul of a column", "(float[B, 5, 12] x) => (float[B, 5, 12] y) <float[5, 1] w> { y = Mul(x, w) }", "..., ... -> ..."),
    ("Where", "(float[B, 12] x) => (float[B, 12] y) <float[12] w, bool[1] c = {1}> { y = Where(c, x, w) }", "..., ..., ... -> ..."),
    ("PRelu", "(float[B, 5, 12] x) => (float[B, 5, 12] y) <float[5, 1] w> { y = PRelu(x, w) }", "..., ... -> ..."),
    ("Max of three", "(float[B, 12] x) => (float[B, 12] y) <float[12] a, float[1, 12] b> { y = Max(x, a, b) }", "..., ..., ... -> ..."),
    ("Cast", "(float[B, 12] x) => (double[B, 12] y) { y = Cast <to = 11> (x) }", "... -> ..."),
    ("CastLike", "(float[B, 12] x) => (double[B, 12] y) <double[3] w> { y = CastLike(x, w) }", "..., . -> ..."),
    ("Dropout", "(float[B, 12] x) => (float[B, 12] y) { y = Dropout(x) }", "... -> ..."),
    ("BiasGelu", "(float[B, 12] x) => (float[B, 12] y) <float[12] w> { y = com.microsoft.BiasGelu(x, w) }", "..., ... -> ..."),
    # contractions
    ("MatMul", "(float[B, 5, 12] x) => (float[B, 5, 14] y) <float[12, 14] w> { y = MatMul(x, w) }", "... m k, ... k n -> ... m n"),
    ("MatMul of batches", "(float[B, 3, 5, 7] x, float[B, 3, 7, 11] z) => (float[B, 3, 5, 11] y) { y = MatMul(x, z) }", "... m k, ... k n -> ... m n"),
    ("MatMul by a vector", "(float[B, 5, 12] x) => (float[B, 5] y) <float[12] w> { y = MatMul(x, w) }", "... m k, k -> ... m"),
    ("Gemm", "(float[B, 12] x) => (float[B, 14] y) <float[12, 14] w, float[14] b> { y = Gemm(x, w, b) }", "m k, k n, n? -> m n"),
    ("Gemm transposed", "(float[12, B] x) => (float[B, 14] y) <float[14, 12] w> { y = Gemm <transA = 1, transB = 1> (x, w) }", "k m, n k, . -> m n"),
    ("Einsum", '(float[B, 5, 3, 7] x) => (float[B, 5, 12] y) <float[12, 3, 7] w> { y = Einsum <equation = "bshd,ohd->bso"> (x, w) }', "b s h d, o h d -> b s o"),
    ("Einsum with an ellipsis", '(float[B, 5, 12] x) => (float[B, 5, 14] y) <float[12, 14] w> { y = Einsum <equation = "...d,df->...f"> (x, w) }', "... d, d f -> ... f"),
    ("Einsum without an arrow", '(float[B, 12] x) => (float[B, 14] y) <float[12, 14] w> { y = Einsum <equation = "bk,kn"> (x, w) }', "b k, k n -> b n"),
    ("Conv", "(float[B, 6, 9] x) => (float[B, 10, 7] y) <float[10, 6, 3] w, float[10] b> { y = Conv <kernel_shape = [3]> (x, w, b) }", "b c _, m c _, m -> b m o0"),
    ("Conv of an image", "(float[B, 6, 9, 11] x) => (float[B, 10, 4, 5] y) <float[10, 6, 2, 2] w> { y = Conv <kernel_shape = [2, 2], strides = [2, 2]> (x, w) }", "b c _ _, m c _ _, m -> b m o0 o1"),
    ("Conv in groups", "(float[B, 6, 9] x) => (float[B, 15, 9] y) <float[15, 2, 3] w> { y = Conv <group = 3, kernel_shape = [3], pads = [1, 1]> (x, w) }", "b (g c) _, (g m) c _, (g m) -> b (g m) o0"),
    ("Conv by depth", "(float[B, 6, 9] x) => (float[B, 6, 9] y) <float[6, 1, 3] w, float[6] b> { y = Conv <group = 6, kernel_shape = [3], pads = [1, 1]> (x, w, b) }", "b (g c) _, (g m) c _, (g m) -> b (g m) o0"),
    ("Conv place by place", "(float[B, 6, 9] x) => (float[B, 10, 9] y) <float[9] g, float[10, 6, 1] w, float[10] b> { z = Conv <kernel_shape = [1]> (x, w, b) y = Mul(z, g) }", "b c o0, m c _, m -> b m o0"),
    ("ConvTranspose", "(float[B, 6, 9] x) => (float[B, 10, 11] y) <float[6, 10, 3] w> { y = ConvTranspose <kernel_shape = [3]> (x, w) }", "b c _, c m _, m -> b m o0"),
    ("ConvTranspose in groups", "(float[B, 6, 9] x) => (float[B, 12, 21] y) <float[6, 4, 3] w, float[12] b> { y = ConvTranspose <group = 3, kernel_shape = [3], strides = [2], dilations = [2]> (x, w, b) }", "b (g c) _, (g c) m _, (g m) -> b (g m) o0"),
    ("ConvTranspose that pads by itself", '(float[B, 6, 9] x) => (float[B, 180] y) <float[6, 10, 3] w, int64[2] to = {-1, 180}> { z = ConvTranspose <kernel_shape = [3], strides = [2], auto_pad = "SAME_LOWER"> (x, w) y = Reshape(z, to) }', "b c _, c m _, m -> b m o0"),
    ("FusedConv with a sum", '(float[B, 6, 9, 9] x, float[B, 10, 7, 7] z) => (float[B, 10, 7, 7] y) <float[10, 6, 3, 3] w, float[10] b> { y = com.microsoft.FusedConv <kernel_shape = [3, 3], activation = "Relu"> (x, w, b, z) }', "b c _ _, m c _ _, m, b m o0 o1 -> b m o0 o1"),
    ("FusedMatMul of transposed batches", "(float[B, 6, 5] x) => (float[6, B, 14] y) <float[6, 5, 14] w> { y = com.microsoft.FusedMatMul <transBatchA = 1> (x, w) }", ""),
    ("FusedMatMul", "(float[B, 12, 5] x) => (float[B, 5, 14] y) <float[14, 12] w> { y = com.microsoft.FusedMatMul <transA = 1, transB = 1> (x, w) }", "... k m, ... n k -> ... m n"),
    # structure
    ("Reshape to heads", "(float[B, S, 15] x) => (float[B, S, 3, 5] y) <int64[4] to = {0, 0, 3, 5}> { y = Reshape(x, to) }", "a3 a2 (a1 a0), . -> a3 a2 a1 a0"),
    ("Reshape from heads", "(float[B, S, 3, 5] x) => (float[B, S, 15] y) <int64[3] to = {0, 0, -1}> { y = Reshape(x, to) }", "a3 a2 a1 a0, . -> a3 a2 (a1 a0)"),
    ("Reshape across", "(float[B, 4, 9] x) => (float[B, 6, 6] y) <int64[3] to = {0, 6, 6}> { y = Reshape(x, to) }", "a0 _ _, . -> a0 z1 z2"),
    ("Reshape with a unit", "(float[B, 15] x) => (float[B, 1, 3, 5] y) <int64[4] to = {0, 1, 3, -1}> { y = Reshape(x, to) }", "a2 (a1 a0), . -> a2 1 a1 a0"),
    ("Flatten", "(float[B, 3, 5] x) => (float[B, 15] y) { y = Flatten <axis = 1> (x) }", "a2 a1 a0, . -> a2 (a1 a0)"),
    ("Flatten from behind", "(float[B, 3, 5] x) => (float[N, 5] y) { y = Flatten <axis = -1> (x) }", "a2 a1 a0, . -> (a2 a1) a0"),
    ("Transpose", "(float[B, 3, 5, 7] x) => (float[B, 5, 3, 7] y) { y = Transpose <perm = [0, 2, 1, 3]> (x) }", "a0 a1 a2 a3 -> a0 a2 a1 a3"),
    ("Transpose by default", "(float[3, 5, B] x) => (float[B, 5, 3] y) { y = Transpose(x) }", "a0 a1 a2 -> a2 a1 a0"),
    ("Squeeze", "(float[B, 1, 5] x) => (float[B, 5] y) <int64[1] axes = {1}> { y = Squeeze(x, axes) }", "a0 1 a2, . -> a0 a2"),
    ("Unsqueeze", "(float[B, 5] x) => (float[B, 1, 5] y) <int64[1] axes = {-2}> { y = Unsqueeze(x, axes) }", "a0 a1, . -> a0 1 a1"),
    ("Concat", "(float[B, 5] x, float[B, 7] z) => (float[B, 12] y) { y = Concat <axis = 1> (x, z) }", "a0 p0, a0 p1 -> a0 (p0 + p1)"),
    ("Split", "(float[B, 12] x) => (float[B, 5] y, float[B, 7] z) <int64[2] parts = {5, 7}> { y, z = Split <axis = 1> (x, parts) }", "a0 (p0 + p1), . -> a0 p0, a0 p1"),
    ("Split in equal parts", "(float[B, 12] x) => (float[B, 6] y, float[B, 6] z) { y, z = Split <axis = 1, num_outputs = 2> (x) }", "a0 (p0 + p1), . -> a0 p0, a0 p1"),
    ("Slice", "(float[B, 12] x) => (float[B, 5] y) <int64[1] s = {3}, int64[1] e = {8}, int64[1] a = {1}> { y = Slice(x, s, e, a) }", "a0 (b0 + i0 + e0), ., ., ., . -> a0 i0"),
    ("Slice from behind", "(float[B, 12] x) => (float[B, 5] y) <int64[1] s = {-5}, int64[1] e = {9223372036854775807}, int64[1] a = {-1}> { y = Slice(x, s, e, a) }", "a0 (b0 + i0 + e0), ., ., ., . -> a0 i0"),
    ("Slice every third", "(float[B, 12] x) => (float[B, 4] y) <int64[1] s = {0}, int64[1] e = {12}, int64[1] a = {1}, int64[1] t = {3}> { y = Slice(x, s, e, a, t) }", "a0 (i0 e0), ., ., ., . -> a0 i0"),
    ("Slice backwards", "(float[B, 12] x) => (float[B, 12] y) <int64[1] s = {-1}, int64[1] e = {-13}, int64[1] a = {1}, int64[1] t = {-1}> { y = Slice(x, s, e, a, t) }", "a0 _, ., ., ., . -> a0 i0"),
    ("Slice of the sequence", "(float[B, S, 12] x) => (float[B, T, 12] y) <int64[1] s = {1}, int64[1] e = {9223372036854775807}, int64[1] a = {1}> { y = Slice(x, s, e, a) }", "a0 _ a2, ., ., ., . -> a0 i0 a2"),
    ("Slice by computed steps", "(float[B, 12] x, int64[1] step) => (float[B, N] y) <int64[1] s = {0}, int64[1] e = {12}, int64[1] a = {1}> { y = Slice(x, s, e, a, step) }", "a0 _, ., ., ., . -> a0 u1"),
    ("Slice along computed axes", "(float[12, 12] x, int64[1] along) => (float[M, N] y) <int64[1] s = {0}, int64[1] e = {7}> { y = Slice(x, s, e, along) }", ""),
    ("Expand", "(float[B, 3, 1, 5] x) => (float[B, 3, 4, 5] y) <int64[4] to = {1, 1, 4, 1}> { y = Expand(x, to) }", "a0 a1 1 a3, . -> a0 a1 n2 a3"),
    ("Tile", "(float[B, 5] x) => (float[B, 15] y) <int64[2] times = {1, 3}> { y = Tile(x, times) }", "a0 a1, . -> a0 (r1 a1)"),
    ("Pad", "(float[B, 5] x) => (float[B, 8] y) <int64[4] pads = {0, 1, 0, 2}> { y = Pad(x, pads) }", "a0 a1, ., ., . -> a0 (b1 + a1 + e1)"),
    ("Pad with copies", '(float[B, 5] x) => (float[B, 8] y) <int64[4] pads = {0, 1, 0, 2}> { y = Pad <mode = "edge"> (x, pads) }', "a0 _, ., ., . -> a0 o1"),
    ("Resize", "(float[B, 6, 5, 7] x) => (float[B, 6, 10, 14] y) <float[4] scales = {1.0, 1.0, 2.0, 2.0}> { y = Resize(x, , scales) }", "a0 a1 _ _, ., ., . -> a0 a1 o2 o3"),
    ("Resize of reordered axes", "(float[B, 6, 5, 7] x) => (float[B, 6, 10, 14] y) <float[4] scales = {2.0, 2.0, 1.0, 1.0}> { y = Resize <axes = [3, 2, 1, 0]> (x, , scales) }", ""),
    ("Resize by a little", '(float[2, 6, 5, 7] x) => (float[2, 6, 5, 7] y) <float[4] scales = {1.0, 1.1, 1.0, 1.0}> { y = Resize <mode = "linear"> (x, , scales) }', "a0 _ a2 a3, ., ., . -> a0 o1 a2 a3"),
    ("Resize that keeps the aspect", '(float[2, 6, 5, 7] x) => (float[2, 6, 5, 7] y) <int64[4] sizes = {2, 6, 10, 11}> { y = Resize <keep_aspect_ratio_policy = "not_larger"> (x, , , sizes) }', ""),
    ("DepthToSpace", "(float[B, 12, 5, 7] x) => (float[B, 3, 10, 14] y) { y = DepthToSpace <blocksize = 2> (x) }", "b (p q c) h w -> b c (h p) (w q)"),
    ("DepthToSpace, CRD", '(float[B, 12, 5, 7] x) => (float[B, 3, 10, 14] y) { y = DepthToSpace <blocksize = 2, mode = "CRD"> (x) }', "b (c p q) h w -> b c (h p) (w q)"),
    ("SpaceToDepth", "(float[B, 3, 10, 14] x) => (float[B, 12, 5, 7] y) { y = SpaceToDepth <blocksize = 2> (x) }", "b c (h p) (w q) -> b (p q c) h w"),
    # indexing
    ("Gather by ids", "(int64[B, S] ids) => (float[B, S, 12] y) <float[17, 12] table> { y = Gather(table, ids) }", "a0 a1, i0 i1 -> i0 i1 a1"),
    ("Gather one entry", "(float[B, 5, 12] x) => (float[B, 12] y) <int64 first = {0}> { y = Gather <axis = 1> (x, first) }", "a0 (b + i + e) a2, . -> a0 a2"),
    ("Gather a run", "(float[B, 12] x) => (float[B, 3] y) <int64[3] run = {4, 5, 6}> { y = Gather <axis = 1> (x, run) }", "a0 (b + i + e), . -> a0 i"),
    ("Gather every third", "(float[B, 12] x) => (float[B, 4] y) <int64[4] run = {1, 4, 7, 10}> { y = Gather <axis = 1> (x, run) }", "a0 (n k), . -> a0 n"),
    ("Gather here and there", "(float[B, 12] x) => (float[B, 3] y) <int64[3] some = {4, 0, 9}> { y = Gather <axis = 1> (x, some) }", "a0 a1, i0 -> a0 i0"),
    ("GatherElements", "(float[3, 12] x, int64[3, 5] ids) => (float[3, 5] y) { y = GatherElements <axis = 1> (x, ids) }", "a0 a1, a0 k -> a0 k"),
    ("GatherND", "(float[17, 12] x, int64[B, S, 1] ids) => (float[B, S, 12] y) { y = GatherND(x, ids) }", "a0 a1, i0 i1 _ -> i0 i1 a1"),
    ("ScatterND", "(float[5, 12] x, float[2, 12] u) => (float[5, 12] y) <int64[2, 1] ids = {1, 3}> { y = ScatterND(x, ids, u) }", "a0 a1, i0 _, i0 a1 -> a0 a1"),
    ("ScatterElements", "(float[3, 12] x, float[3, 2] u) => (float[3, 12] y) <int64[3, 2] ids = {1, 3, 0, 2, 5, 7}> { y = ScatterElements <axis = 1> (x, ids, u) }", "a0 a1, a0 j1, a0 j1 -> a0 a1"),
    ("OneHot", "(int64[B] ids) => (float[B, 12] y) <int64 depth = {12}, float[2] values = {0.0, 1.0}> { y = OneHot(ids, depth, values) }", "a0, ., . -> a0 h"),
    ("TopK", "(float[B, 12] x) => (float[B, 2] y, int64[B, 2] i) <int64[1] k = {2}> { y, i = TopK(x, k) }", "a0 ~a1, . -> a0 k, a0 k"),
    ("ArgMax", "(float[B, 12] x) => (int64[B] y) { y = ArgMax <axis = -1, keepdims = 0> (x) }", "a0 ~a1, . -> a0"),
    ("CumSum", "(float[B, 5, 12] x) => (float[B, 5, 12] y) <int64 axis = {1}> { y = CumSum(x, axis) }", "a0 a1 a2, . -> a0 a1 a2"),
    ("Trilu", "(float[B, 5, 12] x) => (float[B, 5, 12] y) { y = Trilu(x) }", "... p q, . -> ... p q"),
    ("NonZero", "(float[B, 12] x) => (int64[2, N] y) { y = NonZero(x) }", "_ _ -> r n"),
    # statistics
    ("ReduceMean", "(float[B, 5, 12] x) => (float[B, 12] y) <int64[1] axes = {1}> { y = ReduceMean <keepdims = 0> (x, axes) }", "a0 ~a1 a2, . -> a0 a2"),
    ("ReduceSum of everything", "(float[5, 12] x) => (float[1, 1] y) { y = ReduceSum(x) }", "~a0 ~a1, . -> 1 1"),
    ("ReduceSum of nothing", "(float[B, 12] x) => (float[B, 12] y) { y = ReduceSum <noop_with_empty_axes = 1> (x) }", "a0 a1, . -> a0 a1"),
    ("Softmax", "(float[B, 5, 12] x) => (float[B, 5, 12] y) { y = Softmax <axis = 1> (x) }", "a0 ~a1 a2 -> a0 a1 a2"),
    ("LayerNormalization", "(float[B, 5, 12] x) => (float[B, 5, 12] y) <float[12] g, float[12] b> { y = LayerNormalization(x, g, b) }", "a0 a1 ~d0, d0, d0 -> a0 a1 d0, a0 a1 1, a0 a1 1"),
    ("LayerNormalization of two axes", "(float[B, 5, 12] x) => (float[B, 5, 12] y) <float[5, 12] g> { y = LayerNormalization <axis = 1> (x, g) }", "a0 ~d0 ~d1, d0 d1, d0 d1 -> a0 d0 d1, a0 1 1, a0 1 1"),
    ("LayerNormalization with a scale that broadcasts", "(float[B, 5, 12] x) => (float[B, 5, 12] y) <float[5, 12] g> { y = LayerNormalization(x, g) }", "a0 a1 ~d0, a1? d0?, d0 -> a0 a1 d0, a0 a1 1, a0 a1 1"),
    ("InstanceNormalization", "(float[B, 6, 9] x) => (float[B, 6, 9] y) <float[6] g, float[6] b> { y = InstanceNormalization(x, g, b) }", "b c ~s0, c, c -> b c s0"),
    ("BatchNormalization", "(float[B, 6, 9] x) => (float[B, 6, 9] y) <float[6] g, float[6] b, float[6] m, float[6] v = {1.0, 2.0, 3.0, 2.5, 1.5, 0.5}> { y = BatchNormalization(x, g, b, m, v) }", "b c s0, c, c, c, c -> b c s0"),
    ("GroupNormalization of opset 18", "(float[B, 6, 9] x) => (float[B, 6, 9] y) <float[3] g, float[3] b> { y = GroupNormalization <num_groups = 3> (x, g, b) }", "b (g ~c) ~s0, g, g -> b (g c) s0", 18),
    ("GroupNormalization", "(float[B, 6, 9] x) => (float[B, 6, 9] y) <float[6] g, float[6] b> { y = GroupNormalization <num_groups = 3> (x, g, b) }", "b (g ~c) ~s0, (g c), (g c) -> b (g c) s0", 21),
    ("LpNormalization", "(float[B, 12] x) => (float[B, 12] y) { y = LpNormalization <axis = 1> (x) }", "a0 ~a1 -> a0 a1"),
    ("GlobalAveragePool", "(float[B, 6, 9, 11] x) => (float[B, 6, 1, 1] y) { y = GlobalAveragePool(x) }", "b c ~s0 ~s1 -> b c 1 1"),
    ("MaxPool", "(float[B, 6, 9] x) => (float[B, 6, 4] y) { y = MaxPool <kernel_shape = [2], strides = [2]> (x) }", "b c _ -> b c o0, b c o0"),
    ("MaxPool that tells positions", "(float[B, 6, 9] x) => (float[B, 6, 4] y, int64[B, 6, 4] i) { y, i = MaxPool <kernel_shape = [2], strides = [2]> (x) }", "b c _ -> b c o0, b c o0"),
    ("RMSNormalization", "(float[B, 5, 12] x) => (float[B, 5, 12] y) <float[12] g> { y = RMSNormalization(x, g) }", "a0 a1 ~d0, d0?, d0? -> a0 a1 d0, a0 a1 1", 23),
    ("SkipLayerNormalization", "(float[B, S, 12] x, float[B, S, 12] z) => (float[B, S, 12] y) <float[12] g, float[12] b, float[12] c> { y = com.microsoft.SkipLayerNormalization(x, z, g, b, c) }", "... ~d, ... d, d, d, d -> ... d, ., ., ... d"),
    # attention
    ("Attention, heads merged", "(float[B, S, 18] q, float[B, S, 18] k, float[B, S, 15] v) => (float[B, S, 15] y) { y = Attention <q_num_heads = 3, kv_num_heads = 3> (q, k, v) }", "b q (g d), b ~k (g d), b k (g v), ., ., ., . -> b q (g v), b g k d, b g k v, b g q k", 23),
    ("Attention, heads apart", "(float[B, 3, S, 6] q, float[B, 3, S, 6] k, float[B, 3, S, 5] v) => (float[B, 3, S, 5] y) { y = Attention(q, k, v) }", "b g q d, b g ~k d, b g k v, ., ., ., . -> b g q v, b g k d, b g k v, b g q k", 23),
    ("Attention, grouped queries", "(float[B, 6, S, 6] q, float[B, 2, S, 6] k, float[B, 2, S, 5] v) => (float[B, 6, S, 5] y) { y = Attention(q, k, v) }", "b (g r) q d, b g ~k d, b g k v, ., ., ., . -> b (g r) q v, b g k d, b g k v, b (g r) q k", 23),
    ("RotaryEmbedding", "(float[1, 3, S, 8] x, int64[1, S] position_ids) => (float[1, 3, S, 8] y) <float[20, 4] cos, float[20, 4] sin> { y = RotaryEmbedding(x, cos, sin, position_ids) }", "b h s (p + p), _ p, _ p, b? s -> b h s (p + p)", 23),
    ("com.microsoft.Attention", "(float[B, S, 12] x) => (float[B, S, 15] y) <float[12, 45] w, float[45] b> { y = com.microsoft.Attention <num_heads = 3> (x, w, b) }", "b ~s e, e ((h d) + (h d) + (h v)), ((h d) + (h d) + (h v)), ., ., ., . -> b s (h v), ."),
    ("com.microsoft.Attention with a cache", "(float[B, S, 12] x, float[2, B, 3, P, 5] past) => (float[B, S, 15] y, float[2, B, 3, T, 5] present) <float[12, 45] w, float[45] b> { y, present = com.microsoft.Attention <num_heads = 3> (x, w, b, , past) }", "b ~s e, e ((h d) + (h d) + (h d)), ((h d) + (h d) + (h d)), ., _ b h p d, ., . -> b s (h d), two b h t d"),
    ("com.microsoft.MultiHeadAttention", "(float[B, S, 15] q, float[B, S, 15] k, float[B, S, 15] v) => (float[B, S, 15] y) { y = com.microsoft.MultiHeadAttention <num_heads = 3> (q, k, v) }", "b q (h d), b ~k (h d), b k (h v), ((h d) + (h d) + (h v)), ., ., ., ., ., . -> b q (h v), b h t d, b h t v"),
    ("com.microsoft.RotaryEmbedding", "(float[B, S, 24] x, int64[B, S] position_ids) => (float[B, S, 24] y) <float[20, 4] cos, float[20, 4] sin> { y = com.microsoft.RotaryEmbedding <num_heads = 3> (x, position_ids, cos, sin) }", "b s (h (p + p)), b? s, _ p, _ p -> b s (h (p + p))"),
    ("Attention among so many tokens", "(float[2, 4, 24] q, float[2, 4, 12] k, float[2, 4, 10] v, float[4, 4, 4] mask) => (float[2, 4, 20] y) { y = Attention <q_num_heads = 4, kv_num_heads = 2> (q, k, v, mask) }", "b q ((g r) d), b ~k (g d), b k (g v), (g r)? q? k?, ., ., . -> b q ((g r) v), b g k d, b g k v, b (g r) q k", 23),
    ("Attention that is causal among so many tokens", "(float[2, 4, 24] q, float[2, 4, 12] k, float[2, 4, 10] v) => (float[2, 4, 20] y) { y = Attention <q_num_heads = 4, kv_num_heads = 2, is_causal = 1> (q, k, v) }", "b q ((g r) d), b ~k (g d), b k (g v), ., ., ., . -> b q ((g r) v), b g k d, b g k v, b (g r) q k", 23),
    ("RotaryEmbedding by tables of each token", "(float[2, 3, 4, 8] x) => (float[2, 3, 4, 8] y) <float[2, 4, 4] cos, float[2, 4, 4] sin> { y = RotaryEmbedding(x, cos, sin) }", "b h s (p + p), b? s p, b? s p, . -> b h s (p + p)", 23),
    ("com.microsoft.Attention among so many tokens", "(float[2, 4, 12] x) => (float[2, 4, 15] y) <float[12, 45] w, float[45] b, float[1, 3, 4, 4] bias> { y = com.microsoft.Attention <num_heads = 3> (x, w, b, , , bias) }", "b ~s e, e ((h d) + (h d) + (h v)), ((h d) + (h d) + (h v)), ., ., b? h? s? s?, . -> b s (h v), ."),
    ("com.microsoft.MultiHeadAttention among so many tokens", "(float[2, 4, 15] q, float[2, 5, 15] k, float[2, 5, 15] v, int32[2, 5] padding) => (float[2, 4, 15] y) <float[1, 3, 4, 5] bias> { y = com.microsoft.MultiHeadAttention <num_heads = 3> (q, k, v, , padding, bias) }", "b q (h d), b ~k (h d), b k (h v), ((h d) + (h d) + (h v)), ., b? h? q? k?, ., ., ., . -> b q (h v), b h t d, b h t v"),
    # numbers of few bits
    ("DequantizeLinear", "() => (float[5, 12] y) <int8[5, 12] w, float scale = {0.1}> { y = DequantizeLinear(w, scale) }", "a0 a1, ., . -> a0 a1"),
    ("DequantizeLinear per axis", "() => (float[5, 12] y) <int8[5, 12] w, float[12] scale, int8[12] zero> { y = DequantizeLinear <axis = 1> (w, scale, zero) }", "a0 a1, a1, a1 -> a0 a1"),
    ("DequantizeLinear of a vector", "() => (float[12] y) <int8[12] w, float[12] scale, int8[12] zero> { y = DequantizeLinear <axis = 0> (w, scale, zero) }", "a0, a0, a0 -> a0"),
    ("DequantizeLinear in blocks", "() => (float[5, 12] y) <int8[5, 12] w, float[5, 3] scale> { y = DequantizeLinear <axis = 1, block_size = 4> (w, scale) }", "a0 (a1 z), a0 a1, a0 a1 -> a0 (a1 z)", 21),
    ("DequantizeLinear in blocks of which the last is short", "() => (float[5, 10] y) <int8[5, 10] w, float[5, 3] scale> { y = DequantizeLinear <axis = 1, block_size = 4> (w, scale) }", "a0 a1, a0 _, a0 _ -> a0 a1", 21),
    ("QuantizeLinear", "(float[B, 12] x) => (uint8[B, 12] y) <float scale = {0.1}, uint8 zero = {3}> { y = QuantizeLinear(x, scale, zero) }", "a0 a1, ., . -> a0 a1"),
    ("DynamicQuantizeLinear", "(float[B, 12] x) => (float[B, 14] y) <int8[12, 14] w, float[14] each> { q, scale, zero = DynamicQuantizeLinear(x) i = MatMulInteger(q, w, zero) f = Cast <to = 1> (i) factor = Mul(scale, each) y = Mul(f, factor) }", "... -> ..., ,"),
    ("MatMulInteger", "() => (int32[5, 14] y) <uint8[5, 12] x, int8[12, 14] w, uint8 zero = {3}, int8[14] each> { y = MatMulInteger(x, w, zero, each) }", "... m k, ... k n, ., n? -> ... m n"),
    ("MatMulInteger with zero points of each matrix", "() => (int32[3, 5, 14] y) <uint8[3, 5, 12] x, int8[3, 12, 14] w, uint8 zero = {3}, int8[3, 1, 14] each> { y = MatMulInteger(x, w, zero, each) }", "... m k, ... k n, ., ... 1 n? -> ... m n"),
    ("QLinearMatMul", "() => (uint8[5, 14] y) <uint8[5, 12] x, int8[12, 14] w, float s = {0.1}, uint8 z = {3}, float[14] t, int8[14] u> { y = QLinearMatMul(x, s, z, w, t, u, s, z) }", "... m k, ., ., ... k n, n, n, ., . -> ... m n"),
    ("QLinearConv", "() => (uint8[2, 10, 7] y) <uint8[2, 6, 9] x, int8[10, 6, 3] w, int32[10] b, float s = {0.1}, uint8 z = {3}, float[10] t = {0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0}, int8[10] u = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0}> { y = QLinearConv <kernel_shape = [3]> (x, s, z, w, t, u, s, z, b) }", "b c _, ., ., m c _, m, m, ., ., m -> b m o0"),
    ("ConvInteger", "() => (int32[2, 10, 4, 5] y) <uint8[2, 6, 9, 11] x, uint8[10, 6, 2, 2] w> { y = ConvInteger <kernel_shape = [2, 2], strides = [2, 2]> (x, w) }", "b c _ _, m c _ _, ., . -> b m o0 o1"),
    ("com.microsoft.QGemm", "() => (uint8[5, 14] y) <uint8[5, 12] x, int8[14, 12] w, float s = {0.1}, float t = {0.0731}, uint8 z = {3}, int8 u = {0}, int32[14] b> { y = com.microsoft.QGemm <transB = 1> (x, s, z, w, t, u, b, s, z) }", "m k, ., ., n k, ., ., n?, ., . -> m n"),
    ("com.microsoft.QLinearAdd", "() => (uint8[5, 12] y) <uint8[5, 12] x, uint8[12] w, float s = {0.1}, uint8 z = {3}> { y = com.microsoft.QLinearAdd(x, s, z, w, s, z, s, z) }", "..., ., ., ..., ., ., ., . -> ..."),
    ("com.microsoft.QLinearSigmoid", "() => (uint8[5, 12] y) <uint8[5, 12] x, float s = {0.1}, uint8 z = {3}> { y = com.microsoft.QLinearSigmoid(x, s, z, s, z) }", "..., ., ., ., . -> ..."),
    ("com.microsoft.QLinearSoftmax", "() => (uint8[5, 12] y) <uint8[5, 12] x, float s = {0.1}, uint8 z = {0}> { y = com.microsoft.QLinearSoftmax <axis = -1, opset = 13> (x, s, z, s, z) }", "a0 ~a1, ., ., ., . -> a0 a1"),
    ("com.microsoft.QLinearSoftmax before opset 13", "() => (uint8[5, 3, 12] y) <uint8[5, 3, 12] x, float s = {0.1}, uint8 z = {0}> { y = com.microsoft.QLinearSoftmax <axis = 1, opset = 12> (x, s, z, s, z) }", "a0 ~a1 ~a2, ., ., ., . -> a0 a1 a2"),
    ("com.microsoft.QLinearConcat", "() => (uint8[5, 12] y) <uint8[5, 5] x, uint8[5, 7] w, float s = {0.1}, uint8 z = {3}> { y = com.microsoft.QLinearConcat <axis = 1> (s, z, x, s, z, w, s, z) }", "., ., a0 p0, ., ., a0 p1, ., . -> a0 (p0 + p1)"),
    ("com.microsoft.QLinearWhere", "() => (uint8[5, 12] y) <bool[5, 1] c = {1, 0, 1, 0, 1}, uint8[5, 12] x, uint8[12] w, float s = {0.1}, uint8 z = {3}> { y = com.microsoft.QLinearWhere(c, x, s, z, w, s, z, s, z) }", "..., ..., ., ., ..., ., ., ., . -> ..."),
    ("com.microsoft.MatMulIntegerToFloat", "() => (float[5, 14] y) <uint8[5, 12] x, int8[12, 14] w, float s = {0.1}, float[14] t, uint8 z = {3}, int8[14] u, float[14] b> { y = com.microsoft.MatMulIntegerToFloat(x, w, s, t, z, u, b) }", "... m k, ... k n, ., n, ., n, n -> ... m n"),
    ("com.microsoft.DynamicQuantizeMatMul", "(float[B, 12] x) => (float[B, 14] y) <int8[12, 14] w, float[14] t, int8[14] u, float[14] b> { y = com.microsoft.DynamicQuantizeMatMul(x, w, t, u, b) }", "... m k, ... k n, n, n, n -> ... m n"),
    ("com.microsoft.MatMulNBits", "(float[B, 64] x) => (float[B, 14] y) <uint8[14, 4, 8] w, float[14, 4] s> { y = com.microsoft.MatMulNBits <K = 64, N = 14, bits = 4, block_size = 16> (x, w, s) }", "... m (c t z), n (c t) _, n (c t), ., ., . -> ... m n"),
    ("com.microsoft.MatMulNBits with zero points", "(float[B, 64] x) => (float[B, 14] y) <uint8[14, 4, 8] w, float[14, 4] s, uint8[14, 2] z> { y = com.microsoft.MatMulNBits <K = 64, N = 14, bits = 4, block_size = 16> (x, w, s, z) }", "... m (c t z), n (c t) _, n (c t), n (c), ., . -> ... m n"),
    ("com.microsoft.MatMulNBits, scales in a row", "(float[B, 64] x) => (float[B, 14] y) <uint8[14, 4, 8] w, float[56] s, float[14] b> { y = com.microsoft.MatMulNBits <K = 64, N = 14, bits = 4, block_size = 16> (x, w, s, , , b) }", "... m (c t z), n (c t) _, (n c t), ., ., n -> ... m n"),
    ("com.microsoft.MatMulNBits with a short block", "(float[B, 60] x) => (float[B, 14] y) <uint8[14, 4, 8] w, float[14, 4] s> { y = com.microsoft.MatMulNBits <K = 60, N = 14, bits = 4, block_size = 16> (x, w, s) }", "... m k, n c _, n (c), ., ., . -> ... m n"),
    ("com.microsoft.GatherBlockQuantized", "(int64[B, S] ids) => (float[B, S, 64] y) <uint8[17, 32] w, float[17, 4] s> { y = com.microsoft.GatherBlockQuantized <block_size = 16, quantize_axis = 1, bits = 4> (w, ids, s) }", "v (c y), i0 i1, v c, . -> i0 i1 (c z)"),
    ("com.microsoft.QAttention", "() => (float[2, 1, 12] y) <uint8[2, 1, 12] x, int8[12, 36] w, float[36] b, float s = {0.1}, float t = {0.1}, uint8 z = {3}, int8 u = {0}> { y = com.microsoft.QAttention <num_heads = 3> (x, w, b, s, t, , z, u) }", "b s e, e ((h d) + (h d) + (h d)), ((h d) + (h d) + (h d)), ., ., ., ., . -> b s (h d)"),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_rule_says_and_holds(graph, row):
    _, text, signature, *opset = row
    model = graph(text, *opset)
    analysis = analyse(model)
    assert analysis.typing.nodes[0].text.strip() == signature
    report = verify(model, analysis=analysis)
    assert report.ok, str(report)


STRIDED = """(float[B, 12] x) => (float[B, 12, 1] y) <float[12] g, int64 zero = {0}, int64 one = {1}, int64 width = {12},
    int64[1] flat = {-1}, int64[2] rest = {1, 2}, int64[1, 12, 1] steps = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}>
    { z = Mul(x, g)  all = Reshape(z, flat)  s = Shape(x)  b = Gather(s, zero)  r = Range(zero, b, one)
      m = Mul(r, width)  o = Unsqueeze(m, rest)  i = Add(o, steps)  y = Gather(all, i) }"""


def test_a_gather_of_everything_in_order_regroups(graph):
    """torch exports `as_strided` of contiguous memory so: indices counted from the sizes."""
    model = graph(STRIDED)
    analysis = analyse(model)
    assert analysis.typing.nodes[-1].text == "(a1 a0), . -> a1 a0 1"
    assert [(d.size, d.locked) for d in analysis.dimensions] == [(12, None)]
    assert verify(model, analysis=analysis).ok


def test_half_a_batch_is_no_single_sample(graph):
    """Its size is known in neither probe, and must not be taken for one that never changes."""
    text = "(float[B, 12] x) => (float[C, 12] y, float[C, 12] z) { y, z = Split <axis = 0, num_outputs = 2> (x) }"
    types = analyse(graph(text)).typing.types
    assert not is_static(types["y"][0]) and not is_static(types["z"][0])


def test_constants_that_sizes_are_computed_with_stay_whole(graph):
    text = """(float[B, S, 12] x) => (float[B, S, 12] y) <float[3] least = {1.0, 1.0, 1.0}>
        { s = Shape(x)  f = Cast <to = 1> (s)  m = Max(f, least)  t = Cast <to = 7> (m)  y = Reshape(x, t) }"""
    assert verify(graph(text)).ok


def test_what_is_computed_of_a_few_learned_numbers_is_no_size(graph):
    """Mamba 2 has one logarithm of its decay for each head."""
    text = """(float[B, S, 12] x) => (float[B, S, 12] y) <float[12, 4] w, float[4] a, float[4, 12] v>
        { u = MatMul(x, w)  e = Exp(a)  n = Neg(e)  d = Mul(u, n)  y = MatMul(d, v) }"""
    model = graph(text)
    analysis = analyse(model)
    assert [(d.size, d.locked) for d in analysis.dimensions if d.size == 4] == [(4, None)]
    assert verify(model, analysis=analysis).ok


def test_scales_that_are_computed_of_constants_stay_whole(graph):
    text = """(float[B, 6, 4, 4] x) => (float[B, 5, 8, 8] y) <float[2] same = {1.0, 1.0}, float[2] twice = {2.0, 2.0},
        float[7, 6, 1, 1] w, float[5, 7, 1, 1] v>
        { s = Concat <axis = 0> (same, twice)  h = Conv(x, w)  r = Resize <mode = "nearest"> (h, , s)  y = Conv(r, v) }"""
    model = graph(text)
    assert {d.size for d in analyse(model).dimensions if d.locked is None} == {5, 7}
    assert verify(model).ok


TWO_READERS = """(float[B, S, 12] x, float[B, T, 12] z) => (float[B, S, 12] y) <float[30, 12] w, float[30] b,
    float[10, 12] out, int64[1] none = {0}, int64[1] ten = {10}, int64[1] all = {30}> {
    wq = Slice(w, none, ten, none)  wkv = Slice(w, ten, all, none)  bq = Slice(b, none, ten, none)
    bkv = Slice(b, ten, all, none)
    tq = Transpose(wq)  q0 = MatMul(x, tq)  q = Add(q0, bq)
    tkv = Transpose(wkv)  kv0 = MatMul(z, tkv)  kv = Add(kv0, bkv)  k, v = Split <axis = 2, num_outputs = 2> (kv)
    kt = Transpose <perm = [0, 2, 1]> (k)  m = MatMul(q, kt)  p = Softmax(m)  o = MatMul(p, v)
    y = MatMul(o, out) }"""


def test_parts_of_a_vector_are_of_one(graph):
    """torch.nn.MultiheadAttention takes queries' bias from the vector that also has keys' and values'."""
    model = graph(TWO_READERS)
    analysis = analyse(model)
    uses = analysis.typing.uses["b"]
    assert len(uses) == 2 and uses[0].axes is uses[1].axes
    keys, values = (d.name for d in analysis.dimensions if d.size == 10)
    child = apply(model, Plan(keep={keys: tuple(range(6)), values: tuple(range(1, 8))}))
    assert [weight.shape for name, weight in child.weights.items() if name.startswith("b")] == [(6 + 6 + 7,)]
    assert verify(model, analysis=analysis).ok and verify(child).ok


def test_sizes_that_a_file_declares_otherwise_than_they_are_do_not_count(graph):
    """onnxruntime reserves memory by them, and overwrites it: what is measured there would be other tensors' numbers."""
    model = graph("""(float[2, 7, 12] x) => (float[2, 7, 12] y) <float[12, 10] w, float[10, 12] v>
        { h = MatMul(x, w)  y = MatMul(h, v) }""")
    hidden = model.graph.tensors()["h"]
    hidden.dtype, hidden.shape = np.dtype(np.float32), [2, 7, 13]
    stats = calibrate(model, [{"x": np.ones((2, 7, 12), np.float32)}], progress=False, provider="cpu")
    wanted = np.abs(model.weights["w"].load().sum(axis=0))
    assert np.allclose(stats.mean_abs(Tap("h", 2)), wanted, rtol=1e-5)


def test_one_position_from_outside_picks_an_entry(graph):
    """A scalar index is verified like many."""
    model = graph("(float[B, 5, 12] x, int64 i) => (float[B, 12] y) { y = Gather <axis = 1> (x, i) }")
    assert verify(model).ok


TURNED = """(float[B, S, 128] q, float[B, S, 64] k, float[B, S, 64] v, int32[B] last, int32 all)
    => (float[B, S, 128] y, float[B, 2, T, 32] keys, float[B, 2, T, 32] values) <float[9, WIDTH] c, float[9, WIDTH] s>
    { y, keys, values = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2, do_rotary = 1>
        (q, k, v, , , last, all, c, s) }"""


@pytest.mark.parametrize(("width", "sizes"), [(16, {16: 8}), (8, {8: 8, 16: 16})])
def test_turned_heads_are_cut_in_the_steps_that_the_operator_admits(graph, width, sizes):
    """onnxruntime runs heads of whole vectors of numbers alone: halves of 8, and 16 of what is not turned."""
    model = graph(TURNED.replace("WIDTH", str(width)))
    random = np.random.default_rng(0)
    feeds = {n: random.standard_normal((2, 5, w)).astype(np.float32) for n, w in (("q", 128), ("k", 64), ("v", 64))}
    feeds |= {"last": np.full(2, 4, np.int32), "all": np.array(5, np.int32)}
    analysis = analyse(model)
    steps = atom_steps(analysis.typing.steps)
    atoms = list(leaves(analysis.typing.types["keys"][3]))
    assert {leaf.size[0]: steps.get(id(leaf)) for leaf in atoms} == sizes
    report = verify(model, analysis=analysis, data=[feeds, feeds])
    assert report.ok, str(report)


def test_grouped_queries_with_a_bias_and_sinks(graph):
    """Each query head has its own bias on scores, and its own sink."""
    model = graph(
        """(float[B, S, 96] q, float[B, S, 32] k, float[B, S, 32] v, int32[B] last, int32 all, float[B, 6, S, S] bias)
        => (float[B, S, 96] y, float[B, 2, T, 16] keys, float[B, 2, T, 16] values) <float[6] sink>
        { y, keys, values = com.microsoft.GroupQueryAttention <num_heads = 6, kv_num_heads = 2>
            (q, k, v, , , last, all, , , , bias, sink) }"""
    )
    random = np.random.default_rng(0)
    widths = {"q": (2, 5, 96), "k": (2, 5, 32), "v": (2, 5, 32), "bias": (2, 6, 5, 5)}
    feeds = {name: random.standard_normal(shape).astype(np.float32) for name, shape in widths.items()}
    feeds |= {"last": np.full(2, 4, np.int32), "all": np.array(5, np.int32)}
    analysis = analyse(model)
    signature = analysis.typing.nodes[0].text
    assert signature.startswith("b q ((g r) d), b k (g d), b k (g d), ., ., ., ., ., ., ., b? (g r)? _? _?, (g r) -> ")
    report = verify(model, analysis=analysis, data=[feeds, feeds])
    assert report.ok, str(report)
