"""What an export holds of a parameter is found in each form that exporters and tools store it in."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from zoo.layout import Layout  # noqa: E402
from zoo.rounded import round_like  # noqa: E402


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.tensor([0.7]))
        self.positions = torch.nn.Embedding(9, 4)


def test_exponentials_and_whole_tables_are_taken_over(graph):
    module = Small()
    model = graph(
        "(float[9, 4] x) => (float[1, 9, 4] y) <float[1] e, float[1, 9, 4] t> { s = Mul(x, e)  y = Add(s, t) }"
    )
    table = module.positions.weight.detach().numpy() * np.float32(1.001)
    for tensor in (tensor for node in model.graph.nodes for tensor in node.inputs):
        if tensor.name in ("e", "t"):
            tensor.values = np.exp(np.float32([0.7004])) if tensor.name == "e" else table[None]
    round_like(module, model, Layout(sizes={}))
    assert torch.equal(module.positions.weight.detach(), torch.from_numpy(table))
    assert module.logit_scale.item() == pytest.approx(0.7004, abs=1e-6)
