"""Every public function and method, and a small valid call of each, for tests of all of them."""

import atexit
import functools
import importlib
import inspect
import itertools
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import pykv
from pykv import (
    KVSpec,
    PagedKVCache,
    SequenceCache,
    blocks,
    eviction,
    kinds,
    kvtc,
    layout,
    page_files,
    pages,
    plan,
)
from pykv.eval import changes, continuation, needles
from pykv.kvtc import Codec, v0
from pykv.ops import mailbox, permute, phase_program, resident_program
from pykv.programs.phases import Argmax, Embed, Product
from pykv.programs.resident_tokens import Inputs
from pykv.transport import Handover, Local, Region, local, wait_for
from pykv.transport.region import size_of
from tests.kvtc import made
from tests.llm import tiny
from tests.ops.calls import OPS, RANGES, filled, taking, zeros

STEMS = [name for name in dir(pykv.ops) if not name.startswith("_")]
PUBLIC = "blocks kinds kvtc.stream_v0 kvtc.v0 layout page_files pages plan.append".split()
PUBLIC += "plan.base plan.decode transfer".split()
PUBLIC += [f"elastic.{name}" for name in ("compaction", "cycle", "rates", "timed")]
PUBLIC += [
    f"eviction.{name}" for name in ("block_selection", "heads", "policies", "rotary", "steps")
]
PUBLIC += [f"kvtc.{name}" for name in ("artefact", "calibration", "codec", "coder", "stream")]
if local.fcntl:  # a system that can run Local
    engines = "handover interface local messages region".split()
    PUBLIC += [f"transport.{name}" for name in engines]
PUBLIC += [f"eval.{name}" for name in ("changes", "coding", "continuation", "needles", "replay")]


def functions(module):
    """The public functions, classes and methods that a module defines, by dotted name."""
    found = {}
    for name, thing in vars(module).items():
        if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(thing):
            found[name] = thing
            for method, raw in vars(thing).items():
                raw = getattr(raw, "__func__", raw)  # the function of a classmethod or staticmethod
                if not method.startswith("_") and inspect.isfunction(raw):
                    found[f"{name}.{method}"] = raw
        elif inspect.isfunction(inspect.unwrap(thing)):
            found[name] = thing
    return found


def users_call():
    """What users call, by module and dotted name: all of PUBLIC and of the `__all__` of pykv and of
    pykv.llm; of ops, what takes a stream, checks contents or says what it raises, unless it is told
    the name of an op."""
    found = {}
    for name in PUBLIC:
        module = importlib.import_module(f"pykv.{name}")
        found |= {(module, name): thing for name, thing in functions(module).items()}
    for package, name in [(p, name) for p in (pykv, pykv.llm) for name in p.__all__]:
        module = sys.modules.get(getattr(getattr(package, name), "__module__", None))
        for dotted, thing in functions(module).items() if module else ():
            if dotted.partition(".")[0] == name:
                found[module, dotted] = thing
    for stem in STEMS:
        module = importlib.import_module(f"pykv.ops.{stem}")
        for dotted, thing in functions(module).items():
            given = list(inspect.signature(thing).parameters)
            says = "Raises:" in (thing.__doc__ or "") or dotted.startswith("check_")
            if given[:1] != ["op"] and (says or {"stream", "options"} & set(given)):
                found[module, dotted] = thing
    return {key: thing for key, thing in found.items() if not key[1].startswith("reference")}


def name_of(module, dotted):
    return f"{module.__name__.removeprefix('pykv.')}.{dotted}"


# --- Calls ----------------------------------------------------------------------------------------

