"""Functions that generated source may call; the ones it calls are copied into it.

This file is read as text: each function stands alone and needs `torch` and `F` only.
"""

import torch
import torch.nn.functional as F


def rotate_half(x):
    """Return (-b, a) of the halves (a, b) of the last axis."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def rotate_pairs(x):
    """Return (-b, a) of the neighbouring entries (a, b) of the last axis."""
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


def rotary_halves(x, cos, sin):
    """Rotate the halves of x (batch, heads, sequence, head_dim); cos and sin are (batch, sequence, size / 2)."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    size = cos.shape[-1]
    a, b, rest = x[..., :size], x[..., size : 2 * size], x[..., 2 * size :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def rotary_pairs(x, cos, sin):
    """Rotate pairs of entries of x (batch, heads, sequence, head_dim); cos and sin are (batch, sequence, size / 2)."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    size = 2 * cos.shape[-1]
    a, b, rest = x[..., :size:2], x[..., 1:size:2], x[..., size:]
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    return torch.cat((turned, rest), dim=-1)


def capped_attention(q, k, v, mask, scale, softcap):
    """Attend with scores softcap * tanh(scores / softcap); q, k, v are (batch, heads, sequence, head_dim)."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = softcap * torch.tanh(q @ k.mT * scale / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return F.softmax(scores, dim=-1) @ v


def causal_mask(queries, keys, device):
    """Return True where a query may see a key; the last query sees all keys."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
