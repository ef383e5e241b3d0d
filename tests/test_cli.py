"""The command line: every command, every kind of bad input, and how it ends."""

import io
import json
import math
import os
import re
import subprocess
import sys
import types
import warnings

import numpy as np
import pytest

import pykv
from pykv import cli, cuda, doctor, verify
from pykv.llm import model_files
from pykv.ops import norm
from pykv.specs import KVSpec
from tests.llm import tiny
from tools import fuzz_gguf

TEMPLATE = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}[assistant:"
COMMAND = [sys.executable, "-m", "pykv"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny chat model, the same without a chat template, and damaged files."""
    folder = tmp_path_factory.mktemp("models")
    tiny.write_case(folder / "base.gguf", "llama")
    with pytest.MonkeyPatch.context() as patch:
        add_tokenizer = tiny._add_tokenizer

        def with_template(writer, model):
            add_tokenizer(writer, model)
            writer.add_chat_template(TEMPLATE)

        patch.setattr(tiny, "_add_tokenizer", with_template)
        tiny.write_case(folder / "chat.gguf", "llama")
    whole = (folder / "base.gguf").read_bytes()
    (folder / "truncated.gguf").write_bytes(whole[:-1000])
    (folder / "header.gguf").write_bytes(whole[:2000])
    (folder / "text.gguf").write_text("no model at all")
    (folder / "empty.gguf").touch()
    return folder


@pytest.fixture(autouse=True)
def in_the_folder(files, monkeypatch, tmp_path):
    """Files are named as a user in their folder would; nothing reaches the user's own cache."""
    monkeypatch.chdir(files)
    monkeypatch.setenv("PYKV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PYKV_COMPILE", "lazy")  # else each process fills the empty cache


def run(capsys, *argv):
    """Exit code, stdout and stderr of one command."""
    capsys.readouterr()
    code = cli.main(list(map(str, argv)))
    return code, *capsys.readouterr()


BASE = ("run", "--model", "base.gguf", "--device", "cpu")


def tiny_run(capsys, *argv):
    return run(capsys, *BASE, *argv)


def say(monkeypatch, *lines):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def answer(prompt, **params):
    llm = pykv.LLM("chat.gguf", device="cpu")
    return llm.generate(prompt, pykv.SamplingParams(**params))[0].text


class FakeStream(list):
    """Pieces that are all there."""

    @property
    def completion(self):
        return pykv.Completion("".join(self), [7] * len(self), [5], "stop")


class Fake:
    """Stands in for pykv.LLM: keeps what it was given and answers in set pieces."""

    pieces = ["one", " two"]
    device = "Fake GPU"
    has_chat_template = False
    context = 4096
    tiers = None

    def __init__(self, model, **options):
        Fake.model, Fake.options, Fake.asked = model, options, []
        self.stats = types.SimpleNamespace(
            prompt_tokens=30,
            reused_tokens=16,
            prompt_seconds=0.1,
            decode_tokens=8,
            decode_seconds=0.5,
            cached_tokens=38,
        )
        self.cache = types.SimpleNamespace(bytes_per_token=40_000)

    def stream(self, prompt, params, special=False):
        Fake.asked.append((prompt, params))
        return FakeStream(self.pieces)

    def chat_ids(self, messages):
        return [dict(message) for message in messages]


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr("pykv.llm.LLM", Fake)
    monkeypatch.setattr("pykv.llm.commands._check_template", lambda model: None)
    return Fake


# --- run ---


def test_run_prints_the_text_and_one_summary_line(capsys):
    code, out, err = tiny_run(capsys, "hello", "--max-tokens", 8)
    assert code == 0 and out == answer("hello", max_tokens=8) + "\n"
    # "hello" is the start token, "he", "l", "l" and "o". The last of the 8 tokens is not cached.
    # A token: K and V of 2 layers, 2 heads of 16, 2 bytes each.
    speed = r"\d+\.\d tokens/s"
    assert re.fullmatch(
        rf"CPU: prompt 5 tokens, reused 0 tokens, {speed}; decode 7 tokens, {speed}; "
        r"KV 256 bytes a token, 3,072 in all; cut at 8 tokens \(--max-tokens\)\n",
        err,
    )


@pytest.mark.gpu
def test_run_on_the_gpu_names_it(capsys):
    import cupy

    code, out, err = run(capsys, "run", "hello", "--model", "base.gguf", "--device", "cuda")
    assert code == 0 and out
    runtime = cupy.cuda.runtime
    name = runtime.getDeviceProperties(runtime.getDevice())["name"].decode()
    assert err.startswith(name + ": prompt 5")


def test_summary_worked_by_hand(capsys, fake):
    assert run(capsys, "run", "x") == (
        0,
        "one two\n",
        "Fake GPU: prompt 30 tokens, reused 16 tokens, 140.0 tokens/s; "
        "decode 8 tokens, 16.0 tokens/s; KV 40,000 bytes a token, 1,520,000 in all\n",
    )


def test_one_token_needs_no_decode_step(capsys):
    code, _, err = tiny_run(capsys, "hello", "--max-tokens", 1)
    assert code == 0 and "; cut at 1 token (--max-tokens)\n" in err
    assert "decode 0 tokens, 0.0 tokens/s; KV 256 bytes a token, 1,280 in all" in err


def test_run_streams(monkeypatch, fake):
    """Each piece is flushed before the next is computed."""
    flushed = []

    class Recorder(io.StringIO):
        def flush(self):
            flushed.append(self.getvalue())

    monkeypatch.setattr("sys.stdout", Recorder())
    assert cli.main(["run", "x"]) == 0
    assert flushed[:2] == ["one", "one two"] and flushed[-1] == "one two\n"


def test_run_reads_the_prompt_from_stdin(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    code, out, err = tiny_run(capsys, "-", "--max-tokens", 8)
    assert code == 0 and out == answer("hello", max_tokens=8) + "\n" and "prompt 5 tokens" in err


def test_stop_ends_the_text_before_it(capsys):
    text = answer("hello", max_tokens=12)
    stop = text[4:6]
    code, out, _ = tiny_run(capsys, "hello", "--max-tokens", 12, "--stop", "\0", "--stop", stop)
    assert code == 0 and out == text[: text.index(stop)] + "\n"


def test_the_seed_decides_the_draw(capsys):
    flags = ("hello", "--max-tokens", 12, "--temperature", 1.5)
    first, again, other = (tiny_run(capsys, *flags, "--seed", s)[1] for s in (1, 1, 2))
    assert first == again != other
    assert first == answer("hello", max_tokens=12, temperature=1.5, seed=1) + "\n"


def test_every_flag_reaches_the_model(capsys, fake):
    flags = "--model m --device cuda:1 --kv-dtype bf16 --weights fp32 --ctx 77 --max-tokens 5 "
    flags += "--temperature 0.5 --top-k 6 --top-p 0.75 --min-p 0.25 --seed 9 --stop a --stop b "
    flags += "--evict keydiff:0.5 --repetition-penalty 1.25 --presence-penalty 0.5 "
    flags += "--frequency-penalty -0.25 --host-cache 1GiB --disk-cache d:2GB "
    flags += "--prefill-device cuda:2 --decode persistent --max-sms-resident 100"
    assert run(capsys, "run", "a prompt", *flags.split())[0] == 0
    assert fake.model == "m"
    options = dict(device="cuda:1", kv_dtype="bf16", weights="fp32", context=77, progress=False)
    options |= dict(eviction="keydiff:0.5", host_cache="1GiB", disk_cache="d:2GB")
    options |= dict(prefill_device="cuda:2", decode="persistent", max_sms_resident=100)
    assert fake.options == options
    params = dict(temperature=0.5, top_k=6, top_p=0.75, min_p=0.25, seed=9, max_tokens=5)
    params |= dict(repetition_penalty=1.25, presence_penalty=0.5, frequency_penalty=-0.25)
    assert fake.asked == [("a prompt", pykv.SamplingParams(**params, stop=("a", "b")))]


def test_defaults(capsys, fake):
    assert run(capsys, "run", "x")[0] == 0
    assert fake.model == "smollm2-135m"
    options = dict(device="auto", kv_dtype="fp16", weights="fp16", context=None, progress=False)
    options |= dict(eviction=None, host_cache=None, disk_cache=None, prefill_device=None)
    options |= dict(decode="auto", max_sms_resident=None)
    assert fake.options == options and fake.asked == [("x", pykv.SamplingParams())]


@pytest.mark.parametrize("kv, nbytes", [("fp16", 256), ("bf16", 256), ("fp32", 512)])
def test_kv_and_weights(capsys, kv, nbytes):
    code, out, err = tiny_run(capsys, "hello", "--kv-dtype", kv, "--weights", kv, "--max-tokens", 2)
    assert code == 0 and f"KV {nbytes} bytes a token, {6 * nbytes:,} in all" in err


@pytest.mark.filterwarnings("ignore:.*rounding moves:UserWarning")
@pytest.mark.parametrize(
    "kv, nbytes", [("int8", 144), ("k8v4", 112), ("fp8:fp32:HND", 160), ("int4:head", 64)]
)
def test_caches_of_codes(capsys, kv, nbytes):
    """Two layers of two heads of 16; the second prompt reuses a page and its scales."""
    flags = ("--kv-dtype", kv, "--max-tokens", 3)
    code, out, err = tiny_run(capsys, "x" * 20, "x" * 20 + "y", *flags)
    _, first, _, second = out.splitlines()
    llm = pykv.LLM("base.gguf", device="cpu", kv_dtype=kv)
    params = pykv.SamplingParams(max_tokens=3)
    assert code == 0
    assert [first, second] == [
        llm.generate([text], params)[0].text for text in ("x" * 20, "x" * 20 + "y")
    ]
    assert f"KV {nbytes} bytes a token, {23 * nbytes:,} in all" in err and "reused 16" in err


def test_prompts_in_turn_reuse_what_they_have_in_common(capsys, monkeypatch):
    """Pages of 16 tokens: the second prompt begins with one, the third with two. The last token of
    a prompt is computed, even where all of it is known."""
    start = "x" * 31  # a token each, after the start token
    monkeypatch.setattr("sys.stdin", io.StringIO(start))
    code, out, err = tiny_run(capsys, start + "y", start[:20], start + "z", "-", "--max-tokens", 2)
    texts = [answer(text, max_tokens=2) for text in (start + "y", start[:20], start + "z", start)]
    names = ["x" * 31 + "y", "x" * 20, "x" * 31 + "z", "x" * 31]
    titles = [f"==> {n}: {name} <==\n" for n, name in enumerate(names, 1)]
    assert code == 0
    assert out == "".join(f"{title}{text}\n" for title, text in zip(titles, texts, strict=True))
    found = re.findall(r"prompt (\d+) tokens, reused (\d+) tokens", err)
    assert found == [("33", "0"), ("21", "16"), ("33", "32"), ("32", "16")]
    assert err.count("\n") == 4


def test_ctx_ends_the_answer(capsys):
    code, _, err = tiny_run(capsys, "hello", "--ctx", 8)
    assert code == 0 and "decode 2 tokens" in err  # 5 of the prompt, one from it, two more
    assert err.endswith("; cut at 3 tokens (--ctx)\n")


def test_what_a_console_cannot_show_is_replaced(monkeypatch, fake):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, "ascii"))
    monkeypatch.setattr(fake, "pieces", ["caf\u00e9", " \u2192"])
    assert cli.main(["run", "x"]) == 0
    assert raw.getvalue() == b"caf? ?\n"


# --- inspect and size ---


def test_inspect(capsys):
    code, out, err = run(capsys, "inspect", "chat.gguf")
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0].startswith("chat.gguf: GGUF version 3, ")
    assert "general.architecture 'llama'" in lines
    assert "llama.context_length 128" in lines
    assert "blk.1.attn_k.weight F32 32 x 64 8,192 bytes" in lines


