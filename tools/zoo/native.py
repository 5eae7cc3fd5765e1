"""Build the framework's own smaller model, the reference that an engine's child is compared with.

The parent's module is sliced in place, by the family's layout: a smaller config could not express a hidden size that is
no multiple of the heads, unequal blocks, or a constant that keeps the parent's value.
"""

import copy
import fnmatch
import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from zoo.cut import Cut
from zoo.families import family
from zoo.layout import Layout, Stack, candidates, parse

Blocks = Sequence[int] | Mapping[str, Sequence[int]] | None


def native(
    name: str,
    keep: Mapping[str, Sequence[int]] | None = None,
    blocks: Blocks = None,
    drop: Sequence[str] = (),
    *,
    seed: int | None = None,
    native_scales: bool = False,
) -> nn.Module:
    """Return the family's model cut by a plan; `forward(*inputs)` returns a tuple of tensors.

    name: family.
    keep: dimension name -> kept indices, in the child's order.
    blocks: kept blocks, or stack name -> kept blocks.
    drop: half-blocks to bypass, in the parent's numbering (`"blocks.3.attention"`).
    seed: of the weights; None takes the family's own.
    native_scales: attention, embedding and logit scales are those of the new sizes, as a fresh module would compute
        them; otherwise the parent's values stay.

    >>> native("gpt2", {"hidden": range(32), "blocks.*.heads": [2, 0]}, blocks=[0, 4]).transformer.wte.weight.shape
    torch.Size([211, 32])
    """
    given = family(name)
    return cut_model(given.build(seed), given.layout, keep or {}, blocks, drop, native_scales)


@torch.no_grad()
def cut_model(
    model: nn.Module,
    layout: Layout,
    keep: Mapping[str, Sequence[int]],
    blocks: Blocks = None,
    drop: Sequence[str] = (),
    native_scales: bool = False,
) -> nn.Module:
    """Cut a model in place and return it; arguments as in `native`."""
    cut = Cut(layout, keep)
    if layout.before:
        layout.before(model)
    _mask_values(model, layout, cut)
    _slice(model, layout, cut)
    for module in model.modules():
        _fit(module)
    _set_attributes(model, layout, cut, native_scales)
    if native_scales:
        _set_scales(model, layout, cut)
    if layout.after:
        layout.after(model, cut)
    if cut.unused():
        raise ValueError(f"no symbol of the layout answers to {', '.join(cut.unused())}")
    for half in drop:
        _bypass(model, layout, half)
    for stack in layout.stacks:
        _keep_blocks(model, stack, _chosen(blocks, stack))
    return model


def places(model: nn.Module, layout: Layout) -> Iterator[tuple[str, Mapping[str, str], Mapping, str, int | None]]:
    """Yield each scope of a model: module path with its dot, rows, attributes, prefix, block number."""
    for stack in layout.stacks:
        for position in range(len(model.get_submodule(stack.blocks))):
            path = f"{stack.blocks}.{position}."
            number = "*" if stack.shared else position + stack.start
            yield path, stack.rows, stack.attributes, stack.prefix, number
    yield "", layout.rows, layout.attributes, "", None


def _mask_values(model: nn.Module, layout: Layout, cut: Cut) -> None:
    """Cut values narrower than queries by zeroing what the output projection reads of them: modules know one width."""
    for stack in layout.stacks:
        for position, module in enumerate(model.get_submodule(stack.blocks)):
            for kind, name in (("attention", "head_dim"), ("cross_attention", "cross_head_dim")):
                block = position + stack.start
                value = next((each for each in candidates(_value(name), stack.prefix, block) if each in cut.keep), None)
                if value is None:
                    continue
                path = stack.halves[kind].split(";")[0].split()[1]
                _mask(module.get_submodule(path).weight, path, stack, block, cut, name, value)
                cut.used.add(value)


def _value(name: str) -> str:
    return name.replace("head_dim", "v_head_dim")


