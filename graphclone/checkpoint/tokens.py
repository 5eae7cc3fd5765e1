"""Tell which tokens a cut vocabulary keeps: to whoever tokenizes, and to the fields of a config that name them."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from graphclone.analysis import Analysis
from graphclone.checkpoint.folders import write_json
from graphclone.cut import Cut
from graphclone.errors import CutError

TABLE = "vocabulary.json"
NAMING = re.compile(r"token_(ids?|index)$|forced_decoder_ids$")
"""Fields whose tokens a model needs."""
LISTING = re.compile(r"suppress_tokens$|bad_words_ids$|_to_id$")
"""Fields that speak of tokens which may as well be gone: the entry of a cut one goes with it."""


@dataclass(frozen=True)
class Tokens:
    """What is left of a vocabulary of `size`: the parent's id of each of the child's."""

    kept: tuple[int, ...]
    size: int


def kept_tokens(analysis: Analysis, cut: Cut) -> Tokens | None:
    """Return the tokens that a cut keeps, None where it keeps them all.

    Example:
        kept_tokens(analysis, resolve(Plan(keep={"vocab": (0, 1, 5)}), analysis)).kept  # (0, 1, 5)
    """
    vocabulary = analysis.dimension("vocab")
    picks = None if vocabulary is None else cut.picks(vocabulary.axes[0])
    return None if picks is None else Tokens(tuple(map(int, picks)), vocabulary.size)


def with_new_tokens(config: Mapping, tokens: Tokens, file: str = "config.json") -> dict:
    """Return a config whose token ids are those after a cut of the vocabulary.

    Ids that were never in the vocabulary stay, as -1 does.
    Raises: CutError that names the field of a token that was cut.

    Example:
        >>> with_new_tokens({"eos_token_id": 7, "pad_token_id": -1, "n_head": 7}, Tokens((0, 5, 7), 9))
        {'eos_token_id': 2, 'pad_token_id': -1, 'n_head': 7}
    """
    return {key: _renumbered(key, value, tokens, file) for key, value in config.items()}


def write_tokens(folder: Path, tokens: Tokens) -> None:
    """Tell in a folder which of the tokenizer's ids are left: entry i is what the child's id i was."""
    (folder / TABLE).write_text(json.dumps({"kept_token_ids": tokens.kept}) + "\n", encoding="utf-8")
    generation = folder / "generation_config.json"
    if generation.is_file():
        new = with_new_tokens(json.loads(generation.read_text(encoding="utf-8")), tokens, generation.name)
        write_json(generation, new)


def _renumbered(key: str, value: object, tokens: Tokens, file: str) -> object:
    if LISTING.search(key):
        return _thinned(value, tokens)
    if isinstance(value, Mapping):
        return with_new_tokens(value, tokens, file)
    if not NAMING.search(key):
        return value
    if isinstance(value, list):
        if key.endswith("forced_decoder_ids"):  # pairs of a position and a token
            return [[place, _needed(key, token, tokens, file)] for place, token in value]
        return [_needed(key, token, tokens, file) for token in value]
    return _needed(key, value, tokens, file)


def _needed(key: str, token: object, tokens: Tokens, file: str) -> object:
    if _is_gone(token, tokens):
        raise CutError(f"{file} needs token {token} as '{key}', and 'vocab' does not keep it; keep it")
    return _moved(token, tokens)


def _thinned(value: object, tokens: Tokens) -> object:
    """Return a list or a dictionary of tokens, or of lists of them, without the entries that hold a cut one."""
    if isinstance(value, Mapping):
        return {name: _moved(entry, tokens) for name, entry in value.items() if not _is_gone(entry, tokens)}
    if isinstance(value, list):
        return [_moved(entry, tokens) for entry in value if not _is_gone(entry, tokens)]
    return value


def _is_gone(value: object, tokens: Tokens) -> bool:
    if isinstance(value, list):
        return any(_is_gone(entry, tokens) for entry in value)
    return _is_token(value, tokens) and value not in tokens.kept


def _moved(value: object, tokens: Tokens) -> object:
    if isinstance(value, list):
        return [_moved(entry, tokens) for entry in value]
    return tokens.kept.index(value) if _is_token(value, tokens) else value


def _is_token(value: object, tokens: Tokens) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < tokens.size
