"""bench model: steps and prompts of tiny models, and that their checks can fail."""

from argparse import Namespace

import numpy as np
import pytest

from pykv.bench import model, synthetic
from pykv.errors import ParameterError
from pykv.llm import LLM
from pykv.llm.model import forward
from pykv.llm.prompt_steps import Span, of_spans
from pykv.page_arrays import moving_arrays
from pykv.pool import PagedKVCache
from tests.helpers import assert_same_bits, run_and_check, to_numpy, without_simt
from tests.llm import tiny


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    found = tmp_path_factory.mktemp("tiny") / "llama.gguf"
    tiny.write(found, "llama")
    return str(found)


@without_simt
@pytest.mark.parametrize("kv", ["fp16", "int8"])
def test_a_step_is_checked_on_the_host(xp, rng, path, kv):
    """Right after a step; not before one, and not with another layer's weights."""
    work = model.make(dict(model=path, weights="fp16", B=3, Q=1, L=20, kv=kv), xp, rng)
    run_and_check(xp, work)
    weights = model._load(path, "fp16", xp, kv == "int8").layers[1].down
    kept = to_numpy(weights).copy()
    weights *= 4
    work.run()
    if xp is not np:
        assert not work.check()
    weights[...] = xp.asarray(kept)
    work.run()
    assert work.check()


@without_simt
@pytest.mark.parametrize("weights", ["fp16", "stored"])
def test_a_prompt_is_checked_by_a_decode_step(xp, rng, path, weights):
    work = model.make(dict(model=path, weights=weights, B=2, Q=40, L=40, kv="fp16"), xp, rng)
    run_and_check(xp, work)
    norm = model._load(path, weights, xp, False).output_norm
    kept = norm.copy()
    norm *= 4
    assert not work.check()
    norm[...] = kept


def test_operations_of_a_prompt_by_hand(rng, path):
    work = model.make(dict(model=path, weights="fp16", B=1, Q=40, L=40, kv="fp16"), np, rng)
    vocab = len(model._load(path, "fp16", np, False).head)
    matrices = 2 * (128 * 64 + 64 * 64 + 192 * 64 + 64 * 96)
    assert work.flops == 2 * (40 * matrices + vocab * 64)
    case = dict(model=path, weights="fp16", B=9, Q=40, L=40, kv="fp16")
    assert model.make(case, np, rng) is None  # more prompts than are made


@without_simt
@pytest.mark.parametrize("kind", ["q4_k", "q6_k", "f16"])
def test_a_model_of_noise(xp, rng, monkeypatch, kind):
    """Its bytes are those of its type; a step of it has numbers for logits, a prompt is right."""
    sizes = dict(synthetic.SHAPES["tiny"], feed_forward=512, vocab=300)
    monkeypatch.setitem(synthetic.SHAPES, "1b", sizes)
    model._load.cache_clear()
    name = synthetic.name("1b", kind)
    for Q in (1, 20):
        case = dict(model=name, weights="stored", B=1, Q=Q, L=20, kv="fp16")
        work = model.make(case, xp, rng)
        work.run()
        assert work.check()
    # Bytes of a row of 256 weights and of 512, in planes of 16 bytes.
    one, two = {"q4_k": (144, 288), "q6_k": (224, 432), "f16": (512, 1024)}[kind]
    nbytes = 2 * ((512 + 256 + 1024) * one + 256 * two) + 300 * one
    assert model._load(name, "stored", xp, False).matrix_bytes == nbytes
    assert model.make(case | dict(kv="int8"), xp, rng) is None  # rotated weights come from files
    model._load.cache_clear()


