"""A full disk, Ctrl-C and bugs: files appear whole or not at all, and exit codes say what happened."""

import os
import signal

import numpy as np
import pytest

from graphclone.calibration.statistics import Statistics
from graphclone.cli import main

LIMITED = """
import resource, sys
from graphclone.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
raise SystemExit(main(sys.argv[1:]))
"""

SLOW = """
import os, sys, time
from graphclone.cli import main
def fsync(descriptor):
    print("saving", flush=True)
    time.sleep(120)
os.fsync = fsync
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.fixture
def commands(model, data, tmp_path):
    (tmp_path / "plan.json").write_text('{"keep": {"hidden": [0, 1, 2, 3, 4, 5]}}')
    return {
        "apply": ("apply", tmp_path / "plan.json", model, "--no-verify", "-o", tmp_path / "out"),
        "subclone": ("subclone", model, "--hidden", 6, "--by", "first", "--no-verify", "-o", tmp_path / "out"),
        "calibrate": ("calibrate", model, "--data", data, "--provider", "cpu", "-o", tmp_path / "out"),
    }


@pytest.mark.parametrize("name", ["apply", "subclone", "calibrate"])
def test_disk_full_while_saving(start, commands, tmp_path, name):
    (tmp_path / "out").write_text("the old file")
    before = sorted(tmp_path.iterdir())
    process = start(*commands[name], code=LIMITED)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and err.startswith("error: cannot write"), err
    assert err.count("\n") == 1 and "File too large" in err
    assert (tmp_path / "out").read_text() == "the old file" and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["apply", "subclone", "calibrate"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["interrupted", "terminated"])
def test_a_signal_while_saving(start, commands, tmp_path, name, number):
    (tmp_path / "out").write_text("the old file")
    before = sorted(tmp_path.iterdir())
    process = start(*commands[name], code=SLOW)
    while "saving" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert "Traceback" not in err
    assert (tmp_path / "out").read_text() == "the old file" and sorted(tmp_path.iterdir()) == before


@pytest.fixture
def waiting_data(samples, tmp_path_factory):
    """A folder of two batches and a pipe, at which the reader waits."""
    folder = tmp_path_factory.mktemp("batches")
    for number in range(2):
        np.savez(folder / f"{number}.npz", **samples)
    os.mkfifo(folder / "2.npz")
    return folder


@pytest.mark.parametrize("name", ["calibrate", "subclone"])
def test_interrupted_while_calibrating(start, waiting_data, model, tmp_path, name):
    out = tmp_path / "out"
    options = ("--hidden", 6) if name == "subclone" else ()
    process = start(name, model, *options, "--data", waiting_data, "--provider", "cpu", "-o", out)
    pipe = os.open(waiting_data / "2.npz", os.O_WRONLY)  # returns when the command has come to the third batch
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    os.close(pipe)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
    if name == "subclone":
        assert not out.exists()
        return
    stats = Statistics.load(out)
    assert stats.interrupted and (stats.batches, stats.samples) == (2, 24)


def test_a_bug_says_how_to_report_it(cli, model, monkeypatch):
    monkeypatch.delenv("GRAPHCLONE_DEBUG", raising=False)
    monkeypatch.setattr("graphclone.analysis.type_axes", lambda *_: 1 // 0)
    ended = cli("show", model)
    assert ended.code == 3 and "Traceback" not in ended.err and not ended.out
    assert "ZeroDivisionError" in ended.err and "To report it" in ended.err and "GRAPHCLONE_DEBUG=1" in ended.err
    monkeypatch.setenv("GRAPHCLONE_DEBUG", "1")
    assert "Traceback" in cli("show", model).err


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    assert main(["--version"]) == 0
    assert "graphclone" in capsys.readouterr().out
