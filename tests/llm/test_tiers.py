"""A model whose cache forgets: the text with tiers is the text without, and less is computed."""

import re
import threading

import numpy as np
import pytest

from pykv import cli, cuda
from pykv.arrays import to_host
from pykv.errors import CapacityError, DtypeError, FormatError, ParameterError
from pykv.kvtc import Codec
from pykv.llm import LLM, SamplingParams, scales
from pykv.llm.prompts import answer_to
from pykv.llm.tiering import identity
from pykv.tiers import disk
from tests.helpers import without_simt
from tests.llm import tiny
from tests.llm.test_reuse import P, greedy, noted_logits, tokens_of
from tests.tiers.conftest import no_floor  # noqa: F401


def test_the_text_is_that_without_tiers(open_llm, rng, tmp_path):
    check_the_text(open_llm, rng, tmp_path, "fp16", prompts=2)


@without_simt
@pytest.mark.parametrize("kv_dtype", ["int8", "k8v4:HND", "int8:head", "fp8"])
def test_the_text_of_other_kinds(open_llm, rng, tmp_path, kv_dtype):
    check_the_text(open_llm, rng, tmp_path, kv_dtype, prompts=3)


def check_the_text(open_llm, rng, tmp_path, kv_dtype, prompts):
    """In one process, and in the next one. A pool of one prompt forgets all others."""
    options = dict(kv_dtype=kv_dtype, pool_tokens=4 * P)
    tiers = dict(host_cache="1MB", disk_cache=f"{tmp_path}:10MB")
    plain, llm = open_llm(**options), open_llm(**options, **tiers)
    asked = [tokens_of(rng, 3 * P + 5) for _ in range(prompts)]
    said = [plain.generate([prompt], greedy(3)) for prompt in asked]
    for n in range(2):
        for prompt, want in zip(asked, said, strict=True):
            assert llm.generate([prompt], greedy(3)) == want
            assert llm.stats.reused_tokens == n * 3 * P
    llm.flush()
    other = open_llm(**options, disk_cache=f"{tmp_path}:10MB")
    for prompt, want in zip(asked, said, strict=True):
        assert other.generate([prompt], greedy(3)) == want
        assert other.stats.reused_tokens == 3 * P
    assert other.tiers.counters.disk_hits == 3 * prompts
    assert other.cache.manager.num_free == other.cache.manager.num_pages


@without_simt
@pytest.mark.parametrize("batch", [False, True])
def test_a_call_gets_the_same_bits_from_a_tier(open_llm, rng, monkeypatch, batch):
    """As if nothing had been forgotten, whatever came between."""
    llm = open_llm(pool_tokens=16 * P, host_cache="2MB")
    kept = open_llm(pool_tokens=200 * P)
    noted = noted_logits(monkeypatch)
    start = tokens_of(rng, 70)
    prompts = [start + tokens_of(rng, n) for n in (1, 7, 30)] + [tokens_of(rng, 33)]
    calls = [prompts] if batch else [[prompt] for prompt in prompts]
    for call in calls * 3:
        seen = []
        for model in (llm, kept):
            noted.clear()
            seen.append((model.generate(call, greedy(5)), np.concatenate(noted).tobytes()))
            model.generate([tokens_of(rng, 120)], greedy(1))
        assert seen[0] == seen[1]
    assert llm.tiers.counters.host_hits > 0


@without_simt
def test_an_answer_that_gave_way_goes_on_from_a_tier(open_llm, rng):
    """Sequences that find too few pages are preempted, and fall."""
    plain = open_llm()
    llm = open_llm(pool_tokens=8 * P, host_cache="2MB")
    prompts = [tokens_of(rng, 30) for _ in range(4)]
    want = [plain.generate([prompt], greedy(40))[0].text for prompt in prompts]
    assert [answer.text for answer in llm.generate(prompts, greedy(40))] == want
    assert llm.stats.preemptions and llm.tiers.counters.host_hits


@without_simt
def test_misses_of_a_prompt_that_waits_are_counted_once(open_llm, rng):
    """It does not look for its pages before it has room for all of them."""
    llm = open_llm(pool_tokens=8 * P, host_cache="2MB")
    first, second = tokens_of(rng, 4 * P + 2), tokens_of(rng, 3 * P + 2)
    llm.generate([second[: 2 * P + 1]], greedy(1))
    before = llm.tiers.counters.misses
    begin, asked = llm.tiers.begin, []
    llm.tiers.begin = lambda tokens, pages: (asked.append(tokens), begin(tokens, pages))[1]
    llm.generate([first, second], greedy(10))
    assert sum(tokens[:P] == second[:P] for tokens in asked) == 1
    assert llm.tiers.counters.misses - before == 4 + 1


