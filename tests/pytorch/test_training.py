"""Training: from the same weights and batches, the converted module's losses are the framework's, step by step."""

import pytest
import torch
import torch.nn.functional as F
import zoo

import graphclone
from graphclone.pytorch import to_torch

STEPS = 50


def losses(module: torch.nn.Module, vocab: int) -> torch.Tensor:
    """Train on batches that a seed alone decides; return the loss of each step [STEPS]."""
    random = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-3)
    curve = []
    for _ in range(STEPS):
        ids = torch.randint(vocab, (4, 1), generator=random) + torch.arange(9)  # counting on: something to learn
        ids %= vocab
        outputs = module(ids[:, :-1], torch.ones_like(ids[:, :-1]))
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        curve.append(loss.item())
    return torch.tensor(curve, dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-3)])
def test_the_loss_curve_is_the_frameworks(dtype, tolerance):
    model = graphclone.load(zoo.export("gpt2", "dynamo18"))
    assert [value.name for value in model.inputs] == ["input_ids", "attention_mask"]
    native = zoo.family("gpt2").build().train().to(dtype)
    for dropout in (each for each in native.modules() if isinstance(each, torch.nn.Dropout)):
        dropout.p = 0.0
    vocab = native.config.vocab_size
    want = losses(native, vocab)
    have = losses(to_torch(model).train().to(dtype), vocab)
    assert want[-5:].mean() < 0.9 * want[:5].mean()
    assert ((have - want).abs() <= tolerance * want.abs()).all()
