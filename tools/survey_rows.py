"""Judge rows one after the other and keep them as lines of JSON, so that a survey goes on where it was stopped."""

import argparse
import fnmatch
import json
from collections.abc import Callable, Sequence
from pathlib import Path


def known(cache: Path) -> dict[str, dict]:
    """Return the cached rows; of several of one name the last counts, and one without a date adds to what there is."""
    found: dict[str, dict] = {}
    for row in map(json.loads, cache.read_text().splitlines() if cache.exists() else []):
        found[row["row"]] = row if "date" in row else found.get(row["row"], {}) | row
    return {name: row for name, row in found.items() if "date" in row}


def arguments(description: str, cache: Path) -> argparse.ArgumentParser:
    """Return a parser of what both surveys take: patterns of rows, `--cache`, `--again`, `--page`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", metavar="PATTERN")
    parser.add_argument("--cache", type=Path, default=cache)
    parser.add_argument("--again", action="store_true", help="judge rows that the cache holds once more")
    parser.add_argument("--page", action="store_true", help="judge nothing, write the page")
    return parser


def judged(
    names: Sequence[str], given: argparse.Namespace, judge: Callable[[str], dict], line: Callable[[dict], str]
) -> list[dict]:
    """Judge the rows that were asked for and are not known; return all that are known, in the order of their names."""
    done = known(given.cache)
    for name in () if given.page else names:
        asked = not given.patterns or any(fnmatch.fnmatch(name, pattern) for pattern in given.patterns)
        if asked and (given.again or name not in done):
            done[name] = judge(name)
            with given.cache.open("a") as file:
                file.write(json.dumps(done[name]) + "\n")
            print(line(done[name]), flush=True)
    return [done[name] for name in names if name in done]


def write_page(path: Path, text: str) -> None:
    """Write a page, and its folder where there is none."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