# What users are handed or hand on, but do not call with values of their own; or what ops call with
# arguments that they have checked.
UNCHECKED = """
    elastic.timed.Timed elastic.timed.counts elastic.timed.time_calls elastic.rates.Throughput
    elastic.compaction.CompressResult elastic.compaction.CompressResult.kept elastic.cycle.Cycle
    errors.PykvError transfer.CopyReport transfer.Transfer transfer.Transfer.done
    transfer.Transfer.wait llm.answer.Completion llm.answer.Stream llm.answer.Stream.close
    llm.answer.Stream.stop llm.sampling.TokenLogprobs layout.Strides
    plan.base.Sku plan.base.PrecisionGuarantee plan.base.Plan plan.base.PagedPlan
    plan.append.PagedAppendArgs plan.append.ContiguousAppendArgs plan.decode.PagedDecodeArgs
    plan.base.check_sizes plan.base.check_head_dim plan.base.as_dtype
    plan.base.check_element plan.base.Plan.workspace_size plan.base.Plan.precision_guarantee
    plan.base.Plan.sku plan.decode.PagedDecodePlan.workspace_size
    plan.base.PagedCacheDescriptor.shapes
    kinds.Kind kinds.Kind.row_bytes kinds.Kind.row_width kinds.row_scales kinds.encode kinds.decode
    specs.KVSpec.page_order specs.KVSpec.as_nhd specs.KVSpec.strides specs.KVSpec.pool_strides
    specs.KVSpec.rules specs.KVSpec.rules_of_scales
    kvtc.artefact.Text kvtc.artefact.Fingerprint kvtc.artefact.Fingerprint.difference
    kvtc.artefact.Plan kvtc.artefact.Side kvtc.artefact.Group kvtc.artefact.Artefact
    kvtc.artefact.Artefact.check_ratio kvtc.artefact.problems
    kvtc.coder.check_steps kvtc.coder.check_widths kvtc.coder.bits_of kvtc.coder.row_bytes
    kvtc.coder.pack_fields kvtc.coder.unpack_fields
    layout.Layout layout.BlockShape plan.base.Preference pages.Pages
    layout.check_layout layout.check_pair layout.check_shape ops.block_linear.product
    pages.move_known
    ops.activation.launch_gated ops.kvtc_blocks.Blocks.check_apart
    ops.kvtc_blocks.Blocks.check_writeable
    eval.changes.Kept eval.changes.changed eval.changes.check_job eval.changes.check_llm
    eval.changes.identity eval.changes.mixed eval.changes.static_scale eval.changes.stored
    eval.continuation.Cost eval.continuation.Cost.as_dict eval.continuation.compare
    eval.continuation.join eval.continuation.losses eval.needles.Haystack eval.needles.Recall
    eval.replay.ExactCache eval.replay.ExactCache.prefill eval.replay.check_finite
    eval.replay.last_logits eval.replay.steps eval.replay.append eval.replay.Place
    eval.replay.Place.after eval.changes.code eval.coding.Judged
    eval.coding.Judged.errors eval.replay.ExactCache.append_qkv
    kvtc.stream.Section kvtc.stream.Header kvtc.stream.Header.sections kvtc.stream.Header.pack
    kvtc.stream.check_bytes kvtc.stream.Coded.arrays kvtc.stream.Coded.to_bytes
    specs.parsed specs.KVSpec.written kinds.count_largest pool.PagedKVCache.require_scales
    eviction.policies.Policy.counts eviction.policies.Policy eviction.steps.Evicted
    eviction.rotary.Rotary eviction.rotary.ahead eviction.rotary.check_rotary
    eviction.steps.Evicted.moved eviction.policies.base_of eviction.policies.as_policy
    eviction.policies.AdaKV.floors blocks.BlockManager.check_sequences
    kvtc.stream_v0.Range kvtc.stream_v0.row_bytes kvtc.stream_v0.check_ranges
    kvtc.stream_v0.stream_bytes kvtc.stream_v0.offsets kvtc.stream_v0.row_offsets
    kvtc.stream_v0.headers kvtc.stream_v0.check_headers
    transport.handover.Handover.ask transport.interface.check_engine
    transport.messages.Message transport.messages.is_name transport.messages.check_name
    transport.messages.check_facts transport.messages.check_seconds transport.messages.pack
    transport.messages.unpack
    transport.region.size_of transport.region.check_region transport.region.digest
    transport.region.PeerRegion
""".split()
UNCHECKED += [f"eviction.policies.{policy.__name__}.score" for policy in eviction.POLICIES.values()]
UNCHECKED += ["eviction.policies.Policy.score"]
ENGINE = ("register", "connect", "landing", "notify", "messages", "is_alive", "close")
UNCHECKED += [
    "transport.interface.Transport",
    *(f"transport.interface.Transport.{x}" for x in ENGINE),
]


def ints(*values):
    return np.array(values, np.int32)


_memory = [np.arange(32, dtype=np.uint8), np.zeros(32, np.uint8)]
_FROM, _TO = (x.ctypes.data + np.array([0, 16], np.uint64) for x in _memory)
_WIDTHS = [0, 0, 0, 0, 32, 0, 0, 32]
_DIVISORS, _ROW_OF_HOST = np.ones(4), zeros("f4", 2, 4)
_POOLS = dict(k_pool=zeros("f2", 4, 2, 2, 16), v_pool=zeros("f2", 4, 2, 2, 16))
_NHD, _HND = zeros("f2", 2, 1, 2, 3, 2, 4), zeros("f2", 2, 1, 2, 2, 3, 4)
_UNIVERSAL, _OPERATIONAL = zeros("f2", 2, 2, 1, 2, 3, 4), zeros("f2", 2, 1, 2, 24)

