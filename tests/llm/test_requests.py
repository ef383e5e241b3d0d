"""What an LLM is asked: prompts, parameters and options of every wrong sort, threads, and streams
that are stopped."""

import copy
import os
import pickle
import re
import sys
import threading
import time

import numpy as np
import pytest

from pykv import KVSpec
from pykv.errors import (
    CapacityError,
    DtypeError,
    InstallError,
    ParameterError,
    PykvError,
    UnsupportedError,
)
from pykv.llm import LLM, SamplingParams, gguf, weights
from tests.llm import tiny

WRONG_PARAMS = [  # (parameter, values of a wrong type, values out of range)
    ("stop", (None, 5, [None], b"x"), ("", ["a", ""])),
    ("temperature", ("1", None, True, 1j), (-1, 1e308, 10**400, 10**5000, float("inf"))),
    ("top_p", ("1", None), (0, 1e-300, 1.5, float("nan"), -(10**400))),
    ("min_p", ("0", None), (-0.1, 2, float("nan"))),
    ("top_k", (None, 1.5, "3", True), (2**31, -1)),
    ("seed", (None, 1.0, "1"), (-1, 2**64, 10**5000)),
    ("max_tokens", (None, 1.5, "9", True), (0,)),
    ("ignore_eos", (None, "no", 2), ()),
    ("temperature", (), (np.float16("inf"), np.float32("nan"))),
]


