"""A cut vocabulary takes special tokens along."""

import json
import shutil

import pytest
import zoo

from graphclone.checkpoint import write_checkpoint
from graphclone.checkpoint.tokens import Tokens, with_new_tokens
from graphclone.cli import main
from graphclone.errors import CutError
from graphclone.model import load
from graphclone.plan import Plan


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
