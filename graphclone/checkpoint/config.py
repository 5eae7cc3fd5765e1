"""Rewrite a config: fields whose name speaks of a dimension and whose value is the parent's size get the child's.

There is no table of models, only a vocabulary. Where the child has several sizes for one field, or a size that no field
speaks of, the class behind the config cannot express the child, and that is an error that names the field.
"""

import copy
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from graphclone.analysis import Analysis
from graphclone.checkpoint.fields import SECTIONS, Field, fields, sections
from graphclone.checkpoint.sizes import Sizes, sizes_of
from graphclone.cut import Cut
from graphclone.errors import CutError

ROLES = (
    ("layers", r"(^|_)(n|num|hidden|encoder|decoder|text|vision)_?(hidden_|(en|de)coder_)?(layers?|blocks)$|^depth$"),
    ("kv_heads", r"(key_value|kv)_heads|^num_kv$|^n_head_kv$|^n_kv_heads$"),
    ("heads", r"(^|_)n?_?heads?$|(^|_)n_heads?$|attention_heads$"),
    ("head_dim", r"head_dim|head_size|^d_kv$|(^|_)kv_channels$|^key_size$|pre_attn_scalar|^attention_key_size$"),
    ("ffn", r"intermediate|ffn|^n_inner$|^d_ff$|mlp_dim|inner_dim|^hidden_dim$|feed_?forward|mlp_size"),
    ("hidden", r"hidden_size|^n_embd$|^d_model$|^dim$|embed(ding)?_dim|^hidden_dim$|embedding_size|^model_dim$|"
               r"embed_proj_dim|pooler_output_size|^hidden_width$"),
    ("experts", r"num_(local_)?experts$|n_routed_experts|num_experts$"),
    ("vocab", r"^vocab_size$"),
    ("free", r"proj(ection)?_dim|embedding_size|_dim$|_size$|classifier_proj_size"),
)  # fmt: skip
"""Roles by what a field's name says; a field may speak of several, and its value decides."""
BACKBONE = ("out_features", "out_indices", "stage_names")
"""Which blocks a backbone returns: left out where blocks were dropped, so that the class takes the last one."""
DEPTHS = re.compile(r"depth|layers|blocks")
RATIO = re.compile(r"(mlp|ffn|intermediate|expansion)_(ratio|factor)$")
PER_LAYER = re.compile(r"layer|block|types|window|pattern")
DERIVED_FFN = 4


@dataclass(frozen=True)
class Doubt:
    """What the names of a config's fields do not tell: an error, unless the class turns out to have the `sizes`.

    what: the child's sizes that no field speaks of, for whoever finds the fields that make them; "" where `error` names
    a field.
    """

    error: CutError
    sizes: frozenset[int]
    what: str = ""


def rewrite_config(
    config: Mapping,
    analysis: Analysis,
    cut: Cut,
    defaults: Mapping | None = None,
    doubts: list[Doubt] | None = None,
) -> dict:
    """Return the config of the child.

    defaults: the same config with all defaults of its class filled in, where that is known. doubts: takes up what names
    alone do not tell, where the class itself can be asked afterwards; otherwise that is an error, too.
    Raises: CutError that names the field which cannot express the child, or the dimension no field speaks of.
    """
    rewriter = _Rewriter(config, analysis, cut, defaults or config)
    new = rewriter.run()
    if doubts is None and rewriter.doubts:
        raise rewriter.doubts[0].error
    (doubts if doubts is not None else []).extend(rewriter.doubts)
    return new


