"""The training example trains: an ONNX child and a checkpoint, plain, distilled, on two processes, by Trainer."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import train_child
from safetensors.torch import load_file
from train_parent import DATA

import graphclone

SCRIPT = Path(train_child.__file__)
BRIEF = ["--steps", "12", "--batch", "4", "--context", "32"]
SINGLE = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def child(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("child") / "child.onnx"
    model = graphclone.subclone(
        graphclone.load(DATA / "parent.onnx"), by="uniform", rescale="paper", **train_child.TARGET
    )
    model.save(path)
    return path


def losses(text: str) -> tuple[float, float]:
    before, after = re.search(r"validation loss ([\d.]+) -> ([\d.]+)", text).groups()
    return float(before), float(after)


def train(monkeypatch, capsys, *arguments) -> tuple[float, float]:
    monkeypatch.setattr(sys, "argv", ["train_child.py", *map(str, arguments), *BRIEF])
    train_child.main()
    return losses(capsys.readouterr().out)


def test_plain_training_lowers_the_loss_and_keeps_the_names(child, tmp_path, monkeypatch, capsys):
    before, after = train(monkeypatch, capsys, child, "--out", tmp_path)
    assert after < before
    assert "blocks.0.attention.qkv.weight" in load_file(tmp_path / "model.safetensors")


def test_without_a_model_it_makes_the_demos_child(tmp_path, monkeypatch, capsys):
    before, after = train(monkeypatch, capsys, "--out", tmp_path)
    assert after < before


def test_distillation_uses_the_parent_and_trains_the_child_alone(child, tmp_path, monkeypatch, capsys):
    plain = train(monkeypatch, capsys, child, "--out", tmp_path / "plain")
    distilled = train(monkeypatch, capsys, child, "--distil", DATA / "parent.onnx", "--out", tmp_path / "distilled")
    assert distilled[0] == plain[0] and distilled[1] < distilled[0]
    assert distilled[1] != plain[1]
    names = [set(load_file(tmp_path / kind / "model.safetensors")) for kind in ("plain", "distilled")]
    assert names[0] == names[1]


def test_a_checkpoint_trains_and_is_written_as_one(tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers", reason="a checkpoint is read by transformers")
    config = transformers.GPT2Config(vocab_size=65, n_positions=32, n_embd=24, n_layer=2, n_head=3)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "small")
    before, after = train(monkeypatch, capsys, tmp_path / "small", "--out", tmp_path / "trained")
    assert after < before
    assert (tmp_path / "trained" / "config.json").is_file()


def test_two_processes_see_the_same_batches_as_one(child, tmp_path, monkeypatch, capsys):
    alone = train(monkeypatch, capsys, child, "--out", tmp_path / "one")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(SCRIPT), str(child), "--out", str(tmp_path / "two"), *BRIEF]
    done = subprocess.run(command, env=os.environ | SINGLE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert losses(done.stdout) == pytest.approx(alone, abs=2e-3)


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("transformers", "accelerate"))),
    reason="Hugging Face's Trainer needs transformers and accelerate",
)
def test_trainer_lowers_the_loss(child, tmp_path, monkeypatch, capsys):
    before, after = train(monkeypatch, capsys, child, "--trainer", "--distil", DATA / "parent.onnx", "--out", tmp_path)
    assert after < before


def test_trainer_says_what_it_needs(child, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(SystemExit, match="pip install transformers accelerate"):
        train(monkeypatch, capsys, child, "--trainer", "--out", tmp_path)
