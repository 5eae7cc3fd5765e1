"""A width that a plan may name."""

from dataclasses import dataclass

from graphclone.axes.axis import Axis


@dataclass(frozen=True, slots=True)
class Dimension:
    """A width that a plan may name.

    name: as `blocks.3.ffn`. size: how many indices it has. role: hidden, heads, kv_heads, queries_per_kv, head_dim,
    v_head_dim, ffn, experts, vocab or free. axes: what it is in the graph (more than one where the name speaks of
    several, as `vocab` does of the embedding and of an untied head). aliases: other accepted names. locked: why it
    cannot be cut, or None. stack: the prefix of its stack. blocks: the parent's blocks it spans.
    weights: how many initializers carry it. minimum: the least size the graph admits. step: what every size it can have
    is a multiple of.
    """

    name: str
    size: int
    role: str
    axes: tuple[Axis, ...]
    aliases: tuple[str, ...] = ()
    locked: str | None = None
    stack: str = ""
    blocks: tuple[int, ...] = ()
    weights: int = 0
    minimum: int = 1
    step: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)
