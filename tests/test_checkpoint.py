"""Checkpoints: `from_pretrained` gives the slim model's outputs, and what a config cannot say is refused."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import survey_checkpoints
import torch
import zoo
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModel
from transformers.utils import logging

from graphclone.analysis import analyse
from graphclone.axes.axis import Axis
from graphclone.checkpoint import read_checkpoint, write_checkpoint
from graphclone.checkpoint.config import rewrite_config
from graphclone.checkpoint.files import write_tensors
from graphclone.checkpoint.fitting import fit_config
from graphclone.checkpoint.folded import find_folded
from graphclone.checkpoint.matching import Match, Part
from graphclone.checkpoint.outside import Outside
from graphclone.checkpoint.tokens import Tokens, with_new_tokens
from graphclone.cli import main
from graphclone.dimensions import Dimension
from graphclone.errors import CheckFailed, CutError, InputError
from graphclone.model import load
from graphclone.plan import Plan
from graphclone.resolution import resolve
from graphclone.subclone import plan_subclone
from graphclone.weights import Weight

QUICK = ("gpt2", "llama", "bert", "vit")
FAMILIES = [
    *QUICK,
    *(
        pytest.param(name, marks=pytest.mark.long)
        for name in (
            *("qwen2", "qwen3", "gemma2", "phi3", "mixtral", "roberta", "deberta_v2", "t5", "bart", "whisper", "clip"),
            *(
                "qwen3_moe",
                "olmoe",
                "distilbert",
                "electra",
                "albert",
                "opt",
                "gpt_neox",
                "falcon",
                "gemma3",
                "deit",
                "dinov2",
            ),
        )
    ),
]
logging.disable_progress_bar()
logging.set_verbosity_error()


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


def drawn(name: str, *, head_dim: bool = False) -> dict[str, list[int]]:
    """Draw a cut that a config can express: FFNs, heads or head sizes, experts, and the hidden size to match."""
    sizes = zoo.dimensions(name)
    tail = {n: n.split(".")[-1] for n in sizes}
    counts = {n: sizes[n] // 2 for n in sizes if tail[n] == "ffn"}
    counts |= {n: sizes[n] - 2 for n in sizes if tail[n] == "experts"}
    if head_dim:
        counts |= {n: sizes[n] // 2 for n in sizes if tail[n] in ("head_dim", "cross_head_dim")}
    else:
        counts |= {n: sizes[n] - 1 for n in sizes if tail[n] in ("heads", "kv_heads", "cross_heads") and sizes[n] > 1}
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


def planned(name: str, parent) -> Plan:
    """Draw such a cut without the first and the third block."""
    analysis = analyse(parent)
    keep = drawn(name, head_dim=name in ("bart", "whisper"))
    blocks = {s.prefix.rstrip("."): tuple(i for i in range(len(s.blocks)) if i not in (0, 2)) for s in analysis.stacks}
    return Plan(keep={n: tuple(map(int, kept)) for n, kept in keep.items()}, blocks=blocks)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loaded_checkpoint_is_the_slim_model(name, pretrained, tmp_path):
    parent = load(zoo.export(name, "legacy17"))
    report = write_checkpoint(parent, planned(name, parent), pretrained(name), tmp_path / "small")
    assert report.difference < 1e-5
    assert (tmp_path / "small" / "tokenizer_config.json").exists()


@pytest.mark.parametrize("name", QUICK)
def test_dynamo_exports_match_as_well(name, pretrained, tmp_path):
    parent = load(zoo.export(name, "dynamo20"))
    report = write_checkpoint(parent, planned(name, parent), pretrained(name), tmp_path / "small")
    assert report.difference < 1e-5 and not report.kept and not report.typed


@pytest.mark.parametrize(
    ("name", "route", "kind"),
    [
        ("llama", "dynamo18", "every width"),  # arbitrary pairs of RoPE become a list of factors
        ("mamba", "dynamo18", "every width"),  # sizes that only the class tells; the exporter took the exponential
        ("bloom", "legacy17", "all but head sizes"),  # a feed-forward that is four times the hidden size
        ("wav2vec2", "legacy17", "all but head sizes"),  # weight norm, a list of widths
        ("siglip", "dynamo18", "fewer heads"),  # a pooling head that has the tower's sizes
        ("marian", "legacy17", "smaller heads"),  # sinusoids that the class reads where they are stored
        ("beit", "legacy17", "smaller heads"),  # gathered position biases, labels
        ("segformer", "legacy17", "fewer heads, multiples"),  # a batch norm, lists of stages
        ("convnext", "legacy17", "fewer heads, multiples"),  # blocks numbered anew in each stage
        ("swin", "legacy17", "smaller heads"),  # widths of stages that follow from the first
    ],
)
def test_what_only_values_and_the_class_tell_holds(name, route, kind, pretrained, tmp_path):
    parent = load(zoo.export(name, route))
    analysis = analyse(parent)
    plan = next(plan for label, plan in survey_checkpoints.cuts(analysis) if label == kind)
    blocks = {s.prefix.rstrip("."): tuple(i for i in range(len(s.blocks)) if i != 1) for s in analysis.stacks}
    blocks = {} if name == "swin" else blocks  # every second block is shifted, by its number
    report = write_checkpoint(parent, plan.with_(blocks=blocks), pretrained(name), tmp_path / "small")
    assert report.difference < 1e-5 and set(plan.keep) >= {d.name for d in analysis.dimensions if d.role == "hidden"}


def test_fields_are_tried_until_the_class_has_the_childs_sizes():
    def ask(config):
        return {"w": (config["dim"] + 1, 4), "b": (config["inner"]["dim"],), "c": (config["dim"],)}

    config, parent = {"dim": 8, "inner": {"dim": 8}}, {"w": (9, 4), "b": (8,), "c": (8,)}
    child = {"w": (6, 4), "b": (6,), "c": (5,)}
    assert fit_config(config, config, parent, child, ask) == {"dim": 5, "inner": {"dim": 6}}
    with pytest.raises(CutError, match=r"'w' has 7 along axis 0, its class makes 6 of 'dim', and no value of it"):
        fit_config(config, config, parent, child | {"w": (7, 4)}, ask)
    with pytest.raises(CutError, match=r"'w' has 3 along axis 1, its class makes 4 of no field"):
        fit_config(config, config, parent, child | {"w": (6, 3)}, ask)


def test_blocks_that_share_their_weights_lose_none(pretrained, tmp_path):
    parent = load(zoo.export("albert", "dynamo18"))
    report = write_checkpoint(parent, Plan(blocks={"": (1, 4)}), pretrained("albert"), tmp_path / "small")
    assert report.difference < 1e-5 and not report.dropped


def test_a_block_that_the_class_makes_otherwise_is_refused(pretrained, tmp_path):
    parent = load(zoo.export("modernbert", "legacy17"))
    with pytest.raises(CutError, match=r"holds no 'model.layers.0.attn_norm.weight'; keep a block that lacks it"):
        write_checkpoint(parent, Plan(blocks={"": (1, 2)}), pretrained("modernbert"), tmp_path / "small")


def test_the_first_pairs_of_rope_are_another_base(pretrained, tmp_path):
    parent = load(zoo.export("qwen2", "legacy17"))
    plan = Plan(keep={"blocks.*.head_dim": (0, 1, 2, 5, 6, 7)})  # the three fastest of five pairs
    assert write_checkpoint(parent, plan, pretrained("qwen2"), tmp_path / "small").difference < 1e-5
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == pytest.approx(10000 ** (3 / 5))


def test_labels_are_numbered_anew(pretrained, tmp_path):
    parent = load(zoo.export("vit", "legacy17"))
    assert write_checkpoint(parent, Plan(keep={"head_0": (2, 5, 11)}), pretrained("vit"), tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["id2label"] == {"0": "LABEL_2", "1": "LABEL_5", "2": "LABEL_11"}
    assert config["label2id"] == {"LABEL_2": 0, "LABEL_5": 1, "LABEL_11": 2}


def test_files_of_torch_become_safetensors(pretrained, tmp_path):
    folder = shutil.copytree(pretrained("gpt2"), tmp_path / "old")
    tensors = {name: torch.from_numpy(array) for name, array in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    torch.save({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    parent = load(zoo.export("gpt2", "legacy17"))
    report = write_checkpoint(parent, planned("gpt2", parent), folder, tmp_path / "small", check=False)
    assert len(report.matched) == len(tensors)
    assert {tensor.dtype.name for tensor in read_checkpoint(tmp_path / "small").tensors.values()} == {"bfloat16"}
    torch.save({"state_dict": tensors}, tmp_path / "lone.pt")
    write_checkpoint(parent, planned("gpt2", parent), tmp_path / "lone.pt", tmp_path / "alone")
    assert [path.name for path in (tmp_path / "alone").iterdir()] == ["lone.safetensors"]


def test_native_scales_reach_the_checkpoint(pretrained, tmp_path):
    parent = load(zoo.export("bert", "dynamo20"))
    keep = {n: tuple(kept) for n, kept in drawn("bert", head_dim=True).items()}
    assert write_checkpoint(parent, Plan(keep=keep), pretrained("bert"), tmp_path / "small").difference < 1e-5


def test_scales_and_replacements_of_the_plan_reach_the_checkpoint(pretrained, tmp_path):
    parent = load(zoo.export("gpt2", "legacy17"))
    plan = plan_subclone(parent, None, ffn=56, layers=3, by="first").plan
    bias = np.linspace(-1, 1, 48, dtype=np.float32)
    plan = plan.with_(replace={"transformer.ln_f.bias": bias})
    assert any(factor != 1 for factor in plan.scale.values())
    assert write_checkpoint(parent, plan, pretrained("gpt2"), tmp_path / "small").difference < 1e-5
    assert np.array_equal(load_file(tmp_path / "small" / "model.safetensors")["transformer.ln_f.bias"], bias)


def test_shards_stay_shards(pretrained, tmp_path):
    source = tmp_path / "sharded"
    zoo.family("gpt2").build().save_pretrained(source, max_shard_size="60KB")
    parent = load(zoo.export("gpt2", "legacy17"))
    report = write_checkpoint(parent, planned("gpt2", parent), source, tmp_path / "small")
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())["weight_map"]
    assert report.difference < 1e-5 and len(set(index.values())) > 2
    assert set(index) == set(read_checkpoint(tmp_path / "small").tensors)


def test_shards_that_are_left_are_numbered_anew(pretrained, tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(pretrained("gpt2") / "config.json", folder)
    tensors = {name: torch.from_numpy(v) for name, v in load_file(pretrained("gpt2") / "model.safetensors").items()}
    parts = [{n: t for n, t in tensors.items() if (".h.4." in n) == last} for last in (False, True)]
    files = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    for file, part in zip(files, parts, strict=True):
        torch.save(part, folder / file)
    places = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    parent = load(zoo.export("gpt2", "legacy17"))
    report = write_checkpoint(parent, Plan(blocks={"": (0, 1, 2, 3)}), folder, tmp_path / "small")
    assert report.difference < 1e-5
    names = {path.name for path in (tmp_path / "small").iterdir()}
    assert names == {"config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors"}


def test_each_tensor_lies_at_a_multiple_of_its_types_size(tmp_path):
    tensors = {"mask": np.ones(3, np.bool_), "weight": np.arange(4, dtype=np.float32)}
    write_tensors(tmp_path / "some.safetensors", {name: Weight.of(array) for name, array in tensors.items()}, {})
    raw = (tmp_path / "some.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["weight"]["data_offsets"][0] % 4 == 0
    assert all(np.array_equal(array, tensors[n]) for n, array in load_file(tmp_path / "some.safetensors").items())


def test_half_precision_checkpoints_stay_half(pretrained, tmp_path):
    folder = shutil.copytree(pretrained("llama"), tmp_path / "half")
    tensors = {name: value.astype(np.float16) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    parent = load(zoo.export("llama", "legacy17"))
    report = write_checkpoint(parent, planned("llama", parent), folder, tmp_path / "small", check=False)
    assert len(report.matched) == len(tensors)
    assert {value.dtype.name for value in load_file(tmp_path / "small" / "model.safetensors").values()} == {"float16"}


def test_tensors_outside_the_graph_are_cut_by_their_sizes(pretrained, tmp_path):
    folder = shutil.copytree(pretrained("bert"), tmp_path / "more")
    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(0)
    tensors |= {"classifier.weight": rng.random((5, 48), np.float32), "classifier.bias": rng.random(5, np.float32)}
    save_file(tensors, folder / "model.safetensors")
    parent = load(zoo.export("bert", "legacy17"))
    plan = planned("bert", parent)
    report = write_checkpoint(parent, plan, folder, tmp_path / "small", check=False)
    small = load_file(tmp_path / "small" / "model.safetensors")
    assert report.typed == ["classifier.weight"] and report.kept == ["classifier.bias"]
    assert np.array_equal(small["classifier.weight"], tensors["classifier.weight"][:, list(plan.keep["hidden"])])
    assert sorted({name.split(".")[2] for name in small if name.startswith("encoder.layer")}) == ["0", "1", "2"]


def test_a_batch_norm_of_no_mean_is_found_beside_its_bias():
    rng = np.random.default_rng(0)
    weight, gain, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 3, 2, 2), (4,), (4,)))
    norm = {"bn.weight": gain, "bn.bias": bias, "bn.running_mean": 0 * bias, "bn.running_var": np.ones(4, np.float32)}
    tensors = {name: Weight.of(array) for name, array in {"conv.weight": weight, **norm}.items()}
    folded = weight * gain.reshape(4, 1, 1, 1) / np.float32(np.sqrt(1 + 1e-5))
    stored = {"w": Weight.of(folded), "b": tensors["bn.bias"]}
    missing = [name for name in tensors if name != "bn.bias"]
    found = {tensor: name for tensor, name, _ in find_folded(tensors, missing, stored, ["w"])}
    assert found == dict.fromkeys(missing, "w")


def test_two_widths_of_one_size_are_not_mistaken_for_each_other():
    """A tensor outside of the graph, as wide as two towers of which each keeps other indices."""
    axes = [Axis((4, 4)) for _ in range(2)]
    dimensions = [Dimension(f"{side}.hidden", 4, "hidden", (axis,)) for side, axis in zip("ab", axes, strict=True)]
    cut = SimpleNamespace(picks=lambda axis: np.array([0, 1]) if axis is axes[0] else np.array([2, 3]))
    outside = Outside(SimpleNamespace(dimensions=dimensions), cut, {})
    with pytest.raises(CutError, match="could be cut in 2 ways"):
        outside.cut("projection.weight", Weight.of(np.zeros((3, 4), np.float32)))


def test_a_bias_beside_an_uncut_weight_stays_whole():
    rows, columns = Axis((4, 4)), Axis((4, 4))
    uses = {"a.weight": SimpleNamespace(axes=(rows, Axis((3, 3)))), "b": SimpleNamespace(axes=(columns,))}
    matches = {name: Match(name, (Part(name, use),)) for name, use in uses.items()}
    cut = SimpleNamespace(picks=lambda axis: np.array([0, 1]) if axis is columns else None)
    outside = Outside(SimpleNamespace(dimensions=()), cut, matches)
    assert outside.cut("a.bias", Weight.of(np.zeros(4, np.float32))).shape == (4,)


def test_a_lone_file_gets_its_weights_alone(pretrained, tmp_path):
    parent = load(zoo.export("vit", "legacy17"))
    report = write_checkpoint(
        parent, planned("vit", parent), pretrained("vit") / "model.safetensors", tmp_path / "small"
    )
    assert [path.name for path in (tmp_path / "small").iterdir()] == ["model.safetensors"]
    assert report.difference is None and "config.json" in report.note


@pytest.mark.parametrize(
    ("name", "keep", "said"),
    [
        ("gpt2", {"blocks.0.ffn": range(10), "blocks.1.ffn": range(20)}, r"'n_inner' is one number"),
        ("gpt2", {"blocks.*.heads": [0, 1]}, r"computes the head size from 'n_head'"),
        ("llama", {"blocks.2.kv_heads": [0, 1]}, r"'num_(key_value|attention)_heads' is one number"),
        ("bert", {"head_0": range(40)}, r"its 'head_0', 48 before and 40 now: 'pooler.dense.\w+' .* of 'hidden_size'"),
    ],
)
def test_what_a_config_cannot_express_names_the_field(name, keep, said, pretrained, tmp_path):
    parent = load(zoo.export(name, "legacy17"))
    plan = Plan(keep={n: tuple(kept) for n, kept in keep.items()})
    with pytest.raises(CutError, match=said):
        write_checkpoint(parent, plan, pretrained(name), tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_lists_over_layers_lose_the_dropped_blocks(pretrained):
    parent = load(zoo.export("gemma2", "legacy17"))
    analysis = analyse(parent)
    config = json.loads((pretrained("gemma2") / "config.json").read_text())
    new = rewrite_config(config, analysis, resolve(Plan(blocks={"": (1, 4)}), analysis))
    assert new["layer_types"] == ["full_attention", "sliding_attention"] and new["num_hidden_layers"] == 2
    assert config["num_hidden_layers"] == 5


def test_flags_of_layers_are_no_counts_of_stages(pretrained):
    analysis = analyse(load(zoo.export("gemma2", "legacy17")))
    config = json.loads((pretrained("gemma2") / "config.json").read_text()) | {"no_rope_layers": [1, 1, 1, 1, 1]}
    new = rewrite_config(config, analysis, resolve(Plan(blocks={"": (1, 4)}), analysis))
    assert new["no_rope_layers"] == [1, 1]


def test_fields_that_make_a_size_together_are_named(pretrained, tmp_path):
    parent = load(zoo.export("segformer", "legacy17"))
    plan = Plan(keep={"blocks.0.ffn": tuple(range(50)), "blocks.1.ffn": tuple(range(50))})
    with pytest.raises(CutError, match=r"its 'ffn', .*mlp.* of 'hidden_sizes.0' and 'mlp_ratios.0', and no value"):
        write_checkpoint(parent, plan, pretrained("segformer"), tmp_path / "small")


@pytest.mark.parametrize(("value", "said"), [(np.nan, "differs from the slim model's by inf"), (None, "returns none")])
def test_nothing_passes_that_was_not_compared(value, said, pretrained, tmp_path, monkeypatch):
    def outputs(folder, feeds, shapes):
        return {} if value is None else {name: np.full(shape, value, np.float32) for name, shape in shapes.items()}

    monkeypatch.setattr("graphclone.pytorch.pretrained.outputs_of", outputs)
    parent = load(zoo.export("gpt2", "legacy17"))
    arguments = parent, planned("gpt2", parent), pretrained("gpt2"), tmp_path / "small"
    if value is None:
        report = write_checkpoint(*arguments)
        assert report.difference is None and said in report.note
        return
    with pytest.raises(CheckFailed, match=said):
        write_checkpoint(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_result_is_not_written(pretrained, tmp_path):
    folder = shutil.copytree(pretrained("bert"), tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    parent = load(zoo.export("bert", "legacy17"))
    with pytest.raises(CheckFailed, match="differs from the slim model's"):
        write_checkpoint(parent, planned("bert", parent), folder, tmp_path / "small")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_bad_input_is_refused(pretrained, tmp_path):
    parent = load(zoo.export("gpt2", "legacy17"))
    plan = Plan(keep={"blocks.*.ffn": tuple(range(56))})
    with pytest.raises(InputError, match="no such folder"):
        write_checkpoint(parent, plan, tmp_path / "missing", tmp_path / "small")
    with pytest.raises(InputError, match="is it the checkpoint"):
        write_checkpoint(parent, plan, pretrained("llama"), tmp_path / "small")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="more can run code when it is read"):
        write_checkpoint(parent, plan, tmp_path / "pickled", tmp_path / "small")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="something already"):
        write_checkpoint(parent, plan, pretrained("gpt2"), tmp_path / "full")
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(InputError, match="no safetensors file"):
        read_checkpoint(tmp_path / "broken.safetensors")


def test_an_output_folder_is_checked_before_anything_is_read(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    parent = load(zoo.export("gpt2", "legacy17"))
    with pytest.raises(InputError, match="something already"):
        write_checkpoint(parent, Plan(), tmp_path / "missing", tmp_path / "full")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="the folder you are in"):
        write_checkpoint(parent, Plan(), tmp_path / "missing", ".")


def test_the_command(pretrained, tmp_path, capsys):
    model = zoo.export("gpt2", "legacy17")
    planned("gpt2", load(model)).save(tmp_path / "plan.json")
    arguments = ["--plan", tmp_path / "plan.json", "--from", pretrained("gpt2"), "-o", tmp_path / "small"]
    assert main(["checkpoint", str(model), *map(str, arguments)]) == 0
    said = capsys.readouterr()
    assert "differ from the slim model's by" in said.out and "Loading weights" not in said.err
    assert AutoConfig.from_pretrained(tmp_path / "small").n_layer == 3


def cut_file(name: str, tensors: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """Apply the usual plan to tensors in a lone file."""
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / "parent.safetensors")
    parent = load(zoo.export(name, "legacy17"))
    write_checkpoint(parent, planned(name, parent), folder / "parent.safetensors", folder / "small")
    return load_file(folder / "small" / "parent.safetensors")


def test_projections_that_the_graph_splits_stay_fused(pretrained, tmp_path):
    tensors = load_file(pretrained("llama") / "model.safetensors")
    (tmp_path / "plain").mkdir()
    plain = cut_file("llama", tensors, tmp_path / "plain")
    parts = [f"model.layers.3.self_attn.{part}_proj.weight" for part in "qkv"]
    fused = tensors | {"model.layers.3.self_attn.qkv.weight": np.concatenate([tensors[part] for part in parts])}
    small = cut_file("llama", {name: value for name, value in fused.items() if name not in parts}, tmp_path)
    wanted = np.concatenate([plain[part.replace("3", "1")] for part in parts])
    assert np.array_equal(small["model.layers.1.self_attn.qkv.weight"], wanted)


def test_projections_that_the_graph_fuses_stay_split(pretrained, tmp_path):
    tensors = load_file(pretrained("gpt2") / "model.safetensors")
    (tmp_path / "plain").mkdir()
    plain = cut_file("gpt2", tensors, tmp_path / "plain")
    whole, bias = (tensors.pop(f"transformer.h.3.attn.c_attn.{leaf}") for leaf in ("weight", "bias"))
    for part, columns, entries in zip("qkv", np.split(whole, 3, axis=1), np.split(bias, 3), strict=True):
        tensors |= {f"transformer.h.3.attn.{part}.weight": columns.T, f"transformer.h.3.attn.{part}.bias": entries}
    small = cut_file("gpt2", tensors, tmp_path)
    whole, bias = (plain[f"transformer.h.1.attn.c_attn.{leaf}"] for leaf in ("weight", "bias"))
    for part, columns, entries in zip("qkv", np.split(whole, 3, axis=1), np.split(bias, 3), strict=True):
        assert np.array_equal(small[f"transformer.h.1.attn.{part}.weight"], columns.T), part
        assert np.array_equal(small[f"transformer.h.1.attn.{part}.bias"], entries), part


def test_a_config_of_another_framework_is_left_out(pretrained, tmp_path):
    folder = shutil.copytree(pretrained("vit"), tmp_path / "timm")
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_tiny", "num_features": 48}))
    parent = load(zoo.export("vit", "legacy17"))
    report = write_checkpoint(parent, planned("vit", parent), folder, tmp_path / "small")
    assert report.difference is None and "model_type" in report.note
    assert not (tmp_path / "small" / "config.json").exists()


def real_parent() -> Path:
    places = [os.environ.get("GRAPHCLONE_DATA", ""), Path(__file__).parents[2] / "shared" / "models"]
    folders = [Path(place) / "all-MiniLM-L6-v2" for place in places if place]
    found = next((folder for folder in folders if (folder / "model.safetensors").is_file()), None)
    return found or pytest.skip("all-MiniLM-L6-v2 is not here; set GRAPHCLONE_DATA to the folder that holds it")


@pytest.mark.long
def test_the_real_parent_with_its_tokenizer(tmp_path):
    source = real_parent()
    parent = AutoModel.from_pretrained(source).eval()
    ids = torch.randint(5, 1000, (2, 9))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    program = torch.onnx.export(
        parent,
        (),
        kwargs=inputs,
        dynamo=True,
        opset_version=20,
        input_names=list(inputs),
        output_names=["last_hidden_state", "pooler_output"],
        dynamic_shapes=dict.fromkeys(inputs, axes),
        verbose=False,
    )
    program.save(tmp_path / "parent.onnx")
    model = load(tmp_path / "parent.onnx")
    plan = plan_subclone(model, None, hidden=192, heads=6, ffn=768, layers=3, by="first").plan
    report = write_checkpoint(model, plan, source, tmp_path / "small")
    assert report.difference < 1e-5
    assert (tmp_path / "small" / "tokenizer.json").exists()
    config = AutoConfig.from_pretrained(tmp_path / "small")
    assert (config.hidden_size, config.num_attention_heads) == (192, 6)
    assert (config.intermediate_size, config.num_hidden_layers) == (768, 3)


def test_a_cut_vocabulary_takes_its_special_tokens_along(pretrained, tmp_path, capsys):
    folder = shutil.copytree(pretrained("gpt2"), tmp_path / "parent")
    config = json.loads((folder / "config.json").read_text())
    tokens = {"bos_token_id": 8, "eos_token_id": 9, "pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(config | tokens))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 11]}))
    parent = load(zoo.export("gpt2", "legacy17"))
    plan = Plan(keep={"vocab": (2, 3, *range(8, 208))})
    assert write_checkpoint(parent, plan, folder, tmp_path / "small").difference < 1e-5
    small = json.loads((tmp_path / "small" / "config.json").read_text())
    assert [small[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")] == [202, 2, 3, None]
    assert json.loads((tmp_path / "small" / "generation_config.json").read_text()) == {"eos_token_id": [3, 5]}
    assert json.loads((tmp_path / "small" / "vocabulary.json").read_text())["kept_token_ids"][:3] == [2, 3, 8]
    Plan(keep={"vocab": (2, 3, *range(8, 208))}).save(tmp_path / "plan.json")
    arguments = ["--plan", tmp_path / "plan.json", "--from", folder, "-o", tmp_path / "again", "--no-verify"]
    assert main(["checkpoint", str(zoo.export("gpt2", "legacy17")), *map(str, arguments)]) == 0
    assert "202 of 211; vocabulary.json has the tokenizer's id of each" in capsys.readouterr().out
    with pytest.raises(CutError, match="token 9 as 'eos_token_id'"):
        write_checkpoint(parent, Plan(keep={"vocab": tuple(range(9))}), folder, tmp_path / "smaller")


def test_tokens_that_may_be_gone_go_and_ids_outside_stay():
    tokens = Tokens((0, 5, 7), 9)
    config = {
        "suppress_tokens": [5, 6, 7],
        "bad_words_ids": [[5, 7], [5, 6]],
        "lang_to_id": {"<|en|>": 5, "<|de|>": 6},
        "forced_decoder_ids": [[1, 7], [2, None]],
        "image_token_index": 5,
        "bos_token_id": 50256,
        "text_config": {"pad_token_id": -1, "n_head": 7},
    }
    assert with_new_tokens(config, tokens) == {
        "suppress_tokens": [1, 2],
        "bad_words_ids": [[1, 2]],
        "lang_to_id": {"<|en|>": 1},
        "forced_decoder_ids": [[1, 2], [2, None]],
        "image_token_index": 1,
        "bos_token_id": 50256,
        "text_config": {"pad_token_id": -1, "n_head": 7},
    }
    with pytest.raises(CutError, match="token 6 as 'forced_decoder_ids'"):
        with_new_tokens({"forced_decoder_ids": [[1, 6]]}, tokens)


def test_what_the_first_block_holds_for_all_moves_on(pretrained, tmp_path):
    parent = load(zoo.export("t5", "legacy17"))
    plan = Plan(blocks={"encoder": (2, 4), "decoder": (1, 3)})
    report = write_checkpoint(parent, plan, pretrained("t5"), tmp_path / "small")
    assert report.difference < 1e-5
    assert not any("relative_attention_bias" in name for name in report.dropped)
    assert len(report.dropped) == 3 * 9 + 2 * 14


@pytest.mark.parametrize("plan, why", [
    (Plan(bias={"transformer.h.0.attn.c_attn.weight": np.zeros(144)}), "no place for"),
    (Plan(untie={"transformer.wte.weight": "head"}), "keeps tied"),
])  # fmt: skip
def test_what_a_plan_adds_is_refused(pretrained, tmp_path, plan, why):
    with pytest.raises(CutError, match=why):
        write_checkpoint(load(zoo.export("gpt2", "legacy17")), plan, pretrained("gpt2"), tmp_path / "small")
