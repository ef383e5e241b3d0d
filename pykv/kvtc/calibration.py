"""Calibration: from a model and texts to an artefact."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pykv import whole_files
from pykv.errors import CapacityError, DtypeError, InstallError, NumberError, ParameterError, quoted
from pykv.kvtc import groups as groups_coder
from pykv.kvtc import importance, plans
from pykv.kvtc import rows as rows_of
from pykv.kvtc.artefact import SINKS, Artefact, Group, Side, Text, problems
from pykv.kvtc.basis import inverse, orthonormal, weigh
from pykv.kvtc.coder import GROUP
from pykv.kvtc.v0 import KvtcConfig
from pykv.llm import LLM, memory
from pykv.number_texts import counted
from pykv.ops import linear
from pykv.options import check_flag, check_type, check_whole
from pykv.terminal import note

RATIOS = (8, 16, 32, 64)
_MOST_RATIO = 1024
HELD = 6  # one row in HELD is held out,
MOST_HELD = 8192  # but at most this many in all
_ROWS_PER_FEATURE = 2  # with fewer rows the basis fits their noise
_WINDOW = 1024  # tokens
_BLOCK = 4096  # rows on the device at a time
_OP = "kvtc.calibrate"


def calibrate(
    model: LLM | str,
    texts: Mapping[str, str],
    *,
    out: str | os.PathLike[str] | None = None,
    ratios: Sequence[int] = RATIOS,
    groups: str | int | Sequence[Sequence[int]] = "joint",
    tokens: int | None = None,
    window: int | None = None,
    rank: int | None = None,
    progress: bool = False,
) -> Artefact:
    """Find the basis of a model's keys and values, and the bits of its components at each ratio.

    The model reads the texts in windows, each from an empty cache. The mean and the basis are
    fitted to the first part of each text; steps and bits to the last sixth (at most 8,192 rows in
    all), where the plans also measure their errors.

    Args:
        model: an LLM, whose device runs the calibration, or an argument for pykv.LLM.
        texts: by name. Kinds matter more than amounts: give at least four that resemble what the
            caches will hold. Needs two rows for each feature: 11,520 tokens for SmolLM2 135M.
        out: path of the artefact. `out`.rows keeps the rows until it is saved, so that an
            interrupted run resumes where it stopped. None: rows stay in memory, nothing is saved.
        ratios: of float16 rows to coded ones.
        groups: layers that share a basis: "joint", all; "windows", full-attention layers and the
            layers of each sliding window separately; a number of consecutive layers; or lists of
            layers. Larger groups need fewer bits: groups of 5 out of 30 layers raise the error by a
            third.
        tokens: to read at most, an equal share of each text; None: all.
        window: tokens of a window; None: 1,024, or the context if that is less.
        rank: components at most, a multiple of 32; None: half of the features.
        progress: print the memory needed to stderr, and show bars if that is a terminal.

    Returns:
        The artefact.

    Raises:
        ParameterError: there is too little text, an option is out of range, no plan reaches a
            ratio, another process calibrates to `out`, or `out`.rows is not a file of rows.
        DtypeError: an argument has another type.
        CapacityError: memory, or the disk of `out`, is too small; nothing has been computed yet.
        InstallError: CuPy finds no cuBLAS.
        NumberError: keys or values are not finite in float16, or have fewer directions than `rank`;
            or activations are all zero, or beyond float32.
        OSError: a file cannot be written.

    Waits for the GPU. Source: KVTC (arXiv 2511.01815), except the coder, see pykv.kvtc.coder.
    """
    check_flag(_OP, "progress", progress)
    path = None if out is None else whole_files.regular_path(_OP, out, "out")
    texts = _checked_texts(_OP, texts)
    chosen = _checked_ratios(ratios)
    check_type(_OP, "model", model, (LLM, str), "a pykv.LLM or a text")
    llm = LLM(model, progress=progress) if isinstance(model, str) else model
    if llm.xp is not np and not linear.has_cublas():
        raise InstallError(
            f"{_OP}: CuPy finds no cuBLAS, expected the package nvidia-cublas (CUDA 13) or "
            'nvidia-cublas-cu12 (CUDA 12); device="cpu" needs none'
        )
    config = llm.model.config
    if window is None:
        window = min(_WINDOW, config.context)
    window = check_whole(_OP, "window", window, SINKS + 2, config.context)
    layers = _checked_groups(groups, config.windows)
    head_dim = config.head_dim
    width = config.kv_heads * head_dim
    widest = width * max(map(len, layers))
    most = _checked_rank(rank, widest)
    _checked_rank(None, width * min(map(len, layers)))
    for of_group in layers:
        for ratio in chosen:
            plans.budget(width * len(of_group), ratio)

    ids, named = _tokens(_OP, llm, texts, tokens)
    windows, counts = _windows(llm, ids, window)
    if sum(counts) < _ROWS_PER_FEATURE * widest:
        of_each = f" with at most {tokens // len(texts):,} of each" if tokens and texts else ""
        raise ParameterError(
            f"{_OP}: texts has {counted(sum(map(len, ids)), 'token')}{of_each}, expected at least "
            f"{_ROWS_PER_FEATURE * widest + SINKS * len(windows):,}: two for each of {widest:,} "
            f"features, and {SINKS} for each window"
        )
    model_facts = llm.fingerprint
    facts = dict(
        model=[model_facts.sha256, llm.contents],
        weights=llm.weights_dtype,
        window=window,
        sinks=SINKS,
    )
    facts |= dict(texts=[list(t) for t in named])
    _require(path, sum(counts), width * config.num_layers, widest, most, llm.xp, progress)
    kept = None if path is None else whole_files.regular_path(_OP, f"{path}.rows")
    with closing(rows_of.Rows(width * config.num_layers, counts, kept, facts)) as rows:
        _collect(llm, windows, rows, progress)
        select, counting = _split(windows, counts), _importance(llm, windows)
        with _bar(progress, 2 * len(layers), "bases", "") as bar:

            def side(which: int, of_group: tuple[int, ...]) -> tuple[plans.Found, float]:
                with llm.turn():
                    weights, unit = importance.weights_of(counting[which, list(of_group)])
                    found = _find(rows, which, of_group, weights, select, most, llm.xp)
                bar.update(1)
                return found, unit

            def group(of_group: tuple[int, ...]) -> Group:
                (k, of_k), (v, of_v) = side(0, of_group), side(1, of_group)
                with llm.turn():
                    return Group(of_group, *plans.plan(k, v, (of_k, of_v), chosen, llm.xp))

            fitted = tuple(group(of_group) for of_group in layers)
        artefact = Artefact(model_facts, fitted, named)
        for name, has, expected in problems(artefact):
            raise NumberError(f"{_OP}: {name} would be {quoted(has)}, expected {expected}")
        if path is not None:
            artefact.save(path)
        rows.remove()
    return artefact


def compare_coders(
    model: LLM, artefact: Artefact, texts: Mapping[str, str], *, tokens: int | None = None
) -> list[tuple[tuple[int, ...], str, groups_coder.Comparison]]:
    """Compare the static coder with the paper's: both are planned on the rows of `texts` and coded
    at the bytes that the paper's takes after DEFLATE.

    Args:
        model: the LLM of the artefact.
        artefact: gives the bases and the ratios.
        texts: by name.
        tokens: to read at most, an equal share of each text; None: all.

    Returns:
        Layers, "k" or "v", and the comparison, for each group of layers, side and ratio.

    Raises:
        ParameterError: the artefact is of another model, or there are too few tokens for a row.
        DtypeError: an argument has another type.

    All but the model runs on the host: a minute or two for each side of 6,000 features.
    """
    found = []
    for layers, side, of_side, centred in _centred(
        "kvtc.compare_coders", model, artefact, texts, tokens
    ):
        centred = weigh(centred, of_side.weights.astype(np.float32))
        kept = centred @ of_side.basis.astype(np.float32)
        dropped = float(np.square(centred).sum(dtype=np.float64))
        dropped -= float(np.square(kept).sum(dtype=np.float64))
        for one in groups_coder.compare(kept, dropped, len(of_side.mean), artefact.ratios):
            found.append((layers, side, one))
    return found


def v0_configs(
    model: LLM,
    artefact: Artefact,
    texts: Mapping[str, str],
    ratio: int,
    *,
    tokens: int | None = None,
) -> dict[tuple[tuple[int, ...], str], KvtcConfig]:
    """Configs of v0 streams with the paper's plan for rows of texts as ranges. With them,
    pykv.kvtc.v0 codes rows [n, F] of all layers of a group.

    Args:
        model, artefact, texts, tokens: as in compare_coders.
        ratio: of float16 rows to the stream without its headers; any.

    Returns:
        A config for each group of layers and side, keyed by (layers, "k" or "v"). A row is
        [layer, head, dim], keys before their rotation.

    Raises:
        ParameterError: as compare_coders, or no plan reaches the ratio.
        DtypeError: an argument has another type.

    Runs where compare_coders does.
    """
    op = "kvtc.v0_configs"
    ratio = check_whole(op, "ratio", ratio, 1)
    found = {}
    for layers, side, of_side, centred in _centred(op, model, artefact, texts, tokens):
        # A v0 stream has no weights: its basis spans W^-1 @ basis, see Side.
        spanned = weigh(of_side.basis.T.astype(np.float32), inverse(of_side.weights)).T
        basis = orthonormal(spanned, np).astype(np.float16)
        kept = centred @ basis.astype(np.float32)
        order = np.argsort(-np.square(kept).sum(axis=0))
        basis, kept = basis[:, order], kept[:, order]
        found[layers, side] = groups_coder.v0_config(of_side.mean, basis, kept, ratio)
    return found


def _centred(
    op: str, model: Any, artefact: Any, texts: Any, tokens: int | None
) -> Iterator[tuple[tuple[int, ...], str, Side, Any]]:
    """For each group and side: layers, "k" or "v", the side, and the rows of texts less the
    artefact's mean, [n, F] float32."""
    check_type(op, "artefact", artefact, Artefact, "a pykv.kvtc.Artefact")
    check_type(op, "model", model, LLM, "a pykv.LLM")
    facts = model.fingerprint
    if difference := artefact.model.difference(facts):
        raise ParameterError(f"{op}: artefact has {difference}")
    ids, _ = _tokens(op, model, _checked_texts(op, texts), tokens)
    windows, counts = _windows(model, ids, min(_WINDOW, model.model.config.context))
    if not sum(counts):
        raise ParameterError(
            f"{op}: texts has {counted(sum(map(len, ids)), 'token')}, expected more"
        )
    width = facts.kv_heads * facts.head_dim
    rows = rows_of.Rows(width * facts.layers, counts)
    _collect(model, windows, rows, False)
    for group in artefact.groups:
        columns = _columns(group.layers, width)
        for side, of_side in enumerate((group.k, group.v)):
            every = [slice(None)] * len(windows)
            centred = np.concatenate([*rows.blocks(side, columns, every, _BLOCK)]).astype(
                np.float32
            )
            centred -= of_side.mean
            yield group.layers, "kv"[side], of_side, centred