def test_inspect_json(capsys):
    code, out, err = run(capsys, "inspect", "chat.gguf", "--json")
    found = json.loads(out)
    assert (code, err, found["version"]) == (0, "", 3)
    assert found["metadata"]["llama.context_length"] == 128
    assert len(found["metadata"]["tokenizer.ggml.tokens"]) > 4
    expected = {"name": "blk.1.attn_k.weight", "type": "F32", "shape": [32, 64], "bytes": 8192}
    assert expected in found["tensors"]


def test_inspect_json_of_numbers_that_json_has_not(capsys, tmp_path):
    keys = {"x.nan": float("nan"), "x.list": [1.5, float("-inf")]}
    (tmp_path / "x.gguf").write_bytes(fuzz_gguf.packed(keys, {}))
    code, out, err = run(capsys, "inspect", tmp_path / "x.gguf", "--json")
    found = json.loads(out, parse_constant=pytest.fail)
    assert (code, err, found["metadata"]) == (0, "", {"x.nan": None, "x.list": [1.5, None]})


@pytest.mark.parametrize("weights, itemsize", [("bf16", 2), ("fp32", 4)])
def test_size_json(capsys, weights, itemsize):
    flags = ("--kv-dtype", "int8", "--ctx", 9, "--json", "--weights", weights)
    code, out, err = run(capsys, "size", "chat.gguf", *flags)
    found, sizes = json.loads(out), dict(layers=2, kv_heads=2, head_dim=16, context=128)
    nbytes = found.pop("weight_bytes")
    assert (code, err) == (0, "") and found == sizes | dict(
        kv_dtype="int8", tokens=9, bytes_per_token=144, bytes=1296, weights=weights
    )
    _, out, _ = run(capsys, "inspect", "chat.gguf", "--json")
    shapes = [tensor["shape"] for tensor in json.loads(out)["tensors"]]
    matrices = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
    rotated = 2 * 64 * 64  # attention's outputs of both layers: heads of int8 are rotated
    float32 = sum(shape[0] for shape in shapes if len(shape) == 1) + rotated
    assert nbytes == {
        "gpu": itemsize * (matrices - rotated) + 4 * float32,
        "host": 4 * (matrices - rotated) + 4 * float32,
    }


