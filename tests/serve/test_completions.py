"""What the endpoints answer, in OpenAI's forms."""

import json
import re
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from pykv.llm.sampling import TokenLogprobs
from pykv.serve.engine import State
from pykv.serve.metrics import Metrics
from pykv.serve.protocol import Asked
from pykv.serve.replies import Reply
from pykv.tiers import Counters
from tests.serve.test_clients import until

USER = [{"role": "user", "content": "Hi"}]
CHAT = "/v1/chat/completions"


def test_a_chat(serve):
    client = serve()
    answer = client.ask(CHAT, model="tiny", messages=USER)
    assert re.fullmatch("chatcmpl-[0-9a-f]{24}", answer["id"]) and answer["created"] > 1e9
    assert answer["object"] == "chat.completion" and answer["model"] == "tiny"
    message = {"role": "assistant", "content": "Hello, you."}
    choice = {"index": 0, "finish_reason": "stop", "message": message, "logprobs": None}
    assert answer["choices"] == [choice]
    prompt = len(client.server.language.chat_ids(USER))
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 11,
        "total_tokens": prompt + 11,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@pytest.mark.parametrize("usage", [None, False, True])
def test_a_stream_of_a_chat(serve, usage):
    client = serve(seconds=0.001)
    options = {} if usage is None else {"stream_options": {"include_usage": usage}}
    chunks = client.events(CHAT, messages=USER, **options)
    assert len({(c["id"], c["created"], c["object"], c["model"]) for c in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    if usage:
        last = chunks.pop()
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == 11
        assert all(chunk["usage"] is None for chunk in chunks)
    else:
        assert not any("usage" in chunk for chunk in chunks)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert len(choices) == len(chunks)  # never an empty list
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["delta"].get("content", "") for c in choices) == "Hello, you."
    assert [c["finish_reason"] for c in choices[-2:]] == [None, "stop"]
    assert choices[-1]["delta"] == {}


def test_completions_of_every_sort_of_prompt(serve):
    client = serve(lambda s: f"{len(s.prompt)}.")
    llm = client.server.language
    text = len(llm.tokenize("some text"))
    for prompt, said in (
        ("some text", [text]),
        (["a", "some text"], [len(llm.tokenize("a")), text]),
        ([5, 6, 7], [3]),
        ([[5, 6], [7]], [2, 1]),
    ):
        answer = client.ask("/v1/completions", prompt=prompt)
        assert [c["text"] for c in answer["choices"]] == [f"{n}." for n in said]
        assert [c["index"] for c in answer["choices"]] == list(range(len(said)))
        assert answer["usage"]["prompt_tokens"] == sum(said)
        assert answer["object"] == "text_completion"
    chunks = client.events("/v1/completions", prompt=[[5, 6], [7]], echo=True)
    texts = ["", ""]
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == [llm.detokenize([5, 6]) + "2.", llm.detokenize([7]) + "1."]
    assert sorted(c["choices"][0]["finish_reason"] for c in chunks[-2:]) == ["stop", "stop"]


def test_max_tokens(serve):
    client = serve("x" * 50)
    for fields, tokens in (
        ({"max_tokens": 3}, 3),
        ({"max_completion_tokens": 4}, 4),
        ({"max_completion_tokens": 4, "max_tokens": 3}, 4),
        ({"max_completion_tokens": None, "max_tokens": 3}, 3),
    ):
        answer = client.ask(CHAT, messages=USER, **fields)
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == tokens
    answer = client.ask("/v1/completions", prompt="x")
    assert answer["usage"]["completion_tokens"] == 16  # OpenAI's default
    assert client.ask(CHAT, messages=USER)["usage"]["completion_tokens"] == 50


def test_choices_draw_tokens_of_their_own(serve):
    client = serve(lambda s: f"{s.params.seed}")
    answer = client.ask(CHAT, messages=USER, n=3, seed=-2)
    seeds = [choice["message"]["content"] for choice in answer["choices"]]
    assert seeds == [str(2**64 - 2), str(2**64 - 1), "0"]
    assert answer["usage"]["prompt_tokens"] == len(client.server.language.chat_ids(USER))
    orders = client.server.protocol.chat(dict(messages=USER, n=3)).orders
    assert len({id(order.prompt) for order in orders}) == 1  # one, on its way to the engine
    answer = client.ask("/v1/completions", prompt=["x", "x"], n=2, seed=5)
    assert [choice["text"] for choice in answer["choices"]] == ["5", "6", "7", "8"]
    for none in ({}, {"seed": -1}):  # then each request has another
        first, second = (client.ask(CHAT, messages=USER, **none)["choices"] for _ in range(2))
        assert first != second


def test_sampling_parameters_reach_the_sequence(serve):
    seen = []
    client = serve(lambda s: seen.append(s.params) or "x" * 9)
    given = dict(temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, seed=7, max_tokens=9)
    client.ask(CHAT, messages=USER, stop=["a", "b"], ignore_eos=True, **given)
    assert {name: getattr(seen[0], name) for name in given} == given
    assert seen[0].stop == ("a", "b") and seen[0].ignore_eos
    client.ask(CHAT, messages=USER, top_k=-1, top_p=0, stop="a", temperature=None)
    assert seen[1].top_k == 0 and 0 < seen[1].top_p < 1e-6 and seen[1].stop == ("a",)
    assert seen[1].temperature == 1.0


def test_null_is_the_same_as_none(serve):
    client = serve()
    names = """
        temperature top_p top_k min_p seed max_tokens max_completion_tokens stop n stream
        stream_options logprobs top_logprobs presence_penalty frequency_penalty repetition_penalty
        logit_bias response_format tools tool_choice user ignore_eos stop_token_ids model
        parallel_tool_calls chat_template_kwargs
    """.split()
    body = dict.fromkeys(names)
    assert client.ask(CHAT, messages=USER, **body)["choices"][0]["finish_reason"] == "stop"
    body |= {"echo": None, "suffix": None, "best_of": None}
    assert client.ask("/v1/completions", prompt="x", **body)["choices"][0]["text"] == "Hello, you."


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_is_cut_off(serve, stream):
    client = serve("one two three", seconds=0.001)
    if stream:
        chunks = client.events(CHAT, messages=USER, stop=["wo t", "none"])
        deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
        text, reason = "".join(deltas), chunks[-1]["choices"][0]["finish_reason"]
    else:
        (choice,) = client.ask(CHAT, messages=USER, stop=["wo t", "none"])["choices"]
        text, reason = choice["message"]["content"], choice["finish_reason"]
    assert (text, reason) == ("one t", "stop")
    assert client.scheduler.is_idle


def test_characters_of_several_tokens_stay_whole(serve):
    client = serve("a€b", seconds=0.001)
    chunks = client.events(CHAT, messages=USER)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "a€b"
    assert not any("\ufffd" in str(chunk) for chunk in chunks)


def test_messages_of_every_form(serve):
    seen = []
    client = serve(lambda s: seen.append(s.prompt) or "x")
    llm = client.server.language
    parts = [{"type": "text", "text": "How "}, {"type": "text", "text": "are you"}]
    client.ask(
        CHAT,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": parts, "name": "Ann"},
            {"role": "assistant", "content": None, "refusal": None},
            {"role": "user", "content": "<|eos|>"},
            {"role": "assistant", "content": None, "refusal": "No."},
        ],
    )
    text = (
        "[system:Be brief.][user:How are you][assistant:][user:<|eos|>][assistant:No.][assistant:"
    )
    assert seen[0] == llm.tokenize(text)
    assert llm.tokenizer.eos_id not in seen[0]  # what people write is text