# --- Pages come while others are computed ---


@pytest.fixture
def slow_files(open_llm, rng, tmp_path, monkeypatch):
    """An LLM, a prompt that it finds in files which threads read once `may_go` is set, and its
    answer."""
    options = dict(pool_tokens=24 * P, disk_cache=f"{tmp_path}:10MB")
    there, first = tokens_of(rng, 6 * P + 3), open_llm(**options)
    (want,) = first.generate([there], greedy(12))
    first.flush()
    may_go, right = threading.Event(), disk.DiskTier.read

    def slow(*args):
        assert may_go.wait(60)
        return right(*args)

    monkeypatch.setattr(disk.DiskTier, "read", slow)
    yield open_llm(**options), there, want, may_go
    may_go.set()


def begun(llm, tokens):
    answer = answer_to(llm, tokens, greedy(12))
    with llm.turn():
        llm._scheduler.add(answer.sequence)
    return answer.sequence


def step(llm, until):
    with llm.turn():
        for _ in range(100):
            if until():
                return
            llm._scheduler.step()
    raise AssertionError("100 steps")


@without_simt
@pytest.mark.parametrize("how", ["whole", "damaged", "aborted", "preempted"])
def test_answers_go_on_while_pages_come(slow_files, open_llm, rng, tmp_path, how):
    """And the text is the same, whatever becomes of the pages."""
    llm, there, want, may_go = slow_files
    other = tokens_of(rng, 2 * P + 3)
    alone = open_llm().generate([other], greedy(12))[0]
    stays, comes = begun(llm, other), begun(llm, there)
    step(llm, lambda: len(stays.generated) == 6)  # while nothing came
    assert comes.fetch is not None and not comes.generated and comes.cached == 0
    if how == "damaged":
        for entry in sorted(disk.entries(tmp_path), key=lambda entry: entry.path)[::2]:
            entry.path.write_bytes(b"")
    if how == "aborted":
        with llm.turn():
            llm._scheduler.abort(comes)
        assert comes.fetch is None
    if how == "preempted":
        llm._scheduler._wait_again(comes, publish=True)
        assert comes.fetch is None
    may_go.set()
    step(llm, lambda: not llm._scheduler.has_work)
    assert stays.generated == alone.token_ids
    assert comes.generated == ([] if how == "aborted" else want.token_ids)
    counters = llm.tiers.counters
    came = dict(aborted=0, preempted=6).get(how, comes.reused // P)
    assert counters.disk_hits + counters.host_hits == came
    assert comes.reused == {"whole": 6 * P, "preempted": 0}.get(how, comes.reused) < len(there)
    assert (counters.damaged > 0) == (how == "damaged") and comes.finish_reason
    llm.flush()
    assert not llm.tiers.is_busy and not llm.tiers._fetches
    assert llm.cache.manager.num_free == llm.cache.manager.num_pages


@without_simt
def test_where_nobody_else_runs_files_are_waited_for(slow_files):
    """By one step, which computes what they lack."""
    llm, there, want, may_go = slow_files
    comes = begun(llm, there)
    threading.Timer(0.2, may_go.set).start()
    with llm.turn():
        llm._scheduler.step()
    assert comes.reused == 6 * P and len(comes.generated) == 1
    step(llm, lambda: not llm._scheduler.has_work)
    assert comes.generated == want.token_ids


@without_simt
def test_with_eviction(open_llm, rng):
    """Prompts fall as they were, before rows are evicted from copies."""
    options = dict(eviction="streaming:16", pool_tokens=8 * P)
    plain, llm = open_llm(**options), open_llm(**options, host_cache="2MB")
    asked = [tokens_of(rng, 60) for _ in range(3)] * 2
    for prompt in asked:
        assert llm.generate([prompt], greedy(6)) == plain.generate([prompt], greedy(6))
    assert llm.tiers.counters.host_hits


@pytest.fixture(scope="module")
def coded(artefact, tmp_path_factory):
    """A codec's text."""
    path = tmp_path_factory.mktemp("kvtc") / "tiny.kvtc"
    artefact.save(path)
    return f"{path}:2"


@without_simt
@pytest.mark.parametrize("where", ["host", "disk"])
@pytest.mark.parametrize(
    "kv_dtype, codec, most",
    [
        ("fp16", "int8", 1e-3),
        ("fp16", "int4", 0.05),
        ("fp16", "kvtc", 2e-3),
        ("int8", "int4", 0.05),
        ("int8:HND", "kvtc", 2e-3),
    ],
)
def test_codes_change_little(
    open_llm, coded, rng, tmp_path, monkeypatch, where, kv_dtype, codec, most
):
    """KL of the first token's distribution. Less than another page by far."""
    codec = coded if codec == "kvtc" else codec
    options = dict(kv_dtype=kv_dtype, pool_tokens=5 * P, host_cache=f"1MB:{codec}")
    if where == "disk":
        options |= dict(host_cache="1MB", disk_cache=f"{tmp_path}:10MB:{codec}")
    prompt = tokens_of(rng, 60)
    llm = open_llm(**options)
    noted = noted_logits(monkeypatch)
    llm.generate([prompt], greedy(1))
    if where == "disk":
        llm.flush()
        llm = open_llm(**options)
    else:
        llm.generate([tokens_of(rng, 70)], greedy(1))
    llm.generate([prompt], greedy(1))
    assert llm.stats.reused_tokens == 48 and not llm.is_exact
    p, q = (x[0] - np.logaddexp.reduce(x[0]) for x in np.array([noted[0], noted[-1]], np.float64))
    assert 0 < (np.exp(p) * (p - q)).sum() < most
    llm.generate([[*tokens_of(rng, 48), *prompt[48:]]], greedy(1))
    q = (noted[-1][0] - np.logaddexp.reduce(noted[-1][0])).astype(np.float64)
    assert (np.exp(p) * (p - q)).sum() > 2 * most


@without_simt
def test_an_artefact_of_another_model_is_refused(open_llm, coded, tmp_path):
    for name, given in (("host_cache", f"1MB:{coded}"), ("disk_cache", f"{tmp_path}:1MB:{coded}")):
        with pytest.raises(ParameterError, match=f"LLM: {name}'s codec is of a model with"):
            open_llm("gemma3", **{name: given})
        with pytest.raises(ParameterError, match="ratio is 3, expected"):
            open_llm(**{name: given.removesuffix("2") + "3"})


@without_simt
def test_other_models_and_kinds_are_not_seen(open_llm, rng, tmp_path):
    where = f"{tmp_path}:10MB"
    prompt = tokens_of(rng, 40)
    llm = open_llm(disk_cache=where)
    llm.generate([prompt], greedy(1))
    llm.flush()
    for name, options in (
        ("gemma3", {}),
        ("llama", dict(kv_dtype="int8")),
        ("llama", dict(weights="fp32")),
        ("llama", dict(page_size=8)),
    ):
        other = open_llm(name, disk_cache=where, **options)
        other.generate([prompt], greedy(1))
        assert other.stats.reused_tokens == 0
    same = open_llm(disk_cache=where)
    same.generate([prompt], greedy(1))
    assert same.stats.reused_tokens == 32


@pytest.mark.parametrize("row", [0, 48, 95])
def test_weights_of_other_values_are_another_identity(identity_of, row):
    """Where files are looked at: at a matrix's beginning, middle and end."""

    def edit(name, values):
        factors = np.ones((len(values), *[1] * (values.ndim - 1)), values.dtype)
        factors[row if name == "blk.0.ffn_up.weight" else []] = 2
        return values * factors

    assert identity_of(edit=edit) != identity_of()


@pytest.mark.parametrize("key, value", [(".rope.freq_base", 10_000.0), (".context_length", 64)])
def test_other_parameters_are_another_identity(identity_of, key, value):
    assert identity_of(keys={key: value}) != identity_of()


def test_scales_and_devices_are_of_the_identity(identity_of, monkeypatch):
    plain = identity_of(kv_dtype="int8:head")
    assert identity_of(kv_dtype="int8:head") == plain != identity_of(kv_dtype="int8")
    with monkeypatch.context() as patch:
        patch.setattr(scales, "MARGIN", 2 * scales.MARGIN)
        assert identity_of(kv_dtype="int8:head") != plain
    monkeypatch.setattr(cuda, "current_arch", lambda: "sm_90")
    assert identity_of(kv_dtype="int8:head", xp=None) != plain


@pytest.fixture
def identity_of(tmp_path):
    """What pages of a tiny model depend on, of so written a file."""

    def made(kv_dtype="fp16", xp=np, **how):
        tiny.write(tmp_path / "m.gguf", "llama", **how)
        llm = LLM(tmp_path / "m.gguf", device="cpu", kv_dtype=kv_dtype)
        llm.xp = xp
        return identity(llm)

    return made


@without_simt
@pytest.mark.parametrize("kv_dtype", ["fp16", "int8"])
def test_another_layout_finds_the_same_files(open_llm, rng, tmp_path, kv_dtype):
    prompt = tokens_of(rng, 40)
    llm = open_llm(disk_cache=f"{tmp_path}:10MB", kv_dtype=kv_dtype)
    want = llm.generate([prompt], greedy(4))
    llm.flush()
    other = open_llm(disk_cache=f"{tmp_path}:10MB", kv_dtype=f"{kv_dtype}:HND")
    assert other.generate([prompt], greedy(4)) == want
    assert other.stats.reused_tokens == 32 and len(disk.entries(tmp_path)) == 2


@without_simt
def test_a_session_keeps_what_fell(open_llm, rng, tmp_path):
    llm = open_llm(pool_tokens=4 * P, host_cache="1MB")
    prompt = tokens_of(rng, 40)
    llm.generate([prompt], greedy(1))
    llm.generate([tokens_of(rng, 60)], greedy(1))
    assert llm.save(tmp_path / "x", prompt) == 32


@without_simt
def test_a_coded_session_does_not_reach_exact_files(artefact, open_llm, rng, tmp_path, xp):
    codec = Codec(artefact, 2, xp)
    first = open_llm()
    prompt = tokens_of(rng, 40)
    first.generate([prompt], greedy(1))
    first.save(tmp_path / "x", prompt, codec=codec)
    llm = open_llm(disk_cache=f"{tmp_path / 'tier'}:1MB")
    found = llm.load(tmp_path / "x", codec=codec)
    assert (found.token_ids, found.cached_tokens) == (prompt, 0)
    assert llm.cache.manager.num_cached == 0 and llm.is_exact
    assert open_llm(host_cache="1MB").load(tmp_path / "x", codec=codec).cached_tokens == 32


@without_simt
def test_exact_pages_of_a_tier_come_before_those_of_a_coded_session(
    artefact, open_llm, rng, tmp_path, xp
):
    """As those of the cache do: what they serve is what the model computes."""
    codec = Codec(artefact, 2, xp)
    llm = open_llm(pool_tokens=6 * P, host_cache="1MB")
    prompt = tokens_of(rng, 40)
    llm.generate([prompt], greedy(1))
    llm.save(tmp_path / "x", prompt, codec=codec)
    kept = held_bytes(llm, prompt[:32])
    llm.generate([tokens_of(rng, 80)], greedy(1))  # the prompt falls
    assert not held_bytes(llm, prompt)
    assert llm.load(tmp_path / "x", codec=codec).cached_tokens == 32
    assert held_bytes(llm, prompt[:32]) == kept
    other = open_llm()
    other.load(tmp_path / "x", codec=codec)
    assert held_bytes(other, prompt[:32]) != kept


def held_bytes(llm, tokens):
    """What the cache has of tokens, in all layers."""
    pages = llm.cache.manager.reuse(tokens)
    held = b"".join(to_host(x[:, pages]).tobytes() for x in (llm.cache.k, llm.cache.v))
    llm.cache.manager.free(pages)
    return held


@without_simt
def test_pages_that_were_coded_do_not_reach_exact_files_by_a_session(open_llm, rng, tmp_path):
    """From codes of the host tier, and once more through an LLM without tiers."""
    first = open_llm(pool_tokens=4 * P, host_cache="1MB:int8")
    prompt = tokens_of(rng, 40)
    first.generate([prompt], greedy(1))
    first.generate([tokens_of(rng, 60)], greedy(1))
    assert first.save(tmp_path / "x", prompt) == 32
    between, third = open_llm(), open_llm()
    assert between.is_exact and not first.is_exact
    between.load(tmp_path / "x")
    assert not between.is_exact and between.save(tmp_path / "y", prompt) == 32
    text = (tmp_path / "y").read_bytes()
    (tmp_path / "z").write_bytes(text[:-1] + bytes([text[-1] ^ 1]))
    with pytest.raises(FormatError, match="its checksum does not hold"):
        third.load(tmp_path / "z")
    assert third.is_exact  # an LLM that could not load a file is as before
    llm = open_llm(disk_cache=f"{tmp_path / 'tier'}:1MB")
    for name in ("x", "y"):
        found = llm.load(tmp_path / name)
        assert (found.token_ids, found.cached_tokens) == (prompt, 0)
    assert llm.cache.manager.num_cached == 0 and llm.is_exact


@pytest.mark.parametrize(
    "options, error, text",
    [
        (dict(host_cache="much"), ParameterError, "LLM: host_cache is 'much', expected SIZE"),
        (dict(host_cache=-1), ParameterError, "LLM: host_cache is -1, expected at least 1"),
        (dict(host_cache=1.5), DtypeError, "LLM: host_cache is a float"),
        (dict(host_cache="1KiB"), ParameterError, "host_cache is 1,024 bytes, expected at least"),
        (dict(disk_cache="1GiB"), ParameterError, "LLM: disk_cache is '1GiB', expected DIR:SIZE"),
        (dict(disk_cache="{}/file:1GiB"), ParameterError, "file, expected a folder"),
        (dict(disk_cache="{}/file/below:1GiB"), ParameterError, "a folder, or a new one in a "),
        (dict(disk_cache="{}/none/below:1GiB"), ParameterError, "which .*none is not"),
        (dict(disk_cache="{}/t:1KiB"), ParameterError, "disk_cache is 1,024 bytes, expected at"),
        (dict(host_cache="1MB:kvtc"), ParameterError, "host_cache's codec is 'kvtc', expected one"),
        (
            dict(host_cache="1MB:x.kvtc:16"),
            ParameterError,
            "LLM: host_cache's artefact is 'x.kvtc', expected a file",
        ),
        (
            dict(disk_cache="{}/t:1MB:x.kvtc:16"),
            ParameterError,
            "disk_cache's artefact is 'x.kvtc'",
        ),
        (dict(host_cache="9999TiB"), CapacityError, "host_cache asks for"),
        (
            dict(host_cache="1MB", prefix_cache=False),
            ParameterError,
            "LLM: host_cache is given, expected none without a prefix_cache",
        ),
    ],
)
def test_wrong_options(tiny_paths, tmp_path, options, error, text):
    (tmp_path / "file").write_text("mine")
    options = {k: x.format(tmp_path) if type(x) is str else x for k, x in options.items()}
    with pytest.raises(error, match=text):
        LLM(tiny_paths / "llama.gguf", device="cpu", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- Commands ---


def test_run_finds_what_another_process_left(tiny_paths, tmp_path, capsys):
    where = f"{tmp_path / 'tier'}:10MB"
    command = ["run", "--model", str(tiny_paths / "llama.gguf"), "--device", "cpu"]
    command += ["--max-tokens", "3", "--json", "the rain in the time of the rain"]
    said = []
    for extra in ([], ["--disk-cache", where], ["--disk-cache", where, "--host-cache", "1MB"]):
        assert cli.main([*command, *extra]) == 0
        said.append(capsys.readouterr())
    texts = [x.out.partition('"finish')[0] for x in said]
    assert texts[0] == texts[1] == texts[2]
    pages = len(disk.entries(tmp_path / "tier"))
    assert pages and "pykv: looked up" not in said[0].err
    assert f"0 in host memory, 0 on disk, {pages} nowhere (0% found)" in said[1].err
    assert f"0 in host memory, {pages} on disk, 0 nowhere (100% found)" in said[2].err
    for given in (where, str(tmp_path / "tier")):
        assert cli.main(["cache", "info", "--disk-cache", given]) == 0
        out = capsys.readouterr().out
        assert re.search(f"tier: {pages} pages? in 1 folder, ", out)
        assert f"looked up {2 * pages} pages: 0 in host memory, {pages} on disk" in out
    assert cli.main(["cache", "info", "--disk-cache", str(tmp_path / "none")]) == 2
    assert "none, expected a folder" in capsys.readouterr().err
    (tmp_path / "a\x1b[31m").mkdir()
    assert cli.main(["cache", "info", "--disk-cache", str(tmp_path / "a\x1b[31m")]) == 0
    assert r"a\x1b[31m: 0 pages in 0 folders" in capsys.readouterr().out


@without_simt
def test_sampling_is_that_without_tiers(open_llm, rng):
    plain, llm = open_llm(pool_tokens=5 * P), open_llm(pool_tokens=5 * P, host_cache="1MB")
    how = SamplingParams(max_tokens=5, temperature=1.0, seed=7, ignore_eos=True)
    for prompt in [tokens_of(rng, 40) for _ in range(2)] * 2:
        assert llm.generate([prompt], how) == plain.generate([prompt], how)