LLAMA = "(2 layers x 2 heads x {} bytes of K{})"
GEMMA = "(7 layers x 2 heads x {} bytes of K{})"
BOTH, WITH_SCALES = " and V", ", V and scales"  # heads of 16 and of 32


@pytest.mark.parametrize(
    "case, flags, out",
    [
        ("llama", "", f"fp16: 256 bytes a token {LLAMA.format(64, BOTH)}, 32,768 bytes for 128"),
        ("llama", "bf16 --ctx 1", f"bf16: 256 bytes a token {LLAMA.format(64, BOTH)}, 256 bytes"),
        ("llama", "fp32 --ctx 9", f"fp32: 512 bytes a token {LLAMA.format(128, BOTH)}, 4,608"),
        ("llama", "int8 --ctx 1", f"int8: 144 bytes a token {LLAMA.format(36, WITH_SCALES)}, 144"),
        (
            "llama",
            "fp8:fp32",
            f"e4m3:fp32: 160 bytes a token {LLAMA.format(40, WITH_SCALES)}, 20,4",
        ),
        ("llama", "int4:head", f"int4:head: 64 bytes a token {LLAMA.format(16, BOTH)}, 8,192"),
        ("llama", "k8v4", f"k8v4: 112 bytes a token {LLAMA.format(28, WITH_SCALES)}, 14,336"),
        ("gemma3", "fp16 --ctx 10", f"fp16: 1,792 bytes a token {GEMMA.format(128, BOTH)}, 17,920"),
    ],
)
def test_size_worked_by_hand(capsys, tmp_path, case, flags, out):
    tiny.write_case(tmp_path / "m.gguf", case)
    flags = f"--kv-dtype {flags}".split() if flags else []
    code, got, err = run(capsys, "size", tmp_path / "m.gguf", *flags)
    cache, weights = got.splitlines()
    assert (code, err) == (0, "") and cache.startswith(out)
    assert cache.endswith(" for 1 token" if "1" in flags else " tokens")
    pattern = "weights: [0-9,]+ bytes of a GPU in fp16, or [0-9,]+ of the host"
    # Kinds whose codes are all integers: attention's output matrices undo the rotation of heads.
    if flags and flags[1] in ("int8", "int4:head", "k8v4"):
        pattern += f"; attention's output matrices are float32, as {flags[1]} rotates heads"
    assert re.fullmatch(pattern, weights)


