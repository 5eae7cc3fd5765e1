"""Hold one family of the zoo: how to build it, what goes in and what comes out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from zoo.layout import Layout

BATCH, SEQUENCE, DECODER_SEQUENCE, SAMPLES = "batch", "sequence", "decoder_sequence", "samples"
DYNAMIC = (BATCH, SEQUENCE, DECODER_SEQUENCE, SAMPLES)
"""Symbols of the dynamic axes; another symbol in a shape names a dimension."""


@dataclass(frozen=True)
class Input:
    """One graph input: `kind` is ids, mask, pixels or floats; `shape` mixes sizes and the symbols of dynamic axes.

    below: ids are drawn below this.
    """

    kind: str
    shape: tuple[str | int, ...]
    below: int = 0


@dataclass(frozen=True)
class Family:
    """A family: `make()` returns the framework's model, tiny and with random weights.

    outputs: fields of the model's output -> shape with symbols for the dynamic axes.
    extra: further arguments of the model's `forward`.
    seed, gain: of the random weights, see `perturb`.
    """

    name: str
    make: Callable[[], torch.nn.Module]
    inputs: Mapping[str, Input]
    outputs: Mapping[str, tuple[str | int, ...]]
    layout: Layout
    extra: Mapping[str, object] = field(default_factory=lambda: {"use_cache": False})
    seed: int = 0
    gain: float = 1.5

    def build(self, seed: int | None = None) -> torch.nn.Module:
        """Return the model in eval mode, with seeded weights; `forward(*inputs)` returns a tuple of plain tensors."""
        torch.manual_seed(self.seed if seed is None else seed)
        model = self.make()
        perturb(model, gain=self.gain)
        return plain(model.eval(), tuple(self.inputs), tuple(self.outputs), self.extra)


@torch.no_grad()
def perturb(model: torch.nn.Module, spread: float = 0.3, gain: float = 1.5) -> None:
    """Make every weight matter: fresh models hold constants and matrices so small that attention hardly acts.

    spread: deviation of the noise on whatever starts constant or as equal rows (norms, biases, tokens): permutations
        become visible, and exporters do not merge equal weights of different blocks.
    gain: matrices are scaled up to a deviation of gain / sqrt(fan-in), where they are below it.
    """
    for parameter in model.parameters():
        repeated = parameter.dim() > 1 and parameter.shape[0] > 1 and bool((parameter == parameter[:1]).all())
        if parameter.dim() < 2 or repeated or bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(spread * torch.randn_like(parameter))
        else:
            wanted = gain / (parameter[0].numel() if parameter.shape[0] > 1 else parameter.shape[-1]) ** 0.5
            parameter.mul_(max(1.0, float(wanted / parameter.std())))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(spread * torch.randn_like(buffer))
        if name.endswith("running_var"):
            buffer.add_(spread * torch.rand_like(buffer))


def plain(
    model: torch.nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...], extra: Mapping[str, object]
) -> torch.nn.Module:
    """Make `forward` take `inputs` in order and return a tuple of tensors, without renaming a single parameter."""

    def forward(self, *tensors):
        result = self._framework_forward(**dict(zip(inputs, tensors, strict=True)), **extra)
        return tuple(result[name] for name in outputs)

    base = type(model)
    model.__class__ = type(base.__name__, (base,), {"forward": forward, "_framework_forward": base.forward})
    return model