def _mask(weight: nn.Parameter, path: str, stack: Stack, block: int, cut: Cut, name: str, value: str) -> None:
    def full(symbol):
        return cut.full(symbol, stack.prefix, block)

    if len(cut.kept(name, stack.prefix, block)) != full(name):
        raise ValueError(f"cannot cut both {name} and {value} of block {block} in the framework's module")
    pattern = next(stack.rows[glob] for glob in stack.rows if fnmatch.fnmatchcase(f"{path}.weight", glob))
    axes = parse(pattern)
    position = next(at for at, axis in enumerate(axes) if name in str(axis))
    kept = axes[position].kept(
        full, lambda symbol: np.asarray(cut.keep[value]) if symbol == name else np.arange(full(symbol))
    )
    mask = torch.zeros(weight.shape[position])
    mask[kept] = 1
    weight.mul_(mask[None, :] if position else mask[:, None])


def _slice(model: nn.Module, layout: Layout, cut: Cut) -> None:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    scopes = list(places(model, layout))
    for name, tensor in tensors.items():
        if not tensor.dim() or not (tensor.is_floating_point() or isinstance(tensor, nn.Parameter)):
            continue
        path, rows, _, prefix, block = next(scope for scope in scopes if name.startswith(scope[0]))
        pattern = next((rows[glob] for glob in rows if fnmatch.fnmatchcase(name[len(path) :], glob)), None)
        if pattern is None:
            raise KeyError(f"no row of the layout says what the axes of {name} {tuple(tensor.shape)} are")
        tensor.data = _taken(tensor.data, name, pattern, cut, prefix, block)


def _taken(data: torch.Tensor, name: str, pattern: str, cut: Cut, prefix: str, block: int | None) -> torch.Tensor:
    axes = parse(pattern)
    if len(axes) != data.dim():
        raise ValueError(f"{name} {tuple(data.shape)} has not the axes {pattern!r}")
    full = functools.partial(cut.full, prefix=prefix, block=block)
    kept = functools.partial(cut.kept, prefix=prefix, block=block)
    for position, axis in enumerate(axes):
        if axis is None:
            continue
        if axis.size(full) != data.shape[position]:
            raise ValueError(
                f"axis {position} of {name} has {data.shape[position]}, {pattern!r} says {axis.size(full)}"
            )
        index = axis.kept(full, kept)
        if not np.array_equal(index, np.arange(data.shape[position])):
            data = data.index_select(position, torch.from_numpy(index))
    return data.contiguous()


def _fit(module: nn.Module) -> None:
    """Let the sizes that torch's own layers keep beside their weights follow the weights."""
    match module:
        case nn.Linear():
            module.out_features, module.in_features = module.weight.shape
        case nn.Embedding():
            module.num_embeddings, module.embedding_dim = module.weight.shape
        case nn.LayerNorm():
            module.normalized_shape = tuple(module.weight.shape)
        case nn.GroupNorm():
            if module.num_groups == module.num_channels:
                module.num_groups = module.weight.shape[0]
            module.num_channels = module.weight.shape[0]
        case nn.BatchNorm2d():
            module.num_features = module.weight.shape[0]
        case nn.Conv1d() | nn.Conv2d():
            if module.groups > 1 and module.weight.shape[1] == 1:
                module.groups = module.weight.shape[0]
            module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
        case _ if type(module).__name__ == "Conv1D":  # transformers' transposed Linear
            module.nx, module.nf = module.weight.shape


_HEAD_SCALES = ("scaling", "scale", "inv_norm_factor", "norm_factor")
_WIDTH_SCALES = ("embed_scale", "scalar_embed_scale")


def _set_scales(model: nn.Module, layout: Layout, cut: Cut) -> None:
    """Give scaling attributes the value of the new size where they have that of the parent's."""
    for path, _, _, prefix, block in places(model, layout):
        for name, module in model.named_modules():
            if block is not None and name.startswith(path):
                for symbol in ("head_dim", "cross_head_dim"):
                    _rescale(module, _HEAD_SCALES, cut, symbol, prefix, block)
            elif block is None:
                _rescale(module, _WIDTH_SCALES, cut, "hidden", prefix, block)
                if type(module).__name__.startswith(("T5", "MT5")) and hasattr(module, "model_dim"):
                    module.model_dim = len(cut.kept("hidden"))


def _rescale(module: nn.Module, names: Sequence[str], cut: Cut, symbol: str, prefix: str, block) -> None:
    try:
        old, new = cut.full(symbol, prefix, block), len(cut.kept(symbol, prefix, block))
    except KeyError:
        return
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            for power in (0.5, -0.5):
                if abs(value.item() / old**power - 1) < 1e-5:
                    value.fill_(new**power)
        elif isinstance(value, float):
            power = next((p for p in (0.5, -0.5) if abs(value / old**p - 1) < 1e-5), 0)
            if power:
                setattr(module, name, new**power)