def test_size_of_weights_as_stored(capsys, tmp_path):
    """Both places hold what the file does; rows of 64 values of Q8_0 are 68 bytes, here 80."""
    tiny.write(tmp_path / "m.gguf", "llama", kind="Q8_0", ffn=64)
    code, got, err = run(capsys, "size", tmp_path / "m.gguf", "--weights", "stored")
    _, out, _ = run(capsys, "inspect", tmp_path / "m.gguf", "--json")
    shapes = [tensor["shape"] for tensor in json.loads(out)["tensors"]]
    nbytes = sum(80 * shape[0] if len(shape) == 2 else 4 * shape[0] for shape in shapes)
    weights = f"weights: {nbytes:,} bytes of a GPU as stored, or {nbytes:,} of the host"
    assert (code, err, got.splitlines()[1]) == (0, "", weights)


def test_size_beyond_the_models_context_is_noted(capsys):
    code, out, err = run(capsys, "size", "base.gguf", "--context", 1000)
    assert code == 0 and "256,000 bytes for 1,000 tokens\n" in out
    assert err == "note: the model's own context is 128 tokens\n"


# --- doctor and verify ---


@pytest.mark.parametrize("mend, code", [("", 0), ("do this", 1)])
def test_doctor(capsys, monkeypatch, mend, code):
    report = doctor.Report([doctor.Finding("gpu", "found", mend)])
    monkeypatch.setattr(doctor, "examine", lambda: report)
    assert run(capsys, "doctor") == (code, report.as_text() + "\n", "")
    got, out, err = run(capsys, "doctor", "--json")
    assert (got, err) == (code, "")
    assert json.loads(out) == {
        "ok": not code,
        "findings": [
            {"name": "gpu", "value": "found", "mend": mend, "state": ["ok", "FAULT"][code]}
        ],
    }


def test_doctor_without_a_driver(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cuda, "has_driver", lambda: False)
    code, out, err = run(capsys, "doctor")
    assert (code, err) == (0, "")
    names = ["pykv", "versions", "llm", "serve", "plot", "memory", "cache", "gpu"]
    assert [line.split()[1] for line in out.splitlines() if not line.startswith(" ")] == names
    assert str(tmp_path / "cache") in out


@pytest.fixture
def few_rows(monkeypatch):
    found = verify.families()
    few = {name: found[name] for name in ("norm", "rope")}
    monkeypatch.setattr(verify, "families", lambda spec=None: few)
    return [row.op for row in verify.run()]


def test_verify(capsys, few_rows):
    code, out, err = run(capsys, "verify")
    assert (code, err) == (0, "")
    device, *rows, count = out.splitlines()
    assert count == f"{len(few_rows)} rows, 0 wrong"
    assert device == f"on {cuda.device_name(cuda.array_module('auto'))}"
    assert [row.split()[:2] for row in rows] == [["ok", op] for op in few_rows]


def test_verify_json_and_seed(capsys, few_rows):
    reports = []
    for seed in (3, 3, 4):
        code, out, err = run(capsys, "verify", "--json", "--seed", seed)
        assert (code, err) == (0, "")
        reports.append(json.loads(out))
    first, again, other = reports
    assert first == again and first["cases"] != other["cases"]
    assert first["device"] == cuda.device_name(cuda.array_module("auto"))
    assert first["ok"] is True and (first["seed"], other["seed"]) == (3, 4)
    assert [case["op"] for case in first["cases"]] == few_rows
    assert set(first["cases"][0]) == {"op", "case", "error", "bound", "ok"}


