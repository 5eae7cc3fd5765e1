"""Plots: loss against the budget of a training, one curve an arm."""

from pathlib import Path

from convergence.race import Results

COLOURS = ("#7f7f7f", "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#bcbd22")
STYLES = ("-", "--", ":")


def draw(results: Results, stem: Path) -> None:
    """Write stem.png and stem.svg: mean over seeds, with the range as a band; the untrained child at the left edge."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    budgets = sorted({budget for curve in results.trained.values() for budget in curve})
    start = budgets[0] / 2 if budgets else 1
    highest = results.parent_loss
    for number, arm in enumerate(results.arms):
        points = {start: results.untrained[arm.name], **results.trained[arm.name]}
        rows = [
            (budget, [r["report"]["loss"] for r in records]) for budget, records in sorted(points.items()) if records
        ]
        if not rows:
            continue
        steps = [budget for budget, _ in rows]
        means = [sum(values) / len(values) for _, values in rows]
        colour, style = COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]
        axes.plot(steps, means, style, color=colour, label=arm.name, marker="o", markersize=3)
        axes.fill_between(steps, [min(v) for _, v in rows], [max(v) for _, v in rows], color=colour, alpha=0.15, lw=0)
        highest = max(highest, *(value for value in (means[1:] or means)))
    axes.axhline(results.parent_loss, color="black", lw=0.8, ls="--")
    axes.annotate("parent", (start, results.parent_loss), va="bottom", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_xticks([start, *budgets], ["untrained", *map(str, budgets)])
    axes.set_ylim(top=highest * 1.05)
    axes.set_xlabel(f"training steps of {results.batch_tokens:,} tokens, each budget with its own schedule")
    axes.set_ylabel(results.unit)
    axes.set_title(results.title)
    axes.legend(fontsize=7, loc="upper right", ncols=2)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(stem.with_suffix(".png"), dpi=150)
    with matplotlib.rc_context({"svg.hashsalt": "graphclone"}):
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
    pyplot.close(figure)
