"""Measure what each way to store keys and values costs in quality, on real models and real text.

    python tools/measure_kinds.py tools/results/cpu-2-cores/kinds.json  # --model, --specs, --tokens
    python -m tools.readme_tables

The second writes its tables. The text is the first 4,096 tokens of two chapters of Python's
language reference, as pydoc has them; it differs a little between Python's versions, so the record
says which.

A first pass keeps exact (float32) keys, values and some queries of every layer. They give, for each
spec, the errors of keys, values and attention outputs when these very rows are stored as the spec
says: encoded and decoded by pykv.kinds, which all kernels agree with bit for bit. Then one pass for
each spec, in which every layer reads such rows, gives its perplexity. Specs with codes are measured
twice: as they are, and with heads mixed by a Hadamard matrix first (and unmixed again, as what
attention makes of them is), as pykv.LLM does for integers. Scales of a head or a tensor
(one layer's keys, or its values) come from the largest magnitudes of the first pass: as good as
calibration can be. Runs on the GPU where there is one.
"""

import argparse
import hashlib
import json
import platform
import sys
import time
from pathlib import Path
from pydoc_data import topics

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pykv
from pykv import PagedKVCache
from pykv.bench import report
from pykv.errors import FormatError, PykvError
from pykv.eval import continuation, replay
from pykv.eval.changes import static_scale, stored
from pykv.ops import paged_decode
from pykv.specs import KVSpec
from pykv.testing import host

TOPICS = ("execmodel", "import")
MODELS = ("smollm2-135m", "gemma3-270m")
CODES = ("int8", "e4m3", "e5m2", "k8v4", "int4")
SPECS = [
    *("fp32", "fp16", "bf16"),
    *(spec for code in CODES for spec in (code, f"{code}:fp32", f"{code}:head", f"{code}:tensor")),
]
EVERY = 64  # one position in so many gives a query whose attention output is judged


# --- Passes ---------------------------------------------------------------------------------------


class Rows(PagedKVCache):
    """The cache of one sequence, in a single page a layer, whose rows went through `store`; keeps
    one query of EVERY.

    Args:
        store: of the layer, 0 for keys or 1 for values, and rows [T, H, D]: rows to keep.
    """

    def __init__(self, config, tokens, xp, store):
        sizes = (config.num_layers, 1, config.kv_heads, config.head_dim)
        super().__init__(*sizes, page_size=tokens, spec="fp32", xp=xp)
        self.queries = [[] for _ in range(config.num_layers)]
        self._filled = [0] * config.num_layers
        self._store = store

    def append_qkv(self, layer, qkv, slots, **options):
        super().append_qkv(layer, qkv, slots, **options)
        start = self._filled[layer]
        stop = self._filled[layer] = start + len(qkv)
        for part, pool in enumerate(self.layers[layer]):
            pool[0, start:stop] = self._store(layer, part, pool[0, start:stop])

    def prefill(self, layer, q, *where, **options):
        first = -(self._filled[layer] - len(q) + 1) % EVERY
        self.queries[layer].append(q[first::EVERY].copy())
        return super().prefill(layer, q, *where, **options)


def perplexity(llm, ids, cache):
    """Run all tokens through the model, filling the cache."""
    total, start = 0.0, 1
    for logits in replay.steps(llm, cache, replay.Place([0]), ids):
        targets = np.array(ids[start : start + len(logits)])
        total += continuation.losses(logits[: len(targets)], targets).sum()
        start += len(logits)
    return float(np.exp(total / (len(ids) - 1)))


def scales_of(exact, spec, hadamard=False):
    """Given scales of every layer, for keys and values."""
    return [
        [
            static_scale(rows[0], kind, spec, hadamard)
            for rows, kind in zip(pair, spec.kinds, strict=True)
        ]
        for pair in exact.layers
    ]


# --- Errors ---------------------------------------------------------------------------------------


class Error:
    """How far rows are from exact ones: the mean cosine of rows, and the norm of all differences
    over that of all rows."""

    def __init__(self):
        self._cosines, self._rows, self._difference, self._whole = 0.0, 0, 0.0, 0.0

    def add(self, got, exact):
        got, exact = (host(x).astype(np.float64) for x in (got, exact))
        norms = np.linalg.norm(got, axis=-1) * np.linalg.norm(exact, axis=-1)
        cosines = (got * exact).sum(-1)[norms > 0] / norms[norms > 0]  # rows of zeros have none
        self._cosines += cosines.sum()
        self._rows += norms.size
        self._difference += ((got - exact) ** 2).sum()
        self._whole += (exact**2).sum()

    def as_dict(self):
        return {
            "cosine": float(self._cosines / self._rows),
            "relative_error": float(np.sqrt(self._difference / self._whole)),
        }


