"""Resolve a plan's names against a family's layout: which indices of which symbol stay, in which block."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from zoo.layout import Layout, candidates


@dataclass
class Cut:
    """Kept indices by dimension name, as a plan gives them; `used` collects the names that were looked up."""

    layout: Layout
    keep: Mapping[str, Sequence[int]]
    used: set[str] = field(default_factory=set)

    def full(self, symbol: str, prefix: str = "", block: int | None = None) -> int:
        """Return the parent's size of a symbol."""
        place, _, tail = symbol.rpartition(".")
        if tail in self.layout.derived:
            source, _, size = self.layout.derived[tail]
            return size(self.full(f"{place}.{source}" if place else source, prefix, block))
        for name in candidates(symbol, prefix, block):
            if name in self.layout.sizes:
                return self.layout.sizes[name]
        raise KeyError(f"the layout has no size for {symbol!r} ({prefix}blocks.{block})")

    def kept(self, symbol: str, prefix: str = "", block: int | None = None) -> np.ndarray:
        """Return the kept indices of a symbol, int64, all of them where the plan says nothing."""
        full = self.full(symbol, prefix, block)
        place, _, tail = symbol.rpartition(".")
        if tail in self.layout.derived:
            source, index, _ = self.layout.derived[tail]
            source = f"{place}.{source}" if place else source
            return index(self.kept(source, prefix, block), self.full(source, prefix, block))
        for name in candidates(symbol, prefix, block):
            if name in self.keep:
                self.used.add(name)
                return np.asarray(self.keep[name], np.int64)
        aliases = [name for name in self.keep if self._same(symbol, name, prefix, block)]
        if aliases:
            self.used.update(aliases)
            return np.asarray(self.keep[aliases[0]], np.int64)
        return np.arange(full)

    def _same(self, symbol: str, name: str, prefix: str, block: int | None) -> bool:
        """Say whether a plan's name is another block's name of the same, coupled dimension."""
        *place, tail = name.split(".")
        *given, symbol = symbol.split(".")
        if tail != symbol:
            return False
        if symbol in self.layout.block_groups:
            number = int(given[-1]) if given else block
            group = next(group for group in self.layout.block_groups[symbol] if number in group)
            return bool(place) and place[-1] in {*map(str, group), "*"}
        if symbol in self.layout.stack_coupled:
            return name.startswith(f"{prefix}blocks.")
        return symbol in self.layout.coupled

    def unused(self) -> list[str]:
        """List the plan's names that no symbol asked for: a typing error, or an alias of a coupled dimension."""
        every = {*self.layout.coupled, *self.layout.stack_coupled, *self.layout.block_groups}
        return [name for name in self.keep if name not in self.used and name.split(".")[-1] not in every]
