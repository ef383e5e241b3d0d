"""The codec: tokens of a cache to coded tokens and back, with the artefact of their model.

Dimensions: L layers, H KV heads, D head size, P tokens a page, M pages of a sequence, T tokens
(S sinks, C rows, X in the window), F features of a row.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from pykv import cuda, forks, ranges
from pykv.arrays import INT32, UINT8, VECTOR_BYTES, check_module, check_writeable, is_array, on_gpu
from pykv.checker import Dims, checker
from pykv.errors import DtypeError, FormatError, ParameterError, quoted
from pykv.kvtc import sequences
from pykv.kvtc.artefact import Artefact, problems
from pykv.kvtc.loaded import Loaded, identify, load
from pykv.kvtc.stream import Coded, Header, check_bytes
from pykv.number_texts import counted
from pykv.ops import kvtc_code, kvtc_project, kvtc_rows, linear, paged_check
from pykv.options import check_choice, check_flag, check_type, check_whole, page_ids
from pykv.overlaps import check_apart
from pykv.page_arrays import ARRAYS, Ids, check_cache, check_given_scales, check_may_write
from pykv.specs import KVSpec, as_spec

_How = Callable[[], dict[str, Any]]  # see Codec._how


class Codec:
    """Codes tokens at one ratio, and decodes them.

    Args:
        artefact: a pykv.kvtc.Artefact of the model whose caches are coded.
        ratio: one of the artefact's ratios.
        xp: the array module, `numpy` or `cupy`, which decides where the codec runs.
        tokens: rows coded at a time; longer sequences are coded in pieces. The workspace takes
            tokens * 4 * (F + C) bytes, for the C components of K and V together.
        gemm: the matrix product on a GPU, see kvtc_project.project; "own" for calls that are
            captured into a graph.

    Attributes:
        artefact: the SHA-256 that identifies the artefact, in hexadecimal.
        model: the Fingerprint of the model whose caches are coded.
        ratio: as given.
        row_bytes: of a coded token, in all layers.
        sinks, window: how many first and last tokens are not coded as rows, by default.

    Raises:
        ParameterError: the artefact has no such ratio, steps beyond float16, or an invalid field;
            `tokens` is not positive, or `gemm` unknown.
        DtypeError: `artefact` is no Artefact, or `xp` is another module.

    Calls share one workspace: threads take turns, and on a GPU each stream needs a codec of its
    own.
    Source: KVTC (Staniszewski and Lancucki, ICLR 2026), with a static quantiser in place of its
    groups and its entropy coder.

    >>> codec = pykv.kvtc.Codec(artefact, 16)  # doctest: +SKIP
    >>> table = np.array(pages, np.int32)  # doctest: +SKIP
    >>> coded = codec.compress(cache, table, np.arange(1500, dtype=np.int32))  # doctest: +SKIP
    >>> codec.decompress(coded, cache, table)  # doctest: +SKIP
    """

    def __init__(
        self,
        artefact: Artefact,
        ratio: int,
        xp: Any = np,
        *,
        tokens: int = 2048,
        gemm: str = "auto",
    ) -> None:
        op = "Codec"
        check_type(op, "artefact", artefact, Artefact, "a pykv.kvtc.Artefact")
        self.model = model = artefact.model
        for name, has, expected in problems(artefact, lengths=False):
            raise ParameterError(f"{op}: artefact has {name} {quoted(has)}, expected {expected}")
        self.ratio = artefact.check_ratio(op, check_whole(op, "ratio", ratio, 1))
        self._xp = check_module(op, xp)
        self._tokens = check_whole(op, "tokens", tokens, 1, 2**20)
        self._gemm = check_choice(op, "gemm", gemm, linear.GEMMS)
        self.artefact, self._pairing = identify(artefact), model.pairing
        self._sizes = dict(layers=model.layers, heads=model.kv_heads, head_dim=model.head_dim)
        self._features = model.kv_heads * model.head_dim  # of a layer
        self.sinks, self.window = artefact.sinks, artefact.window
        self.row_bytes = artefact.row_bytes(self.ratio)
        self._groups: list[Loaded] = []
        begin = 0
        for group in artefact.groups:
            self._groups.append(load(self._xp, group, model.inv_freq, self.ratio, begin))
            begin = self._groups[-1].end
        elements = [(2 * n.mean.shape[1], sum(map(sum, n.widths))) for n in self._groups]
        rows, components = (self._tokens * n for n in np.max(elements, axis=0).tolist())
        self._rows = self._xp.empty(rows, np.float16)
        self._coefficients = self._xp.empty(components, np.float32)
        if self._xp is not np:
            cuda.synchronize()  # later calls may use any stream, so uploads must be complete
        self._own = [self._rows, self._coefficients]  # the codec's arrays that launches take
        for n in self._groups:
            self._own += [n.places, n.mean, n.inv_freq, *n.bases, *n.back, *n.steps]
        self._kept = Dims()  # caches headers, and the launches of calls by layout
        self._take_turns()
        forks.in_child(self, Codec._take_turns)  # a forked child lacks the thread with the lock

    def __repr__(self) -> str:
        name, size = self.model.architecture, f"{self.row_bytes:,} bytes a token"
        return f'Codec("{name}", ratio {self.ratio}, {size})'

    def _take_turns(self) -> None:
        self._turn = threading.RLock()  # guards the workspace

    def header(
        self,
        tokens: int,
        spec: KVSpec | str,
        *,
        sinks: int | None = None,
        window: int | None = None,
    ) -> Header:
        """The header of a stream of so many tokens; its `nbytes` is the size of the data.

        Args:
            tokens: T, including sinks and window.
            spec: KVSpec of the cache of these tokens, or its text.
            sinks, window: how many first and last tokens are not coded as rows, at most all; None:
                as many as the artefact says.

        Raises:
            ParameterError: a number is negative, or exceeds the tokens that are left.
            DtypeError: one is not a whole number.
        """
        op = "Codec.header"
        T = check_whole(op, "tokens", tokens, 0, 2**31 - 1)
        S = min(self.sinks, T) if sinks is None else check_whole(op, "sinks", sinks, 0, T)
        X = min(self.window, T - S) if window is None else window
        X = check_whole(op, "window", X, 0, T - S)
        spec = as_spec(op, spec)

        def make() -> Header:
            facts = self._sizes | dict(tokens=T, sinks=S, window=X, row_bytes=self.row_bytes)
            return Header(self.artefact, self.ratio, **facts, spec=str(spec))

        found: Header = self._kept.keep((T, S, X, spec), make)
        return found

    def compress(  # a cache, a sequence, its uncoded tokens, the output and options
        self,
        cache: Any,
        table: Ids,
        positions: Ids,
        *,
        sinks: int | None = None,
        window: int | None = None,
        hadamard: bool = False,
        out: Any = None,
        check: bool | None = None,
        stream: Any = None,
    ) -> Coded:
        """Code tokens of a sequence.

        Args:
            cache: of the artefact's model, see pykv.pages; of any spec.
            table: [M] int32; the sequence's pages in order. Lists and NumPy arrays are uploaded.
            positions: [T] int32, ascending, likewise; position p lies in page table[p // P].
            sinks, window: as in `header`. Pass sinks=0 for tokens that do not begin a sequence, and
                window=0 for tokens that others follow.
            hadamard: the cache holds Hadamard-rotated heads, see paged_qkv.append; an LLM's cache
                does if KVSpec.wants_hadamard.
            out: uint8 of at least `header(...).nbytes`: on the codec's device, or pinned on the
                host; for a GPU at a multiple of 16 bytes. Allocated on the device if None.
            check: check table and positions first, see kvtc_rows.gather.
            stream: see pykv.cuda.on_stream.

        Returns:
            Coded, over the first bytes of `out` or of a new array. On a GPU it is complete once the
            stream has run the work.

        Raises:
            ParameterError: the cache is of another model, an entry is wrong (with `check`), or
                `out` is read-only.
            CapacityError: `out` is too small; the text says what is needed.
            ShapeError, DtypeError, DeviceError: an array has another shape, dtype or device.
            UnsupportedError: a list is to be uploaded while a CUDA graph is being captured.

        If a token coded as a row has a key that is not finite in float16, all its keys in that
        group of layers decode to NaN; the same holds for values. Other tokens are unaffected.

        On a GPU only enqueues: for each group of layers and up to `tokens` rows, three launches, or
        four with cuBLAS. pykv.graph captures calls with GPU arrays; prepare calls with lists.
        """
        op = "Codec.compress"
        spec, sizes, layouts = self._check_cache(op, cache)
        hadamard = check_flag(op, "hadamard", hadamard)
        with cuda.on_stream(stream, cache.k):
            table = self._indices(op, "table", table, sizes["N"] - 1)
            last = table.size * sizes["P"] - 1
            positions = self._indices(op, "positions", positions, last, sequences.check_rising)
            dims = _check_compress(table, positions)
            header = self.header(dims["T"], spec, sinks=sinks, window=window)
            data = self._output(op, out, header.nbytes)
            if paged_check.enabled(op, check) or self._xp is np:
                looks = partial(sequences.check_sequence, op, table, positions)
                cuda.look(partial(looks, sizes["N"], sizes["P"]))
            coded = Coded(header, data)
            there = ranges.reach(op, "out", data, self._rows)
            reached = _check_out(there)

            def call() -> None:
                others = dict(table=table, positions=positions, **_arrays_of(cache))
                check_apart(op, dict(out=there), others)
                how = partial(self._how, cache, spec, hadamard, check)
                self._compress(Coded(header, there), table, positions, how)

            arrays = (cache.k, cache.v, cache.k_scales, cache.v_scales, table, positions, there)
            key = ("compress", layouts, dims.layouts, reached.layouts, header, hadamard)
            self._enqueue(op, key, arrays, call, check)
        return coded

    def _compress(self, coded: Coded, table: Any, positions: Any, how: _How) -> None:
        """`compress`, with arrays that are checked and on the codec's device."""
        there = coded.arrays()
        for group in self._groups:
            coded_rows = there["rows"][:, group.begin : group.end]
            for piece, rows, exempt in sequences.pieces(coded, self._tokens):
                made = self._rows_of(group, len(rows))
                kvtc_rows.gather(
                    table=table,
                    positions=positions[piece],
                    **group.frame,
                    rows=made,
                    kept_positions=there["positions"][piece],
                    **exempt,
                    **how(),
                )
                if not len(rows):
                    continue
                k, v = self._coefficients_of(group, len(rows), np.float32)
                kvtc_project.project(
                    made[0], made[1], *group.bases, k_out=k, v_out=v, gemm=self._gemm
                )
                kvtc_code.encode(k, v, **group.coder, out=coded_rows[rows.start : rows.stop])

    def decompress(  # likewise
        self,
        coded: Coded,
        cache: Any,
        table: Ids,
        *,
        positions: Ids | None = None,
        layers: range | None = None,
        hadamard: bool = False,
        check: bool | None = None,
        stream: Any = None,
    ) -> None:
        """Write coded tokens into a cache.

        Args:
            coded: from `compress` of a codec with the same artefact and ratio, or from
                stream.parse; data on the codec's device, or pinned on the host.
            cache, table: as in `compress`; the cache may have another spec. Position p goes to page
                table[p // P].
            positions: the expected positions, a list or an array; None: not compared.
            layers: write only these, so that attention over the first layers can start before the
                last are decoded; None: all.
            hadamard, check, stream: as in `compress`.

        Raises:
            FormatError: it was coded with another artefact or ratio, or positions differ.
            ParameterError: the cache is of another model, read-only, or its shared scales are
                unset; there are no such layers; an entry is wrong (with `check`).
            Otherwise as `compress`.

        On a GPU only enqueues, like `compress`, but waits if `positions` are given, or if heads or
        tensors share scales.
        """
        op = "Codec.decompress"
        spec, sizes, layouts = self._check_cache(op, cache)
        header = self._check_coded(op, coded)
        check_may_write(op, "cache", cache)
        chosen, hadamard = self._check_layers(op, layers), check_flag(op, "hadamard", hadamard)
        with cuda.on_stream(stream, cache.k):
            if spec.has_given_scales:
                check_given_scales(op, "cache", cache)
            table = self._indices(op, "table", table, sizes["N"] - 1)
            dims = _check_decompress(table)
            room = dims["M"] * sizes["P"]
            if header.tokens > room:
                raise ParameterError(
                    f"{op}: coded has {counted(header.tokens, 'token')}, expected at most the "
                    f"{room} that the pages of table hold"
                )
            there = Coded(header, ranges.reach(op, "coded", coded.data, self._rows))
            reached = _check_given(there.data)
            if positions is not None:
                sequences.check_positions(op, there.arrays()["positions"], positions)
            if paged_check.enabled(op, check) or self._xp is np:
                looks, given = sequences.check_sequence, there.arrays()["positions"]
                looks = partial(looks, op, table, given, sizes["N"], sizes["P"], writes=True)
                cuda.look(looks)

            def call() -> None:
                others = _arrays_of(cache)
                written = {name: others.pop(name) for name in spec.written(tuple(others))}
                check_apart(op, written, others | dict(coded=there.data, table=table))
                how = partial(self._how, cache, spec, hadamard, check)
                self._decompress(there, table, chosen, how)

            arrays = (cache.k, cache.v, cache.k_scales, cache.v_scales, table, there.data)
            key = ("decompress", layouts, dims.layouts, reached.layouts, header, hadamard, chosen)
            self._enqueue(op, key, arrays, call, check)

    def _decompress(self, coded: Coded, table: Any, layers: range, how: _How) -> None:
        """`decompress`, with arrays that are checked and on the codec's device."""
        there = coded.arrays()
        for group in self._groups:
            part = group.part(layers, self._features)
            if not part.places.size:
                continue
            coded_rows = there["rows"][:, group.begin : group.end]
            for piece, rows, exempt in sequences.pieces(coded, self._tokens):
                made = self._rows_of(part, len(rows))
                if len(rows):
                    k, v = self._coefficients_of(group, len(rows), np.float16)
                    some = coded_rows[rows.start : rows.stop]
                    kvtc_code.decode(some, **group.coder, k_out=k, v_out=v)
                    kvtc_project.restore(
                        k, v, *part.back, k_out=made[0], v_out=made[1], gemm=self._gemm
                    )
                kvtc_rows.scatter(
                    table=table,
                    positions=there["positions"][piece],
                    **part.frame,
                    rows=made,
                    **exempt,
                    **how(),
                )

    def _enqueue(
        self,
        op: str,
        key: Any,
        arrays: tuple[Any, ...],
        call: Callable[[], None],
        check: bool | None,
    ) -> None:
        """Make a call, which checks that arrays are apart. On a GPU `replayed` records its launches
        once for each layout of `arrays`, and checks later calls for overlaps."""
        with self._turn:
            if self._xp is np or paged_check.enabled(op, check):
                call()
            else:
                cuda.replayed(self._kept, key, (*arrays, *self._own), call)

    # --- Checks ---

    def _check_cache(self, op: str, cache: Any) -> tuple[KVSpec, Dims, tuple[Any, ...]]:
        """check_cache, for a cache of the artefact's model."""
        checked = check_cache(op, "cache", cache)
        for letter, (name, size) in zip("LHD", self._sizes.items(), strict=True):
            if (has := checked[1][letter]) != size:
                raise ParameterError(
                    f"{op}: cache has {name}={has}, expected {size} as the artefact's model"
                )
        return checked

    def _check_coded(self, op: str, coded: Any) -> Header:
        check_type(op, "coded", coded, Coded, "a pykv.kvtc.Coded")
        header = coded.header
        wanted = self.header(header.tokens, header.spec, sinks=header.sinks, window=header.window)
        for name, want in vars(wanted).items() if header is not wanted else ():
            if getattr(header, name) != want:
                raise FormatError(
                    f"{op}: coded has {name}={getattr(header, name)}, expected {want} as the codec"
                )
        return wanted

    def _check_layers(self, op: str, layers: Any) -> range:
        count = self._sizes["layers"]
        if layers is None:
            return range(count)
        if not isinstance(layers, range) or layers.step != 1:
            raise DtypeError(f"{op}: layers is {quoted(layers)}, expected a range of step 1")
        if not 0 <= layers.start < layers.stop <= count:
            raise ParameterError(f"{op}: layers is {layers}, expected some of range(0, {count})")
        return layers

    def _indices(self, op: str, name: str, x: Any, most: int, check: Any = None) -> Any:
        """An array on the codec's device; lists and host arrays are checked and uploaded."""
        if is_array(x) and (on_gpu(x) or self._xp is np):
            return x
        ids = page_ids(op, name, x, 0, most).astype(np.int32)
        if check is not None:
            check(op, ids)
        if self._xp is not np:
            cuda.refuse_capture(op, cuda.UPLOADS)
        return self._xp.asarray(ids)

    def _output(self, op: str, out: Any, nbytes: int) -> Any:
        """The first bytes of `out`, or of a new array."""
        if out is None:
            return self._xp.empty(nbytes, np.uint8)
        check_bytes(op, "out", out, nbytes)
        check_writeable(op, "out", out)
        return out if out.size == nbytes else out[:nbytes]

    # --- Parts of a call ---

    def _how(self, cache: Any, spec: KVSpec, hadamard: bool, check: bool | None) -> dict[str, Any]:
        """The cache and options, as kvtc_rows.gather and scatter take them."""
        pools = dict(k_pools=cache.k, v_pools=cache.v)
        pools |= dict(k_scales=cache.k_scales, v_scales=cache.v_scales)
        return dict(pools, spec=spec, pairing=self._pairing, hadamard=hadamard, check=check)

    def _rows_of(self, group: Loaded, n: int) -> Any:
        """A workspace [2, n, F] for rows of K and V."""
        F = group.mean.shape[1]
        return self._rows[: 2 * n * F].reshape(2, n, F)

    def _coefficients_of(self, group: Loaded, n: int, dtype: Any) -> tuple[Any, Any]:
        """Workspaces [n, C] for the coefficients of K and of V."""
        flat = self._coefficients.view(dtype)
        k, v = (n * sum(widths) for widths in group.widths)
        return flat[:k].reshape(n, -1), flat[k : k + v].reshape(n, -1)


_check_compress = checker("Codec.compress", table=("M", INT32), positions=("T", INT32))
_check_decompress = checker("Codec.decompress", table=("M", INT32))
_check_out = checker("Codec.compress", out=("n", UINT8, VECTOR_BYTES))
_check_given = checker("Codec.decompress", coded=("n", UINT8, VECTOR_BYTES))


def _arrays_of(cache: Any) -> dict[str, Any]:
    return {f"cache.{name}": getattr(cache, name) for name in ARRAYS}
