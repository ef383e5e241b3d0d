"""Figures of records of `pykv eval`. Need matplotlib: the extra `plot`."""

from __future__ import annotations

from typing import Any

from pykv.figures import COLORS, STYLE, finish, new_figure

Record = dict[str, Any]
# Colours of changes other than element kinds.
_MORE = ("#882255", "#44aa99", "#332288", "#999933", "#117733", "#aa4499", "#88ccee")


def draw(record: Record) -> Any:
    """The figure of a record."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        figures = {"needles": _needles, "continuation": _continuation, "kvtc": _continuation}
        return figures[record["eval"]](record)


def _needles(record: Record) -> Any:
    """Bytes kept against recall, a panel for each number of keys and place of the question."""
    dense = {row["keys"]: row["recall"] for row in record["rows"] if row["change"] == "dense"}
    panels = [(keys, aware) for keys in dense for aware in (True, False)]
    figure, axes = new_figure(2.6 * len(dense) + 0.8, 2, len(dense), sharex=True, sharey=True)
    for axis, (keys, aware) in zip(axes, panels, strict=True):
        rows = [row for row in record["rows"] if row["keys"] == keys and row["change"] != "dense"]
        _lines(axis, [row for row in rows if row["query_aware"] == aware], "recall")
        axis.axhline(dense[keys], color="#222222", lw=0.8, label="dense")
        axis.set_ylim(-0.03, 1.03)
        axis.set_xlim(0, max(1.03, axis.get_xlim()[1]))
        how = "seen" if aware else "not seen"
        axis.set_title(f"{keys} {'key' if keys == 1 else 'keys'}, question {how}", loc="left")
        axis.grid(alpha=0.3)
    for axis in axes[::2]:
        axis.set_ylabel("answers that are right")
    for axis in axes[-2:]:
        axis.set_xlabel("bytes kept, of an fp16 cache's")
    _legend(figure, axes)
    title = f"{record['model']}: facts found in {record['tokens']:,} tokens"
    return finish(figure, f"{title}, {record['seeds']} texts", [record])


def _continuation(record: Record) -> Any:
    """Bytes kept against KL, a panel for each text."""
    texts = list(record["texts"])
    figure, axes = new_figure(3.4, len(texts), sharex=True, sharey=True)
    for axis, text in zip(axes, texts, strict=True):
        _lines(axis, [row for row in record["rows"] if row["text"] == text], "kl")
        axis.set_yscale("symlog", linthresh=1e-5, linscale=0.5)
        axis.set_ylim(0, None)
        axis.set_xlim(0, max(1.03, axis.get_xlim()[1]))
        axis.set_xlabel("bytes kept, of an fp16 cache's")
        axis.set_title(text, loc="left")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mean KL from the exact cache, nats")
    _legend(figure, axes)
    title = f"{record['model']}: {record['prefill']:,} tokens of a changed cache, and what follows"
    return finish(figure, title, [record])


def _lines(axis: Any, rows: list[Record], field: str) -> None:
    """A line for each way, which stands before the colon of a change's name: snapkv:0.5."""
    ways: dict[str, list[Record]] = {}
    for row in rows:
        ways.setdefault(row["change"].partition(":")[0], []).append(row)
    for i, (way, some) in enumerate(ways.items()):
        some = sorted(some, key=lambda row: row["share"])
        xs, ys = ([row[name] for row in some] for name in ("share", field))
        style = dict(color=COLORS.get(way, _MORE[i % len(_MORE)]), label=way)
        axis.plot(xs, ys, "s" if way in COLORS else "o-", ms=5, **style)


def _legend(figure: Any, axes: list[Any]) -> None:
    handles: dict[str, Any] = {}
    for axis in axes:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside right center")
