"""Compilation: one graph for all sizes, torch.export, and back to ONNX."""

import pytest
import torch
import zoo

import graphclone
from graphclone.pytorch import to_torch
from graphclone.verify.running import run


@pytest.mark.parametrize(("family", "route"), [("gpt2", "dynamo18"), ("llama", "legacy17")])
def test_one_graph_serves_all_sizes(family, route):
    model = graphclone.load(zoo.export(family, route))
    module = to_torch(model)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for batch, sequence in ((2, 7), (3, 9), (5, 4)):
        feeds = [torch.from_numpy(zoo.feeds(family, batch, sequence)[value.name]) for value in model.inputs]
        assert torch.equal(compiled(*feeds), module(*feeds))
    assert len(graphs) == 1


def test_torch_export_keeps_sizes_dynamic():
    model = graphclone.load(zoo.export("bert", "dynamo18"))
    module = to_torch(model)
    feeds = [torch.from_numpy(zoo.feeds("bert", 3, 9)[value.name]) for value in model.inputs]
    dims = tuple({0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=40)} for _ in feeds)
    program = torch.export.export(module, tuple(feeds), dynamic_shapes=dims, strict=False)
    other = [torch.from_numpy(zoo.feeds("bert", 2, 5)[value.name]) for value in model.inputs]
    for given, want in zip(program.module()(*other), module(*other), strict=True):
        assert torch.allclose(given, want, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "vit"])
def test_a_module_goes_back_to_onnx_and_keeps_its_names(family, tmp_path):
    model = graphclone.load(zoo.export(family, "dynamo18"))
    module, names = to_torch(model).eval(), [value.name for value in model.inputs]
    feeds = [torch.from_numpy(zoo.feeds(family, 3, 9)[name]) for name in names]
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=40)}
    dims = tuple(sizes if each.dim() == 2 else {0: sizes[0]} for each in feeds)
    path = tmp_path / "again.onnx"
    torch.onnx.export(module, tuple(feeds), path, dynamo=True, dynamic_shapes=dims, input_names=names, verbose=False)
    again, other = graphclone.load(path), zoo.feeds(family, 2, 5)
    (given,) = run(again, [{name: other[name] for name in names}])
    outputs = module(*[torch.from_numpy(other[name]) for name in names])
    for have, want in zip(given.values(), outputs if isinstance(outputs, tuple) else (outputs,), strict=True):
        assert abs(have - want.detach().numpy()).max() <= 1e-5 * want.abs().max()
    assert to_torch(again).state_dict().keys() == module.state_dict().keys()