def _set_attributes(model: nn.Module, layout: Layout, cut: Cut, native_scales: bool = False) -> None:
    modules = dict(model.named_modules())
    for path, _, attributes, prefix, block in places(model, layout):
        for glob, settings in attributes.items():
            found = [modules[name] for name in modules if fnmatch.fnmatchcase(name, path + glob) or name == path + glob]
            kept = {k: v for k, v in settings.items() if k != "scaled_rows" or not native_scales}
            for module in found:
                _set(module, kept, _Sizes(cut, prefix, block))


class _Sizes(dict):
    """Look up kept sizes by symbol, and the parent's as `full_NAME`, for an attribute's expression."""

    def __init__(self, cut: Cut, prefix: str, block: int | None) -> None:
        super().__init__()
        self.cut, self.place = cut, (prefix, block)

    def __missing__(self, key: str) -> int:
        if key.startswith("full_"):
            return self.cut.full(key.removeprefix("full_"), *self.place)
        return len(self.cut.kept(key, *self.place))


def _set(module: nn.Module, settings: Mapping[str, str], sizes: _Sizes) -> None:
    for attribute, expression in settings.items():
        value = eval(expression, {"__builtins__": {}}, sizes)
        if attribute == "scaled_rows":
            rows, factor = value
            for parameter in module.parameters():
                parameter[:rows].mul_(factor)
        elif attribute.startswith("config."):
            if "config" not in vars(module) or not getattr(module, "_own_config", False):
                module.config, module._own_config = copy.copy(module.config), True
            setattr(module.config, attribute.removeprefix("config."), value)
        else:
            if not hasattr(module, attribute):
                raise AttributeError(f"{type(module).__name__} has no attribute {attribute!r} to set")
            setattr(module, attribute, value)


def _bypass(model: nn.Module, layout: Layout, half: str) -> None:
    for stack in layout.stacks:
        head = f"{stack.prefix}blocks."
        if not half.startswith(head):
            continue
        number, kind = half.removeprefix(head).split(".", 1)
        position = int(number) - stack.start
        if not 0 <= position < len(model.get_submodule(stack.blocks)) or kind not in stack.halves:
            continue
        block = model.get_submodule(stack.blocks)[position]
        for step in stack.halves[kind].split(";"):
            verb, path = step.split()
            if verb == "identity":
                block.set_submodule(path, nn.Identity())
            else:
                owner = block.get_submodule(path.rpartition(".")[0])
                target = getattr(owner, path.rpartition(".")[2])
                for parameter in [target] if isinstance(target, nn.Parameter) else target.parameters():
                    parameter.zero_()
        return
    raise ValueError(f"the layout cannot bypass {half!r}")


def _chosen(blocks: Blocks, stack: Stack) -> Sequence[int] | None:
    if isinstance(blocks, Mapping):
        return blocks.get(stack.prefix.rstrip("."))
    return blocks


def _keep_blocks(model: nn.Module, stack: Stack, chosen: Sequence[int] | None) -> None:
    if chosen is None:
        return
    module = model.get_submodule(stack.blocks)
    size = stack.shared or len(module)
    local = [number - stack.start for number in chosen if 0 <= number - stack.start < size]
    if not stack.shared:
        for path in stack.first:
            parent, _, leaf = path.rpartition(".")
            owner = module[local[0]].get_submodule(parent)
            setattr(owner, leaf, module[0].get_submodule(path))
            setattr(owner, f"has_{leaf}", True)
        model.set_submodule(stack.blocks, nn.ModuleList([module[number] for number in local]))
    for place in stack.depth:
        path, _, attribute = place.rpartition(":")
        owner = model.get_submodule(path) if path else model
        *parents, attribute = attribute.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        value = getattr(owner, attribute, None)
        if isinstance(getattr(type(owner), attribute, None), property):
            continue
        if isinstance(value, list | tuple):
            setattr(owner, attribute, [value[number] for number in local])
        elif value is not None:
            setattr(owner, attribute, len(local))
