"""The page of a sweep: a table of its runs, the best first, and their loss curves."""

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from cogvideox_factory.report import html

_TITLES = {"validation_loss": "Validation loss", "loss": "Training loss"}


def page(name: str, rows: Sequence[Mapping[str, Any]], curves: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page.

    Args:
        name: of the sweep.
        rows: one a run, as `sweep.results`.
        curves: {measure: {run: (step, value) points}}.
    """
    colours = {row["run"]: f"hsl({round(360 * i / len(rows))} 65% 50%)" for i, row in enumerate(rows)}
    states = [row["state"] for row in rows]
    best = min(rows, key=rank)
    body = [
        html.heading(f"Sweep {name}", 1),
        html.row(
            [html.card(str(states.count(state)), state) for state in ("done", "failed", "stopped", "to do")
             if state in states]
        ),
    ]  # fmt: skip
    if rank(best) < inf:
        measure = "validation loss" if best["validation_loss"] is not None else "loss"
        body.append(html.paragraph(f"Lowest {measure}: {best['run']}"))
    body += [html.heading("Runs"), html.table([_cells(row) for row in sorted(rows, key=rank)], header=list(rows[0]))]
    for measure, title in _TITLES.items():
        lines = {run: points for run, points in curves[measure].items() if points}
        if lines:
            used = {run: colours[run] for run in lines}
            chart = html.line_chart(lines, x_label="steps", colours=list(used.values()))
            body += [html.heading(title), chart, html.legend(used)]
    return html.document(f"Sweep {name}", body)


def rank(row: Mapping[str, Any]) -> float:
    """Return what runs are ordered by: the validation loss, else the training loss; what has neither is last."""
    values = (row["validation_loss"], row["loss"])
    return next((value for value in values if value is not None), inf)


def _cells(row: Mapping[str, Any]) -> list[Any]:
    return ["" if value is None else round(value, 5) if isinstance(value, float) else value for value in row.values()]
