"""List the families; each file of this folder holds the ones that look alike."""

from zoo.families import decoders, dual, encoders, experts, others, seq2seq, vision
from zoo.family import Family

FAMILIES: dict[str, Family] = {
    each.name: each
    for module in (decoders, experts, encoders, seq2seq, vision, dual, others)
    for each in module.FAMILIES
}


def family(name: str) -> Family:
    """Return the family called `name`."""
    if name not in FAMILIES:
        raise KeyError(f"no family is called {name!r}; there are {', '.join(FAMILIES)}")
    return FAMILIES[name]