_ARTEFACT = made.artefact(np.random.default_rng(0))
_OPS = {name_of(importlib.import_module(op.__module__), op.__name__): x for op, x in OPS}
FUNCTIONS = {
    **_OPS,
    "ops.bandwidth.write": taking("out u4 4 4", seed=1),
    "ops.block_rows.pack": taking("blocks u1 2 34", kind="Q8_0"),
    "ops.block_copy.copy_arrays": dict(sources=[zeros("f4", 4)], destinations=[zeros("f4", 4)]),
    "ops.block_copy.vectorized_copy": dict(src_ptrs=_FROM, dst_ptrs=_TO, size=16, device="cpu"),
    "ops.compaction.compress": taking("x f4 8, out f4 8, indices i4 8, count i8 1", threshold=0.5),
    "ops.compaction.count": taking("x f4 8", threshold=0.5),
    "ops.compaction.expand": taking(
        "values f4 2, out f4 8", indices=ints(1, 5), n=8, count=np.array([2])
    ),
    "ops.compaction.workspace_size": dict(n=8, itemsize=4),
    "ops.contiguous_append.read_token": taking(
        "k_cache f2 1 4 2 8, v_cache f2 1 4 2 8", slot=0, token=1
    ),
    "ops.paged_check.check_pages": dict(pages=ints(1, -1), num_pages=2),
    "ops.paged_check.check_slots": dict(slots=ints(1, -1), num_slots=2),
    "ops.paged_check.check_starts": dict(starts=ints(0, 1, 2), end=2),
    "ops.paged_check.check_table": dict(indices=ints(1, 0), indptr=ints(0, 1, 2))
    | dict(last_page_len=ints(1, 2), num_pages=2, page_size=2),
    "ops.paged_check.check_page_table": dict(page_table=ints([1, 0], [0, -1]), lengths=ints(3, 1))
    | dict(num_pages=2, page_size=2),
    "ops.paged_check.check_positions": dict(batch_indices=ints(0), positions=ints(1))
    | dict(indptr=ints(0, 1), page_size=2),
    "ops.paged_convert.gather_rows": taking(
        "k_out f4 3 2 16, v_out f4 3 2 16",
        indices=ints(2, 1),
        indptr=ints(0, 1, 2),
        starts=ints(0, 1, 3),
        **_POOLS,
    ),
    "ops.paged_decode.kernel_for": dict(spec="fp16", D=64, sm=90),
    "ops.paged_decode.workspace_size": dict(B=2, HQ=4, H=2, D=64, capacity=64),
    "ops.prefill.kernel_for": dict(spec="fp16", D=64, sm=90),
    "ops.paged_qkv.hadamard_matrix": dict(D=4),
    "ops.paged_qkv.hadamard_transform": dict(x=_ROW_OF_HOST),
    "ops.rope.frequencies": dict(dim=8, base=1e4, divisors=_DIVISORS),
    "ops.kvtc_blocks.gather_mean_subtract": taking("blocks f2 2 8, mean f4 8"),
    "ops.kvtc_blocks.mean_add_scatter": taking("x f4 2 8, mean f4 8, blocks f2 2 8"),
    "kvtc.stream_v0.compressed_size": dict(ranges=RANGES, batch=2),
    "kvtc.v0.workspace_size": dict(features=8, components=4, batch=2),
    "ops.permute.permute": dict(dst=_UNIVERSAL, src=_NHD, dst_layout="universal", src_layout="NHD"),
    "ops.permute.universal_from_block": dict(universal=_UNIVERSAL, blocks=_NHD),
    "ops.permute.block_from_universal": dict(blocks=_NHD, universal=_UNIVERSAL),
    "ops.permute.operational_from_block": dict(operational=_OPERATIONAL, blocks=_NHD),
    "ops.permute.block_from_operational": dict(blocks=_NHD, operational=_OPERATIONAL),
    "ops.permute.nhd_to_hnd": dict(hnd=_HND, nhd=_NHD),
    "ops.permute.hnd_to_nhd": dict(nhd=_NHD, hnd=_HND),
    "ops.throughput.fma": taking("x f4 8", steps=2),
    "ops.throughput.exp2": taking("x f4 8", steps=2),
    "transfer.memcpy_batch": dict(src_ptrs=_FROM, dst_ptrs=_TO, size=16, device="cpu"),
    "transfer.start": dict(sources=[zeros("f4", 4)], destinations=[zeros("f4", 4)]),
    "elastic.compaction.compress": taking(
        "kv f4 2 4, indices i4 8, out f4 8, count i8 1", threshold=0.5, repetitions=1
    ),
    "elastic.rates.mem_bandwidth": taking("input f4 8, output f4 8", iterations=1),
    "elastic.rates.mem_bandwidth_batched": taking(
        "input f4 8, output f4 8", iters_per_launch=1, num_launches=1
    ),
    "elastic.rates.compute_throughput": taking("data f4 8", ops_per_element=2, repetitions=1),
    "elastic.cycle.inference_cycle": taking(
        "kv f2 2 1 9 2 8, q f2 1 18 2 8", decode_steps=1, keep=0.5, repetitions=1
    ),
    "elastic.rates.gpu_info": {},
    "foreign.asarray": taking("x f4 2"),
    "foreign.from_pointer": dict(address=256, shape=(0, 3), dtype=np.float32),
    "cuda.graphs.graph": dict(function=lambda: None),
    "eval.changes.evict": dict(policy="snapkv:40"),
    "eval.changes.requantise": dict(spec="int8"),
    "blocks.BlockManager": dict(num_pages=8, page_size=2),
    "blocks.slots": dict(pages=[7, 3], start=1, stop=3, page_size=2),
    "blocks.page_table": dict(sequences=[[7, 3], [5]], width=3),
    "specs.KVSpec": dict(k="int8", v="int4", granularity="head", scale_dtype="fp32", layout="HND"),
    "specs.KVSpec.parse": dict(text="int8:HND"),
    "kinds.quantize": taking("x f4 2 8", kind=kinds.KINDS["int8"]),
    "kinds.dequantize": taking("codes i1 2 8, scale f2 2", kind=kinds.KINDS["int8"]),
    "kinds.pack": taking("codes i1 2 8"),
    "kinds.unpack": taking("packed u1 2 8"),
    "kvtc.coder.quantise": taking("x f4 2 64", steps=zeros("f4", 64) + 1, widths=_WIDTHS),
    "kvtc.coder.dequantise": taking("codes i1 2 64", steps=zeros("f4", 64) + 1, widths=_WIDTHS),
    "kvtc.coder.pack": taking("codes i1 2 64", widths=_WIDTHS),
    "kvtc.coder.unpack": taking("packed u1 2 20", widths=_WIDTHS),
    "layout.strides": dict(layout=layout.Layout("NHD"), stored=layout.BlockShape(1, 1, 1, 2, 4, 2)),
    "kvtc.codec.Codec": dict(artefact=_ARTEFACT, ratio=4, xp=np),
    "llm.sampling.SamplingParams": {},
    "eviction.block_selection.BlockSelection": dict(blocks=2, block=4, recent=8),
    "eviction.policies.parse": dict(text="snapkv:40"),
    "eviction.policies.AdaKV": dict(policy=eviction.KeyNorm(budget=4), floor=0.5),
    **{
        f"eviction.policies.{policy.__name__}": dict(budget=99, sinks=4, recent=8)
        for policy in eviction.POLICIES.values()
    },
    "pool.PagedKVCache": dict(layers=1, pages=2, heads=1, head_dim=8),
    "sequence_cache.SequenceCache": dict(max_blocks=2, block_size=2, heads=1, head_dim=8),
}


# --- Methods, and functions of caches: of a new object each time ----------------------------------


def _given(xp, arguments):
    """New arguments: arrays and lists of `arguments` are copied."""
    return {name: _copied(xp, x) for name, x in arguments.items()}


