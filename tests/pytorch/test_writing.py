"""Written folders: standalone source with the same outputs, all or nothing."""

import importlib.util
import subprocess
import sys

import pytest
import torch
import zoo

import graphclone
from graphclone.errors import InputError
from graphclone.pytorch import to_torch, write_torch


def load_folder(folder):
    spec = importlib.util.spec_from_file_location("written_model", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load()


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "vit"])
def test_a_written_folder_gives_the_same_outputs(family, tmp_path):
    model = graphclone.load(zoo.export(family, "dynamo18"))
    written = load_folder(write_torch(model, tmp_path / "out"))
    module = to_torch(model)
    feeds = [torch.from_numpy(zoo.feeds(family, 2, 6)[value.name]) for value in model.inputs]
    given, want = written(*feeds), module(*feeds)
    for left, right in zip(*((each,) if torch.is_tensor(each) else each for each in (given, want)), strict=True):
        assert torch.equal(left, right)
    assert set(written.state_dict()) == set(module.state_dict())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "model.py", "model.safetensors"]
    text = (tmp_path / "out" / "model.py").read_text()
    assert len(text.splitlines()) < 200 and max(map(len, text.splitlines())) <= 140


def test_source_imports_torch_and_safetensors_alone(tmp_path):
    folder = write_torch(graphclone.load(zoo.export("vit", "legacy17")), tmp_path / "out")
    blocker = (
        "import sys\n"
        "class No:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('graphclone', 'onnx', 'onnx_graphsurgeon', 'onnxruntime', 'transformers'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, No())\n"
        f"sys.path.insert(0, {str(folder)!r})\n"
        "from model import load\n"
        "import torch\n"
        "print(tuple(load()(torch.zeros(2, 3, 24, 24)).shape))\n"
    )
    run = subprocess.run([sys.executable, "-c", blocker], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.stdout.strip() == "(2, 13)", run.stderr


def test_a_file_in_the_way_is_an_error_and_nothing_is_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="cannot make the folder"):
        write_torch(graphclone.load(zoo.export("vit", "legacy17")), tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
