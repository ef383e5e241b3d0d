"""Calibration of tiny models: rows, options, files, the command."""

import itertools
import json
import os
import sys
import time

import numpy as np
import pytest

import pykv
from pykv import cli, cuda, kvtc, whole_files
from pykv.errors import CapacityError, DtypeError, InstallError, NumberError, ParameterError
from pykv.kvtc import Artefact, Codec, calibrate, calibration, commands, rows
from pykv.kvtc.artefact import SINKS
from pykv.llm import LLM, memory, model
from tests.helpers import assert_same_bits
from tests.llm import tiny

WORDS = "the in an heart tea shed rain time these thing another hat".split()


def text_of(seed, words):
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, words, p=rng.dirichlet(np.ones(len(WORDS)))))


TEXTS = {f"text {i}": text_of(i, 60) for i in range(4)}
OPTIONS = dict(ratios=(2, 4), window=64)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("kvtc") / "llama.gguf"
    tiny.write_case(path, "llama")  # 2 layers of 2 heads of 16: 64 features
    return path


@pytest.fixture
def llm(path):
    return LLM(path, device="cpu")


def facts(artefact):
    return [
        x
        for group in artefact.groups
        for side in (group.k, group.v)
        for x in (
            side.mean,
            side.weights,
            side.basis,
            *(plan.steps for plan in side.plans.values()),
        )
    ]


# --- Rows -----------------------------------------------------------------------------------------