def _copied(xp, x):
    if isinstance(x, np.ndarray):
        is_of_host = x is _FROM or x is _TO or x is _DIVISORS or x is _ROW_OF_HOST
        return x.copy() if is_of_host else xp.asarray(x.copy())
    return [_copied(xp, one) for one in x] if isinstance(x, list) else x


def _of(make, name, **arguments):
    """A method of what `make` makes; of `...` it makes the value as well."""

    def call(xp):
        made, *others = make(xp)
        mine = [x for x in arguments if arguments[x] is ...]
        own = dict(zip(mine, others, strict=False))
        return getattr(made, name), _given(xp, arguments) | own

    return call


def _mailbox(xp):
    """A mailbox that has had one job; of the host, where nobody must stop it."""
    box = mailbox.Mailbox(np.zeros((2, 4), np.float32))
    box.submit(0, 1.0, 1.0)
    return (box,)


def _program(xp):
    """Of the host: not every GPU has programs."""
    x, w, out = (
        np.zeros(shape, t) for shape, t in (((1, 8), "f4"), ((4, 8), "f2"), ((1, 4), "f4"))
    )
    phases = [Product(x, w, "F16", out)]
    return phase_program.PhaseProgram, dict(phases=phases, blocks=2)


def _resident(xp):
    """A program whose tokens each follow from the one ahead; of the host, as `_program`."""
    x, logits = np.zeros((1, 8), "f4"), np.zeros((1, 8), "f4")
    ids, positions, slots, lengths, peaks = np.array([[3], [0], [-1], [1], [0]], "i4")
    table, params = np.zeros((1, 4), "i4"), np.zeros(2, "i4")
    inputs = Inputs(ids, positions, slots, lengths, table, peaks, params)
    eye = np.eye(8, dtype="f2")
    phases = [Embed(ids, eye, "F16", x), Product(x, eye, "F16", logits), Argmax(logits, peaks)]
    return resident_program.ResidentProgram, dict(
        phases=phases, inputs=inputs, page_size=16, blocks=2, silence=1.0
    )


def _made_resident(xp):
    cls, given = _resident(xp)
    return (cls(**given),)


def _launched(xp):
    (program,) = _made_resident(xp)
    program.launch(2, [9], [[5]])
    return (program,)


def _stopped(xp):
    (program,) = _launched(xp)
    program.stop(0)
    return (program,)


def _manager(xp):
    """A manager, and a sequence of three tokens in two pages of two."""
    manager = blocks.BlockManager(8, 2)
    return manager, manager.allocate(3)


def _cache(xp, spec="fp16"):
    cache = PagedKVCache(2, 4, 2, 16, page_size=2, spec=spec, xp=xp)
    return cache, cache.manager.allocate(3)


def _managers(xp):
    manager, pages = _manager(xp)
    return manager, [pages]


def _evict(xp):
    cache, pages = _cache(xp)
    given = dict(cache=cache, sequences=[pages], lengths=[3], policy="scores:2")
    return eviction.evict, given | dict(scores=[xp.zeros((1, 2, 4), np.float32)] * 2)


def _ragged(xp, **rows):
    """Arguments of one layer whose heads hold different numbers of rows."""
    tables = dict(page_table=ints([1, 0], [2, 3]), lengths=ints([3, 2], [1, 2]))
    return dict(cache=_cache(xp)[0], layer=1, **_given(xp, rows | tables))


def _blockwise(xp, **rows):
    """Arguments of one layer whose blocks are a page each."""
    selection = eviction.BlockSelection(blocks=1, block=2, recent=1)
    arrays = dict(table=ints([1, 0], [2, 3]), lengths=ints(3, 4), means=zeros("f4", 2, 2, 2, 16))
    return dict(cache=_cache(xp)[0], layer=1, selection=selection, **_given(xp, rows | arrays))


def _sequence(xp):
    cache = SequenceCache(4, 2, 2, 16, xp=xp)
    cache.assign([2, 0])
    cache.advance(2)
    return (cache,)


def _compressed(xp):
    return (pykv.ops.compaction.compress(xp.ones(4, np.float32), 0.5),)


def _spec(xp):
    return (KVSpec("int8"),)


def _with_caches(function, *names, **arguments):
    """A function of pages that takes caches by these names."""
    return lambda xp: (function, {name: _cache(xp)[0] for name in names} | _given(xp, arguments))


def _codec(xp):
    """A codec, and a cache of its model."""
    codec = Codec(_ARTEFACT, 4, xp, tokens=8)
    return codec, PagedKVCache(made.L, 4, made.H, made.D, page_size=made.P, xp=xp)


def _decompress(xp):
    codec, cache = _codec(xp)
    given = dict(coded=codec.compress(cache, [2, 0], range(6)), positions=list(range(6)))
    return codec.decompress, dict(given, cache=cache, table=[1, 3], layers=range(1, 2))


def _parse(xp):
    codec, cache = _codec(np)
    return kvtc.parse, dict(stream=codec.compress(cache, [2, 0], range(6)).to_bytes())


def _coded(xp):
    codec, cache = _codec(xp)
    return kvtc.Coded, dict(vars(codec.compress(cache, [2, 0], range(6))))


def _to(xp):
    codec, cache = _codec(xp)
    return codec.compress(cache, [2, 0], range(6)).to, dict(xp=xp)


def _swap_in(xp):
    cache, _ = _cache(xp)
    return pages.swap_in, dict(cache=cache, pages=[1], store=pages.swap_out(cache, [2]))


def _file(function):
    def call(xp):
        path, cache = Path(_folder.name) / f"pages{next(_count)}", _cache(xp)[0]
        if function is page_files.load:
            page_files.save(path, cache, [1, 2])
        return function, dict(path=path, cache=cache, pages=[1, 2])

    return call


