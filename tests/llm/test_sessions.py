"""A conversation in a file: a new LLM goes on where the old one ended, and trusts no file."""

import json
import os
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest

from pykv import prepare, tensor_files, whole_files
from pykv.errors import CapacityError, DtypeError, FormatError, ParameterError, UnsupportedError
from pykv.kvtc import Codec, Coded, parse
from pykv.llm.prompt_steps import PromptSteps
from tests.helpers import assert_same_bits, to_numpy, without_simt
from tests.llm import tiny
from tests.llm.test_reuse import P, greedy, noted_logits, tokens_of

TEMPLATE = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}[assistant:{% endif %}"


@pytest.fixture
def computed(monkeypatch):
    """How many tokens each step of prompts computes."""
    steps, run = [], PromptSteps.run
    monkeypatch.setattr(
        PromptSteps,
        "run",
        lambda self, spans, *args: (
            steps.append(sum(len(span.ids) for span in spans)) or run(self, spans, *args)
        ),
    )
    return steps


@pytest.mark.parametrize(
    "kv_dtype", ["fp16", *(pytest.param(x, marks=pytest.mark.sweep) for x in ("fp32", "k8v4:HND"))]
)
def test_a_new_llm_goes_on(open_llm, rng, tmp_path, computed, kv_dtype):
    """The text is that of one LLM, and nothing is computed again."""
    check_that_it_goes_on(open_llm, rng, tmp_path, computed, kv_dtype=kv_dtype)


@without_simt
@pytest.mark.parametrize("kv_dtype", ["int8", "fp8:HND", "int8:head", "int4"])
def test_scales_come_with_their_pages(open_llm, rng, tmp_path, computed, kv_dtype):
    check_that_it_goes_on(open_llm, rng, tmp_path, computed, kv_dtype=kv_dtype)


@without_simt
def test_of_windows_and_a_pool(open_llm, rng, tmp_path, computed):
    check_that_it_goes_on(open_llm, rng, tmp_path, computed, name="gemma3", pool_tokens=128)


def check_that_it_goes_on(open_llm, rng, tmp_path, computed, name="llama", **options):
    first, path = open_llm(name, **options), tmp_path / "x.session"
    prompt, more = tokens_of(rng, 30), tokens_of(rng, 5)
    (answer,) = first.generate([prompt], greedy(4))
    said = prompt + answer.token_ids
    assert first.save(path, said) == 32  # whole pages of the 33 that have entries
    computed.clear()
    (want,) = first.generate([said + more], greedy(3))
    expected = list(computed)

    second = open_llm(name, **options)
    computed.clear()
    session = second.load(path)
    assert (session.token_ids, session.messages, session.cached_tokens) == (said, None, 32)
    assert not computed
    assert second.generate([said + more], greedy(3)) == [want]
    assert second.stats.reused_tokens == 32 and computed == expected
    assert computed[0] == 34 + 5 - 32
    # The pages are those of the first, bit for bit.
    with first._scheduler.pages.known(said) as pages, second._scheduler.pages.known(said) as others:
        for x in ("k", "v", "k_scales", "v_scales"):
            if getattr(first.cache, x) is not None and first.spec.granularity == "token":
                a, b = getattr(first.cache, x), getattr(second.cache, x)
                assert_same_bits(to_numpy(a)[:, pages[:2]], to_numpy(b)[:, others[:2]])
    cached = second.cache.manager.num_cached
    assert second.load(path) == session and second.cache.manager.num_cached == cached
    assert second.cache.manager.num_free == second.cache.manager.num_pages


# --- Coded ---


@pytest.mark.parametrize("kv_dtype", ["fp16", pytest.param("int8", marks=pytest.mark.sweep)])
def test_a_codec_makes_a_file_smaller(open_llm, rng, tmp_path, artefact, monkeypatch, xp, kv_dtype):
    """And little different; the file names an artefact, by its text or by its codec."""
    plain, path = open_llm(kv_dtype=kv_dtype), tmp_path / "x.session"
    artefact.save(tmp_path / "a.kvtc")
    prompt = tokens_of(rng, 36)
    plain.generate([prompt], greedy(1))
    assert plain.save(tmp_path / "plain", prompt) == 32
    assert plain.save(path, prompt, codec=Codec(artefact, 2, xp)) == 32
    noted = noted_logits(monkeypatch)
    plain.generate([prompt], greedy(1))
    llm = open_llm(kv_dtype=kv_dtype)
    assert llm.load(path, codec=f"{tmp_path / 'a.kvtc'}:2").cached_tokens == 32
    llm.generate([prompt], greedy(1))
    assert llm.stats.reused_tokens == 32
    p, q = (x - np.logaddexp.reduce(x) for [x] in np.array(noted, np.float64))
    assert 0 < (np.exp(p) * (p - q)).sum() < 0.1  # without half of the components it is 5
    if kv_dtype == "fp16":
        assert path.stat().st_size < 0.75 * (tmp_path / "plain").stat().st_size


@without_simt
def test_a_coded_file_of_no_pages(open_llm, tmp_path, artefact, xp):
    codec, path = Codec(artefact, 2, xp), tmp_path / "x"
    assert open_llm().save(path, [5, 6], codec=codec) == 0
    assert open_llm().load(path, codec=codec).token_ids == [5, 6]


@without_simt
def test_a_coded_file_wants_its_codec(open_llm, rng, tmp_path, artefact, xp):
    llm, path = open_llm(), tmp_path / "x"
    prompt = tokens_of(rng, 40)
    llm.generate([prompt], greedy(1))
    llm.save(path, prompt, codec=Codec(artefact, 2, xp))
    other = replace(artefact, window=7)
    free = open_llm()
    for codec, text in (
        (None, "is coded by artefact .* at ratio 2, expected a codec of these .--session-codec"),
        (Codec(other, 2, xp), "is coded with window=8, expected 7"),
        (Codec(with_mean(artefact, 1), 2, xp), "is coded with artefact=[0-9a-f]{64}, expected "),
    ):
        with pytest.raises(FormatError, match=text):
            free.load(path, codec=codec)
    stranger = replace(artefact, model=replace(artefact.model, sha256="ab" * 32))
    for call in (free.save, free.load):
        given = (path, prompt) if call == free.save else (path,)
        with pytest.raises(ParameterError, match="codec is of a model with sha256=abab"):
            call(*given, codec=Codec(stranger, 2, xp))
        with pytest.raises(DtypeError, match="codec is an int, expected a pykv.kvtc.Codec"):
            call(*given, codec=3)
        for codec in ("a.kvtc", ":2", "a.kvtc:", "a.kvtc:x", "a.kvtc:-2"):
            with pytest.raises(ParameterError, match="codec is .*, expected FILE:RATIO"):
                call(*given, codec=codec)
        with pytest.raises(FileNotFoundError):
            call(*given, codec="missing.kvtc:2")
    assert free.cache.manager.num_cached == 0


@without_simt
def test_coded_positions_are_those_of_the_tokens(
    open_llm, rng, tmp_path, artefact, monkeypatch, xp
):
    """A file whose sums hold, and whose stream begins with another position."""
    llm, path, codec = open_llm(), tmp_path / "x", Codec(artefact, 2, xp)
    prompt, write = tokens_of(rng, 40), tensor_files.write
    llm.generate([prompt], greedy(1))

    def lie(path, facts, arrays, **options):
        coded = parse(arrays["stream"])
        data = coded.data.copy()
        Coded(coded.header, data).arrays()["positions"][...] += 1
        arrays["stream"] = np.frombuffer(Coded(coded.header, data).to_bytes(), np.uint8)
        write(path, facts, arrays, **options)

    monkeypatch.setattr(tensor_files, "write", lie)
    llm.save(path, prompt, codec=codec)
    other = open_llm()
    with pytest.raises(FormatError, match="is coded with positions other than 0 to 31"):
        other.load(path, codec=codec)
    assert other.cache.manager.num_cached == 0


def with_mean(artefact, mean):
    """The same, but for a mean."""
    (group,) = artefact.groups
    k = replace(group.k, mean=np.full_like(group.k.mean, mean))
    return replace(artefact, groups=(replace(group, k=k),))


# --- Messages ---


def talking(llm):
    llm.file.metadata["tokenizer.chat_template"] = TEMPLATE
    return llm


@without_simt
@pytest.mark.parametrize("variables", [0, [], "x", [("a", 1)], {"messages": 1}])
def test_variables_of_the_template_are_a_dict(open_llm, tmp_path, variables):
    llm, talk = talking(open_llm()), [{"role": "user", "content": "Hi"}]
    with pytest.raises(ParameterError, match="template_variables has"):
        llm.save(tmp_path / "s", talk, template_variables=variables)
    assert not (tmp_path / "s").exists()


@without_simt
def test_messages_come_back(open_llm, tmp_path):
    llm, path = talking(open_llm()), tmp_path / "x"
    talk = [{"role": "user", "content": "Grüße 😀 <|eos|>"}]
    talk.append({"role": "assistant", "content": llm.chat(talk, greedy(20)).text})
    kept = llm.save(path, talk)
    assert kept >= P and kept % P == 0  # the answer may have other tokens as a text
    more = {"role": "user", "content": "and?"}
    want = llm.chat([*talk, more], greedy(8))
    reused = llm.stats.reused_tokens
    again = talking(open_llm())
    session = again.load(path)
    assert session.messages == talk and session.cached_tokens == kept
    assert again.chat([*session.messages, more], greedy(8)) == want
    assert again.stats.reused_tokens == reused > 0


@without_simt
def test_messages_may_be_any_mappings(open_llm, tmp_path):
    llm, path, message = talking(open_llm()), tmp_path / "x", {"role": "user", "content": "Hi"}
    llm.save(path, (MappingProxyType(message),))
    assert llm.load(path).messages == [message]


@without_simt
def test_what_is_not_computed_is_not_kept(open_llm, rng, tmp_path):
    llm, path = open_llm(), tmp_path / "x"
    prompt = tokens_of(rng, 40)
    assert llm.save(path, prompt) == 0
    session = open_llm().load(path)
    assert (session.token_ids, session.cached_tokens) == (prompt, 0)
    assert llm.save(path, "hello") == 0
    assert open_llm().load(path).token_ids == llm.tokenize("hello")


# --- Wrong files and wrong calls ---


@without_simt
@pytest.mark.parametrize(
    "name, options, text",
    [
        ("gemma3", {}, "has layers=2, expected 7|has head_dim=16, expected 32"),
        ("other", {}, "has model=[0-9a-f]{64}, expected [0-9a-f]{64}"),
        ("base", {}, "has model=[0-9a-f]{64}, expected [0-9a-f]{64}"),
        ("llama", dict(weights="fp32"), "has weights=float16, expected float32"),
        ("llama", dict(kv_dtype="int8"), "has spec=fp16, expected int8"),
        ("llama", dict(kv_dtype="fp16:HND"), "has spec=fp16, expected fp16:HND"),
        ("llama", dict(page_size=8), "has page_size=16, expected 8"),
        ("llama", dict(context=40), "has pages of 48 tokens, expected at most the context of 40"),
        ("llama", dict(pool_tokens=40, context=60), None),
        ("llama", dict(pool_tokens=32), "pool exhausted: 3 pages wanted, 2 free of 2"),
    ],
)
def test_a_file_of_another_llm(open_llm, tiny_paths, rng, tmp_path, name, options, text):
    tiny.write(tiny_paths / "base.gguf", "llama", keys={".rope.freq_base": 4_000.0})
    tiny.write(tiny_paths / "other.gguf", "llama", edit=lambda name, x: x * np.float32(1.01))
    llm, path = open_llm(), tmp_path / "x"
    prompt = tokens_of(rng, 50)
    llm.generate([prompt], greedy(1))
    llm.save(path, prompt)
    other = open_llm(name, **options)
    if text is None:
        assert other.load(path).cached_tokens == 48
        return
    with pytest.raises((FormatError, CapacityError), match=text):
        other.load(path)
    assert other.cache.manager.num_cached == 0


@without_simt
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize(
    "tensor, row", [("token_embd", 100), ("token_embd", 217), ("blk.1.attn_k", -1), ("output", 131)]
)
def test_a_model_that_differs_in_one_row(open_llm, tiny_paths, tmp_path, kind, tensor, row):
    """Far from the first bytes of a tensor, as the embeddings of tokens that were trained later."""

    def edit(name, x):
        x = x.copy()
        if name == f"{tensor}.weight":
            x[row].reshape(-1).view(np.uint8)[-2] ^= 64
        return x

    prompt = [*range(20)]
    names = [f"{kind}-{tensor}-{row}-{n}" for n in range(2)]
    for name, change in zip(names, ({}, dict(edit=edit)), strict=True):
        tiny.write(tiny_paths / f"{name}.gguf", "llama", kind=kind, **change)
    llm, other = map(open_llm, names)
    assert llm.fingerprint.sha256 == other.fingerprint.sha256 or kind != "F32"
    llm.generate([prompt], greedy(1))
    llm.save(tmp_path / "x", prompt)
    with pytest.raises(FormatError, match="has model="):
        other.load(tmp_path / "x")


def saved(llm, path, rng):
    prompt = tokens_of(rng, 2)
    llm.generate([prompt], greedy(1))
    llm.save(path, prompt)
    return path.read_bytes()


@without_simt
def test_every_damaged_byte_is_found(open_llm, rng, tmp_path):
    llm, path = open_llm(page_size=1), tmp_path / "x"
    good = saved(llm, path, rng)
    other = open_llm(page_size=1)
    header = 8 + int.from_bytes(good[:8], "little")
    for at in (*range(0, header, 3), *range(header, len(good), 17)):
        damaged = bytearray(good)
        damaged[at] ^= 1 << at % 7
        path.write_bytes(damaged)
        try:
            other.load(path)
        except FormatError as error:
            assert str(error).isprintable()
            continue
        assert json.loads(damaged[8:header]) == json.loads(good[8:header])  # another blank
    for part in (good[:5], good[:100], good[:-1], good + b"\0", b""):
        path.write_bytes(part)
        with pytest.raises(FormatError):
            other.load(path)


@without_simt
@pytest.mark.parametrize(
    "change, text",
    [
        (lambda facts, x: facts.update(format="pykv.session.1"), "has format 'pykv.session.1', "),
        (lambda facts, x: facts.update(format="pykv.pages.1"), "has format 'pykv.pages.1', "),
        (lambda facts, x: facts.update(pages="9" * 9), "has 999,999,999 pages of 2 tokens"),
        (lambda facts, x: facts.update(pages="-1"), "has pages=-1, expected a whole number"),
        (lambda facts, x: x["tokens"].__setitem__(1, 1 << 30), "has token id 1073741824, expected"),
        (lambda facts, x: x["tokens"].__setitem__(0, -1), "has token id -1, expected 0 to "),
        (lambda facts, x: x.update(tokens=x["tokens"][None]), "has tokens=.*, expected one dim"),
        (lambda facts, x: x.pop("tokens"), "has 2 pages of 0 tokens"),
        (lambda facts, x: x.update(more=x["k"]), "has more=.*, expected None"),
        (lambda facts, x: x.update(v=x["v"][:, :1]), "has v=.*, expected "),
        (lambda facts, x: x.update(messages=text_of("[")), "has messages that are none: "),
        (lambda facts, x: x.update(messages=text_of("[" * 99999)), "has messages that are none: "),
        (lambda facts, x: x.update(messages=text_of('{"role":"a"}')), "has messages that are"),
        (lambda facts, x: x.update(messages=text_of("[3]")), "has messages that are none: "),
        (lambda facts, x: x.update(messages=text_of("\x80")), "has messages that are none: "),
        (lambda facts, x: x.update(stream=text_of("?"), k=None, v=None), "stream has magic"),
    ],
)
def test_a_file_that_lies(open_llm, rng, tmp_path, monkeypatch, change, text):
    """With a checksum that holds."""
    llm, path, write = open_llm(page_size=1), tmp_path / "x", tensor_files.write

    def lie(path, facts, arrays, **options):
        arrays = {name: x.copy() for name, x in arrays.items()}
        change(facts, arrays)
        arrays = {name: arrays[name] for name in ORDER if arrays.get(name) is not None}
        write(path, facts, arrays, **options)

    monkeypatch.setattr(tensor_files, "write", lie)
    saved(llm, path, rng)
    other = open_llm(page_size=1)
    with pytest.raises(FormatError, match=text):
        other.load(path)
    assert other.cache.manager.num_cached == 0


ORDER = ("tokens", "messages", "k", "v", "stream", "more")


def text_of(text):
    return np.frombuffer(text.encode("latin-1"), np.uint8)


@without_simt
def test_wrong_calls(open_llm, tmp_path):
    llm, path = talking(open_llm()), tmp_path / "x"
    for prompt in ([], "", [300_000], [1.5], [{"role": "user"}], [{}, 3]):
        with pytest.raises(ParameterError):
            llm.save(path, prompt)
    with pytest.raises(ParameterError, match="hold what JSON cannot"):
        llm.save(path, [{"role": "user", "content": "a", "extra": {1j}}])
    off = open_llm(prefix_cache=False)
    for call in (lambda: off.save(path, [5]), lambda: off.load(path)):
        with pytest.raises(ParameterError, match="prefix_cache is False, expected an LLM that"):
            call()
    for call in (lambda x: llm.save(x, [5]), llm.load):
        with pytest.raises(ParameterError, match="expected a regular file"):
            call(tmp_path)
        with pytest.raises(DtypeError, match="path is an int"):
            call(3)
    with pytest.raises(FileNotFoundError):
        llm.load(path)
    with pytest.raises(UnsupportedError, match="LLM.load: cannot be prepared"):
        prepare(llm.load, path)
    assert not list(tmp_path.iterdir())


@without_simt
@pytest.mark.skipif(os.name != "posix", reason="needs permissions of POSIX")
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_save_leaves_the_old_file(open_llm, rng, tmp_path, monkeypatch, error):
    llm, path = open_llm(), tmp_path / "x"
    good = saved(llm, path, rng)
    assert path.stat().st_mode & 0o777 == 0o600

    def fail(*_):
        raise error("stop")

    with monkeypatch.context() as patch:
        patch.setattr(whole_files.os, "fsync", fail)
        with pytest.raises(error):
            llm.save(path, tokens_of(rng, 5))
    assert path.read_bytes() == good and [x.name for x in tmp_path.iterdir()] == ["x"]
    assert llm.cache.manager.num_free == llm.cache.manager.num_pages


@without_simt
def test_the_model_file_may_go_before_a_save(open_llm, tiny_paths, rng, tmp_path):
    (tiny_paths / "gone.gguf").write_bytes((tiny_paths / "llama.gguf").read_bytes())
    llm = open_llm("gone")
    (tiny_paths / "gone.gguf").unlink()
    saved(llm, tmp_path / "x", rng)
    assert open_llm().load(tmp_path / "x").token_ids