@pytest.mark.parametrize("kind", ["q4_k", "f16"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_file_of_noise_is_the_same_model(tmp_path, monkeypatch, kind, tied):
    monkeypatch.setattr(synthetic, "TIED", ("tiny",) * tied)
    name, ids = f"tiny-{kind}", [1, 2, 3, 39]
    synthetic.write(tmp_path / "m.gguf", name)
    got = LLM(tmp_path / "m.gguf", device="cpu", weights="stored").logits(ids)
    same = synthetic.model(name, np)
    cache = PagedKVCache(2, 1, 2, 64, page_size=16)
    want = forward(same, of_spans([Span([0], 0, ids)], 16, np), cache)
    assert_same_bits(got, want)


def test_names_of_noise():
    assert synthetic.is_name("8b-q8_0") and synthetic.is_name("1b-f16")
    assert not any(map(synthetic.is_name, ("smollm2-135m", "8b", "8b-q4_9", "2b-q4_k", "x.gguf")))
    for shape, kind, text in (
        ("2b", "q4_k", "--shape is '2b'"),
        ("1b", "q4_z", "--type is 'q4_z'"),
    ):
        with pytest.raises(ParameterError, match=text):
            synthetic.name(shape, kind)


def test_bytes_by_hand(rng, path):
    """2 layers of 64 columns: Q, K and V of 4 + 2 + 2 heads of 16, O of 64, gate and up of 96, and
    down; a head of V rows. Then 3 x 20 tokens of 2 layers, K and V, 2 heads of 16 + 2 bytes."""
    work = model.make(dict(model=path, weights="fp16", B=3, Q=1, L=20, kv="int8"), np, rng)
    rows = np.dtype(np.float32).itemsize  # the host's matrices
    vocab = len(model._load(path, "fp16", np, True).head)
    matrices = 2 * (128 * 64 + 64 * 64 + 192 * 64 + 64 * 96) + vocab * 64
    assert work.bytes == rows * matrices + 3 * 20 * 2 * 2 * 2 * (16 + 2)


def test_options_and_the_closing_line(tmp_path):
    file = tmp_path / "m.gguf"
    file.touch()  # it is looked for before anything is measured
    options = dict(quick=False, model=str(file), weights=None, shape=None, type=None)
    options |= dict(keys=None, prompt=None)
    cases = model.select(Namespace(**options))
    assert len(cases) > 20 and {case["model"] for case in cases} == {str(file)}
    cases = model.select(Namespace(**options | dict(model=None)))
    assert cases == model.CASES and {case["model"] for case in cases} > {"8b-q4_k", model.MODEL}
    cases = model.select(Namespace(**options | dict(weights="stored")))
    assert {case["weights"] for case in cases} == {"stored"} and len(cases) < len(model.CASES)
    cases = model.select(Namespace(**options | dict(shape="8b", type="Q8_0", model=None)))
    assert {case["model"] for case in cases} == {"8b-q8_0"} and len(cases) == 7
    quick = model.select(Namespace(**options | dict(shape="1b", model=None, quick=True)))
    assert [(case["model"], case["B"]) for case in quick] == [("1b-q4_k", 1)]
    for wrong in (
        dict(type="q4_k"),
        dict(shape="1b"),
        dict(shape="1b", model=None, weights="fp16"),
        dict(keys="512", prompt="512"),
    ):
        with pytest.raises(ParameterError, match="^bench model: --.* is given, expected"):
            model.select(Namespace(**options | wrong))
    with pytest.raises(ParameterError, match="--weights"):
        model.select(Namespace(**options | dict(weights="int3")))
    case = dict(model="m", weights="fp16", B=16, Q=1, L=512, kv="fp8")
    record = dict(bench="model", ok=True, case=case, median=2000.0)
    prompt = {**record, "case": case | dict(B=1, Q=512)}
    assert model.conclude([record, prompt, {**record, "ok": False}]) == (
        "m, fp16, 16 x 512 tokens, fp8: 8000 tokens/s, 2.00 ms\n"
        "m, fp16, 1 x prompt of 512 tokens, fp8: 256000 tokens/s, 2.00 ms"
    )


@pytest.mark.parametrize("kv", ["fp16", "int8", "e4m3", "int4"])
def test_a_step_on_the_host_keeps_the_rows_that_are_there(rng, kv):
    """A new row near to the one that is there is passed over; another one is seen, and passed over
    all the same."""
    cache = model._AsWritten(1, 2, 2, 16, page_size=model.PAGE_SIZE, spec=kv)
    heads = rng.standard_normal((1, 4 + 2 * 2, 16)).astype(np.float32)
    slots = np.array([17], np.int32)
    super(model._AsWritten, cache).append_qkv(0, heads.reshape(1, -1), slots)
    arrays = list(moving_arrays(cache).values())
    kept = [x.copy() for x in arrays]
    for factor, least, most in ((1 + 2**-10, 0, model.ROW_TOLERANCE), (-1, 1.5, 2.5)):
        given = heads * np.float32(factor)
        q = cache.append_qkv(0, given.reshape(1, -1), slots)
        assert_same_bits(q, given[:, :4])
        assert least <= cache.off <= most
        for x, y in zip(arrays, kept, strict=True):
            assert_same_bits(x, y)
        cache.off = 0.0
        where = np.array([[0, 1]], np.int32), np.array([18], np.int32)
        out = cache.decode_qkv(0, given.reshape(1, -1), slots, *where)
        assert_same_bits(out, cache.decode(0, q, *where))
        assert least <= cache.off <= most
