"""List the families; each file of this folder holds the ones that look alike."""

from zoo.families import decoders, dual, encoders, experts, others, seq2seq, vision
from zoo.family import Family

FAMILIES: dict[str, Family] = {
    each.name: each
    for module in (decoders, experts, encoders, seq2seq, vision, dual, others)
    for each in module.FAMILIES
}

VARIATIONS: dict[str, Family] = {each.name: each for each in (*decoders.ROTATIONS, decoders.CAPPED, seq2seq.T5_APART)}
"""Families but for a setting: `family` knows them, the survey does not."""


def family(name: str) -> Family:
    """Return the family called `name`."""
    known = FAMILIES | VARIATIONS
    if name not in known:
        raise KeyError(f"no family is called {name!r}; there are {', '.join(known)}")
    return known[name]