def attend(llm, cache, layer, k, v):
    """Attention outputs of a layer for the queries that the cache kept."""
    xp, config = llm.xp, llm.model.config
    lengths = xp.arange(EVERY, cache.page_size + 1, EVERY, dtype=np.int32)
    table = xp.zeros((len(lengths), 1), np.int32)
    q = xp.concatenate(cache.queries[layer])
    options = dict(scale=config.attention_scales[layer], window=config.windows[layer])
    return host(paged_decode.decode(q, k, v, table, lengths, **options))


def errors(llm, exact, outputs, spec, scales, hadamard=False):
    """Errors of keys, values and attention outputs, over all layers."""
    found = {name: Error() for name in ("k", "v", "attention")}
    for layer, pair in enumerate(exact.layers):
        rounded = [
            stored(rows, kind, spec, scale, hadamard)
            for rows, kind, scale in zip(pair, spec.kinds, scales[layer], strict=True)
        ]
        for name, got, rows in zip("kv", rounded, pair, strict=True):
            found[name].add(got, rows)
        got = attend(llm, exact, layer, *(llm.xp.asarray(rows) for rows in rounded))
        found["attention"].add(got, outputs[layer])
    return {name: error.as_dict() for name, error in found.items()}


def measure(model, specs, tokens, device="auto"):
    """The record of one model."""
    llm = pykv.LLM(model, device=device)
    config = llm.model.config
    text = "\n\n".join(topics.topics[name] for name in TOPICS)
    ids = llm.tokenize(text)[:tokens]
    if len(ids) < tokens or tokens < EVERY:
        raise FormatError(f"measure_kinds: {len(ids)} tokens, expected {EVERY} to {tokens}")
    exact = Rows(config, tokens, llm.xp, lambda layer, part, rows: rows)
    exact_perplexity = perplexity(llm, ids, exact)
    outputs = [attend(llm, exact, layer, *pair) for layer, pair in enumerate(exact.layers)]
    rows = []
    ways = [(spec, how) for spec in specs for how in (False, True)[: 1 + spec.has_scales]]
    for spec, hadamard in ways:
        started = time.perf_counter()
        scales = scales_of(exact, spec, hadamard)

        def store(layer, part, values, spec=spec, scales=scales, hadamard=hadamard):
            kind, scale = spec.kinds[part], scales[layer][part]
            return llm.xp.asarray(stored(values, kind, spec, scale, hadamard))

        row = {
            "spec": str(spec),
            "hadamard": hadamard,
            "bytes_per_token": config.num_layers
            * spec.bytes_per_token(config.kv_heads, config.head_dim),
            **errors(llm, exact, outputs, spec, scales, hadamard),
            "perplexity": exact_perplexity
            if spec == KVSpec.parse("fp32")
            else perplexity(llm, ids, Rows(config, tokens, llm.xp, store)),
        }
        rows.append(row)
        seconds = time.perf_counter() - started
        name = f"{model} {spec}{', mixed' * hadamard}"
        print(f"{name}: perplexity {row['perplexity']:.4f}, {seconds:.0f} s", flush=True)
    return {
        **report.environment(llm.xp),
        "python": platform.python_version(),
        "text": list(TOPICS),
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tokens": tokens,
        "rows": rows,
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("record", type=Path, help="JSON; other models in it are kept")
    parser.add_argument("--model", action="append", help=f"one of {', '.join(MODELS)}, or a file")
    parser.add_argument("--specs", nargs="+", default=SPECS, help="int8:head:fp32 and the like")
    parser.add_argument("--tokens", type=int, default=4096, help="(%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu (%(default)s)")
    args = parser.parse_args(argv)
    try:
        specs = [KVSpec.parse(text) for text in args.specs]
        record = {}
        if args.record.exists():
            record = json.loads(args.record.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise FormatError(f"{args.record} holds no record of this tool")
        for model in args.model or MODELS:
            name = Path(model).stem
            record[name] = measure(model, specs, args.tokens, args.device)
            args.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except (PykvError, OSError, ValueError) as error:
        print(f"measure_kinds: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
