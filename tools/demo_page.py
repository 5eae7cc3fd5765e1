"""Draw the demo's result: both validation curves as a PNG, and a self-contained HTML page around the same drawing."""

import io
from pathlib import Path

import jinja2
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

COLOURS = {"subcloned": "#0b6e4f", "random": "#b4532a"}
INK, FAINT = "#1d2a33", "#8a949b"


def draw(arms, result: dict):
    """Return a figure: the mean curve of each start, its seeds thin behind it, and the steps between the two."""
    style = {
        "font.family": ["DejaVu Sans"],
        "font.size": 10.5,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": FAINT,
        "xtick.color": INK,
        "ytick.color": INK,
        "svg.hashsalt": "graphclone",
    }
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(8.4, 4.9), layout="constrained")
        for arm in arms:
            colour = COLOURS[arm.name]
            if len(arm.runs) > 1:
                for run in arm.runs:
                    axes.plot(run.steps, run.losses, color=colour, linewidth=0.8, alpha=0.35)
            axes.plot(arm.steps, arm.mean, color=colour, linewidth=2.4)
        _label_curves(axes, arms)
        _mark_target(axes, result)
        axes.set_xlabel(f"training step ({result['batch']:,} characters each)")
        axes.set_ylabel("validation loss, nats per character")
        axes.set_xlim(0, result["steps"] * 1.005)
        highest = max(loss for arm in arms for step, loss in zip(arm.steps, arm.mean, strict=True) if step >= 20)
        axes.set_ylim(min(result["parent_loss"], *(arm.mean[-1] for arm in arms)) - 0.08, highest + 0.1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e7eaec", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure


def write_png(arms, result: dict, path: Path) -> None:
    """Write the drawing, 1680 pixels wide."""
    figure = draw(arms, result)
    figure.savefig(path, dpi=200, metadata={"Software": None})
    pyplot.close(figure)


def write_page(arms, result: dict, path: Path) -> None:
    """Write one HTML file that needs nothing beside it: the drawing as SVG, the table, what both children write."""
    figure = draw(arms, result)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    svg = buffer.getvalue()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string((Path(__file__).parent / "demo_page.html").read_text(encoding="utf-8"))
    page = template.render(arms=arms, colours=COLOURS, svg=svg[svg.index("<svg") :], result=result)
    path.write_text(page, encoding="utf-8")


def _label_curves(axes, arms) -> None:
    """Name each curve beside itself, where the curves are apart, instead of in a legend."""
    middle = next(i for i, step in enumerate(arms[0].steps) if step >= arms[0].steps[-1] * 0.32)
    ordered = sorted(arms, key=lambda arm: arm.mean[middle])
    for arm, above in zip(ordered, (False, True), strict=True):
        axes.annotate(
            f"{arm.name} start, rate {arm.rate:g}",
            (arm.steps[middle], arm.mean[middle]),
            xytext=(6, 9) if above else (-6, -9),
            textcoords="offset points",
            ha="left" if above else "right",
            va="bottom" if above else "top",
            color=COLOURS[arm.name],
            fontweight="bold",
        )


def _mark_target(axes, result: dict) -> None:
    """Draw the parent's loss, the random child's final loss, and the arrow of the steps that are saved."""
    axes.axhline(result["parent_loss"], color=FAINT, linewidth=1, linestyle=(0, (1, 2)))
    label = f"parent, {result['parent_loss']:.3f}"
    axes.annotate(label, (0, result["parent_loss"]), xytext=(6, 4), textcoords="offset points", color=FAINT, fontsize=9)
    target, reached = result["target"], result["reached"]
    axes.axhline(target, color=COLOURS["random"], linewidth=1, linestyle=(0, (4, 3)), alpha=0.7)
    if not reached or reached >= result["steps"]:
        return
    arrow = {"arrowstyle": "->", "color": INK, "lw": 1.4}
    axes.annotate("", (reached, target), xytext=(result["steps"], target), arrowprops=arrow)
    axes.plot([reached], [target], "o", color=COLOURS["subcloned"], markersize=7, zorder=5)
    axes.annotate(
        f"{reached:.0f} steps instead of {result['steps']}: {result['steps'] / reached:.1f} times fewer",
        ((reached + result["steps"]) / 2, target),
        xytext=(0, -7),
        textcoords="offset points",
        ha="center",
        va="top",
        fontweight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85},
    )
