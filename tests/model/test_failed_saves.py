"""A save that fails leaves every file as it was."""

import errno
import hashlib
import os
from pathlib import Path

import pytest

from graphclone import atomic
from graphclone.errors import InputError
from graphclone.model import Model, load


class FullDisk:
    """A file on a disk that is full after `room` bytes, or interrupted there."""

    def __init__(self, file, room: int, error: BaseException):
        self.file, self.room, self.error = file, room, error

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise self.error
        return self.file.write(data)


@pytest.mark.parametrize("room", [0, 500, 2000])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_failed_save_changes_nothing(stored, monkeypatch, room, error, contents):
    loaded = load(stored)
    loaded.save(stored.with_name("out.onnx"))
    before = contents(stored.parent)
    loaded.metadata["more"] = "text" * 500
    monkeypatch.setattr(atomic, "open", lambda *args: FullDisk(open(*args), room, error), raising=False)
    expected, message = (InputError, "No space left") if isinstance(error, OSError) else (KeyboardInterrupt, None)
    with pytest.raises(expected, match=message):
        loaded.save(stored.with_name("out.onnx"))
    with pytest.raises(expected, match=message):
        loaded.save(stored)
    assert contents(stored.parent) == before


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_rename_restores_the_data_file(tmp_path, monkeypatch, failing, small, contents, load_external):
    loaded = load_external(tmp_path, small())
    loaded.save(tmp_path / "out.onnx")
    before = contents(tmp_path)
    loaded.graph.nodes[0].inputs[1]._values = loaded.weights["layer.0.weight"].scaled(2)
    calls = []

    def replace(source, target):
        calls.append(target)
        if len(calls) == failing:
            raise OSError(errno.EIO, "Input/output error")
        os.rename(source, target)

    monkeypatch.setattr(atomic.os, "replace", replace)
    with pytest.raises(InputError, match="Input/output error"):
        loaded.save(tmp_path / "out.onnx")
    assert contents(tmp_path) == before


def test_a_file_size_limit_leaves_nothing_behind(stored, tmp_path, contents, run_script):
    script = (
        "import resource, sys; from graphclone.model import load; model = load(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))\n"
        "from graphclone.errors import InputError\n"
        "try: model.save(sys.argv[2])\n"
        "except InputError as error: print(error)\n"
    )
    (tmp_path / "out").mkdir()
    assert "File too large" in run_script(script, stored, tmp_path / "out" / "out.onnx")
    assert not contents(tmp_path / "out")


def test_paths_that_cannot_be_written(tmp_path, small):
    loaded = Model.from_proto(small())
    (tmp_path / "file").write_bytes(b"kept")
    (tmp_path / "folder.onnx").mkdir()
    for path, message in (
        (tmp_path / "file" / "out.onnx", "'.*file' is a file, not a folder"),
        (tmp_path / "file" / "deeper" / "out.onnx", "part of its folder is a file"),
        (tmp_path / "missing" / "out.onnx", "there is no folder '.*missing'; create it first"),
        (tmp_path / "folder.onnx", "it is a folder; name a file in it"),
        (Path("/dev/null"), "device or pipe"),
    ):
        with pytest.raises(InputError, match=message):
            loaded.save(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.onnx"]


def test_saving_over_the_files_the_weights_are_mapped_from(stored):
    loaded = load(stored)
    before = hashlib.sha256(loaded.weights["layer.0.weight"].load().tobytes()).digest()
    for path in (stored, stored, stored.with_name("small.weights")):
        loaded.save(path)
        again = load(path)
        assert hashlib.sha256(again.weights["layer.0.weight"].load().tobytes()).digest() == before
        assert hashlib.sha256(loaded.weights["layer.0.weight"].load().tobytes()).digest() == before
    mode = os.umask(0)
    os.umask(mode)
    assert stored.stat().st_mode & 0o777 == 0o666 & ~mode
