"""Checkpoints of the zoo's families, and cuts that their configs can express."""

from pathlib import Path

import pytest
import zoo
from transformers.utils import logging

from graphclone.analysis import analyse
from graphclone.plan import Plan

logging.disable_progress_bar()
logging.set_verbosity_error()



@pytest.fixture
def drawn():
    """Return a function that draws indices a config can express: heads or head sizes, a hidden size to match."""

    def draw(name: str, *, head_dim: bool = False) -> dict[str, list[int]]:
        sizes = zoo.dimensions(name)
        tail = {n: n.split(".")[-1] for n in sizes}
        counts = {n: sizes[n] // 2 for n in sizes if tail[n] == "ffn"}
        counts |= {n: sizes[n] - 2 for n in sizes if tail[n] == "experts"}
        if head_dim:
            counts |= {n: sizes[n] // 2 for n in sizes if tail[n] in ("head_dim", "cross_head_dim")}
        else:
            heads = [n for n in sizes if tail[n] in ("heads", "kv_heads", "cross_heads")]
            counts |= {n: sizes[n] - 1 for n in heads if sizes[n] > 1}
        for name_of_width in [n for n in sizes if tail[n] == "hidden"]:
            before = name_of_width.removesuffix("hidden")
            own = [n for n in sizes if n.startswith(before)]
            heads = next((counts.get(n, sizes[n]) for n in own if tail[n] == "heads"), None)
            heads = heads or 2 * next(counts.get(n, sizes[n]) for n in own if tail[n] == "kv_heads")
            width = heads * next(counts.get(n, sizes[n]) for n in own if tail[n] == "head_dim")
            width = width if width < sizes[name_of_width] else sizes[name_of_width] - 8
            alike = [n for n in sizes if tail[n].startswith(("head_", "stem_")) and tail[n][5:].isdigit()]
            counts |= {n: width for n in (name_of_width, *alike) if sizes[n] == sizes[name_of_width]}
        return {n: zoo.choose(name, n, count) for n, count in counts.items()}

    return draw


@pytest.fixture
def planned(drawn):
    """Return a function that draws such a cut, without the first and the third block."""

    def plan(name: str, parent) -> Plan:
        analysis = analyse(parent)
        keep = drawn(name, head_dim=name in ("bart", "whisper"))
        kept = {s.prefix.rstrip("."): [i for i in range(len(s.blocks)) if i not in (0, 2)] for s in analysis.stacks}
        blocks = {stack: tuple(numbers) for stack, numbers in kept.items()}
        return Plan(keep={n: tuple(map(int, indices)) for n, indices in keep.items()}, blocks=blocks)

    return plan


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """Return a function from a family's name to the folder of its checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def save(name: str) -> Path:
        if not (folder / name).exists():
            zoo.family(name).build().save_pretrained(folder / name)
            (folder / name / "tokenizer_config.json").write_text("{}")
        return folder / name

    return save
