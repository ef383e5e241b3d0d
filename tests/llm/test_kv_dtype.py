"""Caches of every kind under a model: codes are written, read by both attentions, and kept."""

import warnings

import numpy as np
import pytest

from pykv import kinds, pool
from pykv.errors import NumberError
from pykv.llm import LLM
from pykv.llm.scales import MARGIN, TEXT
from pykv.llm.weights import load
from pykv.ops import paged_qkv
from pykv.specs import KVSpec
from tests.helpers import assert_same_bits, swept, to_numpy, without_simt
from tests.llm import tiny
from tests.llm.test_model import DEVICES, MODELS, assert_same_tokens, greedy, truth_of
from tests.llm.test_reuse import tokens_of

pytestmark = pytest.mark.filterwarnings("ignore:.*rounding moves:UserWarning")
SPECS = ("int8", "fp8", "int4", "k8v4", "fp16+e5m2", "int8:HND:fp32", "fp16:HND")
SHARED = ("int8:head", "e4m3:tensor:fp32", "k8v4:head:HND")


def patch_appends(monkeypatch, cache):
    """Make caches of floats keep what `cache` would make of rows, by pykv.kinds alone."""
    append_qkv, spec = pool.PagedKVCache.append_qkv, cache.spec
    given = [None if x is None else to_numpy(x) for x in (cache.k_scales, cache.v_scales)]
    dtype = kinds.SCALE_DTYPES[spec.scale_dtype]
    mix = paged_qkv.hadamard_transform if spec.wants_hadamard else np.asarray  # its own inverse

    def stored(layer, i, rows):
        kind, rows = spec.kinds[i], mix(rows)
        scale = given[i][layer] if spec.has_given_scales and kind.largest else None
        codes, scale = kinds.quantize(rows, kind, scale=scale, scale_dtype=dtype)
        return mix(kinds.dequantize(codes, kind, scale))

    def append_stored(self, layer, qkv, slots, **options):
        q = append_qkv(self, layer, qkv, slots, **options)
        for i, pages in enumerate(self.layers[layer]):
            rows = pages.reshape(-1, *pages.shape[2:])
            rows[slots] = self._xp.asarray(stored(layer, i, to_numpy(rows[slots])))
        return q

    def decode_stored(self, layer, qkv, slots, table, lengths, **options):
        names = ("scale", "window", "logits_soft_cap", "out", "workspace")
        of_decode = {name: options.pop(name) for name in names if name in options}
        q = append_stored(self, layer, qkv, slots, q_out=options.pop("q_scratch"), **options)
        return self.decode(layer, q, table, lengths, **of_decode)

    monkeypatch.setattr(pool.PagedKVCache, "append_qkv", append_stored)
    monkeypatch.setattr(pool.PagedKVCache, "decode_qkv", decode_stored)


@without_simt
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("kv_dtype", [*SPECS, *SHARED])
def test_a_model_reads_what_the_kinds_define(open_llm, rng, monkeypatch, name, kv_dtype):
    check_a_model(open_llm, rng, monkeypatch, name, kv_dtype)


@pytest.mark.parametrize(
    "name, kv_dtype",
    [
        ("llama", "e4m3+int4:head:HND"),
        pytest.param("llama", "int8", marks=pytest.mark.sweep),
        pytest.param("gemma3", "int8", marks=pytest.mark.nightly),
    ],
)
def test_a_model_with_codes_on_every_machine(open_llm, rng, monkeypatch, name, kv_dtype):
    check_a_model(open_llm, rng, monkeypatch, name, kv_dtype)


def check_a_model(open_llm, rng, monkeypatch, name, kv_dtype):
    """Logits are those of floats that hold decoded codes; answers agree with the logits. Logits
    have a standard deviation of 4."""
    llm = open_llm(name, kv_dtype=kv_dtype, weights="fp32")
    ids = tokens_of(rng, 40)
    logits = llm.logits(ids)
    (answer,) = llm.generate([ids], greedy(12))
    after = llm.logits(ids + answer.token_ids)[len(ids) - 1 : -1]
    chosen = after[np.arange(12), answer.token_ids]
    assert (chosen > after.max(axis=1) - 0.2).all()

    exact = open_llm(name, kv_dtype="fp32", weights="fp32").logits(ids)
    patch_appends(monkeypatch, llm.cache)
    want = open_llm(name, kv_dtype="fp32", weights="fp32").logits(ids)
    effect = np.abs(want - exact).max()
    assert effect > 4e-3  # else the bound would prove nothing
    # Where sums have another order, now and then a row gets a code that lies as near.
    mixes = KVSpec.parse(kv_dtype).wants_hadamard
    bound = effect / 3 if mixes or llm.xp.__name__ == "cupy" else 2e-3
    np.testing.assert_allclose(logits, want, rtol=0, atol=bound)


