"""Initialization: fresh weights of the same shapes, for baselines trained from scratch."""

import torch

from graphclone.errors import InputError

NORMS = (torch.nn.LayerNorm, torch.nn.RMSNorm)
STD = 0.02
"""Standard deviation of matrices, as GPT-2, BERT, Llama and ViT start (arXiv 1810.04805, section A.2; 1908.08593)."""


@torch.no_grad()
def initialize(module: torch.nn.Module, init: str, seed: int) -> None:
    """Fill all parameters anew: matrices and tables normal with deviation 0.02, biases zero, norms one.

    Scalars and vectors that are neither bias nor norm weight (scales, gates) keep their value.
    Raises: InputError for an `init` other than "random".
    """
    if init != "random":
        raise InputError(f"init={init!r} is not known; write init='random', or None to keep the model's weights")
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if isinstance(layer, NORMS) and name == "weight":
                parameter.fill_(1.0)
            elif "bias" in name and parameter.dim() == 1:
                parameter.zero_()
            elif parameter.dim() >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * STD)
