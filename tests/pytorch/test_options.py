"""Options of to_torch: dropout, checkpointing, fresh weights, names from a checkpoint."""

import functools

import numpy as np
import pytest
import torch
import zoo
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

import graphclone
from graphclone.errors import InputError
from graphclone.model import Model
from graphclone.pytorch import to_torch


@functools.cache
def model_of(family: str, route: str = "dynamo18"):
    return graphclone.load(zoo.export(family, route))


def run(module, family: str):
    names = [value.name for value in model_of(family).inputs]
    outputs = module(*[torch.from_numpy(zoo.feeds(family, 2, 7)[name]) for name in names])
    return outputs[0] if isinstance(outputs, tuple) else outputs


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "vit"])
def test_dropout_acts_in_training_alone_and_in_each_place(family):
    plain, module = to_torch(model_of(family)), to_torch(model_of(family), dropout=0.25)
    assert torch.equal(run(module.eval(), family), run(plain, family))
    assert not torch.equal(run(module.train(), family), run(plain, family))
    assert module.source.count("F.dropout(") == 3 and module.source.count("dropout_p=0.25 if self.training") == 1
    assert module.state_dict().keys() == plain.state_dict().keys()


def test_blocks_compute_again_with_the_same_gradients():
    gradients = []
    for flag in (False, True):
        module = to_torch(model_of("gpt2"), checkpoint_blocks=flag)
        run(module, "gpt2").square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in module.named_parameters()})
        assert ("checkpoint(block" in module.source) == flag
    assert all(torch.allclose(gradients[1][name], gradient) for name, gradient in gradients[0].items())


def test_fresh_weights_follow_the_usual_rules_and_the_seed():
    module = to_torch(model_of("bert"), init="random", seed=7)
    again = to_torch(model_of("bert"), init="random", seed=7)
    other = to_torch(model_of("bert"), init="random", seed=8)
    layer = module.encoder.layer[0]
    assert torch.equal(layer.attention.output.LayerNorm.weight, torch.ones(48))
    assert not layer.intermediate.dense.bias.any()
    assert 0.015 < layer.intermediate.dense.weight.std() < 0.025
    assert torch.equal(again.embeddings.word_embeddings.weight, module.embeddings.word_embeddings.weight)
    assert not torch.equal(other.embeddings.word_embeddings.weight, module.embeddings.word_embeddings.weight)


def fused_norm() -> Model:
    """Return x -> norm(x + x) as onnxruntime's optimizer writes it, its vectors called as it likes."""
    rng = np.random.default_rng(0)
    node = helper.make_node("SkipLayerNormalization", ["x", "x", "gain", "shift"], ["y"], domain="com.microsoft")
    graph = helper.make_graph(
        [node],
        "fused",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "s", 6])],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(rng.random(6, np.float32), name) for name in ("gain", "shift")],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return Model.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=8))


def test_norms_start_at_one_whatever_they_are_called():
    module = to_torch(fused_norm(), init="random")
    assert torch.equal(module.gain, torch.ones(6)) and torch.equal(module.shift, torch.zeros(6))


def test_without_blocks_there_is_nothing_to_compute_again():
    with pytest.raises(InputError, match="checkpoint_blocks=True needs repeated blocks"):
        to_torch(fused_norm(), checkpoint_blocks=True)


def test_attention_that_is_one_operator_drops_its_weights_too():
    shape = ["n", 2, "s", 4]
    graph = helper.make_graph(
        [helper.make_node("Attention", ["q", "k", "v"], ["y"])],
        "attention",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "qkv"],
        [helper.make_empty_tensor_value_info("y")],
    )
    model = Model.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10))
    assert "dropout_p=0.25 if self.training" in to_torch(model, dropout=0.25).source


@pytest.mark.parametrize(
    ("option", "message"), [({"init": "ones"}, "init='ones' is not known"), ({"dropout": 1.0}, "dropout=1.0")]
)
def test_other_values_are_errors(option, message):
    with pytest.raises(InputError, match=message):
        to_torch(model_of("gpt2"), **option)


def anonymous(family: str):
    """Return the model with every initializer and node renamed, and no metadata."""
    model = model_of(family, "legacy17").copy()
    for number, (name, tensor) in enumerate(model.graph.tensors().items()):
        if name in model.weights:
            tensor.name = f"const_{number}"
    for number, node in enumerate(model.graph.nodes):
        node.name = f"n{number}"
    return model


@pytest.mark.parametrize("family", ["gpt2", "vit"])
def test_a_checkpoint_brings_lost_names_back(family, tmp_path):
    native = zoo.family(family).build().state_dict()
    without = to_torch(anonymous(family))
    assert not set(without.state_dict()) & set(native)
    assert to_torch(anonymous(family), checkpoint=native).report["absent"] == []
    save_file({name: value.clone() for name, value in native.items()}, tmp_path / "weights.safetensors")
    for given in (native, tmp_path, tmp_path / "weights.safetensors"):
        module = to_torch(anonymous(family), checkpoint=given)
        assert {name: value.shape for name, value in module.state_dict().items()} == {
            name: value.shape for name, value in native.items()
        }
    with pytest.raises(InputError, match="no safetensors in"):
        to_torch(anonymous(family), checkpoint=tmp_path / "absent")