@pytest.mark.parametrize("name", ["llama", *swept(["gemma3"])])
def test_mixing_changes_nothing_but_what_is_stored(open_llm, rng, name):
    """Without codes there is nothing to gain, and nothing may be lost."""
    llm, ids = open_llm(name, kv_dtype="fp32", weights="fp32"), tokens_of(rng, 40)
    want, rows = llm.logits(ids), to_numpy(llm.cache.k).copy()
    llm.runner.model = load(llm.file, llm.xp, dtype=np.float32, hadamard=True)
    np.testing.assert_allclose(llm.logits(ids), want, rtol=0, atol=1e-3)
    assert np.abs(to_numpy(llm.cache.k) - rows).max() > 0.1


@without_simt
def test_integers_are_mixed_and_no_others(open_llm):
    for kv_dtype in ("int8", "int4:head", "k8v4", "fp16+int4"):
        assert open_llm(kv_dtype=kv_dtype).model.hadamard
    for kv_dtype in ("fp16", "fp32", "fp8", "int8+e4m3", "e5m2:tensor"):
        assert not open_llm(kv_dtype=kv_dtype).model.hadamard


@without_simt
def test_scales_of_pages_are_read(open_llm, rng):
    """A NaN among the scales of a page that a prompt reuses, then of one that it computes."""
    llm = open_llm(kv_dtype="int8")
    prompt = tokens_of(rng, 40)
    (want,) = llm.generate([prompt], greedy(4))
    llm.cache.v_scales[:, 2] = np.nan
    assert llm.generate([prompt], greedy(4)) == [want] and llm.stats.reused_tokens == 32
    llm.cache.v_scales[:, 0] = np.nan
    with pytest.raises(NumberError, match="logits are not finite"):
        llm.generate([prompt], greedy(4))
    assert llm.stats.reused_tokens == 32


@without_simt
@pytest.mark.parametrize("kv_dtype", ["int8", "int8:head"])
def test_a_pool_that_grows_keeps_its_scales(open_llm, rng, kv_dtype):
    llm = open_llm(kv_dtype=kv_dtype)
    prompt = tokens_of(rng, 20)
    stream = llm.stream(prompt, greedy(20))
    pieces = [next(stream)]
    llm.generate([tokens_of(rng, 90)], greedy(8))
    pieces += stream
    assert "".join(pieces) == open_llm(kv_dtype=kv_dtype).generate([prompt], greedy(20))[0].text


@without_simt
@pytest.mark.parametrize("kv_dtype", SHARED)
def test_shared_scales_come_from_a_text(open_llm, kv_dtype):
    """What it needs at most, with a margin; no prompt changes them."""
    llm = open_llm(kv_dtype=kv_dtype, weights="fp32")
    scales = [to_numpy(x).copy() for x in (llm.cache.k_scales, llm.cache.v_scales)]
    llm.generate([[5]], greedy(3))
    for now, before in zip((llm.cache.k_scales, llm.cache.v_scales), scales, strict=True):
        assert_same_bits(now, before)

    exact, spec = open_llm(kv_dtype="fp32", weights="fp32"), llm.spec
    ids = exact.tokenize(TEXT)
    assert len(ids) > 200
    exact.logits(ids[: exact.context - 1])
    mix = paged_qkv.hadamard_transform if spec.wants_hadamard else np.asarray
    sides = ((exact.cache.k, scales[0]), (exact.cache.v, scales[1]))
    for kind, (rows, got) in zip(spec.kinds, sides, strict=True):
        peaks = np.abs(mix(to_numpy(rows))).max((1, 2, 4))  # zeros where no row is
        if spec.granularity == "tensor":
            peaks = peaks.max(1, keepdims=True)
        want = MARGIN * peaks / kind.largest
        np.testing.assert_allclose(got[0], want[0], rtol=2e-3)
        np.testing.assert_allclose(got[1:], want[1:], rtol=0.1)  # behind codes of the first layer


