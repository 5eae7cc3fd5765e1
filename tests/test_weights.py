"""Weights: lazy composition equals numpy, every element type keeps its bits, and dropped bytes are not read."""

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphclone import weights
from graphclone.dtypes import bits, numpy_dtype
from graphclone.errors import InputError
from graphclone.external import map_file
from graphclone.sources import MappedSource
from graphclone.weights import Weight, weight_of

NUMERIC = [kind for kind in TensorProto.DataType.values() if kind not in (TensorProto.UNDEFINED, TensorProto.STRING)]


def streamed(weight: Weight) -> bytes:
    return b"".join(bytes(chunk) for chunk in weight.chunks())


def mapped(path, array: np.ndarray, offset: int = 3) -> Weight:
    """Write an array to a file at an odd offset and map it."""
    path.write_bytes(bytes(offset) + array.tobytes())
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    return Weight(MappedSource(map_file(path), offset, array.shape, kind))


@st.composite
def cuts(draw):
    """Draw a shape and a list of steps: (axis, indices) or a factor."""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    sizes, steps = list(shape), []
    for _ in range(draw(st.integers(0, 6))):
        if draw(st.integers(0, 3)) == 0:
            steps.append(draw(st.sampled_from([0.5, 2.0, -0.25])))
            continue
        axis = draw(st.integers(0, len(shape) - 1))
        order = draw(st.permutations(range(sizes[axis])))
        kept = order[: draw(st.integers(1, len(order)))]
        steps.append((axis, sorted(kept) if draw(st.booleans()) else kept))
        sizes[axis] = len(kept)
    return shape, steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@settings(max_examples=150, deadline=None)
@given(cut=cuts(), chunk=st.sampled_from([4, 28, 1 << 20]))
def test_takes_and_scales_compose_as_in_numpy(folder, cut, chunk):
    shape, steps = cut
    expected = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    weight = mapped(folder / "data", expected)
    for step in steps:
        if isinstance(step, float):
            weight, expected = weight.scaled(step), expected * np.float32(step)
        else:
            axis, indices = step
            weight, expected = weight.take(axis, indices), np.take(expected, indices, axis)
    assert weight.shape == expected.shape and weight.nbytes == expected.nbytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "CHUNK_BYTES", chunk)
        parts = [bytes(part) for part in weight.chunks()]
        assert weight.load().tobytes() == expected.tobytes()
    assert b"".join(parts) == expected.tobytes()
    assert all(len(part) <= max(chunk, 4) for part in parts)


@pytest.mark.parametrize("kind", NUMERIC, ids=TensorProto.DataType.Name)
def test_every_element_type_keeps_its_bits(kind):
    count = 7 * 5
    raw = np.random.default_rng(1).integers(
        0, 2 if kind == TensorProto.BOOL else 256, -(-count * bits(kind) // 8), np.uint8
    )
    if count * bits(kind) % 8:
        raw[-1] &= (1 << count * bits(kind) % 8) - 1
    tensor = TensorProto(name="w", data_type=kind, dims=[7, 5], raw_data=raw.tobytes())
    weight = Weight.from_proto(tensor)
    assert (weight.onnx_dtype, weight.dtype, weight.shape) == (kind, numpy_dtype(kind), (7, 5))
    assert streamed(weight) == weight.tensor.raw_data == tensor.raw_data
    cut = weight.take(0, [6, 0]).take(1, [1, 2, 4])
    expected = numpy_helper.to_array(tensor)[[6, 0]][:, [1, 2, 4]]
    assert cut.load().tobytes() == expected.tobytes()
    assert streamed(cut) == numpy_helper.from_array(expected).raw_data and len(streamed(cut)) == cut.nbytes


def test_strings_stay_inside_the_proto():
    weight = Weight.from_proto(helper.make_tensor("words", TensorProto.STRING, [3], [b"a", b"\xff", b"ccc"]))
    assert list(weight.take(0, [2, 1]).tensor.string_data) == [b"ccc", b"\xff"]
    with pytest.raises(InputError, match="strings have no raw bytes"):
        next(weight.chunks())


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT32, TensorProto.FLOAT16])
def test_typed_fields_are_read(kind):
    tensor = helper.make_tensor("w", kind, [2, 3], [0, 1, 2, 3, 4, 5])
    assert not tensor.HasField("raw_data")
    assert (Weight.from_proto(tensor).take(1, [2]).load() == [[2], [5]]).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_scaled_in_single_precision_and_rounded_once(dtype):
    array = np.random.default_rng(2).standard_normal((48, 7)).astype(dtype)
    twice = Weight.of(array).scaled(1 / 3).scaled(0.7)
    expected = (array.astype(np.float32) * np.float32(1 / 3 * 0.7)).astype(dtype)
    assert twice.load().tobytes() == streamed(twice) == expected.tobytes()