def test_verify_of_one_cache(capsys):
    code, out, err = run(capsys, "verify", "--kv-dtype", "fp8:head", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["kv_dtype"] == "e4m3:head"
    assert {case["op"] for case in report["cases"]} == set(verify.families(KVSpec("e4m3", "e4m3")))
    code, _, err = run(capsys, "verify", "--kv-dtype", "int7")
    assert code == 2 and "'int7' is no kind" in err


def test_verify_wants_a_seed_of_at_least_0(capsys):
    error = "pykv: verify: seed is -1, expected at least 0\n"
    assert run(capsys, "verify", "--seed", "-1") == (2, "", error)


@pytest.mark.parametrize("wrong", [2.0, np.nan])
def test_verify_says_wrong(capsys, monkeypatch, few_rows, wrong):
    op = norm.rms_norm
    monkeypatch.setattr(norm, "rms_norm", lambda *args, **kwargs: op(*args, **kwargs) * wrong)
    code, out, err = run(capsys, "verify")
    assert (code, err) == (1, "pykv: some results are outside their bounds\n")
    *rows, count = out.splitlines()[1:]
    verdicts = ["WRONG" if op == "norm" else "ok" for op in few_rows]
    assert [row.split()[0] for row in rows] == verdicts
    assert count == f"{len(verdicts)} rows, {verdicts.count('WRONG')} wrong"

    def no_constants(name):
        raise ValueError(f"{name} is no JSON")

    code, out, err = run(capsys, "verify", "--json")
    report = json.loads(out, parse_constant=no_constants)
    assert (code, err, report["ok"]) == (1, "", False)
    assert [case["ok"] for case in report["cases"]] == [word == "ok" for word in verdicts]


def test_verify_goes_on_where_an_op_raises(capsys, monkeypatch, few_rows):
    def broken(*args, **options):
        raise ZeroDivisionError("no rows\nto divide")

    monkeypatch.setattr(norm, "rms_norm", broken)
    code, out, _ = run(capsys, "verify")
    of_rope = few_rows.count("rope")
    assert code == 1 and out.splitlines()[-1] == f"{1 + of_rope} rows, 1 wrong"
    code, out, err = run(capsys, "verify", "--json")
    first, *others = json.loads(out)["cases"]
    assert (code, err) == (1, "")
    assert first == {
        "op": "norm",
        "case": "raised ZeroDivisionError: no rows to divide",
        "error": None,
        "bound": 0.0,
        "ok": False,
    }
    assert [case["op"] for case in others if case["ok"]] == ["rope"] * of_rope


# --- models and cache ---


def test_models(capsys, filled):
    code, out, err = run(capsys, "models")
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[:2] == ["smollm2-135m 98 MB not fetched", "Apache-2.0"]
    assert f"m 0 MB {filled / 'models' / 'm.gguf'}" in lines
    assert "hf:owner/repo/file.gguf" in lines[-1]


def test_models_json(capsys, filled):
    code, out, err = run(capsys, "models", "--json")
    rows = {row["name"]: row for row in json.loads(out)["models"]}
    assert (code, err) == (0, "") and rows["smollm2-135m"]["file"] is None
    assert rows["m"]["bytes"] == 7 and rows["m"]["file"] == str(filled / "models" / "m.gguf")


ENTRIES = f"cubin/entries/ab/{'0' * 62}", f"cubin/entries/cd/{'1' * 62}"
FOREIGN = "cubin/README cubin/entries/ab/notes models/mine.gguf models/x.part own/file".split()


@pytest.fixture
def filled(tmp_path):
    """A cache folder with 12 bytes of cubins, of which 2 were never finished, 7 bytes of a model
    and 3 of a download; and files that somebody else put there."""
    folder = tmp_path / "cache"
    sizes = {ENTRIES[0]: 4, ENTRIES[1]: 6, "cubin/tmp/entry-x1": 2, f"models/{'a' * 32}.part": 3}
    for name, size in {**sizes, **dict.fromkeys(FOREIGN, 100), "models/m.gguf": 7}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
    model_files.write_record(folder / "models/m.gguf", "m", "", folder / "models/m.gguf")
    return folder


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_cache_info(capsys, filled):
    assert run(capsys, "cache", "info") == (
        0,
        f"folder      {filled}\nkernels     3 files, 12 bytes\nmodels      1 file, 7 bytes\n"
        "unfinished  1 file, 3 bytes\n",
        "",
    )


def test_cache_info_without_a_folder(capsys, tmp_path):
    code, out, err = run(capsys, "cache", "info")
    assert (code, err) == (0, "") and out.count(" 0 files, 0 bytes\n") == 3
    assert not (tmp_path / "cache").exists()


def test_cache_clear_keeps_models_and_what_is_not_ours(capsys, filled):
    out = "kernels     12 bytes deleted\nunfinished  3 bytes deleted\n"
    assert run(capsys, "cache", "clear") == (0, out, "")
    assert files_in(filled) == sorted([*FOREIGN, "models/m.gguf", "models/m.gguf.json"])


def test_cache_clear_models(capsys, filled):
    out = "kernels     12 bytes deleted\nmodels      7 bytes deleted\nunfinished  3 bytes deleted\n"
    assert run(capsys, "cache", "clear", "--models") == (0, out, "")
    assert files_in(filled) == sorted(FOREIGN)
    code, out, err = run(capsys, "cache", "clear", "--models")
    assert (code, err) == (0, "") and out.count(" 0 bytes deleted\n") == 3
    assert files_in(filled) == sorted(FOREIGN)


def test_cache_clear_without_the_extra(capsys, filled, monkeypatch):
    """Where no download was interrupted nothing has to be locked: models may be of another venv."""
    assert run(capsys, "cache", "clear")[0] == 0
    monkeypatch.setitem(sys.modules, "filelock", None)
    code, _, err = run(capsys, "cache", "clear")
    assert (code, err) == (0, "")


def test_cache_clear_leaves_no_empty_folders(capsys, filled):
    for name in FOREIGN:
        (filled / name).unlink()
    assert run(capsys, "cache", "clear", "--models")[0] == 0
    assert [path.name for path in filled.iterdir()] == ["own"]


@pytest.fixture
def one_variant(monkeypatch):
    pytest.importorskip("cuda.core")
    monkeypatch.setattr(cuda.compiler, "variants", lambda arch=None: [("norm", norm.VARIANTS[0])])


@pytest.mark.nvrtc
def test_cache_warmup(capsys, one_variant):
    code, out, err = run(capsys, "cache", "warmup", "--arch", "sm_80", "--arch", "sm_90")
    assert (code, out) == (0, "2 kernels compiled for sm_80, sm_90\n")
    assert err == "pykv: compiling kernels for sm_80, sm_90: 2 in all\n"
    again = run(capsys, "cache", "warmup", "--arch", "sm_90")
    assert again == (0, "0 kernels compiled for sm_90\n", "")
    assert "kernels     0 files" not in run(capsys, "cache", "info")[1]


@pytest.mark.nvrtc
def test_cache_warmup_takes_the_gpus_present(capsys, monkeypatch, one_variant):
    monkeypatch.setattr(cuda, "architectures", lambda: ["sm_75"])
    assert run(capsys, "cache", "warmup")[:2] == (0, "1 kernel compiled for sm_75\n")


# --- Bad input: one line on stderr, nothing on stdout, exit code 2 ---


def assert_one_line(result, text):
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("pykv: ") and err.count("\n") == 1 and err.endswith("\n")
    assert re.search(text, err), err


GOOD = ["run", "hello", "--model", "base.gguf", "--device", "cpu"]


@pytest.mark.parametrize("command", ["run hello --device cpu --model", "inspect", "size"])
@pytest.mark.parametrize(
    "file, text",
    [
        ("missing.gguf", "model is 'missing.gguf', .* no such file exists"),
        ("", "model is '', expected a GGUF file"),
        (".", "model is '.', expected a GGUF file .* that is no file"),
        ("text.gguf", r"text.gguf: has magic b'no m', expected b'GGUF'"),
        ("empty.gguf", "empty.gguf: is empty, expected a GGUF file"),
        ("header.gguf", "header.gguf: the length of key .* in the .* bytes that follow"),
        ("truncated.gguf", "truncated.gguf: tensor .* has bytes .* the file has"),
        ("no-such-model", "one of smollm2-135m, gemma3-270m"),
        (5000 * "a", "File name too long"),
    ],
    ids=lambda value: value[:20],
)
def test_bad_file(capsys, command, file, text):
    assert_one_line(run(capsys, *command.split(), file), text)


@pytest.mark.parametrize(
    "flags, text",
    [
        ("--device gpu", "device is 'gpu', expected auto, cpu, cuda or cuda:N"),
        ("--kv-dtype int7", "'int7' is no kind, expected one of fp32, fp16, .*, fp8, k8v4"),
        ("--weights int4", "weights is 'int4', expected one of fp16, bf16, fp32, stored"),
        ("--max-tokens 0", "max_tokens is 0, expected at least 1"),
        ("--max-tokens -1", "max_tokens is -1, expected at least 1"),
        ("--temperature -1", "temperature is -1.0, expected 0 to "),
        ("--temperature 1e999", "temperature is inf, expected 0 to "),
        ("--top-k -1", "top_k is -1, expected 0 to 2147483647"),
        ("--top-p 0", "top_p is 0.0, expected a positive number up to 1"),
        ("--min-p 2", "min_p is 2.0, expected 0 to 1"),
        ("--repetition-penalty 0", "repetition_penalty is 0.0, expected 0.01 to 100"),
        ("--presence-penalty 3", "presence_penalty is 3.0, expected -2 to 2"),
        ("--frequency-penalty -3", "frequency_penalty is -3.0, expected -2 to 2"),
        ("--seed -1", "seed is -1, expected 0 to 184"),
        ("--stop=", "expected non-empty strings"),
        ("--ctx 0", "context is 0, expected at least 1"),
        ("--ctx 129", "context is 129, expected 1 to 128"),
        ("--ctx 4", "prompt has 5 tokens, expected at most the context of 4"),
    ],
)
def test_bad_flag(capsys, flags, text):
    assert_one_line(run(capsys, *GOOD, *flags.split()), text)


def test_empty_prompt(capsys, monkeypatch):
    assert_one_line(tiny_run(capsys, ""), "prompt is empty, expected at least one character")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert_one_line(tiny_run(capsys, "-"), "prompt is empty, expected at least one character")


def test_an_empty_prompt_is_noticed_before_the_model(capsys):
    result = run(capsys, "run", "hello", "", "--model", "missing.gguf")
    assert_one_line(result, "prompt is empty")


@pytest.mark.parametrize("prompts, piped", [(["-"], ""), (["-"], "\n"), (["-", "-"], "one")])
def test_an_empty_pipe_is_refused_before_a_model_is_opened(capsys, monkeypatch, prompts, piped):
    """Standard input has one prompt, however often it is named."""
    monkeypatch.setattr("sys.stdin", io.StringIO(piped))
    code, _, err = run(capsys, "run", *prompts, "--model", "/no/such.gguf")
    assert code == 2 and "prompt is empty" in err


def test_prompt_that_is_no_text(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), "utf-8"))
    assert_one_line(tiny_run(capsys, "-"), "the text given is not valid utf-8")
    assert_one_line(tiny_run(capsys, "a\udcff"), "expected no lone surrogates")