def _checked_rank(rank: int | None, features: int) -> int:
    """The largest number of components of a group of so many `features`, a multiple of 32."""
    most = features // GROUP * GROUP
    if not most:
        raise ParameterError(f"{_OP}: rows have {features} features, expected at least {GROUP}")
    if rank is None:
        return max(GROUP, features // 2 // GROUP * GROUP)
    if check_whole(_OP, "rank", rank, GROUP, most) % GROUP:
        raise ParameterError(f"{_OP}: rank is {rank}, expected a multiple of {GROUP}")
    return int(rank)


def _checked_texts(op: str, texts: Any) -> dict[str, str]:
    check_type(op, "texts", texts, Mapping, "a mapping of names to texts")
    for name, text in texts.items():
        if not (isinstance(name, str) and isinstance(text, str)):
            raise DtypeError(f"{op}: texts has {quoted(name, 40)}, expected names and texts alone")
        if not (name.isprintable() and 0 < len(name.encode()) <= 96):
            raise ParameterError(
                f"{op}: texts has the name {quoted(name, 200)}, expected 1 to 96 printable bytes"
            )
    return dict(texts)


def _checked_ratios(ratios: Any) -> tuple[int, ...]:
    try:
        given = list(islice(ratios, _MOST_RATIO))  # more numbers up to that cannot rise
    except TypeError:
        raise DtypeError(f"{_OP}: ratios is {quoted(ratios)}, expected whole numbers") from None
    found = tuple(check_whole(_OP, "ratios", ratio, 2, _MOST_RATIO) for ratio in given)
    if not found or list(found) != sorted(set(found)):
        raise ParameterError(f"{_OP}: ratios is {quoted(ratios)}, expected rising numbers")
    return found


def _checked_groups(groups: Any, windows: tuple[int | None, ...]) -> list[tuple[int, ...]]:
    """Layers of each group."""
    L = len(windows)
    if isinstance(groups, (str, bytes)):
        if groups == "joint":
            return [tuple(range(L))]
        if groups == "windows":
            kinds = dict.fromkeys(windows)  # in the order of layers
            return [tuple(i for i in range(L) if windows[i] == kind) for kind in kinds]
        raise ParameterError(
            f"{_OP}: groups is {quoted(groups)}, expected joint, windows or layers"
        )
    if not isinstance(groups, Sequence):
        size = check_whole(_OP, "groups", groups, 1, L)
        return [tuple(range(i, min(i + size, L))) for i in range(0, L, size)]
    try:
        found = [tuple(check_whole(_OP, "groups", i, 0, L - 1) for i in group) for group in groups]
    except TypeError:
        raise DtypeError(f"{_OP}: groups is {quoted(groups)}, expected lists of layers") from None
    if sorted(i for group in found for i in group) != list(range(L)) or not all(found):
        raise ParameterError(
            f"{_OP}: groups is {quoted(groups)}, expected each of {L} layers in one of them"
        )
    return [tuple(sorted(group)) for group in found]


def _tokens(
    op: str, llm: LLM, texts: dict[str, str], most: int | None
) -> tuple[list[list[int]], tuple[Text, ...]]:
    """The ids of each text, an equal share of `most` for each, and the artefact's facts of it."""
    ids = [llm.tokenizer.encode(text, bos=False) for text in texts.values()]
    if most is not None:
        share = check_whole(op, "tokens", most, 1) // max(1, len(ids))
        ids = [of_text[:share] for of_text in ids]
    named = tuple(
        Text(name, hashlib.sha256(text.encode()).hexdigest(), len(of_text))
        for (name, text), of_text in zip(texts.items(), ids, strict=True)
        if of_text
    )
    return [of_text for of_text in ids if of_text], named


def _windows(llm: LLM, ids: list[list[int]], tokens: int) -> tuple[list[rows_of.Window], list[int]]:
    """The windows of texts, and the number of rows of each."""
    bos = llm.tokenizer.bos_id if llm.tokenizer.add_bos else None
    windows = rows_of.windows_of(ids, tokens, bos)
    return windows, [max(0, len(w.ids) - SINKS) for w in windows]


def _require(
    path: Path | None, count: int, total: int, widest: int, rank: int, xp: Any, progress: bool
) -> None:
    """Print the memory and disk space that a calibration takes.

    Raises:
        CapacityError: one of them is too small.
    """
    stored = 4 * count * total  # K and V in float16
    held = min(count // HELD, MOST_HELD)
    fit = 4 * (2 * widest**2 + 5 * widest * rank + 3 * held * rank + 2 * _BLOCK * widest)
    of_host = stored if path is None else 0
    if progress:
        where = "memory" if path is None else f"{path.name}.rows"
        note(
            f"{count:,} rows of {total:,} features: {stored / 1e9:.2f} GB in {where}, "
            f"{fit / 1e9:.2f} GB of {'memory' if xp is np else 'GPU memory'} to fit"
        )
    needs = [(fit + of_host, xp)] if xp is np else [(fit, xp), (of_host, np)]
    for need, place in needs:
        free = memory.free(place)
        if free is not None and need > free:
            where = "the host" if place is np else "the GPU"
            raise CapacityError(
                f"{_OP}: {need / 1e9:.2f} GB are needed, but {where} has {free / 1e9:.2f} GB free; "
                "fewer layers in a group or a smaller rank need less"
            )
    if path is not None:
        existing = path.with_name(path.name + ".rows")
        there = existing.stat().st_size if existing.exists() else 0
        free = shutil.disk_usage(path.parent).free
        if stored - there > free:
            raise CapacityError(
                f"{_OP}: {existing} needs {stored:,} bytes, expected at most the {free:,} that are "
                "free on its disk"
            )


def _collect(llm: LLM, windows: list[rows_of.Window], rows: rows_of.Rows, progress: bool) -> None:
    """Compute and add the rows of the windows that are still missing."""
    with _bar(progress, sum(len(w.ids) for w in windows), "rows", "tok") as bar:
        bar.update(sum(len(w.ids) for w in windows[: len(rows)]))
        for window in windows[len(rows) :]:
            with llm.turn():
                pair = rows_of.collect(llm.model, window.ids, llm.xp)
                rows.append(*(x[SINKS:].reshape(-1, rows.features) for x in pair))
            bar.update(len(window.ids))


def _importance(llm: LLM, windows: list[rows_of.Window]) -> Any:
    """importance.measure, summed over the first window of each text."""
    first = {window.text: window.ids for window in reversed(windows)}
    total: Any = 0
    for ids in first.values():
        with llm.turn():
            total = total + importance.measure(llm.model, ids, llm.xp)
    return total


def _split(windows: list[rows_of.Window], counts: list[int]) -> tuple[list[slice], list[slice]]:
    """For each window, the rows to fit the basis, and the rows held out: the last of each text."""
    of_text: dict[int, int] = {}
    for window, count in zip(windows, counts, strict=True):
        of_text[window.text] = of_text.get(window.text, 0) + count
    share = min(1 / HELD, MOST_HELD / sum(counts))
    left = {text: count - max(1, round(count * share)) for text, count in of_text.items()}
    seen, held = [], []
    for window, count in zip(windows, counts, strict=True):
        first = min(count, left[window.text])
        left[window.text] -= first
        seen.append(slice(0, first))
        held.append(slice(first, count))
    return seen, held


def _find(
    rows: rows_of.Rows,
    side: int,
    layers: tuple[int, ...],
    weights: Any,
    select: tuple[list[slice], list[slice]],
    rank: int,
    xp: Any,
) -> plans.Found:
    """Fit a basis of the keys (0) or the values (1) of some layers, see plans.find."""
    features = len(weights) * weights.shape[1]
    columns = _columns(layers, features // len(layers))

    def blocks(chosen: list[slice]) -> Iterator[Any]:
        return map(xp.asarray, rows.blocks(side, columns, chosen, _BLOCK))

    seen, held = (partial(blocks, chosen) for chosen in select)
    return plans.find(seen, held, weights, min(rank, features // GROUP * GROUP), xp)


def _columns(layers: tuple[int, ...], width: int) -> Any:
    """The columns of some layers in a row; a slice if the layers are adjacent."""
    first, stop = layers[0], layers[-1] + 1
    if stop - first == len(layers):
        return slice(first * width, stop * width)
    return (np.array(layers)[:, None] * width + np.arange(width)).reshape(-1)


def _bar(progress: bool, total: int, what: str, unit: str) -> Any:
    """A progress bar on stderr; hidden without `progress`, or if stderr is no terminal."""
    from tqdm import tqdm

    shown = dict(desc=what, unit=unit, leave=False, disable=None if progress else True)
    return tqdm(total=total, **shown)
