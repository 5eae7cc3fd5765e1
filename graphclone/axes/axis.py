"""Axes and the equations between them: atoms, products and sums, unified with refinement.

Every axis of every tensor is an `Axis`. An atom is indivisible so far; a product is the row-major combination
of its parts (what Reshape merges: heads x head_dim); a sum is their concatenation (fused QKV, RoPE halves).
`Equations.equate` makes two axes one; an equation that cannot hold locks every atom it speaks of, which is sound:
keeping an axis whole satisfies any equation.

Sizes are vectors with one entry per probe (two runs of the shape arithmetic with other batch and sequence lengths).
An axis whose entries differ is *dynamic*: it is never cut, and that is another thing than being *locked*.
"""

from collections.abc import Iterator, Sequence

Size = tuple[int, ...]

ATOM, PRODUCT, SUM = "atom", "product", "sum"
TOO_MANY_TERMS = 64
FEW_UNITS = 8


class Axis:
    """A node of the union-find forest; read it through `find` and the functions of this module.

    Attributes: `size` (one entry per probe), `kind` (atom, product or sum), `parts` (of a composite),
    `lock` (an atom's reason not to be cut, or None), `fill` (an atom along which a generated tensor repeats itself:
    broadcasting it against a real axis makes no equation, since it may as well have size one).
    """

    __slots__ = ("fill", "kind", "link", "lock", "opaque", "parts", "size")

    def __init__(self, size: Size, kind: str = ATOM, parts: tuple["Axis", ...] = (), lock: str | None = None):
        self.size = size
        self.kind = kind
        self.parts = parts
        self.lock = lock
        self.link: Axis | None = None
        self.opaque = False
        self.fill = False

    def __repr__(self) -> str:
        return f"Axis({describe(self)})"


def find(axis: Axis) -> Axis:
    """Return the representative of an axis."""
    root = axis
    while root.link is not None:
        root = root.link
    while axis.link is not None:
        axis.link, axis = root, axis.link
    return root


def is_unit(axis: Axis) -> bool:
    """Tell whether the axis has one entry in every probe (it broadcasts, and there is nothing to cut)."""
    return axis.size.count(1) == len(axis.size)


def is_static(axis: Axis) -> bool:
    """Tell whether the size is the same in every probe."""
    return axis.size.count(axis.size[0]) == len(axis.size)


def is_fill(axis: Axis) -> bool:
    """Tell whether nothing but a generated fill has this axis so far."""
    axis = find(axis)
    return axis.fill and axis.kind == ATOM and axis.lock is None


def product(parts: Sequence[Axis]) -> Axis:
    """Return the row-major product of the parts; units vanish, a product of one is that one."""
    kept = [part for part in parts if not is_unit(part)]
    if len(kept) == 1:
        return kept[0]
    if not kept:
        return parts[0] if parts else Axis((1, 1))
    return Axis(multiply(part.size for part in kept), PRODUCT, tuple(kept))


def total(parts: Sequence[Axis]) -> Axis:
    """Return the concatenation of the parts; empty parts vanish, units keep their position."""
    kept = [part for part in parts if any(part.size)]
    if len(kept) == 1:
        return kept[0]
    if not kept:
        return parts[0]
    return Axis(tuple(map(sum, zip(*(part.size for part in kept), strict=True))), SUM, tuple(kept))


def multiply(sizes) -> Size:
    """Return the entrywise product of sizes."""
    result = None
    for size in sizes:
        result = size if result is None else tuple(a * b for a, b in zip(result, size, strict=True))
    return result if result is not None else (1, 1)


