"""Compilation: one graph for all sizes, and torch.export."""

import pytest
import torch
import zoo

import graphclone
from graphclone.pytorch import to_torch


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
