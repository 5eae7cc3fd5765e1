"""Branches and caches: one module with both ways of an If, and a cache that goes in and comes out."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

import graphclone
from graphclone.model import Model
from graphclone.pytorch import to_torch

OPTIMUM = Path(__file__).resolve().parent.parent / "fixtures" / "optimum"
SIZES = [
    {"batch_size": 2, "sequence_length": 3, "past_sequence_length": 4, "decoder_sequence_length": 3}
    | {"past_decoder_sequence_length": 4, "encoder_sequence_length": 5},
    {"batch_size": 3, "sequence_length": 1, "past_sequence_length": 6, "decoder_sequence_length": 1}
    | {"past_decoder_sequence_length": 6, "encoder_sequence_length": 2},
]


def feeds_of(session: onnxruntime.InferenceSession, sizes: dict[str, int], use_cache: bool) -> dict[str, np.ndarray]:
    random, feeds = np.random.default_rng(0), {}
    for given in session.get_inputs():
        shape = [sizes.get(size) or sum(sizes[part] for part in size.split(" + ")) if isinstance(size, str) else size
                 for size in given.shape]  # fmt: skip
        if given.type == "tensor(bool)":
            feeds[given.name] = np.array([use_cache])
        elif given.type == "tensor(int64)":
            feeds[given.name] = random.integers(0, 9, shape) if "mask" not in given.name else np.ones(shape, np.int64)
        else:
            feeds[given.name] = random.standard_normal(shape).astype(np.float32)
    return feeds


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("file", ["t5/decoder_model_merged", "bart/decoder_model_merged", "gpt2/model", "llama/model"])
def test_caches_go_in_and_come_out_as_the_graph_has_them(file, use_cache):
    path = OPTIMUM / f"{file}.onnx"
    module, session = to_torch(graphclone.load(path)), onnxruntime.InferenceSession(path)
    assert module.input_names == [given.name for given in session.get_inputs()]
    assert module.output_names == [given.name for given in session.get_outputs()]
    for sizes in SIZES:
        feeds = feeds_of(session, sizes, use_cache)
        outputs = module(*[torch.from_numpy(feeds[name]) for name in module.input_names])
        for have, want in zip(outputs, session.run(None, feeds), strict=True):
            assert have.shape == want.shape
            assert not want.size or np.abs(have.detach().numpy() - want).max() <= 1e-5 * np.abs(want).max()
    outputs[0].square().sum().backward()
    assert all(each.grad.isfinite().all() for each in module.parameters() if each.grad is not None)


def test_both_ways_of_a_merged_decoder_share_blocks_and_weights():
    merged = to_torch(graphclone.load(OPTIMUM / "t5/decoder_model_merged.onnx"))
    plain = to_torch(graphclone.load(OPTIMUM / "t5/decoder_model.onnx"))
    assert {name: value.shape for name, value in merged.state_dict().items()} == {
        name: value.shape for name, value in plain.state_dict().items()
    }
    block = merged.decoder.block[0]
    assert callable(block.forward) and callable(block.forward_2)
    assert merged.source.count("if use_cache_branch:") == 1


def test_a_compiled_module_follows_a_branch_given_as_a_python_bool():
    path = OPTIMUM / "bart/decoder_model_merged.onnx"
    module = to_torch(graphclone.load(path))
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="eager")
    for use_cache in (False, True):
        feeds = feeds_of(onnxruntime.InferenceSession(path), SIZES[0], use_cache)
        given = [torch.from_numpy(feeds[name]) for name in module.input_names[:-1]]
        for have, want in zip(compiled(*given, use_cache), module(*given, torch.tensor([use_cache])), strict=True):
            assert torch.equal(have, want)


def choice(condition: list, inside: bool = False) -> bytes:
    """y = w x where the condition holds, else w x + x; `inside` adds a choice in a choice."""
    node, info = helper.make_node, helper.make_empty_tensor_value_info
    first = helper.make_graph([node("Mul", ["x", "w"], ["a"])], "first", [], [info("a")])
    second = helper.make_graph(
        [node("Mul", ["x", "w"], ["b"]), node("Add", ["b", "x"], ["c"])], "second", [], [info("c")]
    )
    outer = node("If", ["go"], ["y"], name="outer", then_branch=first, else_branch=second)
    if inside:
        inner = node("If", ["again"], ["d"], name="inner", then_branch=first, else_branch=second)
        nested = helper.make_graph([inner, node("Neg", ["d"], ["e"])], "nested", [], [info("e")])
        third = helper.make_graph([node("Abs", ["x"], ["f"])], "third", [], [info("f")])
        outer = node("If", ["go"], ["y"], name="outer", then_branch=nested, else_branch=third)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])]
    inputs += [helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("go", "again")]
    weight = numpy_helper.from_array(np.array([2, 3, 4, 5], np.float32), "w")
    graph = helper.make_graph([*condition, outer], "choice", inputs, [info("y")], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


@pytest.mark.parametrize("go", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_choices_lie_in_choices(go, again):
    data = choice([], inside=True)
    module, x = to_torch(Model.from_proto(ModelProto.FromString(data))), torch.tensor([[1.0, -2.0, 3.0, 4.0]])
    want = onnxruntime.InferenceSession(data).run(None, {"x": x.numpy(), "go": np.array(go), "again": np.array(again)})
    assert np.array_equal(module(x, torch.tensor(go), torch.tensor(again)).detach().numpy(), want[0])
    assert len(list(module.parameters())) == 1


@pytest.mark.parametrize("go", [False, True])
def test_a_number_that_a_branch_gives_is_a_tensor(go):
    node, info = helper.make_node, helper.make_empty_tensor_value_info
    first = helper.make_graph([node("Constant", [], ["a"], value_float=2.0)], "first", [], [info("a")])
    second = helper.make_graph([node("ReduceSum", ["x"], ["b"], keepdims=0)], "second", [], [info("b")])
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])]
    inputs += [helper.make_tensor_value_info("go", TensorProto.BOOL, [])]
    outer = node("If", ["go"], ["y"], name="outer", then_branch=first, else_branch=second)
    graph = helper.make_graph([outer], "choice", inputs, [info("y")])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = torch.ones(2, 4)
    y = to_torch(Model.from_proto(proto))(x, torch.tensor(go))
    assert isinstance(y, torch.Tensor) and y.shape == () and y == (2 if go else 8)


def test_a_choice_that_sizes_decide_is_made():
    condition = [
        helper.make_node("Shape", ["x"], ["s"], start=1),
        helper.make_node("Squeeze", ["s"], ["width"]),
        helper.make_node("Constant", [], ["four"], value_int=4),
        helper.make_node("Equal", ["width", "four"], ["equal"]),
    ]
    proto = ModelProto.FromString(choice(condition))
    proto.graph.node[-1].input[0] = "equal"
    module = to_torch(Model.from_proto(proto))
    assert "if " not in module.source.split("def forward")[1].split("def load")[0]
    assert module(torch.ones(1, 4), None, None).tolist() == [[2, 3, 4, 5]]