_folder, _count = tempfile.TemporaryDirectory(), itertools.count()

_PAGES = dict(page_size=2, num_total_pages=4, num_kv_heads=2, head_dim=8)
_SIZES = dict(batch_size=1, num_heads=2, new_tokens=1, max_tokens=4, k_dim=8, v_dim=8)
_ROWS, _ROW, _STORE = zeros("f2", 1, 2, 8), zeros("f2", 1, 2, 1, 8), zeros("f2", 1, 2, 4, 8)
_BLOCKS = dict(k_data=zeros("f2", 4, 2, 2, 8), v_data=zeros("f2", 4, 2, 2, 8))
_BLOCKS |= dict(indices=ints(3), indptr=ints(0, 1), last_page_len=ints(1))
PLANS = {  # a descriptor's fields, and the arrays of a run
    plan.PagedAppendPlan: (
        dict(batch_size=1, cache=plan.PagedCacheDescriptor(**_PAGES)),
        dict(key=_ROWS, value=_ROWS) | _BLOCKS,
    ),
    plan.PagedDecodePlan: (
        dict(batch_size=1, num_q_heads=2, cache=plan.PagedCacheDescriptor(**_PAGES)),
        dict(q=_ROWS, o=_ROWS, lse=zeros("f4", 1, 2)) | _BLOCKS,
    ),
    plan.ContiguousAppendPlan: (
        _SIZES,
        dict(k_new=_ROW, v_new=_ROW, k_cache=_STORE, v_cache=_STORE, cache_offsets=ints(1)),
    ),
}


def _select(kind, of_cache=False):
    """`select`, of a descriptor's fields or of those of its cache."""
    fields, _ = PLANS[kind]
    taken = plan.PagedCacheDescriptor if of_cache else kind.descriptor_type

    def call(*, element=np.float16, preference=None, xp=np, **given):
        made = taken(**given)
        descriptor = kind.descriptor_type(**fields | dict(cache=made)) if of_cache else made
        return kind.select(descriptor, element, preference=preference, xp=xp)

    _sign(call, inspect.signature(taken).parameters, inspect.signature(kind.select).parameters)
    return lambda xp: (call, dict(_PAGES if of_cache else fields) | dict(xp=xp))


def _run(kind, name):
    """`run` or `can_implement` of a plan, of its arrays."""
    fields, arrays = PLANS[kind]

    def call(xp):
        selected = kind.select(kind.descriptor_type(**fields), np.float16, xp=xp)
        method = getattr(selected, name)

        def run(**given):
            of_args = {n: given.pop(n) for n in kind.args_type._fields if n in given}
            return method(kind.args_type(**of_args), **given)

        of_args = inspect.signature(kind.args_type).parameters
        _sign(run, of_args, inspect.signature(method).parameters)
        return run, _given(xp, arrays)

    return call


def _sign(function, *parameters):
    """Say which parameters a function takes, all by name."""
    named = {n: p.replace(kind=p.KEYWORD_ONLY) for some in parameters for n, p in some.items()}
    kept = [p for n, p in named.items() if n not in ("args", "descriptor")]
    function.__signature__ = inspect.Signature(kept)


@functools.cache
def _model():
    path = Path(_folder.name) / "tiny.gguf"
    tiny.write(path, "llama")
    return path


@functools.cache
def _loaded():
    llm = pykv.LLM(_model(), device="cpu")
    llm.file.metadata["tokenizer.chat_template"] = "{{ messages[0].content }}"
    return llm


def _llm(xp):
    return (_loaded(),)


@functools.cache
def _measured():
    """An LLM that has figures of its ways of decoding, as one on a GPU."""
    llm = pykv.LLM(_model(), device="cpu")
    llm.runner._ways = SimpleNamespace(times=lambda rows, force: dict(graph=2.0, persistent=1.0))
    return llm


def _with_llm(function, **arguments):
    return lambda xp: (function, dict(llm=_loaded()) | _given(xp, arguments))


_CHANGES = {"int8": changes.requantise("int8")}
_WORDS = {"a text": "the heat in the tea " * 20}
_SMALL = dict(ratios=[2], window=64)


@functools.cache
def _artefact():
    return pykv.kvtc.calibrate(_loaded(), _WORDS, **_SMALL)


def _calibrate(xp):
    return pykv.kvtc.calibrate, dict(model=_loaded(), texts=_WORDS, **_SMALL)


def _compare_coders(xp):
    given = dict(model=_loaded(), artefact=_artefact(), texts={"short": "the tea " * 10})
    return pykv.kvtc.compare_coders, given


def _v0_configs(xp):
    return pykv.kvtc.v0_configs, _compare_coders(xp)[1] | dict(ratio=2)


def _load_artefact(xp):
    path = Path(_folder.name) / "artefact"
    _artefact().save(path)
    return pykv.kvtc.Artefact.load, dict(path=path)


def _session(method, **arguments):
    """`save` or `load` of a session, which is there."""

    def call(xp):
        path = Path(_folder.name) / f"session{next(_count)}"
        _loaded().save(path, [5, 6])
        return getattr(_loaded(), method), dict(path=path) | arguments

    return call


# --- Engines, which end when the next begins ---

_engines = []


def _close_engines():
    while _engines:
        _engines.pop().close()


atexit.register(_close_engines)


def _engine(xp):
    """A Local without a region."""
    _close_engines()
    _engines.append(Local("here", Path(_folder.name) / "shm"))
    return (_engines[-1],)


def _registered(xp):
    """One with a region of two rows, whose second one is offered: a peer to itself."""
    (engine,) = _engine(xp)
    engine.register(2, 64, dict(model="a")).put(_KEY, 1)
    return (engine,)