def test_what_cannot_be_scaled_or_taken():
    weight = Weight.of(np.zeros((3, 5), np.int64))
    with pytest.raises(InputError, match="cannot scale a weight of type INT64"):
        weight.scaled(0.5)
    with pytest.raises(InputError, match="cannot scale a weight by nan"):
        Weight.of(np.zeros(3, np.float32)).scaled(float("nan"))
    for axis, indices in ((2, [0]), (0, [3]), (0, [-1]), (0, [True, False, True]), (0, [[0]]), (0, [0.0])):
        with pytest.raises(IndexError, match="cannot take"):
            weight.take(axis, indices)


def test_keeping_everything_is_the_same_weight():
    weight = Weight.of(np.zeros((3, 5), np.float32))
    assert weight.take(-1, range(5)) is weight
    assert weight.take(1, []).shape == (3, 0) and streamed(weight.take(1, [])) == b""


def test_scalars_and_empty_weights():
    assert Weight.of(np.float32(2.5)).scaled(2).load() == 5
    for shape in ((0,), (3, 0)):
        empty = Weight.from_proto(numpy_helper.from_array(np.zeros(shape, np.float32), "none"))
        assert empty.load().shape == shape and streamed(empty) == b"" and empty.sample() == b""


def test_a_slice_of_a_huge_file_reads_little(tmp_path):
    path = tmp_path / "huge.data"
    with open(path, "wb") as file:  # sparse: 256 GB of nothing, and one row of ones
        file.truncate(1 << 38)
        file.seek(4 * 4096 * 1000)
        file.write(np.ones(4096, np.float32).tobytes())
    weight = Weight(MappedSource(map_file(path), 0, (1 << 24, 4096), TensorProto.FLOAT))
    cut = weight.take(0, [999, 1000, 9_000_000]).take(1, [0, 4095]).scaled(3)
    assert cut.load().tolist() == [[0, 0], [3, 3], [0, 0]]
    assert len(weight.sample()) == weights.SAMPLE_BYTES


def test_chunks_are_bounded(tmp_path):
    array = np.arange(3 << 20, dtype=np.float32).reshape(3, 1 << 20)
    weight = mapped(tmp_path / "data", array)
    assert max(len(chunk) for chunk in weight.chunks()) <= weights.CHUNK_BYTES
    assert streamed(weight) == array.tobytes()


def test_sample_sees_the_end_and_the_cut_before_it_is_stored():
    array = np.random.default_rng(3).standard_normal((5, 48, 700)).astype(np.float32)
    changed = array.copy()
    changed[-1, -1, -1] += 1
    assert Weight.of(array).sample() != Weight.of(changed).sample()
    cut = Weight.of(array).take(0, [3, 1]).take(2, range(0, 700, 2)).scaled(0.5)
    assert cut.sample() == Weight.of(cut.load()).sample() and len(cut.sample()) <= weights.SAMPLE_BYTES


def test_graphsurgeon_exports_weights_without_loading_them():
    array = np.random.default_rng(4).standard_normal((48, 7)).astype(np.float32)
    constant = gs.Constant("w", Weight.of(array).take(0, [5, 3]))
    x = gs.Variable("x", np.float32, [3, 2])
    y = gs.Variable("y", np.float32, [3, 7])
    graph = gs.Graph([gs.Node("MatMul", inputs=[x, constant], outputs=[y])], [x], [y], opset=17).copy().cleanup()
    exported = gs.export_onnx(graph).graph.initializer[0]
    assert isinstance(graph.tensors()["w"]._values, Weight)
    assert exported.name == "w" and (numpy_helper.to_array(exported) == array[[5, 3]]).all()


def test_weight_of_wraps_what_users_put_into_constants():
    array = np.ones((3, 5), np.float32)
    assert weight_of(gs.Constant("a", array)).load().base is not None
    lazy = gs.import_onnx(
        helper.make_model(
            helper.make_graph(
                [helper.make_node("Identity", ["a"], ["b"])], "g", [], [], [numpy_helper.from_array(array, "a")]
            )
        )
    )
    assert (weight_of(lazy.tensors()["a"]).load() == array).all()