def test_chat_with_a_base_model(capsys, monkeypatch):
    say(monkeypatch, "hi")
    result = run(capsys, "chat", "--model", "base.gguf", "--device", "cpu")
    assert_one_line(result, "base.gguf has no chat template")


def no_weights(*_, **__):
    raise AssertionError("weights are read")


@pytest.mark.parametrize(
    "argv, text",
    [
        ("chat --model base.gguf", "base.gguf has no chat template"),
        ("run x --chat --model base.gguf", "base.gguf has no chat template"),
        ("run x a\udcff --model base.gguf", "expected no lone surrogates"),
        ("kvtc calibrate --text none.txt --out x --model base.gguf", "none.txt: No such file"),
        ("eval needles --keys 0 --model base.gguf", "--keys is 0, expected 1 to 16"),
        ("eval needles --keys 1,17 --model base.gguf", "--keys is 17, expected 1 to 16"),
    ],
)
def test_what_a_header_or_less_shows_is_refused_before_weights_are_read(
    capsys, monkeypatch, argv, text
):
    monkeypatch.setattr("pykv.llm.generate.open_runner", no_weights)
    assert_one_line(run(capsys, *argv.split(), "--device", "cpu"), text)


@pytest.mark.parametrize(
    "flags, text",
    [
        ("--ctx 0", "--ctx is 0, expected at least 1"),
        ("--weights int8", "--weights is 'int8', expected one of fp16, bf16, fp32, stored"),
        ("--kv-dtype int7", "'int7' is no kind, expected one of fp32, fp16, .*, fp8, k8v4"),
        ("--kv-dtype int8:row", "'row' of 'int8:row' is unknown, expected one of token, head"),
    ],
)
def test_bad_size(capsys, flags, text):
    assert_one_line(run(capsys, "size", "base.gguf", *flags.split()), text)


@pytest.mark.parametrize("arch", ["volta", "90", "sm_90a", ""])
def test_warmup_of_what_is_no_sm(capsys, arch):
    text = f"--arch is '{arch}', expected sm_75 or the like"
    assert_one_line(run(capsys, "cache", "warmup", "--arch", "sm_90", "--arch", arch), text)


@pytest.mark.nvrtc
def test_warmup_of_an_unknown_sm(capsys, one_variant):
    text = "arch is sm_999, .* expected a newer NVRTC"
    assert_one_line(run(capsys, "cache", "warmup", "--arch", "sm_999"), text)


