"""Axis rules of operators that make tensors from sizes, and of those that read sizes."""

import numpy as np

from graphclone.axes.registry import Store, Typing, letters, rule
from graphclone.op import Op


def constant_of_shape(op: Op) -> Typing | None:
    """A fill of the listed sizes; every axis is new."""
    value = op.value(0)
    if value is None or len({entry.size for entry in value}) != 1:
        return None
    names = letters(value[0].size, "n")
    sizes = {name: tuple(int(entry[i]) for entry in value) for i, name in enumerate(names)}
    return Typing(f". -> {' '.join(names)}", sizes, (Store(0, " ".join(names)),), fills=tuple(names))


def range_(op: Op) -> Typing | None:
    """Consecutive numbers: a cut selects the positions that stay."""
    values = [op.value(slot) for slot in range(3)]
    if any(value is None for value in values):
        return None
    sizes = tuple(
        max(0, int(np.ceil((limit.item() - start.item()) / delta.item())))
        for start, limit, delta in zip(*values, strict=True)
    )
    return Typing("., ., . -> n", {"n": sizes}, (Store("", "n", "select"),))


def shape(op: Op) -> Typing:
    """The sizes as a vector, whose length is fixed; surgery keeps what it reports (freeze the sources)."""
    names = letters(op.rank(0))[op.attribute("start", 0) : op.attribute("end", None)]
    return Typing(". -> r", {"r": (len(names),)}, fixed=("r",))


def eye_like(op: Op) -> Typing:
    return Typing("_ _ -> p q", {"p": op.sizes(0)[0], "q": op.sizes(0)[1]}, fixed=("p", "q"))


def random_of_shape(op: Op) -> Typing:
    """Noise of the shape an attribute lists."""
    listed = [int(entry) for entry in op.attribute("shape")]
    names = letters(len(listed), "n")
    return Typing(
        f"-> {' '.join(names)}",
        {n: (s,) for n, s in zip(names, listed, strict=True)},
        (Store("shape", " ".join(names)),),
    )


rule("ConstantOfShape", constant_of_shape)
rule("Range", range_)
rule("Shape", shape)
rule("Size", ". -> ")
rule("EyeLike", eye_like)
rule(["RandomNormal", "RandomUniform"], random_of_shape)
