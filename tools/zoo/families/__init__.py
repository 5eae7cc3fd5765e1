"""List the families; each file of this folder holds the ones that look alike."""

from zoo.families import decoders, encoders, vision
from zoo.family import Family

FAMILIES: dict[str, Family] = {
    each.name: each for module in (decoders, encoders, vision) for each in module.FAMILIES
}


def family(name: str) -> Family:
    """Return the family called `name`."""
    if name not in FAMILIES:
        raise KeyError(f"no family is called {name!r}; there are {', '.join(FAMILIES)}")
    return FAMILIES[name]
