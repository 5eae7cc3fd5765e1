"""The README speaks of what exists: files of the map, commands and their flags, public names."""

import re
from pathlib import Path

import graphclone
from graphclone.cli.group import COMMANDS, group

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_map_lists_every_module():
    section = README.split("## Map of the code")[1].split("```")[1]
    listed = set(re.findall(r"^  ([a-z_]+(?:\.py|/))", section, re.MULTILINE))
    package = ROOT / "graphclone"
    modules = {path.name for path in package.glob("*.py")} | {
        f"{path.parent.name}/" for path in package.glob("*/__init__.py")
    }
    assert listed == modules


def test_the_commands_and_flags_exist():
    lines = re.findall(r"^graphclone ([a-z]+) ([^\n#]*)", README, re.MULTILINE)
    assert lines
    for name, rest in lines:
        assert name in COMMANDS
        options = {flag for parameter in group.get_command(None, name).params for flag in parameter.opts}
        assert set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", rest)) <= options, name


def test_the_python_names_are_public():
    assert set(re.findall(r"graphclone\.([a-z_]+)\(", README)) <= set(graphclone.__all__)


def test_the_files_it_names_exist():
    for path in re.findall(r"`((?:graphclone|passes|tests|tools)/[\w/]+\.\w+)`", README):
        if "NAME" not in path:
            assert (ROOT / path).exists(), path