def _opened_and_closed(name: str, folder: str | os.PathLike[str] | None = None):
    _close_engines()
    Local(name, folder).close()


def _region(xp):
    return (Region(np.zeros(size_of(2, 64), np.uint8), 2, 64, dict(model="a")),)


def _peer_region(xp):
    region = _registered(xp)[0].connect("here")
    region.exists([_KEY])
    return (region,)


def _handover(xp):
    return Handover, dict(llm=_loaded(), transport=_engine(xp)[0], size="256KB", timeout=1.0)


def _handed_over(xp):
    return (Handover(**_handover(xp)[1]),)


_KEY = b"k" * 16
_TRANSPORT = {
    "transport.local.default_folder": lambda xp: (local.default_folder, {}),
    "transport.local.Local": lambda xp: (
        _opened_and_closed,
        dict(name="other", folder=Path(_folder.name) / "shm"),
    ),
    "transport.local.Local.register": _of(
        _engine, "register", count=2, nbytes=64, facts=dict(model="a")
    ),
    "transport.local.Local.connect": _of(_registered, "connect", peer="here"),
    "transport.local.Local.landing": _of(_engine, "landing"),
    "transport.local.Local.notify": _of(_registered, "notify", peer="here", facts=dict(a=[1])),
    "transport.local.Local.messages": _of(_engine, "messages", timeout=0.0),
    "transport.local.Local.is_alive": _of(_engine, "is_alive", peer="here"),
    "transport.local.Local.close": _of(_engine, "close"),
    "transport.interface.wait_for": lambda xp: (
        wait_for,
        dict(transport=_registered(xp)[0], peer="here", timeout=0.0),
    ),
    "transport.region.Region": lambda xp: (
        Region,
        dict(memory=np.zeros(size_of(2, 64), np.uint8), count=2, nbytes=64, facts=dict(a="b")),
    ),
    "transport.region.Region.drop": _of(_region, "drop", slot=1),
    "transport.region.Region.put": _of(_region, "put", key=_KEY, slot=1),
    "transport.region.PeerRegion.exists": _of(_peer_region, "exists", keys=[_KEY]),
    "transport.region.PeerRegion.get": _of(
        _peer_region, "get", keys=[_KEY], rows=[np.zeros(64, np.uint8)]
    ),
    "transport.handover.Handover": _handover,
    "transport.handover.Handover.offer": _of(_handed_over, "offer", tokens=[5, 6]),
    "transport.handover.Handover.serve": _of(_handed_over, "serve", stop=lambda: True),
    "transport.handover.Handover.take": _of(_handed_over, "take", peer="here", tokens=[5, 6]),
}
_SHORT = pykv.SamplingParams(max_tokens=2)
_MESSAGES = [dict(role="user", content="a")]


def _prepare(op: Callable):
    return pykv.prepare(op)


def _normalised(xp):
    return pykv.ops.norm.rms_norm(xp.ones((1, 8), np.float32), xp.ones(8, np.float32))


def _config(xp):
    basis = np.eye(8, dtype=np.float32)
    return v0.KvtcConfig(xp.zeros(8, np.float32), xp.asarray(basis), RANGES), xp.ones((2, 8), "f2")


def _stream(xp):
    config, blocks = _config(xp)
    return config, v0.compress(blocks, config), blocks


def _compress(xp):
    config, blocks = _config(xp)
    return v0.compress, dict(blocks=blocks, config=config)


def _v0_decompress(xp):
    config, codes, blocks = _stream(xp)
    return v0.decompress, dict(codes=codes, config=config, blocks=blocks)


def _v0_parse(xp):
    return v0.parse, dict(data=_stream(np)[1], num_ranges=2, batch=2, features=8)


def _dequantize_ranges(xp):
    given = dict(codes=_stream(xp)[1], ranges=RANGES, batch=2)
    return pykv.ops.kvtc_ranges.dequantize_ranges, given


