"""A config.json says the child's sizes, or the refusal names the field that cannot."""

import json
import shutil

import pytest
import zoo

from graphclone.analysis import analyse
from graphclone.checkpoint import write_checkpoint
from graphclone.checkpoint.config import rewrite_config
from graphclone.checkpoint.fitting import fit_config
from graphclone.errors import CutError
from graphclone.model import load
from graphclone.plan import Plan
from graphclone.resolution import resolve


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


def test_fields_that_make_a_size_together_are_named(pretrained, tmp_path):
    parent = load(zoo.export("segformer", "legacy17"))
    plan = Plan(keep={"blocks.0.ffn": tuple(range(50)), "blocks.1.ffn": tuple(range(50))})
    with pytest.raises(CutError, match=r"its 'ffn', .*mlp.* of 'hidden_sizes.0' and 'mlp_ratios.0', and no value"):
        write_checkpoint(parent, plan, pretrained("segformer"), tmp_path / "small")


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


def test_labels_are_numbered_anew(pretrained, tmp_path):
    parent = load(zoo.export("vit", "legacy17"))
    assert write_checkpoint(parent, Plan(keep={"head_0": (2, 5, 11)}), pretrained("vit"), tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["id2label"] == {"0": "LABEL_2", "1": "LABEL_5", "2": "LABEL_11"}
    assert config["label2id"] == {"LABEL_2": 0, "LABEL_5": 1, "LABEL_11": 2}


def test_a_config_of_another_framework_is_left_out(pretrained, tmp_path, planned):
    folder = shutil.copytree(pretrained("vit"), tmp_path / "timm")
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_tiny", "num_features": 48}))
    parent = load(zoo.export("vit", "legacy17"))
    report = write_checkpoint(parent, planned("vit", parent), folder, tmp_path / "small")
    assert report.difference is None and "model_type" in report.note
    assert not (tmp_path / "small" / "config.json").exists()
