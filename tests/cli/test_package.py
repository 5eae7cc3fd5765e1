"""The package's public names, and how long a first word takes."""

import subprocess
import sys

HEAVY = ("numpy", "onnx", "onnxruntime", "torch", "onnx_graphsurgeon", "rich")


def loaded_by(code):
    """Return which heavy packages a line of Python imports."""
    line = f"{code}; import sys; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
    return ended.stdout.split("\n")[-2].split()


def test_importing_it_imports_nothing_heavy():
    assert loaded_by("import graphclone") == []


def test_help_imports_nothing_heavy():
    assert loaded_by("from graphclone.cli import main; main(['subclone', '--help'])") in ([], ["rich"])


def test_public_names_are_there_and_stay_what_they_are():
    code = (
        "import graphclone, graphclone.verify, graphclone.subclone, graphclone.pytorch\n"
        "assert all(callable(getattr(graphclone, name)) for name in graphclone.__all__)\n"
        "assert graphclone.verify.__name__ == 'verify' and graphclone.subclone.__name__ == 'subclone'\n"
        "from graphclone.verify import Report\n"
        "try: graphclone.lode\n"
        "except AttributeError as error: assert 'load' in str(error)\n"
        "else: raise AssertionError"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
