"""Templates: the parts of generated source that are the same for every model."""

HEADER = '''"""{title}"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
'''

CHECKPOINT = "from torch.utils.checkpoint import checkpoint\n"

GROUP = '''

class Group(nn.Module):
    """Modules and tensors under their names."""

    def __init__(self, /, **members):
        super().__init__()
        for name, member in members.items():
            if isinstance(member, (nn.Module, nn.Parameter, nn.Buffer)):
                setattr(self, name, member)
            else:
                self.register_buffer(name, member, persistent=False)

    def __getitem__(self, index):
        return getattr(self, str(index))
'''

CONV1D = '''

class Conv1D(nn.Module):
    """A linear layer whose weight is (in, out)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x):
        return F.linear(x, self.weight.t(), self.bias)
'''

LOAD = '''

def load(path=None):
    """Return the model with the weights of `path`, by default the model.safetensors beside this file."""
    with torch.device("meta"):
        model = Model()
    fill(model, load_file(path or Path(__file__).with_name("model.safetensors")))
    return model


def fill(model, tensors):
    """Give the model its tensors, those of its state dict and its tables."""
    for name, _ in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = tensors.pop(name)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise ValueError(f"the weights hold no tensor {name!r}")
'''