# --- Logprobs ---


@pytest.mark.parametrize("top", [None, 0, 1, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_chat(serve, top, stream):
    client = serve("Hi €", seconds=0.001)
    fields = dict(messages=USER, logprobs=True, top_logprobs=top)
    if stream:
        choices = [chunk["choices"][0] for chunk in client.events(CHAT, **fields)]
        found = [choice["logprobs"] for choice in choices]
        assert found[0] is None and found[-1] is None  # chunks without tokens
        entries = [x for each in found if each for x in each["content"]]
    else:
        entries = client.ask(CHAT, **fields)["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries) == "Hi €".encode()
    assert [entry["token"] for entry in entries[:4]] == ["H", "i", " ", "bytes:\\xe2"]
    for entry in entries:
        assert entry["logprob"] == -0.5 and len(entry["top_logprobs"]) == (top or 0)
        for other in entry["top_logprobs"][:1]:
            assert other == {name: entry[name] for name in ("token", "logprob", "bytes")}


def test_logprobs_of_a_completion(serve):
    client = serve("Hi!")
    (choice,) = client.ask("/v1/completions", prompt="x", logprobs=1)["choices"]
    assert choice["logprobs"] == {
        "tokens": ["H", "i", "!"],
        "token_logprobs": [-0.5] * 3,
        "top_logprobs": [{"H": -0.5}, {"i": -0.5}, {"!": -0.5}],
        "text_offset": [0, 1, 2],
    }
    offsets = []
    for chunk in client.events("/v1/completions", prompt="x", logprobs=0):
        if found := chunk["choices"][0]["logprobs"]:
            offsets += found["text_offset"]
    assert offsets == [0, 1, 2]


def test_the_drawn_token_is_among_the_likeliest_of_a_completion():
    """As one more where it is none of them. Tokens that are spelled alike share an entry."""
    spelled = {1: b" the", 2: b"A", 3: b"A", 4: b" Bhutan"}
    tokenizer = SimpleNamespace(
        stream_decoder=lambda: SimpleNamespace(push=lambda i: "x"), token_bytes=spelled.get
    )
    entry = TokenLogprobs(4, -7.0, {1: -1.0, 2: -2.0, 3: -3.0})
    for count, top in (
        (0, {" Bhutan": -7.0}),
        (1, {" the": -1.0, " Bhutan": -7.0}),
        (3, {" the": -1.0, "A": -2.0, " Bhutan": -7.0}),
    ):
        asked = Asked([], stream=True, logprobs=count)
        reply = Reply(asked, SimpleNamespace(choices=[None]), "m", tokenizer, chat=False)
        (found,) = json.loads(reply._of_choice(0, [entry]))["top_logprobs"]
        assert found == top and list(found) == list(top)


def test_each_choice_begins_with_its_own_prompt(serve):
    fields = dict(prompt=["a", "b"], n=2, echo=True)
    choices = serve("!").ask("/v1/completions", **fields)["choices"]
    assert [choice["text"] for choice in choices] == ["a!", "a!", "b!", "b!"]


def test_choices_of_all_prompts_are_counted_before_they_are_made(serve):
    status, error = serve().refused("/v1/completions", prompt=["x"] * 65, n=2)
    assert (status, error["param"]) == (400, "n")
    assert error["message"] == "n is 2, expected 128 choices at most, of 65 prompts"


def test_offsets_count_characters_of_several_tokens(serve):
    """€ has three tokens here; it is in the text once its last one has come."""
    client = serve("a€b")
    (choice,) = client.ask("/v1/completions", prompt="x", logprobs=0)["choices"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 1, 2]


def test_logprobs_are_spelled_beside_the_event_loop(serve, monkeypatch):
    threads = set()

    def spelled(self, index, found):
        threads.add(threading.current_thread().name)
        return "null"

    monkeypatch.setattr(Reply, "_of_choice", spelled)
    client = serve()
    client.ask(CHAT, messages=USER, logprobs=True)
    assert threads and all(name.startswith("asyncio_") for name in threads)


def test_a_token_is_spelled_once(serve, monkeypatch):
    client = serve("x" * 50)
    spelled, tokenizer = [], client.server.language.tokenizer
    spell = tokenizer.token_bytes

    def noted(i):
        if threading.current_thread().name != "pykv-engine":  # which turns tokens into text
            spelled.append(i)
        return spell(i)

    monkeypatch.setattr(tokenizer, "token_bytes", noted)
    client.ask(CHAT, messages=USER, logprobs=True, top_logprobs=2)
    assert len(spelled) == len(set(spelled)) == 2


# --- The others ---


def test_models(serve):
    client = serve()
    status, answer = client.get("/v1/models")
    assert status == 200 and answer["object"] == "list"
    assert [model["id"] for model in answer["data"]] == ["tiny", "other"]
    assert client.get("/v1/models/other") == (200, answer["data"][1])
    assert answer["data"][0]["max_model_len"] == 1000
    assert client.get("/v1/models/a/b")[0] == 404
    assert client.ask(CHAT, model="other", messages=USER)["model"] == "tiny"
    status, error = client.refused(CHAT, model="gpt-4o", messages=USER)
    assert (status, error["param"], error["code"]) == (404, "model", "model_not_found")


def test_tokenize_and_back(serve):
    client = serve()
    llm = client.server.language
    ids = llm.tokenize("some text")
    answer = client.ask("/tokenize", prompt="some text")
    assert answer == {"tokens": ids, "count": len(ids), "max_model_len": 1000}
    assert client.ask("/tokenize", prompt="x", add_special_tokens=False)["count"] == 1
    assert client.ask("/tokenize", messages=USER)["tokens"] == llm.chat_ids(USER)
    assert client.ask("/detokenize", tokens=ids[1:]) == {"prompt": "some text"}
    said = f"a{llm.tokenizer.token(llm.tokenizer.eos_id)}b"
    ids = client.ask("/tokenize", prompt=said, special=True, add_special_tokens=False)["tokens"]
    assert len(ids) == 3 and client.ask("/detokenize", tokens=ids) == {"prompt": said}


def test_health_and_head(serve):
    client = serve()
    assert client.get("/health") == (200, {"status": "ok"})
    for path in ("/health", "/metrics", "/v1/models", "/"):
        status, headers, data = client.request("HEAD", path)
        assert status == 200 and data == b"" and int(headers["Content-Length"]) > 0


def test_generate_of_m40_llm(serve):
    client = serve(seconds=0.001)
    assert client.ask("/generate", prompt="x") == {"output": "Hello, you."}
    data = json.dumps({"prompt": "x", "stream": True, "max_tokens": 5})
    status, headers, data = client.request("POST", "/generate", data)
    assert (status, headers["Content-Type"]) == (200, "application/jsonl")
    lines = [json.loads(line) for line in data.splitlines()]
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert lines[-1]["output"] == "Hello" == "".join(line["delta"] for line in lines)
    assert all(
        a["output"] + b["delta"] == b["output"] for a, b in zip(lines, lines[1:], strict=False)
    )
    status, answer = client.post("/generate", prompt=5)
    assert status == 400 and answer["error"].startswith("prompt is 5, expected")
    status, answer = client.post("/generate", prompt={"x": "y" * 100})
    assert status == 400 and "yyy..., expected" in answer["error"]
    status, answer = client.post("/generate", prompt="x", n=2)
    assert status == 400 and answer["error"].startswith("n is 2, expected")


@pytest.mark.parametrize("style", ["auto", "raw", "llama3-chat"])
def test_prompt_formats(serve, style):
    seen = []
    client = serve(lambda s: seen.append(s.prompt) or "x")
    status, _ = client.post("/generate", prompt="Hi", prompt_format=style)
    assert (status == 200) == (style != "llama3-chat")
    llm = client.server.language
    assert not seen or seen[0] == (llm.tokenize("Hi") if style == "raw" else llm.chat_ids(USER))


def test_metrics_count(serve):
    client = serve()
    before = client.metrics()
    assert before["vllm:num_requests_running"] == before["vllm:kv_cache_usage_perc"] == 0
    client.ask(CHAT, messages=USER, n=2)
    client.refused(CHAT, messages=[])
    until(lambda: client.metrics().get('pykv:responses_total{status="400"}'))  # once it was sent
    until(lambda: client.metrics()["vllm:e2e_request_latency_seconds_count"])
    after = client.metrics()
    prompt = len(client.server.language.chat_ids(USER))
    assert after["vllm:prompt_tokens_total"] == 2 * prompt
    assert after["vllm:generation_tokens_total"] == 22
    assert after['vllm:request_success_total{model_name="tiny",finished_reason="stop"}'] == 2
    assert after['pykv:responses_total{status="400"}'] == 1
    assert after["vllm:prefix_cache_queries_total"] == 2 * prompt
    label = '{model_name="tiny"}'
    assert after["vllm:time_to_first_token_seconds_count"] == 2
    assert after["vllm:inter_token_latency_seconds_count"] == 20
    assert after["vllm:e2e_request_latency_seconds_count"] == 1
    bucket = 'vllm:inter_token_latency_seconds_bucket{model_name="tiny",le="+Inf"}'
    assert after[bucket] == 20 and label not in "".join(after)


def test_metrics_of_tiers():
    counters = Counters(host_hits=3)
    counters.from_host.count(3, 768, 0.25)
    tiers = tuple(counters.as_dict().items())
    text = Metrics().text("m", State(pages=8, tiers=tiers), running=0)
    assert 'pykv:tiers_host_hits_total{model_name="m"} 3\n' in text
    assert 'pykv:tiers_from_host_seconds_total{model_name="m"} 0.25\n' in text
    assert "tiers" not in Metrics().text("m", State(pages=8), running=0)


def test_logprobs_are_numbers_of_json():
    """Of a token that cannot come, too."""
    asked = Asked([], stream=True, logprobs=1)
    tokenizer = SimpleNamespace(
        stream_decoder=lambda: SimpleNamespace(push=lambda i: "x"), token_bytes=lambda i: b"x"
    )
    entry = TokenLogprobs(5, -np.inf, {5: -np.inf})
    for chat in (True, False):
        reply = Reply(asked, SimpleNamespace(choices=[None]), "m", tokenizer, chat=chat)
        found = json.loads(reply._of_choice(0, [entry]))
        values = found["content"][0]["logprob"] if chat else found["token_logprobs"][0]
        assert values == -9999
