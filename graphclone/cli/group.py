"""Group: the list of commands; each is imported only when it is called."""

import importlib

import click

COMMANDS = {
    "show": "Print a model's dimensions, blocks and what cannot be cut.",
    "calibrate": "Measure activations on data and save the statistics.",
    "subclone": "Cut a model to target sizes (the main job).",
    "apply": "Apply a plan file to a model.",
    "verify": "Check a model, or a child against its parent.",
    "torch": "Write a model as trainable PyTorch source and weights.",
    "checkpoint": "Apply a plan to the original checkpoint.",
    "run": "Run a pipeline of passes on a model.",
    "ops": "List the operators whose axes are understood.",
    "passes": "List the passes that are installed.",
}


class LazyGroup(click.Group):
    """A group that knows its commands' names and summaries without importing them."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"graphclone.cli.{name}").command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="graphclone", message="%(package)s %(version)s")
def group() -> None:
    """Cut any transformer exported to ONNX to an exact smaller size, ready to train in PyTorch.

    \b
    graphclone show gpt2.onnx
    graphclone subclone gpt2.onnx --data batches.npz --hidden 384 --layers 6 -o small.onnx
    """