def divide(size: Size, by: Size) -> Size | None:
    """Return size / by entry by entry, or None where it does not divide."""
    if any(b == 0 or a % b for a, b in zip(size, by, strict=True)):
        return None
    return tuple(a // b for a, b in zip(size, by, strict=True))


def leaves(axis: Axis) -> Iterator[Axis]:
    """Yield the atoms an axis is made of, in order, with repetitions."""
    stack = [axis]
    while stack:
        axis = find(stack.pop())
        if axis.kind == ATOM:
            yield axis
        else:
            stack.extend(reversed(axis.parts))


def outer_parts(axis: Axis) -> tuple[Axis, ...]:
    """Return the factors of a product; the axis itself where it is none."""
    axis = find(axis)
    return tuple(find(part) for part in axis.parts) if axis.kind == PRODUCT else (axis,)


def free_leaves(axis: Axis) -> list[Axis]:
    """Return the atoms of an axis that may be cut: static, not locked, larger than one; each once."""
    seen: dict[int, Axis] = {}
    for leaf in leaves(axis):
        if leaf.lock is None and is_static(leaf) and leaf.size[0] > 1:
            seen[id(leaf)] = leaf
    return list(seen.values())


def lock(axis: Axis, reason: str) -> None:
    """Forbid cutting any atom of an axis; the first reason stays."""
    axis = find(axis)
    if axis.opaque:
        return
    for leaf in leaves(axis):
        if leaf.lock is None:
            leaf.lock = reason
    if axis.kind != ATOM and is_static(axis):
        axis.opaque = True


def first_lock(axis: Axis) -> str | None:
    """Return the reason of the first locked atom larger than one, or None."""
    return next((leaf.lock for leaf in leaves(axis) if leaf.lock and not is_unit(leaf)), None)


def terms(axis: Axis) -> list[tuple[Axis, ...]]:
    """Return the normal form: a sum of terms, each a list of factors of which the first is never a sum.

    (x + y) * r == x * r + y * r holds in row-major order, so a leading sum distributes; x * (y + z) does not.
    """
    axis = find(axis)
    if axis.kind == ATOM:
        return [(axis,)]
    if axis.kind == SUM:
        return [term for part in axis.parts for term in terms(part)]
    factors = _factors(axis)
    rest = tuple(factors[1:])
    return [tuple(f for f in term if not is_unit(f)) + rest for term in terms(factors[0])]


def _factors(axis: Axis) -> list[Axis]:
    axis = find(axis)
    if axis.kind != PRODUCT:
        return [axis]
    return [factor for part in axis.parts for factor in _factors(part) if not is_unit(factor)]


def _is_opaque(axis: Axis) -> bool:
    """Tell whether nothing of a composite can be cut, so that its structure need not be looked at.

    A few units in a row are looked at: where one of queries, keys and values is picked, so are the others.
    """
    if axis.kind == ATOM:
        return False
    if not axis.opaque and is_static(axis):
        kept = all(leaf.lock is not None or is_unit(leaf) for leaf in leaves(axis))
        axis.opaque = kept and (axis.size[0] > FEW_UNITS or not all(is_unit(leaf) for leaf in leaves(axis)))
    return axis.opaque


class Equations:
    """Unification with refinement; `why` names the node whose equation is being added, for the locks it causes.

    `conflicts` collects the pairs of dynamic sizes that equations asked to be one: an exporter that names the batch of
    each input apart says less than its graph does.
    """

    def __init__(self) -> None:
        self.why = ""
        self.conflicts: list[tuple[Size, Size]] = []
        self._version = 0

    def equate(self, a: Axis, b: Axis) -> None:
        """Make two axes one, refining either where the other has more structure; lock both where that fails."""
        a, b = find(a), find(b)
        if a is b:
            return
        if a.size != b.size:
            self._note_conflict(a, b)
            self._give_up(a, b)
            return
        if is_unit(a):
            return
        if _is_opaque(a) or _is_opaque(b):
            reason = first_lock(a) or first_lock(b) or self.why
            lock(a, reason)
            lock(b, reason)
            if a.kind == ATOM:
                self._bind(a, b)
            elif b.kind == ATOM:
                self._bind(b, a)
            elif first_lock(b):  # kept whole, both: how they are built no longer matters, and must not be asked again
                a.link = b
        elif a.kind == ATOM:
            self._bind(a, b)
        elif b.kind == ATOM:
            self._bind(b, a)
        else:
            self._match(a, b)

    def _note_conflict(self, a: Axis, b: Axis) -> None:
        """Note the dynamic sizes that would have to be one, also where each is joined with equally many heads."""
        parts = [[factor for factor in _factors(axis) if not is_static(factor)] for axis in (a, b)]
        if all(len(part) == 1 for part in parts):
            (one,), (other,) = parts
            beside = divide(a.size, one.size)
            if one.kind == other.kind == ATOM and beside is not None and beside == divide(b.size, other.size):
                self.conflicts.append((one.size, other.size))

    def _bind(self, atom: Axis, other: Axis) -> None:
        if atom.lock is not None:
            lock(other, atom.lock)
        elif other.kind == ATOM and other.lock is not None:
            atom.lock = other.lock
        other.fill &= atom.fill
        atom.link = other
        self._version += 1

    def _match(self, a: Axis, b: Axis) -> None:
        while True:
            ours, theirs = terms(a), terms(b)
            if len(ours) > TOO_MANY_TERMS or len(theirs) > TOO_MANY_TERMS:
                return self._give_up(a, b)
            version = self._version
            if len(ours) == len(theirs) == 1:
                fits = self._match_factors(ours[0], theirs[0])
            else:
                fits = self._match_terms(ours, theirs)
            if not fits:
                return self._give_up(a, b)
            if self._version == version:
                a, b = find(a), find(b)
                if a is not b:
                    a.link = b
                return None

    def _match_factors(self, ours: tuple[Axis, ...], theirs: tuple[Axis, ...]) -> bool:
        left, right = list(ours), list(theirs)
        version = self._version
        while left and right:
            p, q = find(left.pop()), find(right.pop())
            if p.size == q.size:
                self.equate(p, q)
            elif quotient := divide(p.size, q.size):
                fresh = Axis(quotient)
                self.equate(p, product((fresh, q)))
                left.append(fresh)
            elif quotient := divide(q.size, p.size):
                fresh = Axis(quotient)
                self.equate(q, product((fresh, p)))
                right.append(fresh)
            else:
                return False
            if self._version != version:
                return True
        return all(is_unit(axis) for axis in left + right)

    def _match_terms(self, ours: list[tuple[Axis, ...]], theirs: list[tuple[Axis, ...]]) -> bool:
        version = self._version
        for mine, yours in zip(ours, theirs, strict=False):
            my_size, your_size = multiply(f.size for f in mine), multiply(f.size for f in yours)
            if my_size == your_size:
                if not self._match_factors(mine, yours):
                    return False
            else:
                larger, smaller = (mine, your_size) if my_size[0] > your_size[0] else (yours, my_size)
                if not self._split_first(larger, smaller):
                    return False
            if self._version != version:
                return True
        return len(ours) == len(theirs)

    def _split_first(self, term: tuple[Axis, ...], size: Size) -> bool:
        """Refine the first factor of a term into a sum whose first part makes up `size`."""
        first, rest = find(term[0]), term[1:]
        head = divide(size, multiply(f.size for f in rest)) if rest else size
        if head is None or first.kind != ATOM or not is_static(first) or not 0 < head[0] < first.size[0]:
            return False
        tail = tuple(a - b for a, b in zip(first.size, head, strict=True))
        self.equate(first, total((Axis(head), Axis(tail))))
        return True

    def _give_up(self, a: Axis, b: Axis) -> None:
        lock(a, self.why)
        lock(b, self.why)


def describe(axis: Axis, names: dict[int, str] | None = None) -> str:
    """Return an axis in the notation of signatures: `48`, `(3 16)`, `(8 + 8)`, `?` for dynamic.

    Example:
        >>> describe(product((Axis((3, 3)), total((Axis((8, 8)), Axis((8, 8)))))))
        '(3 (8 + 8))'
    """
    axis = find(axis)
    if names and id(axis) in names:
        return names[id(axis)]
    if axis.kind == ATOM:
        return str(axis.size[0]) if is_static(axis) else "?"
    joint = " " if axis.kind == PRODUCT else " + "
    return "(" + joint.join(describe(part, names) for part in axis.parts) + ")"