_ATTENDED = dict(page_table=ints([1, 0], [2, -1]), lengths=ints(3, 1))
_QUERIES, _NEW = zeros("f4", 2, 4, 16), zeros("f4", 2, 2, 16)
METHODS = {
    "ops.mailbox.Mailbox": lambda xp: (mailbox.Mailbox, dict(x=xp.zeros((2, 4), np.float32))),
    "ops.mailbox.Mailbox.submit": _of(_mailbox, "submit", row=1, scale=2.0, bias=1.0, n=3),
    "ops.mailbox.Mailbox.poll": _of(_mailbox, "poll", job=1),
    "ops.mailbox.Mailbox.wait": _of(_mailbox, "wait", job=1),
    "ops.mailbox.Mailbox.stop": _of(_mailbox, "stop"),
    "ops.phase_program.PhaseProgram": _program,
    "ops.resident_program.ResidentProgram": _resident,
    "ops.resident_program.ResidentProgram.launch": _of(
        _made_resident, "launch", tokens=2, limits=[9], ends=[[5]]
    ),
    **{
        f"ops.resident_program.ResidentProgram.{name}": _of(_launched, name)
        for name in ("await_result", "take", "end")
    },
    "ops.resident_program.ResidentProgram.extend": _of(
        _launched, "extend", tokens=3, pages=[(0, 1, [2])]
    ),
    "ops.resident_program.ResidentProgram.start": _of(
        _stopped,
        "start",
        row=0,
        token=3,
        length=20,
        limit=30,
        ends=[5],
        pages=[1, 2],
        params=[(0, [7])],
    ),
    "ops.resident_program.ResidentProgram.stop": _of(_launched, "stop", row=0),
    "llm.generate.LLM": lambda xp: (pykv.LLM, dict(model=_model(), device="cpu")),
    "llm.generate.LLM.generate": _of(_llm, "generate", prompts=[[5, 6]], params=_SHORT),
    "llm.generate.LLM.stream": _of(_llm, "stream", prompt=[5, 6], params=_SHORT),
    "llm.generate.LLM.chat": _of(_llm, "chat", messages=_MESSAGES, params=_SHORT),
    "llm.generate.LLM.chat_ids": _of(_llm, "chat_ids", messages=_MESSAGES),
    "llm.generate.LLM.tokenize": _of(_llm, "tokenize", text="ab"),
    "llm.generate.LLM.detokenize": _of(_llm, "detokenize", ids=[5, 6]),
    "llm.generate.LLM.save": _session("save", prompt=[5, 6]),
    "llm.generate.LLM.load": _session("load"),
    "llm.generate.LLM.flush": _of(_llm, "flush"),
    "llm.generate.LLM.logits": _of(_llm, "logits", token_ids=[5, 6]),
    "eval.continuation.measure": _with_llm(
        continuation.measure, windows=[[5, 6, 7, 8]], changes=_CHANGES, prefill=2
    ),
    "eval.continuation.windows": _with_llm(
        continuation.windows, text="a text", count=1, prefill=2, score=1
    ),
    "eval.needles.haystack": _with_llm(needles.haystack, keys=1, tokens=100, seed=0),
    "eval.needles.measure": _with_llm(
        needles.measure, haystacks=[needles.Haystack("ab", ("c",), ("d",))], changes=_CHANGES
    ),
    "llm.generate.LLM.perplexity": _of(_llm, "perplexity", text_or_ids=[5, 6]),
    "llm.generate.LLM.turn": _of(_llm, "turn"),
    "llm.decode_ways.calibrate": lambda xp: (
        pykv.llm.calibrate,
        dict(llm=_measured(), answers=[1, 2], force=True),
    ),
    "kvtc.calibration.calibrate": _calibrate,
    "kvtc.calibration.compare_coders": _compare_coders,
    "kvtc.calibration.v0_configs": _v0_configs,
    "kvtc.artefact.Artefact.row_bytes": _of(lambda xp: (_artefact(),), "row_bytes", ratio=2),
    "kvtc.artefact.Artefact.as_dict": _of(lambda xp: (_artefact(),), "as_dict"),
    "kvtc.artefact.Artefact.as_text": _of(lambda xp: (_artefact(),), "as_text"),
    "kvtc.artefact.Artefact.save": lambda xp: (
        _artefact().save,
        dict(path=Path(_folder.name) / "saved"),
    ),
    "kvtc.artefact.Artefact.load": _load_artefact,
    "kvtc.v0.KvtcConfig": lambda xp: (
        v0.KvtcConfig,
        _given(xp, dict(mean=zeros("f4", 8), projection=zeros("f4", 8, 8))) | dict(ranges=RANGES),
    ),
    "kvtc.v0.KvtcConfig.compressed_size": _of(_config, "compressed_size", batch=2),
    "kvtc.v0.KvtcConfig.workspace_size": _of(_config, "workspace_size", batch=2),
    "kvtc.v0.compress": _compress,
    "kvtc.v0.decompress": _v0_decompress,
    "kvtc.stream_v0.parse": _v0_parse,
    "ops.kvtc_ranges.dequantize_ranges": _dequantize_ranges,
    "cuda.calls.prepare": lambda xp: (_prepare, dict(op=lambda: _normalised(xp))),
    "blocks.BlockManager.pages_for": _of(_manager, "pages_for", tokens=3),
    "blocks.BlockManager.place_of": _of(_manager, "place_of", page=3),
    "blocks.BlockManager.require": _of(_manager, "require", num_pages=3),
    "blocks.BlockManager.allocate": _of(_manager, "allocate", tokens=3),
    "blocks.BlockManager.extend": _of(_manager, "extend", pages=..., start=3, stop=5),
    "blocks.BlockManager.fork": _of(_manager, "fork", pages=...),
    "blocks.BlockManager.free": _of(_manager, "free", pages=...),
    "blocks.BlockManager.free_later": _of(_manager, "free_later", pages=...),
    "blocks.BlockManager.publish": _of(_manager, "publish", pages=..., tokens=[5, 6, 7]),
    "blocks.BlockManager.publish_keys": _of(
        _manager, "publish_keys", pages=..., start=0, keys=[bytes(range(16))]
    ),
    "blocks.BlockManager.reuse": _of(_manager, "reuse", tokens=[5, 6, 7]),
    "blocks.BlockManager.grow": _of(_manager, "grow", num_pages=9),
    "ops.compaction.Compressed.kept": _of(_compressed, "kept"),
    "ops.compaction.Compressed.trimmed": _of(_compressed, "trimmed"),
    "blocks.BlockManager.evict": _of(_managers, "evict", sequences=..., start=1, stops=[2]),
    "eviction.steps.evict": _evict,
    "eviction.heads.decode": lambda xp: (eviction.decode, _ragged(xp, q=_QUERIES)),
    "eviction.heads.attention_mass": lambda xp: (
        eviction.attention_mass,
        _ragged(xp, q=zeros("f4", 2, 1, 4, 16), before=zeros("f4", 2, 2, 3)),
    ),
    "eviction.heads.append": lambda xp: (eviction.append, _ragged(xp, k=_NEW, v=_NEW)),
    "eviction.block_selection.block_means": lambda xp: (eviction.block_means, _blockwise(xp)),
    "eviction.block_selection.decode_blocks": lambda xp: (
        eviction.decode_blocks,
        _blockwise(xp, q=_QUERIES),
    ),
    "specs.KVSpec.pool_shapes": _of(_spec, "pool_shapes", N=1, P=2, H=3, D=8),
    "specs.KVSpec.scale_shape": _of(_spec, "scale_shape", N=1, P=2, H=3),
    "specs.KVSpec.bytes_per_token": _of(_spec, "bytes_per_token", heads=2, head_dim=8),
    "pool.PagedKVCache.pools": _of(_cache, "pools", layer=1),
    "pool.PagedKVCache.extend": _of(_cache, "extend", pages=..., start=3, stop=5),
    "pool.PagedKVCache.clamped": _of(_cache, "clamped", pages=[1, 2]),
    "pool.PagedKVCache.grow": _of(_cache, "grow", pages=5),
    "pool.PagedKVCache.append": _of(_cache, "append", layer=1, k=_NEW, v=_NEW, slots=ints(3, 1)),
    "pool.PagedKVCache.append_qkv": _of(
        _cache, "append_qkv", layer=1, qkv=zeros("f4", 2, 128), slots=ints(3, 1)
    ),
    "pool.PagedKVCache.decode_qkv": _of(
        *(_cache, "decode_qkv"), layer=1, qkv=zeros("f4", 2, 128), slots=ints(3, 1), **_ATTENDED
    ),
    "pool.PagedKVCache.decode": _of(_cache, "decode", layer=1, q=_QUERIES, **_ATTENDED),
    "pool.PagedKVCache.prefill": _of(
        _cache, "prefill", layer=1, q=_QUERIES, **_ATTENDED, q_starts=ints(0, 1, 2)
    ),
    "sequence_cache.SequenceCache.assign": _of(_sequence, "assign", block_ids=[1]),
    "sequence_cache.SequenceCache.advance": _of(_sequence, "advance", tokens=1),
    "sequence_cache.SequenceCache.append": _of(
        _sequence, "append", k=_NEW[:1], v=_NEW[:1], length_before=1
    ),
    "sequence_cache.SequenceCache.decode": _of(_sequence, "decode", q=_NEW[0], length=1),
    "kvtc.codec.Codec.header": _of(_codec, "header", tokens=6, spec="fp16", sinks=1, window=2),
    "kvtc.codec.Codec.compress": _of(
        _codec, "compress", cache=..., table=[2, 0], positions=list(range(6)), sinks=1, window=2
    ),
    "kvtc.codec.Codec.decompress": _decompress,
    **_TRANSPORT,
    "kvtc.stream.Coded": _coded,
    "kvtc.stream.Coded.to": _to,
    "kvtc.stream.parse": _parse,
    "pages.zero_pages": _with_caches(pages.zero_pages, "cache", pages=[1, 2]),
    "pages.copy_pages": _with_caches(
        pages.copy_pages, "source", "target", source_pages=[1], target_pages=[2]
    ),
    "pages.convert_pages": _with_caches(
        pages.convert_pages,
        *("source", "target"),
        source_pages=[1],
        target_pages=[2],
        heads=(0, 1),
        target_heads=(0, 1),
    ),
    "pages.host_pages": _with_caches(pages.host_pages, "cache", num_pages=2),
    "pages.swap_out": _with_caches(pages.swap_out, "cache", pages=[1, 2]),
    "pages.swap_in": _swap_in,
    "page_files.save": _file(page_files.save),
    "page_files.load": _file(page_files.load),
    "plan.base.PagedCacheDescriptor": _select(plan.PagedDecodePlan, of_cache=True),
    "plan.append.PagedAppendDescriptor": _select(plan.PagedAppendPlan),
    "plan.append.ContiguousAppendDescriptor": _select(plan.ContiguousAppendPlan),
    "plan.decode.PagedDecodeDescriptor": _select(plan.PagedDecodePlan),
    "plan.base.Plan.select": _select(plan.PagedDecodePlan),
    "plan.base.Plan.can_implement": _run(plan.PagedDecodePlan, "can_implement"),
    "plan.base.PagedPlan.run": _run(plan.PagedAppendPlan, "run"),
    "plan.append.PagedAppendPlan": _run(plan.PagedAppendPlan, "can_implement"),
    "plan.append.ContiguousAppendPlan": _run(plan.ContiguousAppendPlan, "can_implement"),
    "plan.append.ContiguousAppendPlan.run": _run(plan.ContiguousAppendPlan, "run"),
    "plan.decode.PagedDecodePlan": _run(plan.PagedDecodePlan, "run"),
}