def test_warmup_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(cuda.devices, "has_driver", lambda: False)
    text = "no GPU was found, expected --arch sm_75 or the like"
    assert_one_line(run(capsys, "cache", "warmup"), text)


def test_cuda_without_its_packages(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(cuda.devices, "has_driver", lambda: False)
    text = "device is 'cuda', but there is no NVIDIA driver; device='cpu' runs NumPy"
    assert_one_line(run(capsys, *GOOD[:-1], "cuda"), text)
    monkeypatch.setattr(cuda.devices, "has_driver", lambda: True)
    text = r"device is 'cuda', but cupy is not installed: .*pip install .*cu13"
    assert_one_line(run(capsys, *GOOD[:-1], "cuda"), text)


@pytest.mark.parametrize("packages_find", ["an error", "no GPU"])
def test_cuda_without_a_gpu(capsys, monkeypatch, packages_find):
    pytest.importorskip("cuda.core")

    class CUDARuntimeError(RuntimeError):
        status = 100

    def count():
        if packages_find == "an error":
            raise CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
        return 0

    runtime = types.SimpleNamespace(getDeviceCount=count, CUDARuntimeError=CUDARuntimeError)
    stub = types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime))
    monkeypatch.setitem(sys.modules, "cupy", stub)
    monkeypatch.setattr(cuda.devices, "has_driver", lambda: True)
    text = "device is 'cuda', but the .*driver .*see `pykv doctor`"
    assert_one_line(run(capsys, *GOOD[:-1], "cuda"), text)


def raising(error):
    def stream(self, prompt, params, special=False):
        raise error

    return stream


@pytest.mark.parametrize(
    "error, text",
    [
        (MemoryError("2 GiB"), "out of memory: 2 GiB"),
        (OSError(28, "No space left on device"), "^pykv: No space left on device$"),
        (OSError(28, "No space left", "/x/y"), "^pykv: /x/y: No space left$"),
        (OSError("neither number nor file"), "^pykv: neither number nor file$"),
        (ModuleNotFoundError(name="jinja2"), r"jinja2 is not installed: .*pip install .*\[llm\]'"),
        (ModuleNotFoundError(name="cuda.core"), r"cuda.core is not .*\[cu13\]' \(or \[cu12\]\)"),
    ],
    ids=repr,
)
def test_faults_on_the_way(capsys, monkeypatch, fake, error, text):
    monkeypatch.setattr(fake, "stream", raising(error))
    assert_one_line(run(capsys, "run", "x"), text)


def test_a_bug_of_ours_is_one_line_too(capsys, monkeypatch, fake):
    monkeypatch.setattr(fake, "stream", raising(IndexError("list index\nout of range")))
    code, _, err = run(capsys, "run", "x")
    assert code == 2 and err.count("\n") == 1
    assert "fault inside pykv, please report it: IndexError: list index out of range" in err
    assert "python -X dev" in err


def test_what_a_terminal_would_obey_is_spelled(capsys, monkeypatch, fake):
    """Names in files and the words of servers are in messages."""
    monkeypatch.setattr(fake, "stream", raising(pykv.errors.FetchError("404 \x1b[31mred\r\x9b")))
    assert_one_line(run(capsys, "run", "x"), r"404 \\x1b\[31mred\\r\\x9b")


def test_so_is_the_name_of_a_file(capsys, tmp_path, files):
    (tmp_path / "m\x1b[31m.gguf").symlink_to(files / "base.gguf")
    code, out, _ = run(capsys, "inspect", tmp_path / "m\x1b[31m.gguf")
    assert code == 0 and "/m\\x1b[31m.gguf: GGUF version" in out


@pytest.mark.parametrize("command", ["run", "chat"])
def test_ctrl_c_ends_the_line(capsys, monkeypatch, fake, command):
    say(monkeypatch, "hi")
    monkeypatch.setattr(fake, "stream", raising(KeyboardInterrupt()))
    code, _, err = run(capsys, command, *(["x"] if command == "run" else []))
    assert (code, err) == (130, "\n")


def test_a_warning_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(cuda.devices, "has_driver", lambda: True)
    monkeypatch.setitem(sys.modules, "cupy", None)
    warnings.simplefilter("always")  # until the test ends; pytest made them errors
    code, _, err = run(capsys, "run", "hello", "--model", "base.gguf", "--max-tokens", "1")
    warning, summary = err.splitlines()
    assert code == 0 and summary.startswith("CPU: prompt 5")
    assert re.match("pykv: running on the CPU: cupy is not installed: .*pip install", warning)


# --- Usage ---


@pytest.mark.parametrize(
    "argv, text",
    [
        ("", "the following arguments are required: COMMAND; `pykv --help` says more"),
        ("bensh", r"argument COMMAND: invalid choice: 'bensh' \(.*\); did you mean bench\?"),
        ("run", "run: the following arguments are required: PROMPT; `pykv run --help` says more"),
        ("run x --max-tokens many", "run: argument --max-tokens: invalid int value: 'many'; "),
        ("cache", "cache: the following arguments are required: ACTION"),
        (
            "cache cleer",
            r"cache: argument ACTION: invalid choice: 'cleer' \(.*\); did you mean clear\?",
        ),
        ("size", "size: the following arguments are required: file"),
        ("models \x1b[2J", r"models: unrecognized arguments: \\x1b\[2J; `pykv models --help` "),
        ("eval needles --texts 1", "eval needles: unrecognized arguments: --texts 1; "),
        ("--texts run x", "unrecognized arguments: --texts; `pykv --help` says more"),
        ("bench decode --page", "bench decode: argument --page: expected one argument; "),
    ],
)
def test_usage_errors(capsys, argv, text):
    """On one line, as all others."""
    with pytest.raises(SystemExit) as ended:
        cli.main(argv.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and re.match(f"pykv: {text}", line), line


def test_version_and_help(capsys):
    for flag in ("--version", "--help"):
        with pytest.raises(SystemExit) as ended:
            cli.main([flag])
        assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"pykv {pykv.__version__}\n")
    for command in "run chat serve inspect size models doctor verify bench cache".split():
        assert re.search(rf"^    {command} +\w", out, re.MULTILINE)


