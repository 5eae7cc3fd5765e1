"""`from_pretrained` of a cut checkpoint gives the slim model's outputs."""

import os
from pathlib import Path

import numpy as np
import pytest
import survey_checkpoints
import torch
import zoo
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModel

from graphclone.analysis import analyse
from graphclone.checkpoint import write_checkpoint
from graphclone.errors import CutError
from graphclone.model import load
from graphclone.plan import Plan
from graphclone.subclone import plan_subclone

QUICK = ("gpt2", "llama", "bert", "vit")
SLOW = (
    *("qwen2", "qwen3", "gemma2", "phi3", "mixtral", "roberta", "deberta_v2", "t5", "bart", "whisper", "clip"),
    *("qwen3_moe", "olmoe", "distilbert", "electra", "albert", "opt", "gpt_neox", "falcon", "gemma3", "deit", "dinov2"),
)
FAMILIES = [*QUICK, *(pytest.param(name, marks=pytest.mark.long) for name in SLOW)]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loaded_checkpoint_is_the_slim_model(name, pretrained, tmp_path, planned):
    parent = load(zoo.export(name, "legacy17"))
    report = write_checkpoint(parent, planned(name, parent), pretrained(name), tmp_path / "small")
    assert report.difference < 1e-5
    assert (tmp_path / "small" / "tokenizer_config.json").exists()


@pytest.mark.parametrize("name", QUICK)
def test_dynamo_exports_match_as_well(name, pretrained, tmp_path, planned):
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


def test_blocks_that_share_their_weights_lose_none(pretrained, tmp_path):
    parent = load(zoo.export("albert", "dynamo18"))
    report = write_checkpoint(parent, Plan(blocks={"": (1, 4)}), pretrained("albert"), tmp_path / "small")
    assert report.difference < 1e-5 and not report.dropped


def test_what_the_first_block_holds_for_all_moves_on(pretrained, tmp_path):
    parent = load(zoo.export("t5", "legacy17"))
    plan = Plan(blocks={"encoder": (2, 4), "decoder": (1, 3)})
    report = write_checkpoint(parent, plan, pretrained("t5"), tmp_path / "small")
    assert report.difference < 1e-5
    assert not any("relative_attention_bias" in name for name in report.dropped)
    assert len(report.dropped) == 3 * 9 + 2 * 14


def test_native_scales_reach_the_checkpoint(pretrained, tmp_path, drawn):
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


@pytest.mark.parametrize("plan, why", [
    (Plan(bias={"transformer.h.0.attn.c_attn.weight": np.zeros(144)}), "no place for"),
    (Plan(untie={"transformer.wte.weight": "head"}), "keeps tied"),
])  # fmt: skip
def test_what_a_plan_adds_is_refused(pretrained, tmp_path, plan, why):
    with pytest.raises(CutError, match=why):
        write_checkpoint(load(zoo.export("gpt2", "legacy17")), plan, pretrained("gpt2"), tmp_path / "small")


def real_parent() -> Path:
    places = [os.environ.get("GRAPHCLONE_DATA", ""), Path(__file__).parents[3] / "shared" / "models"]
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
