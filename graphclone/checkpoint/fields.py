"""Walk a config: its fields, and the sections that speak of one stack each."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

SECTIONS = ("text", "vision", "encoder", "decoder", "audio")


@dataclass(frozen=True)
class Field:
    """A field of the config: the dictionary that holds it, its key, the path that messages show, its section."""

    holder: dict
    key: str
    path: str
    section: str


def fields(config: dict, path: str = "", section: str = "") -> Iterator[Field]:
    """Yield the fields of a config and of its nested sections.

    Example:
        >>> [(each.path, each.section) for each in fields({"dim": 4, "text_config": {"dim": 3}})]
        [('dim', ''), ('text_config.dim', 'text')]
    """
    for key, value in list(config.items()):
        if isinstance(value, dict):
            yield from fields(value, f"{path}{key}.", _section(key) or section)
        else:
            yield Field(config, key, f"{path}{key}", section)


def sections(config: dict, defaults: Mapping, section: str = "") -> Iterator[tuple[dict, Mapping, str]]:
    """Yield (section's config, the same with its class's defaults, its name); a config without any is one itself."""
    nested = [key for key, value in config.items() if isinstance(value, dict) and _section(key)]
    if not nested:
        yield config, defaults, section
    for key in nested:
        below = defaults.get(key)
        yield from sections(config[key], below if isinstance(below, Mapping) else {}, _section(key))


def _section(key: str) -> str:
    return next((word for word in SECTIONS if key.startswith(word)), "")
