"""Initialization: fresh weights of the same shapes, for baselines trained from scratch."""

from collections.abc import Mapping

import torch

from graphclone.errors import InputError
from graphclone.pytorch.parameters import Stored
from graphclone.pytorch.program import Program

STD = 0.02
"""Standard deviation of matrices, as GPT-2, BERT, Llama and ViT start (arXiv 1810.04805, section A.2; 1908.08593)."""


NORM_SLOTS = {
    "LayerNorm": 1, "RMSNorm": 1, "LayerNormalization": 1, "RMSNormalization": 1, "SimplifiedLayerNormalization": 1,
    "InstanceNormalization": 1, "GroupNormalization": 1, "BatchNormalization": 1, "SkipLayerNormalization": 2,
    "SkipSimplifiedLayerNormalization": 2, "EmbedLayerNormalization": 5,
}  # fmt: skip
"""Where operators take the weight of a norm; what follows is its bias."""


def norm_vectors(program: Program) -> dict[Stored, float]:
    """Return the weights and biases of norms and what they start as, whatever they are called."""
    found: dict[Stored, float] = {}
    for op in program.ops:
        first = NORM_SLOTS.get(op.type)
        for slot, start in ((first, 1.0), (first + 1, 0.0)) if first is not None else ():
            value = op[slot]
            if value is not None and value.parameter is not None and value.parameter.trainable and value.rank == 1:
                found[value.parameter] = start
    return found


@torch.no_grad()
def initialize(module: torch.nn.Module, init: str, seed: int, norms: Mapping[str, float]) -> None:
    """Fill all parameters anew: matrices and tables normal with deviation 0.02, biases zero, norms one.

    Scalars and vectors that are neither bias nor norm weight (scales, gates) keep their value.
    norms: what vectors of norms start as, by their names in the module.
    Raises: InputError for an `init` other than "random".
    """
    if init != "random":
        raise InputError(f"init={init!r} is not known; write init='random', or None to keep the model's weights")
    generator = torch.Generator().manual_seed(seed)
    for path, layer in module.named_modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            start = norms.get(f"{path}.{name}" if path else name)
            if start is not None:
                parameter.fill_(start)
            elif "bias" in name and parameter.dim() == 1:
                parameter.zero_()
            elif parameter.dim() >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * STD)
