"""Naming: what the exporter leaves beside an operator tells a parameter from what was computed with it."""

import functools

import pytest
import zoo

import graphclone
from graphclone.pytorch import to_torch


@functools.cache
def module_of(family: str, route: str):
    return to_torch(graphclone.load(zoo.export(family, route)))


@functools.cache
def native(family: str):
    return zoo.family(family).build().state_dict()


@pytest.mark.parametrize("route", ["dynamo18", "legacy17"])
def test_a_weight_stands_beside_its_bias_though_a_module_above_calls_the_function(route):
    """A scan calls conv1d with the weight and bias of a layer it holds."""
    held = module_of("mamba", route).state_dict()
    for leaf in ("weight", "bias"):
        name = f"backbone.layers.1.mixer.conv1d.{leaf}"
        assert held[name].shape == native("mamba")[name].shape


@pytest.mark.parametrize(
    ("family", "route"), [("gemma2", "dynamo18"), ("gemma2", "legacy17"), ("wav2vec2", "dynamo23")]
)
def test_no_name_of_the_framework_holds_other_values(family, route):
    """1 + w is not w, and g * v / |v| is no weight: their names would load a checkpoint wrongly."""
    module = module_of(family, route)
    same = [name for name in module.state_dict() if name in native(family)]
    assert len(same) > 10 and all((module.state_dict()[name] == native(family)[name]).all() for name in same)
    lacking = {name for name in native(family) if name not in same}
    assert lacking and (route == "legacy17" or set(module.report["absent"]) == lacking)


@pytest.mark.parametrize("route", ["dynamo18", "legacy17"])
def test_a_convolution_that_holds_its_norm_has_its_own_name(route):
    module = module_of("segformer", route)
    layer = module.decode_head.linear_fuse
    assert isinstance(layer.weight, type(next(module.parameters()))) and layer.bias is not None
    assert "decode_head.batch_norm.weight" not in module.state_dict()
    if route == "dynamo18":
        assert "decode_head.linear_fuse.weight: the batch norm behind it is folded in" in module.report["unsure"]
        assert {"decode_head.batch_norm.weight", "decode_head.batch_norm.running_var"} <= set(module.report["absent"])


@pytest.mark.parametrize("route", ["dynamo18", "legacy17"])
def test_a_group_norm_has_one_weight(route):
    module = module_of("wav2vec2", route)
    names = [name for name, _ in module.named_parameters() if "conv_layers.0" in name]
    stem = "wav2vec2.feature_extractor.conv_layers.0"
    assert module.state_dict()[f"{stem}.layer_norm.weight"].shape == (20,) and "F.group_norm(" in module.source
    assert sorted(names) == [f"{stem}.conv.weight", f"{stem}.layer_norm.bias", f"{stem}.layer_norm.weight"]


@pytest.mark.parametrize("family", ["bert", "bart", "t5"])
def test_parameters_are_listed_as_the_framework_lists_them(family):
    """Optimizers number parameters by this order; tied ones have the first of their names."""
    wanted = [name for name, _ in zoo.family(family).build().named_parameters()]
    assert [name for name, _ in module_of(family, "dynamo18").named_parameters()] == wanted


def test_a_bias_of_a_head_that_is_not_tied_is_absent():
    module = module_of("bert_mlm", "dynamo18")
    assert module.report["absent"] == ["cls.predictions.bias"] and "cls.predictions.decoder.bias" in module.state_dict()
