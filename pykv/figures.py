"""Figures from records: one style, and files that are the same for the same input.

Needs matplotlib: the extra `plot`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

WIDTH = 8.8  # inches, at 100 pixels each as wide as a README
COLORS = {  # of kinds, told apart by colour-blind readers as well
    "fp16": "#222222",
    "bf16": "#8c8c8c",
    "int8": "#0072b2",
    "e4m3": "#d55e00",
    "e5m2": "#e69f00",
    "k8v4": "#009e73",
    "int4": "#cc79a7",
}
RED = "#c00000"
SUFFIXES = (".svg", ".png")
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: small files that can be searched
    "svg.hashsalt": "pykv",  # the same input gives the same file
}


def new_figure(
    height: float, columns: int = 1, rows: int = 1, **options: Any
) -> tuple[Any, list[Any]]:
    """A figure as wide as a README, and its axes in a list."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def source(records: Iterable[dict[str, Any]]) -> str:
    """Where records come from, for the foot of a figure."""
    found: dict[str, dict[str, None]] = {}
    for one in records:
        for name in ("device", "driver", "cuda", "flashinfer", "torch", "pykv", "commit", "date"):
            if one.get(name):
                found.setdefault(name, {})[str(one[name])] = None
    words = {name: " and ".join(values) for name, values in found.items()}
    device = words.pop("device", "unknown device")
    return ", ".join([device, *(f"{name} {value}" for name, value in words.items())])


def finish(figure: Any, title: str, records: Iterable[dict[str, Any]]) -> Any:
    """Title and foot of a figure."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.supxlabel(source(records), x=0.01, ha="left", fontsize=7.5, color="#666666")
    return figure


def save(figure: Any, out: str) -> None:
    """Write a figure; the same one gives the same bytes."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        metadata = {"Date": None} if str(out).endswith(".svg") else {"Software": None}
        figure.savefig(out, dpi=200, metadata=metadata, facecolor="white")