def call_of(name, xp):
    """The function, or a method of a new object, and new arguments that pass."""
    if name in METHODS:
        return METHODS[name](xp)
    module, dotted = _PLACES[name]
    arguments = _given(xp, FUNCTIONS[name])
    if name in _OPS:
        arguments = filled(FUNCTIONS[name], np.random.default_rng(0), xp)
    return functools.reduce(getattr, dotted.split("."), module), arguments


OPTIONS = {  # function: the one to which it passes its options
    "ops.prefill.prefill_contiguous": pykv.ops.prefill.prefill,
    **{name: permute.permute for name in FUNCTIONS if name.startswith("ops.permute.")},
    "pool.PagedKVCache.append": pykv.ops.paged_append.append,
    "pool.PagedKVCache.append_qkv": pykv.ops.paged_qkv.append,
    "pool.PagedKVCache.decode_qkv": pykv.ops.qkv_decode.decode,
    "pool.PagedKVCache.decode": pykv.ops.paged_decode.decode,
    "pool.PagedKVCache.prefill": pykv.ops.prefill.prefill,
    "eviction.heads.decode": pykv.ops.paged_decode.decode,
    "eviction.heads.append": pykv.ops.paged_append.append,
    "sequence_cache.SequenceCache.append": pykv.ops.paged_append.append,
    "sequence_cache.SequenceCache.decode": pykv.ops.paged_decode.decode,
}
_PLACES = {name_of(*place): place for place in users_call()}
CALLS = [name for name in _PLACES if name not in UNCHECKED]
