"""Files of a checkpoint: formats, shards, element types; nothing is written that was not compared."""

import json
import shutil

import numpy as np
import pytest
import torch
import zoo
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig

from graphclone.checkpoint import read_checkpoint, write_checkpoint
from graphclone.checkpoint.files import write_tensors
from graphclone.cli import main
from graphclone.errors import CheckFailed, InputError
from graphclone.model import load
from graphclone.plan import Plan
from graphclone.weights import Weight


def test_files_of_torch_become_safetensors(pretrained, tmp_path, planned):
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


def test_shards_stay_shards(tmp_path, planned):
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


def test_half_precision_checkpoints_stay_half(pretrained, tmp_path, planned):
    folder = shutil.copytree(pretrained("llama"), tmp_path / "half")
    tensors = {name: value.astype(np.float16) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    parent = load(zoo.export("llama", "legacy17"))
    report = write_checkpoint(parent, planned("llama", parent), folder, tmp_path / "small", check=False)
    assert len(report.matched) == len(tensors)
    assert {value.dtype.name for value in load_file(tmp_path / "small" / "model.safetensors").values()} == {"float16"}


def test_a_lone_file_gets_its_weights_alone(pretrained, tmp_path, planned):
    parent = load(zoo.export("vit", "legacy17"))
    report = write_checkpoint(
        parent, planned("vit", parent), pretrained("vit") / "model.safetensors", tmp_path / "small"
    )
    assert [path.name for path in (tmp_path / "small").iterdir()] == ["model.safetensors"]
    assert report.difference is None and "config.json" in report.note


@pytest.mark.parametrize(("value", "said"), [(np.nan, "differs from the slim model's by inf"), (None, "returns none")])
def test_nothing_passes_that_was_not_compared(value, said, pretrained, tmp_path, monkeypatch, planned):
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


def test_a_wrong_result_is_not_written(pretrained, tmp_path, planned):
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


def test_the_command(pretrained, tmp_path, capsys, planned):
    model = zoo.export("gpt2", "legacy17")
    planned("gpt2", load(model)).save(tmp_path / "plan.json")
    arguments = ["--plan", tmp_path / "plan.json", "--from", pretrained("gpt2"), "-o", tmp_path / "small"]
    assert main(["checkpoint", str(model), *map(str, arguments)]) == 0
    said = capsys.readouterr()
    assert "differ from the slim model's by" in said.out and "Loading weights" not in said.err
    assert AutoConfig.from_pretrained(tmp_path / "small").n_layer == 3