class _Rewriter:
    def __init__(self, config: Mapping, analysis: Analysis, cut: Cut, defaults: Mapping):
        self.config = copy.deepcopy(dict(config))
        self.defaults = defaults
        self.analysis = analysis
        self.cut = cut
        self.prefixes = [stack.prefix.rstrip(".") for stack in analysis.stacks]
        self.sizes = sizes_of(analysis, cut)
        self.spoken: set[tuple[str, str]] = set()
        self.stages = self._find_stages()
        self.doubts: list[Doubt] = []

    def run(self) -> dict:
        for each in list(fields(self.config)):
            self._rewrite(each)
        self._rewrite_labels(self.config)
        self._derived()
        self._unspoken()
        return self.config

    def _rewrite(self, each: Field) -> None:
        value = each.holder.get(each.key)
        if each.key in BACKBONE and any(r == "layers" and s.changed for (_, r), s in self.sizes.items()):
            del each.holder[each.key]
            return
        if isinstance(value, list):
            self._rewrite_list(each, value)
            return
        if RATIO.search(each.key) and isinstance(value, (int, float)):
            self._rewrite_ratio(each, value)
            return
        if isinstance(value, bool) or not isinstance(value, int):
            return
        for role, pattern in ROLES:
            if not re.search(pattern, each.key):
                continue
            matching = self._matching(each, role, value) or (
                role == "kv_heads" and self._matching(each, "heads", value)
            )
            if not matching:
                continue
            self.spoken |= {(stack, each_role) for stack, each_role in matching}
            new = set().union(*(s.of(value) for s in matching.values()))
            if any(s.changed for s in matching.values()):
                if len(new) > 1:
                    raise inexpressible(
                        f"'{each.path}' is one number, and the child has "
                        f"{sorted(new)} {role.replace('_', ' ')}; choose one size for all blocks"
                    )
                each.holder[each.key] = new.pop()
            return

    def _rewrite_ratio(self, each: Field, value: float) -> None:
        """Rewrite what a class multiplies the hidden size with to get the feed-forward's."""
        for stack in [s for s in self.prefixes if self._speaks(each, s, "ffn")]:
            hidden, ffn = self._one(stack, "hidden"), self._one(stack, "ffn")
            if hidden is None or ffn is None or int(hidden[0] * value) != ffn[0]:
                continue
            if int(hidden[1] * value) != ffn[1]:
                each.holder[each.key] = (ffn[1] + 1e-9) / hidden[1] if ffn[1] % hidden[1] else ffn[1] // hidden[1]
            self.spoken.add((stack, "ffn"))
            return

    def _matching(self, each: Field, role: str, value: int) -> dict[tuple[str, str], Sizes]:
        return {
            (stack, known): sizes
            for (stack, known), sizes in self.sizes.items()
            if value in sizes.old
            and (known == role or (role == "free" and known.startswith("free") and sizes.changed))
            and self._speaks(each, stack, role)
        }

    def _speaks(self, each: Field, stack: str, role: str) -> bool:
        """Tell whether a field speaks of a stack: its section or its name says so, or neither names any."""
        named = next((word for word in SECTIONS if re.search(rf"(^|_){word}(_|$)", each.key)), "")
        said = named or each.section
        if said and stack:
            return stack.startswith(said)
        if (
            role == "layers" and stack == "decoder" and not said
        ):  # beside num_decoder_layers, num_layers is the encoder's
            return not any("decoder" in key and re.search(ROLES[0][1], key) for key in each.holder)
        return True

    def _rewrite_list(self, each: Field, value: list) -> None:
        """Slice lists with an entry per layer or per stage; renumber lists of layers."""
        if not value or self._rewrite_stages(each, value) or not PER_LAYER.search(each.key):
            return
        for stack in self.analysis.stacks:
            kept = self.cut.blocks[stack.prefix]
            if len(kept) == len(stack.blocks) or not self._speaks(each, stack.prefix.rstrip("."), "layer list"):
                continue
            if len(value) == len(stack.blocks):
                each.holder[each.key] = [value[i] for i in kept]
                return
            if all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < len(stack.blocks) for v in value):
                each.holder[each.key] = [kept.index(v) for v in value if v in kept]
                return

    def _rewrite_stages(self, each: Field, value: list) -> bool:
        """Rewrite a list with an entry per stage: the blocks of each, or a width that its blocks have."""
        for stack, stages in self.stages.items():
            if len(value) != len(stages) or not all(_is_count(entry) for entry in value):
                continue
            kept = self.cut.blocks[f"{stack}." if stack else ""]
            if value == [len(stage) for stage in stages] and DEPTHS.search(each.key):
                new = [sum(block in kept for block in stage) for stage in stages]
                if 0 in new:
                    raise inexpressible(
                        f"'{each.path}' counts the blocks of each stage, and "
                        f"stage {new.index(0)} has none; keep one of blocks {stages[new.index(0)].start} to "
                        f"{stages[new.index(0)].stop - 1}"
                    )
                each.holder[each.key] = new
                self.spoken.add((stack, "layers"))
                return True
            for role in [role for role, pattern in ROLES if re.search(pattern, each.key.removesuffix("s"))]:
                sizes = self.sizes.get((stack, role))
                pairs = self._of_stages(role, sizes, stages, kept) if sizes else None
                if pairs and [old for old, _ in pairs] == value:
                    each.holder[each.key] = [new for _, new in pairs]
                    self.spoken.add((stack, role))
                    return True
        return False

    def _of_stages(self, role: str, sizes: Sizes, stages: list[range], kept: Sequence[int]) -> list | None:
        """Return the old and the new size of each stage, where its kept blocks agree on one."""
        if role == "hidden":
            widths = sorted(sizes.pairs)
            return widths if len(widths) == len(stages) else None
        found = [{sizes.by_block[b] for b in stage if b in kept and b in sizes.by_block} for stage in stages]
        return [next(iter(pairs)) for pairs in found] if all(len(pairs) == 1 for pairs in found) else None

    def _find_stages(self) -> dict[str, list[range]]:
        """Return the blocks of each stage, by stack: a list of counts whose sum is the number of blocks."""
        found: dict[str, list[range]] = {}
        for each in fields(self.config):
            value = each.holder[each.key]
            if not isinstance(value, list) or not DEPTHS.search(each.key) or not all(map(_is_count, value)):
                continue
            for stack in self.analysis.stacks:
                flags = len(value) == len(stack.blocks) and PER_LAYER.search(each.key)
                if value and not flags and sum(value) == len(stack.blocks) and min(value) > 0:
                    ends = list(itertools.accumulate(value))
                    found.setdefault(stack.prefix.rstrip("."), list(map(range, [0, *ends[:-1]], ends)))
        return found

    def _rewrite_labels(self, config: dict) -> None:
        """Number kept labels anew: an object with a key, or a value, for each index of a free width."""
        for dimension in self.analysis.dimensions:
            picks = self.cut.picks(dimension.axes[0]) if dimension.role == "free" else None
            if picks is None:
                continue
            number = {int(old): new for new, old in enumerate(picks)}
            for key, value in config.items():
                if not isinstance(value, Mapping) or len(value) != dimension.size:
                    continue
                if set(value) == set(map(str, range(dimension.size))):
                    config[key] = {str(number[int(k)]): label for k, label in value.items() if int(k) in number}
                elif set(map(str, value.values())) == set(map(str, range(dimension.size))):
                    config[key] = {label: number[int(k)] for label, k in value.items() if int(k) in number}
                else:
                    continue
                self.spoken.add(("", f"free {dimension.name}"))

    # what a class derives ---------------------------------------------------------------------------------------

    def _derived(self) -> None:
        """Fill in fields that were left to be derived, where the child's sizes are not what would be derived."""
        for holder, defaults, section in sections(self.config, self.defaults):
            stacks = [s for s in self.prefixes if not section or s.split("_")[0] == section] or [""]
            for stack in stacks:
                self._derive(holder, defaults, stack)

    def _derive(self, holder: dict, defaults: Mapping, stack: str) -> None:
        hidden, heads = self._one(stack, "hidden"), self._one(stack, "heads")
        head_dim, groups, ffn = self._one(stack, "head_dim"), self._one(stack, "kv_heads"), self._one(stack, "ffn")
        key = next((k for k in ("head_dim", "d_kv", "attention_head_size", "kv_channels") if k in defaults), None)
        if head_dim and hidden and heads and (stack, "head_dim") not in self.spoken:
            if head_dim[0] * heads[0] == hidden[0] and head_dim[1] * heads[1] != hidden[1]:
                if key is None:
                    name = next((k for k in holder if re.search(ROLES[2][1], k)), "num_attention_heads")
                    self._doubt(
                        f"its class computes the head size from '{name}', and {hidden[1]} hidden / {heads[1]} heads "
                        f"is not {head_dim[1]}; cut the head size or the heads to fit",
                        (head_dim[1] * heads[1],),
                    )
                else:
                    holder[key] = head_dim[1]
            self.spoken.add((stack, "head_dim"))
        if groups and heads and (stack, "kv_heads") not in self.spoken and groups[1] != groups[0]:
            key = next((k for k in ("num_key_value_heads", "num_kv_heads") if k in defaults), None)
            if key is not None:
                holder[key] = groups[1]
                self.spoken.add((stack, "kv_heads"))
        if ffn and hidden and (stack, "ffn") not in self.spoken and ffn[0] == DERIVED_FFN * hidden[0]:
            key = next(
                (k for k in ("n_inner", "intermediate_size", "ffn_dim", "ffn_hidden_size") if k in defaults), None
            )
            if ffn[1] != DERIVED_FFN * hidden[1]:
                if key is None:
                    self._doubt(
                        f"its class computes the feed-forward as {DERIVED_FFN} x hidden, and the child has {ffn[1]} "
                        f"with {hidden[1]}; keep {DERIVED_FFN * hidden[1]}",
                        (ffn[1],),
                    )
                else:
                    holder[key] = ffn[1]
            self.spoken.add((stack, "ffn"))

    def _doubt(self, why: str, sizes: Iterable[int], what: str = "") -> None:
        self.doubts.append(Doubt(inexpressible(why), frozenset(sizes), what))

    def _one(self, stack: str, role: str) -> tuple[int, int] | None:
        sizes = self.sizes.get((stack, role)) or self.sizes.get(("", role))
        if sizes is None or len(sizes.old) != 1 or len(sizes.new) != 1:
            return None
        return next(iter(sizes.old)), next(iter(sizes.new))

    def _unspoken(self) -> None:
        for (stack, role), sizes in self.sizes.items():
            if not sizes.changed or role == "queries_per_kv" or (stack, role) in self.spoken:
                continue
            if any(r == role and (s == "" or stack == "") for s, r in self.spoken) or role == "v_head_dim":
                continue
            if role.startswith("free") and any(r == "hidden" and s == sizes for (_, r), s in self.sizes.items()):
                continue  # a pooler or a head's transform: as wide as the stream in the class as well
            old, new = sorted(sizes.old), sorted(sizes.new)
            where = f" of the {stack}" if stack else ""
            what = (
                f"'{role.removeprefix('free ')}'{where}, {old[0] if len(old) == 1 else old} before and "
                f"{new[0] if len(new) == 1 else new} now"
            )
            self._doubt(f"no field speaks of its {what}; do not cut it", new, what)


def inexpressible(why: str) -> CutError:
    """Return the error of a child that the class behind a config cannot be."""
    return CutError(f"config.json cannot express the child: {why}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
