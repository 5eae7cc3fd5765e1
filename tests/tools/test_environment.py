"""./tools/test and ./tools/demo install once, and say what to do where they cannot."""

import subprocess

import environment
import pytest


class Recorder(list):
    """The commands that were run, each of which returned `code`."""

    code = 0

    def run(self, command: list[str], **_) -> subprocess.CompletedProcess:
        self.append(command)
        return subprocess.CompletedProcess(command, self.code)


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """Point the module at an empty environment and record the commands it runs instead of running them."""
    monkeypatch.setattr(environment, "STAMP", tmp_path / "stamp.json")
    monkeypatch.setattr(environment, "PYTHON", tmp_path)
    monkeypatch.setattr(environment, "_make", lambda: ["pip"])
    commands = Recorder()
    monkeypatch.setattr(environment.subprocess, "run", commands.run)
    return commands


def test_installs_once(sandbox):
    environment.ensure("test")
    environment.ensure("test")
    assert len(sandbox) == 1
    assert sandbox[0][:2] == ["pip", "install"]


def test_a_second_extra_keeps_the_first(sandbox):
    environment.ensure("test")
    environment.ensure("demo")
    assert any(argument.endswith("[demo,test]") for argument in sandbox[1])


def test_changed_constraints_install_again(sandbox, monkeypatch, tmp_path):
    environment.ensure("test")
    changed = tmp_path / "constraints.txt"
    changed.write_text("torch==3\n")
    monkeypatch.setattr(environment, "DECIDING", (changed,))
    environment.ensure("test")
    assert len(sandbox) == 2


def test_a_failed_installation_is_said_and_not_remembered(sandbox):
    sandbox.code = 1
    with pytest.raises(SystemExit, match="pip could not install"):
        environment.ensure("test")
    assert not environment.STAMP.exists()
