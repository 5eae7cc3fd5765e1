"""Say in a config which frequencies of rotary positions stay.

A class computes base ** (-2i / n). Kept entries that are such a series again need another base; any others are the
usual series over a list of factors, which transformers calls `longrope` (arXiv 2402.13753).
"""

import copy
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from graphclone.axes.tables import Table
from graphclone.cut import Cut

BASE = re.compile(r"theta|base|rope|rotary")
TOLERANCE = 1e-3
EXACT = 1e-6
FAR = 1 << 30
"""More positions than any model has: the short and the long list of factors are one."""


def rewrite_frequencies(config: Mapping, tables: Sequence[Table], cut: Cut) -> tuple[dict, list[str]]:
    """Return a config that gives the kept entries of RoPE tables, and the names of the tables it speaks of.

    Example:
        config, said = rewrite_frequencies({"rope_theta": 1e4}, list(refused_tables(typing, cut)), cut)
    """
    config = copy.deepcopy(dict(config))
    places = list(_places(config))
    said = []
    for table in tables:
        before = _once(table.entries)
        after = _once(table.entries[cut.picks(table.axis)])
        if table.kind == "slopes" or before is None or after is None or len(before) < 2:
            continue
        base = (before[1] / before[0]) ** -len(before)
        fitting = [(holder, key, path) for holder, key, path in places if abs(holder[key] / base - 1) < TOLERANCE]
        fitting = _named(fitting, table.name)
        if abs(before[0] - 1) > EXACT or not _series(before, base) or not fitting:
            continue
        for holder, key, _ in fitting:
            _say(holder, key, base, after)
        said.append(table.name)
    return config, said


def _say(holder: dict, key: str, base: float, after: np.ndarray) -> None:
    fresh = (after[1] / after[0]) ** -len(after) if len(after) > 1 else base
    if abs(after[0] - 1) < EXACT and _series(after, fresh):
        holder[key] = float(fresh)
        return
    factors = (1 / (after * base ** (np.arange(len(after)) / len(after)))).tolist()
    scaling = {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": FAR,
    }
    inside = holder if "rope_type" in holder else holder.setdefault("rope_scaling", {}) or {}
    inside.update(scaling)
    if inside is not holder:
        holder["rope_scaling"] = inside


def _once(entries: np.ndarray) -> np.ndarray | None:
    """Return entries without their repetition (two halves, or pairs); None where they are no frequencies."""
    if not np.all(np.isfinite(entries)) or np.any(entries <= 0):
        return None
    half = len(entries) // 2
    for repeated in ((entries[:half], entries[half:]), (entries[::2], entries[1::2])):
        if len(entries) % 2 == 0 and np.allclose(*repeated, rtol=EXACT, atol=0):
            return np.asarray(repeated[0], np.float64)
    return np.asarray(entries, np.float64)


def _series(entries: np.ndarray, base: float) -> bool:
    return bool(np.allclose(entries, base ** (-np.arange(len(entries)) / len(entries)), rtol=1e-5, atol=0))


def _places(config: dict, path: str = "") -> Iterator[tuple[dict, str, str]]:
    """Yield the numbers that may be a base: the dictionary, the key, the path."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _places(value, f"{path}{key}.")
        elif BASE.search(key) and isinstance(value, int | float) and not isinstance(value, bool) and value > 1:
            yield config, key, f"{path}{key}"


def _named(places: list[tuple[dict, str, str]], table: str) -> list[tuple[dict, str, str]]:
    """Return the places whose path is most like a table's name, where there are several."""

    def likeness(place: tuple[dict, str, str]) -> int:
        same = difflib.SequenceMatcher(None, place[2], table, autojunk=False).find_longest_match()
        return same.size

    best = max(map(likeness, places), default=0)
    return [place for place in places if likeness(place) == best]
