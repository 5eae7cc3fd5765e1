"""Values: the forms a target size may take on the command line, `384`, `encoder=6,decoder=4`, `[3072,2048,3072]`."""

import re

import click

Value = int | list[int]

ONE = r"(?:-?\d+|\[[^\[\]]*\])"
STACKED = re.compile(rf"([A-Za-z_]\w*)\.?=({ONE})(?:,|$)")


class Target(click.ParamType):
    """A target size: N, stack=N,stack=N, or [n0,n1,..] with one entry per kept block."""

    name = "V"

    def __init__(self, lists: bool = True):
        """lists: whether a list with one entry per kept block makes sense."""
        self.lists = lists

    def convert(self, value, parameter, context) -> Value | dict[str, Value]:
        try:
            return parse(value, self.lists)
        except ValueError as error:
            self.fail(str(error), parameter, context)


class Blocks(click.ParamType):
    """Kept blocks: 0,2,5, or stack=0,2,5,stack=0,1."""

    name = "0,2,5"

    def convert(self, value, parameter, context) -> list[int] | dict[str, list[int]]:
        try:
            return parse_blocks(value)
        except ValueError as error:
            self.fail(str(error), parameter, context)


def parse(text: str, lists: bool = True) -> Value | dict[str, Value]:
    """Read a target size.

    >>> parse("384"), parse("encoder=6,decoder=[4,2]"), parse("[3072, 2048]")
    (384, {'encoder': 6, 'decoder': [4, 2]}, [3072, 2048])
    """
    text = "".join(text.split())
    if "=" not in text:
        return _one(text, text, lists)
    found: dict[str, Value] = {}
    position = 0
    while position < len(text):
        part = STACKED.match(text, position)
        if part is None:
            raise ValueError(_wrong(text, lists))
        if part[1] in found:
            raise ValueError(f"'{text}' names the stack '{part[1]}' twice")
        found[part[1]] = _one(part[2], text, lists)
        position = part.end()
    return found


def parse_blocks(text: str) -> list[int] | dict[str, list[int]]:
    """Read a list of blocks.

    >>> parse_blocks("0,2,5"), parse_blocks("encoder=0,2,decoder=1")
    ([0, 2, 5], {'encoder': [0, 2], 'decoder': [1]})
    """
    items = "".join(text.split()).strip("[]").split(",")
    stacks: dict[str, list[int]] = {}
    name = ""
    for item in items:
        if "=" in item:
            name, _, item = item.partition("=")
            name = name.rstrip(".")
            if name in stacks or not name:
                raise ValueError(f"'{text}' names the stack '{name}' twice" if name else f"'{text}' names no stack")
        if not item.isdigit():
            raise ValueError(f"'{text}' is no list of blocks; write 0,2,5 or stack=0,2,5,stack=0,1")
        stacks.setdefault(name, []).append(int(item))
    if "" in stacks and len(stacks) > 1:
        raise ValueError(f"'{text}' names a stack for some blocks only; write stack=0,2,5,stack=0,1")
    return stacks[""] if "" in stacks else stacks


def _one(item: str, text: str, lists: bool) -> Value:
    if re.fullmatch(r"-?\d+", item):
        return int(item)
    if lists and re.fullmatch(r"\[-?\d+(,-?\d+)*,?\]", item):
        return [int(number) for number in re.findall(r"-?\d+", item)]
    raise ValueError(_wrong(text, lists))


def _wrong(text: str, lists: bool) -> str:
    forms = "N, or stack=N,stack=N" + (", or [n0,n1,..] with one entry per kept block" if lists else "")
    return f"'{text}' is not a size; write {forms}"