YARN = {".rope.scaling.type": "yarn", ".rope.scaling.factor": 4.0}
YARN |= {".rope.scaling.original_context_length": 32}
SCALINGS = {
    "llama": dict(arch="llama"),
    "llama3": dict(arch="llama", rope_scaling="llama3"),
    "linear": dict(arch="gemma3", rope_scaling="linear"),
    "yarn": dict(arch="qwen2", keys=YARN),
    "some not rotated": dict(arch="smollm3"),
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("kv_dtype", ["fp16", "int8"])
def test_keys_are_those_of_zero_frequencies(tmp_path, monkeypatch, name, kv_dtype):
    """Of each layer, what an append without rotation stores: every scaling, layers that are not
    rotated, both pairings, and models whose heads are mixed by a Hadamard matrix."""
    tiny.write(tmp_path / "x.gguf", **SCALINGS[name])
    llm = LLM(tmp_path / "x.gguf", device="cpu", kv_dtype=kv_dtype, weights="fp32")
    config, n = llm.model.config, 50
    sizes = config.num_layers, 4, config.kv_heads, config.head_dim
    still = pykv.PagedKVCache(*sizes, spec="fp32")
    append = pykv.PagedKVCache.append_qkv

    def append_both(self, layer, qkv, slots, **options):
        plain = options | dict(
            inv_freq=np.zeros_like(options["inv_freq"]), hadamard=False, q_out=None
        )
        append(still, layer, qkv, slots, **plain)
        return append(self, layer, qkv, slots, **options)

    monkeypatch.setattr(pykv.PagedKVCache, "append_qkv", append_both)
    ids = np.random.default_rng(3).integers(0, config.vocab, n).tolist()
    got = rows.collect(llm.model, ids, np)
    for x, pool in zip(got, (still.k, still.v), strict=True):
        want = pool.reshape(config.num_layers, -1, *pool.shape[-2:])[:, :n].swapaxes(0, 1)
        np.testing.assert_allclose(x, want, atol=2e-5 * abs(want).max())


def test_steps_of_a_window_are_one_context(llm, monkeypatch):
    """Rows do not depend on how many tokens a forward step takes."""
    ids = llm.tokenizer.encode(TEXTS["text 0"])[:40]
    whole = rows.collect(llm.model, ids, np)
    monkeypatch.setattr(rows, "STEP", 16)
    for a, b in zip(whole, rows.collect(llm.model, ids, np), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_windows_have_every_token_once():
    texts = [list(range(10)), [], [7], list(range(100, 125))]
    for bos, length in ((None, 8), (99, 8), (None, 1), (None, 100)):
        found = rows.windows_of(texts, length, bos)
        for i, ids in enumerate(texts):
            mine = [w.ids[bos is not None :] for w in found if w.text == i]
            assert [x for part in mine for x in part] == ids
        assert all(len(w.ids) <= length for w in found)
        assert bos is None or all(w.ids[0] == bos for w in found)


def test_the_last_rows_of_each_text_are_held_out():
    windows = [rows.Window([], text) for text in (0, 0, 1, 2)]
    seen, held = calibration._split(windows, [10, 2, 6, 1])
    assert [(s.start, s.stop) for s in seen] == [(0, 10), (0, 0), (0, 5), (0, 0)]
    assert [(s.start, s.stop) for s in held] == [(10, 10), (0, 2), (5, 6), (0, 1)]


# --- Options --------------------------------------------------------------------------------------


def test_a_model_is_calibrated(llm, tmp_path):
    out = tmp_path / "a.kvtc"
    artefact = calibrate(llm, TEXTS, out=out, **OPTIONS)
    assert os.listdir(tmp_path) == ["a.kvtc"]
    assert artefact.ratios == (2, 4) and artefact.row_bytes(2) <= 2 * 2 * 64 // 2
    assert [text.name for text in artefact.texts] == list(TEXTS)
    assert artefact.model.layers == 2 and artefact.model.pairing == "adjacent"
    for side in (artefact.groups[0].k, artefact.groups[0].v):
        assert side.mean.shape == (64,) and 0 < side.plans[2].error <= side.plans[4].error < 1
    for a, b in zip(facts(artefact), facts(Artefact.load(out)), strict=True):
        assert_same_bits(a, b)
    assert not llm.fingerprint.difference(Artefact.load(out).model)


@pytest.mark.parametrize(
    "groups, want",
    [
        ("joint", [(0, 1, 2, 3, 4, 5, 6)]),
        ("windows", [(0, 1, 2, 3, 4, 6), (5,)]),
        (3, [(0, 1, 2), (3, 4, 5), (6,)]),
        ([[6, 0], [1, 2, 3, 4, 5]], [(0, 6), (1, 2, 3, 4, 5)]),
    ],
)
def test_groups_of_layers(groups, want):
    windows = (8, 8, 8, 8, 8, None, 8)  # gemma3: every sixth layer sees all keys
    assert calibration._checked_groups(groups, windows) == want


def test_groups_have_rows_of_their_own(llm):
    """Each layer apart gives what the rows of that layer alone give."""
    apart = calibrate(llm, TEXTS, ratios=(2,), window=64, groups=1)
    assert [group.layers for group in apart.groups] == [(0,), (1,)]
    joint = calibrate(llm, TEXTS, ratios=(2,), window=64)
    both = np.concatenate([group.v.mean for group in apart.groups])
    assert_same_bits(both, joint.groups[0].v.mean)


def test_only_so_many_tokens_are_read(llm):
    artefact = calibrate(llm, TEXTS, tokens=400, **OPTIONS)
    assert [text.tokens for text in artefact.texts] == [100] * 4


def test_too_little_text_is_refused(llm):
    some = {"short": TEXTS["text 0"][:100]}
    count = len(llm.tokenizer.encode(some["short"], bos=False))
    windows = -(-count // 63)  # a window has 64 tokens, with BOS
    with pytest.raises(ParameterError) as error:
        calibrate(llm, some, window=64, ratios=(2,))
    needed = 2 * 64 + SINKS * windows
    assert f"texts has {count} tokens, expected at least {needed}" in str(error.value)
    for tokens in (None, 4):
        with pytest.raises(ParameterError, match="texts has 0 tokens, expected"):
            calibrate(llm, {}, ratios=(2,), tokens=tokens)
    with pytest.raises(
        ParameterError, match="texts has 12 tokens with at most 3 of each, expected"
    ):
        calibrate(llm, TEXTS, ratios=(2,), tokens=15)


def test_texts_without_a_row_compare_nothing(llm):
    artefact = calibrate(llm, TEXTS, **OPTIONS)
    with pytest.raises(ParameterError, match="compare_coders: texts has 1 token, expected more"):
        calibration.compare_coders(llm, artefact, {"short": "a"})


def test_rows_below_a_group_of_components_are_refused():
    with pytest.raises(ParameterError, match="rows have 16 features, expected at least 32"):
        calibration._checked_rank(None, 16)


@pytest.mark.parametrize(
    "options, error, text",
    [
        (dict(ratios=(4, 2)), ParameterError, "ratios"),
        (dict(ratios=()), ParameterError, "ratios"),
        (dict(ratios=(2, 64)), ParameterError, "ratios has 64, expected at most 32"),
        (dict(ratios=4), DtypeError, "ratios"),
        (dict(ratios=("8",)), DtypeError, "ratios"),
        (dict(ratios=range(10**18)), ParameterError, "ratios is 0, expected 2 to 1024"),
        (dict(ratios=itertools.repeat(2)), ParameterError, "ratios is .*, expected rising numbers"),
        (dict(window=5), ParameterError, "window is 5, expected 6 to 128"),
        (dict(window=129), ParameterError, "window is 129, expected 6 to 128"),
        (dict(rank=48), ParameterError, "rank is 48, expected a multiple of 32"),
        (dict(rank=96), ParameterError, "rank is 96, expected 32 to 64"),
        (dict(tokens=0), ParameterError, "tokens"),
        (dict(groups="all"), ParameterError, "groups is 'all', expected joint"),
        (dict(groups=3), ParameterError, "groups is 3, expected 1 to 2"),
        (dict(groups=[[0]]), ParameterError, "groups is .*, expected each of 2 layers"),
        (dict(groups=[[0, 1], [1]]), ParameterError, "groups is .*, expected each of 2 layers"),
        (dict(groups=1.5), DtypeError, "groups"),
        (dict(groups=np.array([[0], [1]])), DtypeError, "groups is a ndarray"),
        (dict(progress="yes"), DtypeError, "progress"),
        (dict(out=5), DtypeError, "out"),
    ],
)
def test_wrong_options_are_refused(llm, monkeypatch, options, error, text):
    monkeypatch.setattr(rows, "collect", None)  # nothing is computed
    with pytest.raises(error, match=text):
        calibrate(llm, TEXTS, **{**OPTIONS, **options})


@pytest.mark.parametrize("texts", ["a text", ["a"], {"a": 5}, {5: "a"}, {"": "a"}, {"a\n": "a"}])
def test_wrong_texts_are_refused(llm, texts):
    with pytest.raises((ParameterError, DtypeError), match="texts"):
        calibrate(llm, texts)


def test_memory_is_asked_for_first(llm, monkeypatch, tmp_path):
    monkeypatch.setattr(rows, "collect", None)
    monkeypatch.setattr(memory, "free", lambda xp: 1000)
    with pytest.raises(CapacityError, match="GB are needed, but the host has 0.00 GB free"):
        calibrate(llm, TEXTS, **OPTIONS)
    monkeypatch.setattr(memory, "free", lambda xp: None)
    usage = type("Usage", (), dict(free=10))
    monkeypatch.setattr(calibration.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CapacityError, match="x.rows needs [0-9,]+ bytes, expected at most the 10"):
        calibrate(llm, TEXTS, out=tmp_path / "x", **OPTIONS)
    assert not os.listdir(tmp_path)


def test_a_missing_cublas_is_named_first(device, path, monkeypatch):
    monkeypatch.setattr(cuda, "array_module", lambda name: device)
    monkeypatch.setattr(calibration.linear, "has_cublas", lambda: False)
    monkeypatch.setattr(rows, "collect", None)
    with pytest.raises(InstallError, match="finds no cuBLAS, expected the package nvidia-cublas"):
        calibrate(LLM(path), TEXTS, **OPTIONS)


def test_values_beyond_float16_are_an_error(llm, monkeypatch):
    collect = rows.collect
    monkeypatch.setattr(rows, "collect", lambda *a: (collect(*a)[0], 1e5 * collect(*a)[1]))
    with pytest.raises(NumberError, match="not finite in float16"):
        calibrate(llm, TEXTS, **OPTIONS)


@pytest.mark.parametrize("of_embedding", [0.0, 1e25, None])
def test_activations_that_tell_nothing_are_an_error(path, tmp_path, of_embedding):
    """Of all tokens, or of the last layer, which no keys come from."""
    llm = LLM(path, device="cpu", weights="fp32")
    if of_embedding is None:
        llm.model.layers[1].attention_out[0, 0] = np.nan
    else:
        llm.model.embedding[...] *= np.float32(of_embedding)
    with pytest.raises(NumberError, match=r"errors of layer [01] count is not finite"):
        calibrate(llm, TEXTS, out=tmp_path / "a", **OPTIONS)
    assert os.listdir(tmp_path) == ["a.rows"]


def test_coefficients_beyond_float16_are_an_error(llm, monkeypatch):
    """Of keys that are not: no codec would take the artefact."""
    collect = rows.collect

    def far(*given):
        k, v = collect(*given)
        return k * np.float32(6e4 / abs(k).max()), v

    monkeypatch.setattr(rows, "collect", far)
    with pytest.raises(
        NumberError, match="steps would be .*, expected coefficients within float16"
    ):
        calibrate(llm, TEXTS, **OPTIONS)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_rows_that_do_not_vary_come_back(llm, monkeypatch, tmp_path, value):
    """As those of values whose weights are zeros; a group of components stays."""
    collect = rows.collect

    def constant(*given):
        k, v = collect(*given)
        return k, np.full_like(v, value)

    monkeypatch.setattr(rows, "collect", constant)
    artefact = calibrate(llm, TEXTS, out=tmp_path / "a", **OPTIONS)
    (group,) = Artefact.load(tmp_path / "a").groups
    assert (group.v.mean == value).all()
    for ratio, plan in artefact.groups[0].v.plans.items():
        assert plan.error == 0 and sum(plan.widths) >= 32 and (plan.steps < 1e-20).all()
        Codec(artefact, ratio)


# --- Interruptions --------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_where_it_ended(llm, monkeypatch, tmp_path):
    """And gives the same artefact, bit for bit; a window that was cut short is computed again."""
    out, kept = tmp_path / "a", tmp_path / "a.rows"
    want = calibrate(llm, TEXTS, **OPTIONS)
    collect, calls = rows.collect, []

    def interrupted(*arguments):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(arguments)
        return collect(*arguments)

    monkeypatch.setattr(rows, "collect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(llm, TEXTS, out=out, **OPTIONS)
    assert os.listdir(tmp_path) == ["a.rows"]
    with open(kept, "r+b") as file:
        file.truncate(kept.stat().st_size - 1)

    def counted(*arguments):
        calls.append(arguments)
        return collect(*arguments)

    calls.clear()
    monkeypatch.setattr(rows, "collect", counted)
    got = calibrate(llm, TEXTS, out=out, **OPTIONS)
    windows = rows.windows_of([llm.tokenizer.encode(t, bos=False) for t in TEXTS.values()], 64, 0)
    assert len(calls) == len(windows) - 2
    assert os.listdir(tmp_path) == ["a"]
    for a, b in zip(facts(got), facts(want), strict=True):
        assert_same_bits(a, b)


def test_a_file_that_is_not_ours_stays(llm, tmp_path):
    """Neither overwritten nor deleted when the artefact is there."""
    kept = tmp_path / "a.rows"
    for contents in (b"mine", b"name,rows\n1,2\n" * 100):
        kept.write_bytes(contents)
        with pytest.raises(ParameterError, match="a.rows is no file of rows"):
            calibrate(llm, TEXTS, out=tmp_path / "a", **OPTIONS)
        assert kept.read_bytes() == contents and os.listdir(tmp_path) == ["a.rows"]


@pytest.mark.parametrize("other", ["window", "texts", "bytes", "model"])
def test_rows_of_something_else_are_not_used(llm, monkeypatch, tmp_path, other):
    out, kept = tmp_path / "a", tmp_path / "a.rows"
    want = calibrate(llm, TEXTS, **OPTIONS)
    find = calibration._find

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration, "_find", fail)
    texts, options, before = dict(TEXTS), dict(OPTIONS), llm
    if other == "model":  # with the same first bytes of each tensor

        def edit(name, x):
            return np.concatenate([x[:-40], -x[-40:]]) if name == "token_embd.weight" else x

        tiny.write(model := tmp_path / "m.gguf", **tiny.CASES["llama"], edit=edit)
        before = LLM(model, device="cpu")
    if other == "window":
        options["window"] = 32
    if other == "texts":
        texts["text 0"] = texts["text 0"].replace("the", "tea")
    with pytest.raises(KeyboardInterrupt):
        calibrate(before, texts, out=out, **options)
    data = bytearray(kept.read_bytes())
    if other == "bytes":
        data[len(data) // 2] ^= 1
    kept.write_bytes(data)
    monkeypatch.setattr(calibration, "_find", find)
    for a, b in zip(
        facts(calibrate(llm, texts | TEXTS, out=out, **OPTIONS)), facts(want), strict=True
    ):
        assert_same_bits(a, b)


def test_two_runs_do_not_share_a_file(llm, monkeypatch, tmp_path):
    pytest.importorskip("fcntl")
    out, collect, errors = tmp_path / "a", rows.collect, []

    def calibrate_too(*arguments):
        if not errors:
            with pytest.raises(
                ParameterError, match="another process is writing .*a.rows"
            ) as error:
                errors.append(error)
                calibrate(llm, TEXTS, out=out, **OPTIONS)
        return collect(*arguments)

    monkeypatch.setattr(rows, "collect", calibrate_too)
    got = calibrate(llm, TEXTS, out=out, **OPTIONS)
    assert errors and not os.path.exists(f"{out}.rows")
    monkeypatch.setattr(rows, "collect", collect)
    for a, b in zip(facts(got), facts(calibrate(llm, TEXTS, **OPTIONS)), strict=True):
        assert_same_bits(a, b)


def test_a_run_that_ends_may_remove_its_file_before_the_lock(llm, monkeypatch, tmp_path):
    out, lock, removed = tmp_path / "a", whole_files.lock, []

    def end_first(file):
        if not removed:
            removed.append(os.unlink(f"{out}.rows"))
        return lock(file)

    monkeypatch.setattr(whole_files, "lock", end_first)
    calibrate(llm, TEXTS, out=out, **OPTIONS)
    assert removed and os.listdir(tmp_path) == ["a"]


def test_the_model_is_free_between_windows(llm, monkeypatch):
    """Another thread's call takes its turn."""
    forward, held = model.forward, []
    lock = llm._lock

    def watched(*arguments, **options):
        held.append(lock._is_owned())
        return forward(*arguments, **options)

    monkeypatch.setattr(rows, "forward", watched)
    calibrate(llm, TEXTS, **OPTIONS)
    assert held and all(held) and not lock._is_owned()


@pytest.mark.gpu
@pytest.mark.model
@pytest.mark.slow
def test_smollm2_takes_20_seconds_on_a_gpu():
    from pydoc_data import topics

    llm = LLM("smollm2-135m", device="cuda")
    started = time.perf_counter()
    artefact = calibrate(llm, {"topics": "\n".join(topics.topics.values())}, tokens=13_000)
    assert time.perf_counter() - started < 20
    assert artefact.groups[0].k.plans[16].error < 0.25


# --- The command ----------------------------------------------------------------------------------


def test_the_command(path, tmp_path, capsys):
    files = []
    for name, text in TEXTS.items():
        files.append(str(tmp_path / name))
        (tmp_path / name).write_text(text)
    out = tmp_path / "a.kvtc"
    arguments = ["kvtc", "calibrate", "--model", str(path), "--device", "cpu", "--out", str(out)]
    arguments += ["--window", "64", "--ratio", "2,4", "--text", *files]
    assert cli.main(arguments) == 0
    shown, said = capsys.readouterr()
    assert "ratio  bytes a token  K error  V error  layers" in shown and "0-1" in shown
    assert "rows of 64 features" in said and "\r" not in said  # no bar: it is no terminal
    artefact = Artefact.load(out)
    assert cli.main([*arguments, "--json", "--groups", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [plan["layers"] for plan in found["plans"]] == [[0]] * 4 + [[1]] * 4
    assert found["model"]["sha256"] == artefact.model.sha256
    for wrong in (["--ratio", "8:16"], ["--groups", "most"], ["--ratio", "9999"]):
        assert cli.main([*arguments, *wrong]) == 2
        assert wrong[0][2:] in capsys.readouterr().err
    assert cli.main([*arguments[:-4], str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
    for wrong, text in (("/dev/zero", "expected a regular file"), (files[0], "two files called")):
        assert cli.main([*arguments, wrong]) == 2
        assert text in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux alone")
def test_the_name_of_a_text_is_any(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/a\xff.txt")
    with open(path, "w") as file:
        file.write("text")
    assert commands._texts([path]) == {os.fsencode(path)[-96:].decode(errors="ignore"): "text"}


def test_coders_are_compared(path, tmp_path, capsys, llm):
    calibrate(llm, TEXTS, out=tmp_path / "a", ratios=(2,), window=64)
    (tmp_path / "text").write_text(text_of(9, 100))
    arguments = ["kvtc", "coders", "--model", str(path), "--device", "cpu"]
    arguments += ["--artefact", str(tmp_path / "a"), "--text", str(tmp_path / "text")]
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["coders"]
    assert [(x["layers"], x["side"], x["ratio"]) for x in found] == [
        ([0, 1], "k", 2),
        ([0, 1], "v", 2),
    ]
    for x in found:
        assert x["static_bytes"] <= x["final_bytes"] and 0 < x["static_error"] < 1
    assert cli.main(arguments) == 0 and "static: bytes" in capsys.readouterr().out
    tiny.write(tmp_path / "other.gguf", "llama", rope_base=6_000.0)
    arguments[3] = str(tmp_path / "other.gguf")
    assert cli.main(arguments) == 2
    assert "artefact has inv_freq of other values" in capsys.readouterr().err


def test_configs_of_v0_streams(llm):
    """Rows that the plans have not seen come back, from the bytes that the ratio allows."""
    artefact = calibrate(llm, TEXTS, ratios=(2,), window=64)
    configs = kvtc.v0_configs(llm, artefact, TEXTS, 2)
    assert list(configs) == [((0, 1), "k"), ((0, 1), "v")]
    ids = llm.tokenizer.encode(text_of(9, 60))[:64]
    for x, config in zip(rows.collect(llm.model, ids, np), configs.values(), strict=True):
        x = x[SINKS:].reshape(-1, 64)
        codes = kvtc.v0.compress(x, config)
        assert 0.7 * x.size < len(codes) - 40 * len(config.ranges) <= x.size
        kvtc.v0.decompress(codes, config, back := np.zeros_like(x))
        assert 0 < np.linalg.norm(back - x) < 0.2 * np.linalg.norm(x - config.mean)
    with pytest.raises(ParameterError, match="ratio is 512, expected less, .* any of its 2 bits"):
        kvtc.v0_configs(llm, artefact, TEXTS, 512)