def test_a_fused_weight_is_the_tensors_of_the_checkpoint():
    """onnxruntime's optimizer packs queries, keys and values (in, 3 out); the checkpoint has them apart, (out, in)."""
    random = np.random.default_rng(0)
    native = {f"h.0.attn.{name}.weight": random.random((6, 6), np.float32) for name in ("q", "k", "v")}
    native |= {f"h.0.attn.{name}.bias": random.random(6, np.float32) for name in ("q", "k", "v")}
    packed = np.concatenate([native[f"h.0.attn.{name}.weight"].T for name in "qkv"], axis=1)
    bias = np.concatenate([native[f"h.0.attn.{name}.bias"] for name in "qkv"])
    node = helper.make_node("Attention", ["x", "packed", "bias"], ["y"], domain="com.microsoft", num_heads=2)
    graph = helper.make_graph(
        [node],
        "fused",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "s", 6])],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(packed, "packed"), numpy_helper.from_array(bias, "bias")],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = Model.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=8))
    module, plain = to_torch(model, checkpoint=native), to_torch(model)
    assert set(plain.state_dict()) == {"packed", "bias"} and set(module.state_dict()) == set(native)
    assert all(np.array_equal(module.state_dict()[name].numpy(), value) for name, value in native.items())
    x = torch.randn(2, 5, 6)
    assert torch.allclose(module(x), plain(x), atol=1e-6)


def test_split_weights_are_one_tensor_of_the_checkpoint():
    node, info = helper.make_node, helper.make_tensor_value_info
    weights = {name: np.random.default_rng(number).random((4, 3), np.float32) for number, name in enumerate("qkv")}
    graph = helper.make_graph(
        [node("MatMul", ["x", f"val_{name}"], [name]) for name in weights] + [node("Sum", list(weights), ["y"])],
        "split",
        [info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(weight, f"val_{name}") for name, weight in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    whole = np.concatenate([weight.T for weight in weights.values()])
    module = to_torch(Model.from_proto(proto), checkpoint={"attn.qkv.weight": whole, "attn.pooler": whole[:1]})
    assert set(module.state_dict()) == {"attn.qkv.weight", "attn.pooler"} and module.report["absent"] == ["attn.pooler"]
    assert np.array_equal(module.attn.qkv.weight.detach().numpy(), whole)
    x = np.ones((2, 4), np.float32)
    assert np.allclose(module(torch.from_numpy(x)).detach(), sum(x @ weight for weight in weights.values()))


def test_axes_of_one_do_not_hide_a_tensor_of_the_checkpoint():
    model = model_of("mamba", "legacy17")
    native = zoo.family("mamba").build().state_dict()
    module, plain = to_torch(model, checkpoint=native), to_torch(model)
    assert torch.equal(module.backbone.layers[0].mixer.D, native["backbone.layers.0.mixer.D"])
    feeds = [torch.from_numpy(each) for each in zoo.feeds("mamba", 2, 7).values()]
    assert torch.equal(module(*feeds), plain(*feeds))


@pytest.mark.parametrize(
    ("family", "route"),
    [
        ("swin", "dynamo18"),
        ("swin", "legacy17"),
        ("beit", "dynamo18"),
        ("wav2vec2", "legacy17"),
        ("beit", "legacy17"),
        ("dinov2", "dynamo18"),
        ("dinov2", "legacy17"),
        ("clip", "dynamo18"),
        ("marian", "dynamo18"),
        ("mamba", "dynamo18"),
        ("mamba", "legacy17"),
        ("segformer", "dynamo18"),
        ("segformer", "legacy17"),
        ("wav2vec2", "dynamo23"),
    ],
)
def test_the_state_dict_is_the_checkpoint_where_the_exporter_computed_with_it(family, route):
    """Gathered and resized tables, normed weights; what no operator reads is kept and takes no gradient."""
    model, framework = model_of(family, route), zoo.family(family).build()
    native = framework.state_dict()
    module, plain = to_torch(model, checkpoint=native), to_torch(model)
    trained = {name for name, _ in framework.named_parameters(remove_duplicate=False)}
    assert {name for name, _ in module.named_parameters(remove_duplicate=False)} == trained
    held = module.state_dict()
    assert held.keys() == native.keys()
    assert all(held[name].shape == value.shape and torch.equal(held[name], value) for name, value in native.items())
    fixed = {name for name, parameter in framework.named_parameters() if not parameter.requires_grad}
    idle = {name for name, parameter in module.named_parameters() if not parameter.requires_grad} - fixed
    assert idle == trained & set(module.report["carried"]) and idle <= set(module.report["absent"])
    feeds = [torch.from_numpy(each) for each in zoo.feeds(family, 2, 7).values()]
    for given, wanted in zip(module(*feeds), plain(*feeds), strict=True):
        assert torch.allclose(given, wanted, atol=1e-5)


def test_what_is_computed_from_the_checkpoint_trains_its_tensors():
    rng = np.random.default_rng(0)
    shapes = {"fc.weight_v": (3, 4), "fc.weight_g": (3, 1), "decay": (3,), "table": (5, 3), "scale": ()}
    native = {name: rng.random(shape, np.float32) for name, shape in shapes.items()}
    v, g, rows = native["fc.weight_v"], native["fc.weight_g"], np.array([[0], [1], [0], [3]])
    weights = {
        "val_1": (g * v / np.linalg.norm(v, axis=1, keepdims=True)).T,
        "val_2": -np.exp(native["decay"]),
        "val_3": native["table"][rows],
    }
    node = helper.make_node
    graph = helper.make_graph(
        [node("MatMul", ["x", "val_1"], ["a"]), node("Mul", ["a", "val_2"], ["b"]), node("Add", ["b", "val_3"], ["y"])],
        "folds",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(weight, name) for name, weight in weights.items()],
    )
    model = Model.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    module = to_torch(model, checkpoint=native)
    held = module.state_dict()
    assert held.keys() == native.keys() and module.report["carried"] == ["scale"]
    assert all(np.array_equal(held[name].numpy(), value) for name, value in native.items())
    x = rng.random((2, 4), np.float32)
    y = module(torch.from_numpy(x))
    assert np.allclose(y.detach(), x @ weights["val_1"] * weights["val_2"] + weights["val_3"], atol=1e-6)
    y.square().sum().backward()
    assert module.table.grad[[0, 1, 3]].all() and not module.table.grad[[2, 4]].any()
    assert module.decay.grad.all() and module.fc.weight_g.grad.all() and module.scale.grad is None


@pytest.mark.parametrize(("family", "route"), [("clip", "dynamo18"), ("siglip", "legacy17")])
def test_a_lone_number_is_computed_from_the_checkpoints_in_a_cut_model_too(family, route):
    """CLIP multiplies by exp(logit_scale), which exporters store; fresh weights of it must train."""
    native, parent = zoo.family(family).build().state_dict(), model_of(family, route)
    for model in (parent, graphclone.subclone(parent, layers=3)):
        module, plain = to_torch(model, checkpoint=native), to_torch(model)
        assert torch.equal(module.logit_scale, native["logit_scale"]) and "logit_scale" not in module.report["absent"]
        feeds = [torch.from_numpy(zoo.feeds(family, 2, 7)[value.name]) for value in model.inputs]
        first = module(*feeds)[0]
        torch.testing.assert_close(first, plain(*feeds)[0], rtol=1e-6, atol=1e-6)
        first.square().sum().backward()
        assert module.logit_scale.grad.abs().sum() > 0


def test_numbers_that_anybody_writes_are_not_the_checkpoints(graph):
    model = graph("(float[N, 4] x) => (float[N, 4] y) <float half = {0.5}, float odd = {0.7310586}> "
                  "{ a = Mul(x, half)  b = Add(a, odd)  y = Mul(b, half) }")  # fmt: skip
    tensors = {"gate": torch.tensor(1.0), "scale": torch.tensor(0.5), "other": torch.tensor(0.123456)}
    module = to_torch(model, checkpoint=tensors)
    assert sorted(module.report["carried"]) == ["gate", "other", "scale"]


@pytest.mark.parametrize("told", ["folder", "keep_vars"])
def test_a_buffer_of_the_checkpoint_is_no_parameter(told, tmp_path):
    """The legacy exporter leaves no word of which is which."""
    native = zoo.family("bart").build()
    if told == "folder":
        native.save_pretrained(tmp_path)
    module = to_torch(
        model_of("bart", "legacy17"), checkpoint=tmp_path if told == "folder" else native.state_dict(keep_vars=True)
    )
    assert "final_logits_bias" in module.state_dict()
    assert {name for name, _ in module.named_parameters()} == {name for name, _ in native.named_parameters()}


def test_a_model_in_16_bits_takes_the_checkpoints_numbers_in_full_on_request():
    """The module is what the graph is; float() and load_state_dict() make it what the checkpoint is."""
    native = zoo.family("gpt2").build()
    module = to_torch(model_of("gpt2", "dynamo18_fp16"), checkpoint=native.state_dict())
    assert {each.dtype for each in module.parameters()} == {torch.float16}
    module.float().load_state_dict(native.state_dict())
    feeds = zoo.feeds("gpt2", 2, 7)
    have, want = run(module, "gpt2"), native(*map(torch.from_numpy, feeds.values()))
    want = want[0] if isinstance(want, tuple) else want
    assert (have - want).abs().max() <= 1e-4 * want.abs().max()
