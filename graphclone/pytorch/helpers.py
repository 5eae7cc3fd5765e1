"""Functions that generated source may call; the ones it calls are copied into it.

This file is read as text: each function stands alone and needs `torch` and `F` only.
"""

import torch
import torch.nn.functional as F


def rotate_half(x):
    """Return (-b, a) of the halves (a, b) of the last axis."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


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


def one_hot(x, places):
    """Return True where a place (depth) is that of an index in x; a negative index counts from the end."""
    x = x.unsqueeze(-1)
    return (x == places) | (x + len(places) == places)


def fourier(x, axis, length, inverse, onesided):
    """Transform x (..., 1 or 2), real or complex numbers as pairs, along an axis; return pairs."""
    x = torch.view_as_complex(x.contiguous()) if x.shape[-1] == 2 else x.squeeze(-1)
    if onesided:
        return torch.view_as_real(torch.fft.rfft(x, n=length, dim=axis))
    transform = torch.fft.ifft if inverse else torch.fft.fft
    return torch.view_as_real(transform(x, n=length, dim=axis).resolve_conj())


def cached_attention(q, k, v, past, mask, causal, scale):
    """Attend to what is past and what is new; return the context (batch, queries, hidden) and the longer past.

    q, k, v are (batch, heads, sequence, head_dim), the past is keys and values (2, batch, heads, sequence, head_dim).
    """
    past = torch.cat((past, torch.stack((k, v))), dim=3)
    if causal:
        allowed = causal_mask(q.shape[2], past.shape[3], q.device)
        mask = allowed if mask is None else mask.masked_fill(~allowed, float("-inf"))
    context = F.scaled_dot_product_attention(q, past[0], past[1], attn_mask=mask, scale=scale)
    return context.transpose(1, 2).flatten(2), past


def grouped_attention(q, k, v, past_k, past_v, places, total, bias, scale, window, softcap):
    """Attend causally behind a cache; return the context (batch, queries, hidden), keys and values of the new cache.

    q, k, v are (batch, heads, sequence, head_dim); `places` (batch, sequence) are where each row's new entries go, the
    cache then has `total` places or as many as it had; a query sees `window` keys back, None for all.
    """
    length = max(past_k.shape[2], total)
    rows = places[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
    k = F.pad(past_k, (0, 0, 0, length - past_k.shape[2])).scatter(2, rows, k)
    v = F.pad(past_v, (0, 0, 0, length - past_v.shape[2])).scatter(2, rows, v)
    keys, queries = torch.arange(length, device=q.device), places[:, None, :, None]
    mask = keys <= queries
    if window is not None:
        mask = mask & (keys > queries - window)
    if bias is not None:
        mask = bias.masked_fill(~mask, float("-inf"))
    if softcap:
        context = capped_attention(q, k, v, mask, scale or q.shape[3] ** -0.5, softcap)
    else:
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return context.transpose(1, 2).flatten(2), k, v


def cache_places(last, count):
    """Return the places (batch, count) of each row's new entries: they end at its last place, or begin at the first."""
    return (last + 1 - count).clamp(min=0)[:, None] + torch.arange(count, device=last.device)


def causal_mask(queries, keys, device):
    """Return True where a query may see a key; the last query sees all keys."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def quantize(x, scale, zero_point, low, high):
    """Return the integers between low and high, as floats, that x stands for; gradients pass as if none was rounded."""
    steps = (x / scale).clamp(low - zero_point, high - zero_point)
    return torch.round(steps).detach() + zero_point + (steps - steps.detach())


def held(x, at):
    """Return x; where `at` is zero no gradient passes, not even an infinite one times zero."""
    return torch.where(at == 0, x.detach(), x)


def quantize_dynamically(x):
    """Return x as integers from 0 to 255, held as floats, their scale and zero point, which its range gives."""
    low, high = x.detach().amin().clamp(max=0), x.detach().amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, 1.0, scale)
    zero_point = torch.round((-low / scale).clamp(0, 255))
    steps = x / scale
    whole = (torch.round(steps.detach()) + zero_point).clamp(0, 255)
    return whole + (steps - steps.detach()), scale, zero_point