@without_simt
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_first_prompt_of_one_token_spoils_nothing(open_llm, rng, name):
    """Logits of a later prompt are as near to those of floats as they are on their own."""
    llm, exact = open_llm(name, kv_dtype="int8:head"), open_llm(name, kv_dtype="fp32")
    ids = tokens_of(rng, 60)
    want = exact.logits(ids)
    alone = np.abs(open_llm(name, kv_dtype="int8:head").logits(ids) - want).max()
    llm.generate([[5]], greedy(1))
    assert np.abs(llm.logits(ids) - want).max() == alone < 0.3 * want.std()


@without_simt
def test_heads_of_zeros_have_scales(open_llm, tmp_path, rng):
    """Without one, each append would look for it, which a CUDA graph cannot."""
    rows_of_zeros = {"blk.0.attn_v.weight": 16, "blk.1.attn_v.weight": 32}  # a head, and both

    def pruned(name, values):
        values = values.copy()
        values[: rows_of_zeros.get(name, 0)] = 0
        return values

    tiny.write(tmp_path / "llama.gguf", "llama", edit=pruned)
    llm = open_llm(tmp_path / "llama", kv_dtype="int8:head")
    scales = to_numpy(llm.cache.v_scales)
    assert scales[0, 0] == scales[0, 1] > 0 and (scales[1] == 1).all()
    llm.generate([tokens_of(rng, 9)], greedy(4))


@without_simt
def test_scales_that_do_not_fit_are_said_so(open_llm, rng):
    llm = open_llm(kv_dtype="int8:head")
    llm.generate([tokens_of(rng, 60)], greedy(3))  # no warning, which would be an error
    for scales in (llm.cache.k_scales, llm.cache.v_scales):
        scales[1] /= 4
    with pytest.warns(UserWarning, match=r"int8:head: .*% of the .* of layer 1 exceed the scales"):
        llm.generate([tokens_of(rng, 60)], greedy(3))
    assert llm.cache.manager.num_free == llm.cache.manager.num_pages


@without_simt
def test_steps_that_are_too_coarse_are_said_so(open_llm):
    text = r"int4:head: rounding moves the (keys|values) of layer \d by \d\d% of their root mean sq"
    with pytest.warns(UserWarning, match=text):
        open_llm(kv_dtype="int4:head")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kv_dtype in ("int4", "int8:tensor", "e5m2:head", "fp16"):
            open_llm(kv_dtype=kv_dtype)


# Texts that models are sure how to continue: on the published models the two best logits of every
# token lie at least 0.25 apart, with either cache. Codes of 8 bits move logits by up to 0.3, sums
# in another order by 0.02, and where the best are closer than that, the text may be another one.
ALPHABET = "a b c d e f g h i j k l m n o p q r s t u v w x y z "
SURE = (
    "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16",
    "20 19 18 17 16 15 14 13 12 11 10 9 8 7 6 5 4 3 2 1 0 " * 2 + "20 19 18",
    "1 0 1 0 1 0 1 0 1 0 1 0 1 0 1 0",
    "red green blue red green blue red green blue " * 4 + "red",
    ALPHABET * 2 + "a b c d e f g",
)
INT8_CALL = 0.45


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.sweep
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", MODELS)
def test_int8_writes_the_text_of_fp16(model_path, model, device):
    """The same for 4 of 5 sure texts at least; for any, up to the first close call."""
    plain, codes = (LLM(model_path(model), device=device, kv_dtype=k) for k in ("fp16", "int8"))
    prompts = truth_of(model)["prompts"][:5]
    texts = [answer.text for answer in plain.generate(list(SURE), greedy(48))]
    answers = codes.generate([*SURE, *(prompt["ids"] for prompt in prompts)], greedy(48))
    pairs = zip(texts, (answer.text for answer in answers), strict=False)
    other = [pair for pair in pairs if pair[0] != pair[1]]
    assert len(other) <= 1, other
    assert_same_tokens(prompts, answers[len(SURE) :], INT8_CALL)
