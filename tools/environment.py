"""Make the `.venv` that ./tools/test and ./tools/demo run in, with nothing but Python 3.11+ and pip at hand.

A second call with nothing changed takes milliseconds: `.venv/graphclone.json` remembers what was installed, by a digest
of the files that decide it.
"""

import hashlib
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

if sys.version_info < (3, 11):
    found = ".".join(map(str, sys.version_info[:2]))
    raise SystemExit(f"graphclone needs Python 3.11 or newer and this is {found}; try: python3.12 {sys.argv[0]}")

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv"
PYTHON = FOLDER / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = FOLDER / "graphclone.json"
# OpenMP's threads spin while they wait, by default: many times slower where other programs use the cores too.
SHARED_CORES = {"OMP_WAIT_POLICY": "PASSIVE"}
CONSTRAINTS = ROOT / "tools" / "constraints.txt"
DECIDING = (ROOT / "pyproject.toml", CONSTRAINTS)


def ensure(extra: str) -> Path:
    """Return the Python of an environment that holds graphclone, editable, and what `extra` ("test", "demo") needs."""
    deciding = [f"{ROOT} {sys.version}".encode(), *(path.read_bytes() for path in DECIDING)]
    digest = hashlib.sha256(b"".join(deciding)).hexdigest()
    stamp = _stamp()
    if stamp["digest"] == digest and extra in stamp["extras"] and PYTHON.exists():
        return PYTHON

    print(f"Installing graphclone[{extra}] into {FOLDER.name}; the first time takes minutes.", flush=True)
    STAMP.unlink(missing_ok=True)
    pip = _make()
    extras = sorted({*stamp["extras"], extra})
    command = [*pip, "install", "--disable-pip-version-check", "-c", str(CONSTRAINTS)]
    command += ["-e", f"{ROOT}[{','.join(extras)}]", *([] if sys.stdout.isatty() else ["--quiet"])]
    if subprocess.run(command, cwd=ROOT).returncode != 0:
        raise SystemExit("pip could not install graphclone; put right what it says above, then run this again")
    STAMP.write_text(json.dumps({"digest": digest, "extras": extras}))
    return PYTHON


def run(command: list[str], **variables: str) -> int:
    """Run `command` in the repository's root, its environment extended by `variables`; return its exit code."""
    try:
        return subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}).returncode
    except KeyboardInterrupt:
        return 130


def _stamp() -> dict:
    """Return what was installed last: the digest of what decided it, and the extras."""
    try:
        return json.loads(STAMP.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {"digest": "", "extras": []}


def _make() -> list[str]:
    """Make the environment if it is missing or of another Python; return the command that is its pip.

    Some systems (Debian without python3-venv) cannot put pip into a new environment; this Python's pip then serves it.
    """
    config = FOLDER / "pyvenv.cfg"
    same = config.exists() and f"version = {sys.version.split()[0]}" in config.read_text()
    if not same:
        venv.create(FOLDER, clear=True, symlinks=os.name != "nt")
    own = [str(PYTHON), "-m", "pip"]
    if subprocess.run([*own, "--version"], capture_output=True).returncode == 0:
        return own
    if subprocess.run([str(PYTHON), "-m", "ensurepip", "--default-pip"], capture_output=True).returncode == 0:
        return own
    return [sys.executable, "-m", "pip", "--python", str(PYTHON)]