@pytest.mark.parametrize(
    "name, types, values", WRONG_PARAMS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_parameters_are_checked_when_they_are_made(name, types, values):
    for error, wrong in ((DtypeError, types), (ParameterError, values)):
        for value in wrong:
            with pytest.raises(error, match=f"SamplingParams: {name} is .*, expected "):
                SamplingParams(**{name: value})


def test_parameters_of_every_sort_of_number(open_tiny):
    params = SamplingParams(
        temperature=np.float32(0.5), top_p=np.float64(1e-45), top_k=np.int64(3), seed=np.uint64(7)
    )
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b") and SamplingParams(temperature=1)
    for extreme in ({"temperature": 3.4e38}, {"temperature": 1e-300}, {"top_p": 1e-45}):
        assert open_tiny().generate([[5]], SamplingParams(max_tokens=2, **extreme))
    assert open_tiny().generate([[5]], params)
    # 100 + 127 wraps around where NumPy adds small integers
    llm = open_tiny(context=np.int8(120), page_size=np.int8(16))
    params = SamplingParams(max_tokens=np.int8(127), temperature=np.float16(0), ignore_eos=True)
    assert len(llm.generate([[5] * 100], params)[0].token_ids) == 20


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("requests") / "llama.gguf"
    tiny.write_case(path, "llama")
    return path


@pytest.fixture
def open_tiny(path):
    return lambda **options: LLM(path, device="cpu", **options)


def test_an_llm_stays_in_its_process(tmp_path):
    tiny.write(tmp_path / "m.gguf", "llama")
    llm = LLM(tmp_path / "m.gguf", device="cpu")
    for move in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(UnsupportedError, match=r"LLM\(.* is neither copied nor pickled"):
            move(llm)


def test_a_stop_string_may_be_a_control_token(tmp_path):
    """Clients send <|eot_id|> and the like, which are no part of any text."""
    tiny.write(tmp_path / "m.gguf", "llama")
    llm = LLM(tmp_path / "m.gguf", device="cpu")
    bos = llm.tokenizer.bos_id
    options = dict(max_tokens=4, ignore_eos=True, logit_bias={bos: 100})
    for stop in ("<|bos|>", ["x", "<|bos|>"]):
        (answer,) = llm.generate([[5]], SamplingParams(**options, stop=stop))
        assert (answer.token_ids, answer.finish_reason) == ([], "stop")
    (answer,) = llm.generate([[5]], SamplingParams(**options, stop="<|bos"))
    assert (answer.token_ids, answer.finish_reason) == ([bos] * 4, "length")


def test_what_a_file_suppresses_is_never_said(tmp_path):
    """As llama.cpp does it: tokens of tokenizer.ggml.suppress_tokens get a bias, whoever draws."""
    free, said = tmp_path / "free.gguf", tmp_path / "said.gguf"
    options = dict(max_tokens=8, ignore_eos=True)
    tiny.write(free, "llama")
    (answer,) = LLM(free, device="cpu").generate([[5, 6, 7]], SamplingParams(**options))
    tiny.write(said, "llama", keys={"tokenizer.ggml.suppress_tokens": answer.token_ids})
    for params in (
        SamplingParams(**options),
        SamplingParams(**options, temperature=2.0, logit_bias={answer.token_ids[0]: 100}),
    ):
        (other,) = LLM(said, device="cpu").generate([[5, 6, 7]], params)
        assert len(other.token_ids) == 8 and {*other.token_ids}.isdisjoint(answer.token_ids)


@pytest.mark.parametrize(
    "prompts",
    [
        *(None, 5, b"abc", {"a": 1}, [None], [5], [b"abc"], [[1.7, 2]], [["a"]], [[None]]),
        *([[True]], [{}], [[1, [2]]], [np.array([1.0, 2.0])], [[2**70]], [[-1]], [[]], [""]),
    ],
    ids=lambda value: str(value)[:30],
)
def test_prompts_are_checked_before_any_work(open_tiny, prompts, monkeypatch):
    llm = open_tiny()
    monkeypatch.setattr(llm._scheduler, "add", None)
    with pytest.raises(ParameterError, match="promp"):
        llm.generate(prompts)


def test_what_was_meant_is_said(open_tiny):
    llm = open_tiny()
    for prompts, params, text in (
        (5, None, "prompts is 5, expected a text, or a list of prompts"),
        ([1, 2], None, "prompts[0] is 1, expected a text or a list of token ids"),
        (["a", ""], None, "prompts[1] is empty, expected at least one character"),
        (["a", [1, -1]], None, "prompts[1] has token id -1, expected 0 to"),
        (["a", "\ud800"], None, "prompts[1] has '\\ud800' at position 0"),
        (["a", "b"], [SamplingParams(), None], "params[1] has None, expected SamplingParams"),
        ("a", {"max_tokens": 1}, "params is {'max_tokens': 1}, expected SamplingParams, or a list"),
    ):
        with pytest.raises(ParameterError, match=re.escape(text)):
            llm.generate(prompts, params)


@pytest.mark.parametrize("ids", [5, None, "ab", b"ab", [1.5], [None], ["a"], [True], [-1], [263]])
def test_ids_to_text_are_checked(open_tiny, ids):
    with pytest.raises(ParameterError, match="ids? (is|has) .*, expected"):
        open_tiny().detokenize(ids)


@pytest.mark.parametrize("params", [0, [], ""], ids=str)
def test_params_of_a_stream_are_checked(open_tiny, params):
    with pytest.raises(ParameterError, match="params has"):
        open_tiny().stream("a", params)


@pytest.mark.parametrize("params", [5, "x", [None], [5], {"seed": 1}], ids=str)
def test_params_are_checked_before_any_work(open_tiny, params):
    with pytest.raises(ParameterError, match="params"):
        open_tiny().generate(["a"], params)


def test_repr_says_what_it_is(tiny_paths):
    path = tiny_paths / "llama.gguf"
    llm = LLM(path, device="cpu", kv_dtype="int8:head", weights="stored", context=20)
    assert repr(llm) == (
        f'LLM({str(path)!r}, device="cpu", kv_dtype="int8:head", weights="stored", context=20)'
    )
    assert len(repr(llm.file)) < 200  # no vocabulary


def test_a_spec_is_a_kv_dtype(open_tiny):
    """As a text is, wherever caches are made."""
    answers = [open_tiny(kv_dtype=x).generate("ab") for x in ("int8", KVSpec("int8"))]
    assert answers[0] == answers[1]


def test_ids_of_every_sort_of_integer(open_tiny):
    llm = open_tiny()
    params = SamplingParams(max_tokens=4)
    want = llm.generate([[1, 2, 3]], params)
    assert llm.generate([np.array([1, 2, 3])], params) == want
    assert llm.generate([(np.int64(1), np.uint8(2), 3)], params) == want
    assert llm.generate(np.array([[1, 2, 3]]), params) == want


@pytest.mark.parametrize(
    "wrong",
    [
        *({"kv_dtype": None}, {"kv_dtype": 8}, {"weights": None}, {"weights": []}),
        *({"context": 10.5}, {"context": "9"}, {"context": True}, {"context": 0}),
        *({"page_size": None}, {"page_size": 2.0}, {"pool_tokens": "9"}, {"pool_tokens": 0}),
        *({"prefix_cache": "no"}, {"prefix_cache": 2}, {"progress": "no"}),
    ],
    ids=str,
)
def test_options_are_checked(open_tiny, wrong):
    with pytest.raises((ParameterError, DtypeError), match=next(iter(wrong))):
        open_tiny(**wrong)


@pytest.mark.parametrize("ids", ["ab", 3, None, [1.5], ["a"], [True], [-1]], ids=str)
def test_ids_to_detokenize_are_checked(open_tiny, ids):
    with pytest.raises(ParameterError, match="expected"):
        open_tiny().detokenize(ids)


def test_special_is_true_or_false(open_tiny):
    llm = open_tiny()
    for call in (llm.generate, llm.stream):
        with pytest.raises(DtypeError, match="special is 'no', expected True or False"):
            call("a", special="no")


@pytest.mark.parametrize(
    ("wrong", "bound"),
    [
        ({"seed": 2**64}, str(2**64 - 1)),
        ({"top_k": 2**31}, str(2**31 - 1)),
        ({"temperature": 1e39}, "e.38"),
    ],
    ids=str,
)
def test_upper_bounds_are_named(wrong, bound):
    with pytest.raises(ParameterError, match=f"expected .*{bound}"):
        SamplingParams(**wrong)


@pytest.mark.parametrize("package", ["gguf", "tokenizers"])
def test_without_the_extra(open_tiny, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    text = rf"{package} is not installed: .*pip install .*\[llm\]"
    with pytest.raises(InstallError, match=text) as caught:
        open_tiny()
    assert isinstance(caught.value, PykvError) and caught.value.name == package


def test_ctrl_c_while_weights_are_read(tmp_path, monkeypatch):
    """No other layer is begun."""
    begun, has_begun, may_end = [], threading.Event(), threading.Event()

    class Pool(weights.ThreadPoolExecutor):
        def shutdown(self, **options):
            super().shutdown(wait=False, **options)
            may_end.set()
            super().shutdown()

    def layer(self, i, *_):
        begun.append(i)
        has_begun.set()
        may_end.wait(60)

    def matrix(*_):
        has_begun.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(weights._Reader, "layer", layer)
    monkeypatch.setattr(weights._Reader, "matrix", matrix)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    tiny.write_case(tmp_path / "model.gguf", "gemma3")  # has seven layers
    with pytest.raises(KeyboardInterrupt):
        weights.load(gguf.read(tmp_path / "model.gguf"))
    assert begun == [0]


def test_a_prompt_that_is_much_too_long_is_refused_at_once(open_tiny):
    llm = open_tiny()
    text = "hello " * 2_000_000
    started = time.process_time()
    for method, name in (
        (llm.generate, "prompt"),
        (lambda text: llm.generate(["a", text]), r"prompts\[1\]"),
        (llm.stream, "prompt"),
        (llm.logits, "token_ids"),
        (llm.perplexity, "text_or_ids"),
    ):
        wanted = f"^{name} has at least [0-9,]+ tokens, expected at most 128$"
        with pytest.raises(CapacityError, match=wanted):
            method(text)
    assert time.process_time() - started < 2


def test_control_tokens_of_a_prompt_are_read_on_request(open_tiny):
    llm = open_tiny()
    eos = llm.tokenizer.eos_id
    params = SamplingParams(max_tokens=2)
    for special, ends in ((False, False), (True, True)):
        ids = llm.tokenize("a<|eos|>", special=special)
        (answer,) = llm.generate("a<|eos|>", params, special=special)
        stream = llm.stream("a<|eos|>", params, special=special)
        assert (ids[-1] == eos) is ends and answer.prompt_token_ids == ids
        assert "".join(stream) == answer.text and stream.completion == answer


def test_a_stream_can_be_stopped(open_tiny):
    llm = open_tiny()
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    stream = llm.stream([5, 6, 7], params)
    assert stream.completion.text == "" and stream.completion.finish_reason == ""
    pieces = [next(stream), next(stream)]
    stream.stop()
    pieces += stream
    answer = stream.completion
    assert answer.finish_reason == "abort" and answer.text == "".join(pieces)
    assert len(answer.token_ids) < 10 and llm.cache.manager.num_free == llm.cache.manager.num_pages
    stream.stop()
    assert stream.completion == answer

    stream = llm.stream([5, 6, 7], params)
    stream.stop()
    assert "".join(stream) == "" and llm.cache.manager.num_free == llm.cache.manager.num_pages


def test_a_stream_is_collected_without_a_turn(open_tiny):
    """As in the midst of another LLM's turn, for which who has this one's may be waiting."""
    llm = open_tiny()
    manager = llm.cache.manager
    streams = [llm.stream([5, 6, 7], SamplingParams(max_tokens=50, ignore_eos=True))]
    next(streams[0])
    collecting = threading.Thread(target=streams.clear, daemon=True)
    with llm.turn():
        collecting.start()
        collecting.join(60)
        assert not collecting.is_alive()
        assert manager.num_free < manager.num_pages
    llm.logits([5])
    assert llm.cache.manager.num_free == llm.cache.manager.num_pages


def test_threads_share_a_stream(open_tiny):
    """They share its pieces; who closes it waits for the one that is being computed."""
    llm = open_tiny()
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    want = llm.generate([[5, 6, 7]], params)[0].text
    pieces, errors = [], []

    def read(stream):
        try:
            pieces.extend(stream)
        except BaseException as error:
            errors.append(error)

    for closes in (False, True):
        pieces.clear()
        stream = llm.stream([5, 6, 7], params)
        threads = [threading.Thread(target=read, args=[stream]) for _ in range(3)]
        for thread in threads:
            thread.start()
        if closes:
            stream.close()
        for thread in threads:
            thread.join()
        assert not errors and (closes or sorted("".join(pieces)) == sorted(want))
    assert llm.cache.manager.num_free == llm.cache.manager.num_pages


def test_threads_share_an_llm(open_tiny):
    """Each gets the answers that it would get alone; streams and whole answers, in a pool that
    grows, with prompts that begin alike."""
    llm = open_tiny()
    prompts = [[5 + n % 7] * (20 + n) for n in range(40)]
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    want = [open_tiny(prefix_cache=False).generate([p], params)[0].token_ids for p in prompts]
    got = {}

    def work(first):
        for n in range(first, 40, 4):
            if n % 3:
                got[n] = llm.generate([prompts[n]], params)[0].token_ids
            else:
                stream = llm.stream(prompts[n], params)
                list(stream)
                got[n] = stream.completion.token_ids
            llm.logits(prompts[n])

    threads = [threading.Thread(target=work, args=[n]) for n in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert [got[n] for n in range(40)] == want
    assert llm.cache.manager.num_free == llm.cache.manager.num_pages