# --- As a process ---


def process(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_as_a_process():
    done = process(*COMMAND, "run", "-", *GOOD[2:], "--max-tokens", "4", input="hello")
    assert done.returncode == 0 and done.stdout == answer("hello", max_tokens=4) + "\n"
    assert done.stderr.startswith("CPU: prompt 5 tokens") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command, closed, code",
    [
        ("run - --model base.gguf", "<&-", 2),
        ("run hello --max-tokens 2 --model base.gguf", "2>&-", 0),
        ("chat --model chat.gguf", "<&- 2>&-", 0),
    ],
)
def test_closed_streams_are_empty_ones(command, closed, code):
    """Nothing comes from a closed standard input, and nobody reads a closed standard error."""
    command = f'"{sys.executable}" -m pykv {command} --device cpu {closed}'
    done = process("sh", "-c", command, stdin=subprocess.DEVNULL)
    assert done.returncode == code and "fault" not in done.stdout + done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", [GOOD, ["inspect", "chat.gguf"], ["--help"]])
def test_a_reader_that_left(command, unbuffered):
    """However the output is buffered, nothing is said when nobody reads it."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [*COMMAND, *command],
            stdout=write,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (2, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is full")
@pytest.mark.parametrize("command", ["size chat.gguf", "--help", "size nothing"])
def test_nobody_can_be_told(monkeypatch, command):
    """Of an error, where standard error takes nothing either."""
    monkeypatch.setenv("PYTHONUNBUFFERED", "")
    for streams in (">/dev/full 2>/dev/full", ">/dev/full 2>&-"):
        done = process("sh", "-c", f'"{sys.executable}" -m pykv {command} {streams}')
        assert done.returncode == 2


@pytest.mark.parametrize("place", ["_parser", "_size"])
def test_ctrl_c_at_any_time(capsys, monkeypatch, place):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, place, interrupt)
    assert run(capsys, "size", "chat.gguf") == (130, "", "\n")


def test_a_closed_stdout():
    done = process("sh", "-c", f'"{sys.executable}" -m pykv size chat.gguf >&-')
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "package, extra, argv",
    [
        ("tokenizers", "[llm]", GOOD),
        ("jinja2", "[llm]", ["chat", "--model", "chat.gguf", "--device", "cpu"]),
        ("cuda", "[cu13]", ["cache", "warmup", "--arch", "sm_90"]),
    ],
)
def test_a_missing_package(package, extra, argv):
    code = f"import sys; sys.modules[{package!r}] = None; from pykv.cli import main; "
    code += f"sys.exit(main({argv}))"
    done = process(sys.executable, "-c", code, input="hi\n")
    result = done.returncode, done.stdout, done.stderr
    text = rf"{package}\S* is not installed: .*pip install .*{re.escape(extra)}'"
    assert_one_line(result, text)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is full")
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_that_cannot_be_written(option):
    """Unbuffered, as in most containers, argparse itself sees the error, and is silent."""
    with open("/dev/full", "w") as full:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        done = subprocess.run(
            [*COMMAND, option], stdout=full, stderr=subprocess.PIPE, env=environment
        )
    assert (done.returncode, done.stderr) == (2, b"pykv: No space left on device\n")


IMPORT = """
import sys
sys.argv = [{program!r}, "models"]
class Interrupt:
    def find_spec(self, name, *_):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
import pykv
"""


@pytest.mark.parametrize("module", ["pykv.pool", "pykv.blocks"])
def test_ctrl_c_while_the_command_is_imported(module):
    """An import that compiles kernels takes seconds. In other programs it raises as everywhere."""
    for program, want in (("/usr/bin/pykv", (130, "\n")), ("mine.py", None)):
        code = IMPORT.format(program=program, module=module)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if want:
            assert (done.returncode, done.stderr) == want
        else:
            assert done.stderr.endswith("KeyboardInterrupt\n") and "Traceback" in done.stderr


@pytest.mark.parametrize("name, value", [("PYKV_CHECK", "yes"), ("PYKV_COMPILE", "eager")])
def test_variables_of_wrong_values_are_warned_of(name, value):
    environment = {**os.environ, name: value}
    code = [sys.executable, "-W", "always", "-c", "import pykv.ops.paged_check"]
    done = subprocess.run(code, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and f"{name} is {value!r}, expected" in done.stderr
    command = [*COMMAND, "verify", "--seed", "-1"]  # which imports all ops
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    warning, mistake = done.stderr.splitlines()
    assert warning.startswith(f"pykv: {name} is {value!r}, expected ") and "seed is -1" in mistake


@pytest.mark.parametrize("options", [["-mpykv"], ["-Bm", "pykv"]])
def test_the_module_is_the_command_however_it_is_named(options):
    done = subprocess.run([sys.executable, *options, "--version"], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout


@pytest.mark.parametrize("argv", [["bench"], ["bench", "append", "--help"], ["models"]])
def test_without_docstrings(argv):
    """As PYTHONOPTIMIZE=2 has it."""
    done = subprocess.run([sys.executable, "-OO", "-m", "pykv", *argv], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout
