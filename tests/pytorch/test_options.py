"""Options of to_torch: dropout, checkpointing, fresh weights, names from a checkpoint."""

import functools

import pytest
import torch
import zoo
from safetensors.torch import save_file

import graphclone
from graphclone.errors import InputError
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
