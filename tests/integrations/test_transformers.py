"""Caches and attention of pykv in models of transformers: what the models say is held to what they
say with transformers' own caches and attention."""

import copy
import pickle
from inspect import signature

import ml_dtypes
import numpy as np
import pytest

from pykv.errors import CapacityError, DtypeError, ParameterError, ShapeError, UnsupportedError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from pykv.integrations import batch  # noqa: E402
from pykv.integrations import transformers as ours  # noqa: E402
from pykv.integrations.transformers import Cache  # noqa: E402

# The argument that models and `generate` take caches by.
CACHE = (
    "cache"
    if "cache" in signature(transformers.LlamaForCausalLM.forward).parameters
    else "past_key_values"
)
SIZES = dict(
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=99,
    max_position_embeddings=128,
)
IMPLEMENTATIONS = ("sdpa", "pykv")
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
# Largest difference of a logit, of about 0.3: what keys and values lose at half a step of a kind.
LOSSES = {None: 1e-6, "fp16": 5e-4, "bf16": 4e-3, "int8": 1e-2, "e4m3": 4e-2, "e5m2": 8e-2}
LOSSES |= {"int4": 0.25, "k8v4": 0.25, "fp32:HND": 1e-6, "int8:head": 2e-2}


def model_of(name="Llama", implementation="sdpa", dtype=torch.float32, **sizes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().to(dtype)
    model.set_attn_implementation(implementation)
    return model


@pytest.fixture(autouse=True)
def no_gradients():
    torch.manual_seed(1)
    with torch.no_grad():
        yield


def prompts(B=2, n=20, padding=0):
    ids = torch.randint(5, 99, (B, n))
    mask = torch.ones_like(ids)
    mask[1:, :padding] = 0
    return dict(input_ids=ids, attention_mask=mask)


def generate(model, cache, inputs, **options):
    words = dict(max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)
    return model.generate(**inputs, **words | options, **{CACHE: cache})


def logits(model, cache, input_ids, **options):
    return model(input_ids, **{CACHE: cache}, **options).logits


def both(implementation, name="Llama", spec=None, **sizes):
    """A model with its own attention, and the same with `implementation` and one of our caches."""
    own, other = model_of(name, "eager", **sizes), model_of(name, implementation, **sizes)
    return own, transformers.DynamicCache(), other, Cache(other.config, spec)


@implementations
@pytest.mark.parametrize("padding", [0, 7])
def test_generate_says_the_same(implementation, padding):
    own, dynamic, model, cache = both(implementation)
    inputs = prompts(padding=padding)
    want = generate(own, dynamic, inputs)
    assert torch.equal(generate(model, cache, inputs), want)
    rows = 2 * 39 - (padding if implementation == "pykv" else 0)
    assert int(cache._store.batch.seen.sum()) == rows  # padding takes no room


@implementations
@pytest.mark.parametrize("spec", LOSSES)
def test_kinds(implementation, spec):
    """Two chunks and single tokens, whose logits differ by no more than what a kind loses."""
    own, dynamic, model, _ = both(implementation)
    cache = Cache(model.config, spec, margin=1.5 if ":head" in str(spec) else None)
    ids = torch.randint(0, 99, (2, 40))
    for part in (ids[:, :17], ids[:, 17:36], ids[:, 36:37], ids[:, 37:38]):
        want, got = logits(own, dynamic, part), logits(model, cache, part)
        assert (got - want).abs().max() <= LOSSES[spec]
    assert cache.pool.spec == ours.as_spec("", spec or "fp32")


@implementations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(implementation, dtype):
    model = model_of("Llama", implementation, dtype)
    want = logits(
        model_of("Llama", "eager", dtype),
        transformers.DynamicCache(),
        ids := torch.arange(30)[None],
    )
    got = logits(model, cache := Cache(model.config), ids)
    assert got.dtype == dtype and (got - want).abs().max() < 0.03
    assert cache.pool.k.dtype.itemsize == 2


@implementations
@pytest.mark.parametrize(
    "name, sizes",
    [
        ("Mistral", dict(sliding_window=9)),
        ("Gemma2", dict(head_dim=16, sliding_window=9, query_pre_attn_scalar=16)),
        ("GptOss", dict(head_dim=16, sliding_window=9, num_local_experts=2, num_experts_per_tok=1)),
    ],
)
def test_windows_caps_and_sinks(implementation, name, sizes):
    if name != "Mistral" and implementation == "sdpa":
        implementation = "eager"  # the only one of transformers' that these have on a CPU
    own, dynamic, model, cache = both(implementation, name, **sizes)
    for parameter, other in zip(own.parameters(), model.parameters(), strict=True):
        if parameter.shape == (4,):  # sinks, which are not initialised
            other.copy_(parameter.copy_(torch.randn(4)))
    inputs = prompts(padding=5)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    real = mask.bool()  # given as it is, since a model makes a mask of it for each sort of layer
    want = logits(own, dynamic, ids, attention_mask=real)
    got = logits(model, cache, ids, attention_mask=real)
    assert not hasattr(real, "seen")
    assert (got - want)[real].abs().max() < 2e-5
    mask = torch.cat((mask, torch.ones(2, 1, dtype=mask.dtype)), 1)
    want, got = (
        logits(*x, ids[:, :1], attention_mask=mask) for x in ((own, dynamic), (model, cache))
    )
    assert (got - want).abs().max() < 2e-5


@implementations
def test_beams(implementation):
    own, dynamic, model, cache = both(implementation)
    options = dict(num_beams=3, num_return_sequences=3)
    inputs = prompts(padding=3)
    want = generate(own, dynamic, inputs, **options)
    assert torch.equal(generate(model, cache, inputs, **options), want)


@implementations
def test_prefix_of_several_prompts(implementation):
    """A copy shares pages, and neither side sees what the other writes."""
    own, dynamic, model, cache = both(implementation)
    ids = torch.randint(0, 99, (1, 37))
    logits(own, dynamic, ids), logits(model, cache, ids)
    (pages,) = cache._store.batch._pages
    for _ in range(3):
        end = torch.randint(0, 99, (1, 5))
        want, got = copy.deepcopy(dynamic), copy.deepcopy(cache)
        assert got._store.batch._pages == [pages[:3]]  # not one page was copied
        assert torch.allclose(logits(model, got, end), logits(own, want, end), atol=1e-6)
        del got
    end = torch.randint(0, 99, (1, 5))
    assert torch.allclose(logits(model, cache, end), logits(own, dynamic, end), atol=1e-6)


@implementations
def test_crop_repeat_select_and_reset(implementation):
    own, dynamic, model, cache = both(implementation)
    ids = torch.randint(0, 99, (2, 37))

    def same(new):
        want, got = logits(own, dynamic, new), logits(model, cache, new)
        assert torch.allclose(got, want, atol=1e-6)

    same(ids)
    for each in (dynamic, cache):
        each.crop(-9)
    assert cache.get_seq_length() == 28
    same(ids[:, :3])
    for each in (dynamic, cache):
        each.batch_repeat_interleave(2)
        each.reorder_cache(torch.tensor([3, 3, 0, 1]))
        each.batch_select_indices(torch.tensor([3, 0, 1]))
    same(torch.randint(0, 99, (3, 2)))
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.pool.manager.num_free == cache.pool.k.shape[1]
    dynamic = transformers.DynamicCache()
    same(ids[:1, :4])


@implementations
def test_reset_of_layers(implementation):
    """Of one after the other: the cache is empty, as transformers' own. Of some: they forget their
    tokens, and take no others until all have."""
    own, _, model, cache = both(implementation, num_hidden_layers=3)
    ids, first = torch.randint(0, 99, (2, 7)), torch.randint(0, 99, (1, 20))
    for layer in cache.layers:
        layer.reset()
    logits(model, cache, first)
    for layer in cache.layers[:2]:
        layer.reset()
    prefix = copy.deepcopy(cache)
    assert [layer.get_seq_length() for layer in cache.layers] == [0, 0, 20]
    for n in (20, 7):
        with pytest.raises(ParameterError, match="layer 0 has 0 tokens .* crop or reset the cache"):
            logits(model, cache, first[:, :n])
    cache.layers[2].reset()
    assert cache.get_seq_length() == 0 and prefix.layers[2].get_seq_length() == 20
    want = logits(own, transformers.DynamicCache(), ids)
    assert torch.allclose(logits(model, cache, ids), want, atol=1e-6)


def lies_in_pages(cache, keys, values):
    return all(
        pool.ctypes.data <= x.data_ptr() < pool.ctypes.data + pool.nbytes
        for x, pool in ((keys, cache.pool.k), (values, cache.pool.v))
    )


def sdpa_caches(spec=None, **options):
    config = transformers.LlamaConfig(num_hidden_layers=2)
    config._attn_implementation = "sdpa"
    return transformers.DynamicCache(), Cache(config, spec, **options)


def update(caches, B, n, dtype=torch.float32):
    """What caches give for the same new rows in each of two layers, the last first."""
    for layer in range(2):
        k, v = torch.randn(2, B, n, 3, 16).to(dtype).transpose(2, 3)
        given = [each.update(k, v, layer) for each in caches]
    return given[::-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_random_calls(dtype, seed):
    """Of a batch, what a DynamicCache gives, bit by bit: whether pages lie in order, are shared or
    were moved when the cache grew."""
    random, (dynamic, cache), B = np.random.default_rng(seed), sdpa_caches(), 2
    update((dynamic, cache), B, 9, dtype)
    lie = []
    for _ in range(80):
        call, n = random.integers(24), int(random.integers(1, 30))
        chosen = torch.from_numpy(random.integers(0, B, int(random.integers(1, 5))))
        if call == 0:
            B = len(chosen)
            dynamic.batch_select_indices(chosen), cache.batch_select_indices(chosen)
        elif call == 1:
            dynamic, cache = copy.deepcopy(dynamic), copy.deepcopy(cache)
        elif call == 2 and n < cache.get_seq_length():
            dynamic.crop(-n), cache.crop(-n)
        elif call == 3:
            cache.reset()
            dynamic, B = transformers.DynamicCache(), len(chosen)
            assert cache.pool.manager.num_free == cache.pool.k.shape[1]
        else:
            given, want = update((dynamic, cache), B, n if call == 4 else 1, dtype)
            assert all(map(torch.equal, given, want))
            lie.append(lies_in_pages(cache, *given))
    assert any(lie) and not all(lie)


def test_pages_are_given_as_they_lie():
    """The model's own floats, through growth; after a reset, though sequences were shared before;
    and of a fixed number of pages where one sequence has all."""
    caches = dynamic, cache = sdpa_caches()
    for n in (20, *(1,) * 40, 300, 1):
        given, want = update(caches, 3, n)
        assert all(map(torch.equal, given, want)) and lies_in_pages(cache, *given)
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    assert not lies_in_pages(cache, *update((cache,), 3, 1)[0])
    cache.reset()
    assert lies_in_pages(cache, *update((cache,), 3, 1)[0])
    _, cache = sdpa_caches(pages=4)
    assert lies_in_pages(cache, *update((cache,), 1, 40)[0])
    for spec in ("int8", "fp16", "fp32:HND"):
        _, cache = sdpa_caches(spec)
        assert not lies_in_pages(cache, *update((cache,), 1, 4)[0])
    k = torch.ones(1, 3, 4, 16, requires_grad=True)
    with pytest.raises(UnsupportedError, match="Cache.update: key_states requires a gradient"):
        sdpa_caches()[1].update(k, k.detach(), 0)


@pytest.mark.parametrize("rows", [16, 40])
def test_shared_pages_stay_shared_when_the_cache_grows(rows):
    _, cache = sdpa_caches(page_size=8)
    update((cache,), 1, rows)
    other = copy.deepcopy(cache)
    update((cache,), 1, 300)
    (pages,), (others,) = cache._store.batch._pages, other._store.batch._pages
    assert pages[: rows // 8] == others and len(pages) == (rows + 300 + 7) // 8
    _, cache = sdpa_caches(page_size=8)
    update((cache,), 1, rows)
    cache.batch_repeat_interleave(2)
    update((cache,), 2, 300)
    pages, others = cache._store.batch._pages
    assert pages[: rows // 8] == others[: rows // 8]


def test_no_cache_and_transformers_own():
    own, model = model_of("Llama", "eager"), model_of("Llama", "pykv")
    ids = torch.randint(0, 99, (2, 12))
    want, got = (m(ids, use_cache=False).logits for m in (own, model))
    assert torch.allclose(got, want, atol=1e-6)
    dynamic = transformers.DynamicCache()
    logits(model, dynamic, ids)
    for once in range(2):  # keys from elsewhere, of which pykv knows no order
        with pytest.raises(UnsupportedError, match="key has .* from another cache than pykv's"):
            logits(model, dynamic, ids[:, : 1 + once])
    window = model_of("Mistral", "pykv", sliding_window=9)
    dynamic = transformers.DynamicCache(config=window.config)
    logits(window, dynamic, ids)
    with pytest.raises(UnsupportedError, match="kv_offset is 4, expected 0 as of a pykv Cache"):
        logits(window, dynamic, ids[:, :1])


def test_assistants_have_caches_of_their_own():
    """Of another attention, or a refusal that says so."""
    own, dynamic, model, cache = both("pykv")
    inputs = dict(input_ids=torch.randint(5, 99, (1, 20)))
    helper = model_of("Llama", "sdpa")
    want = generate(own, dynamic, inputs)
    assert torch.equal(generate(model, cache, inputs, assistant_model=helper), want)
    helper.set_attn_implementation("pykv")
    with pytest.raises(UnsupportedError, match="'sdpa' for a model that makes its own"):
        generate(model, Cache(model.config), inputs, assistant_model=helper)


@pytest.mark.parametrize(
    "name, sizes", [("DiffLlama", {}), ("JetMoe", dict(num_local_experts=2)), ("Doge", {})]
)
def test_models_that_compute_with_what_a_cache_gives(name, sizes):
    """Of keys and values in pages they are refused; of those that are read back they are right."""
    sizes = dict(sizes, kv_channels=16, head_dim=16, num_experts_per_tok=2)
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    own, dynamic, model, cache = both("pykv", name, **sizes)
    ids = torch.randint(5, 99, (2, 12))
    if model.config._attn_implementation == "pykv":  # which some do not take in old versions
        with pytest.raises(UnsupportedError, match="the model calls .* take 'sdpa' or 'eager'"):
            logits(model, cache, ids)
        model.set_attn_implementation("eager")
    assert torch.equal(logits(model, cache, ids), logits(own, dynamic, ids))


@pytest.mark.parametrize("B", [1, 2])
def test_queries_as_they_lie(B):
    """Heads outside of tokens, or within, and spread."""
    attention = ours.pykv.integrations.transformers_attention
    x = torch.randn(B, 2, 5, 16)
    mask = attention.mask(batch_size=B, kv_length=5)
    want = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    within = x.transpose(1, 2).contiguous().transpose(1, 2)
    for q in (x, within, torch.stack((x, x), -1)[..., 0]):
        for pair in ((x, x), (within, within)):
            got, _ = attention.attention(torch.nn.Module(), q, *pair, mask)
            assert torch.allclose(got, want.transpose(1, 2), atol=1e-6)


def test_keys_and_values_reach_attention_as_they_were_given():
    attention = ours.pykv.integrations.transformers_attention
    config = transformers.LlamaConfig(num_hidden_layers=1)
    config._attn_implementation = "pykv"
    cache, x = Cache(config), torch.randn(1, 2, 5, 16)
    mask = attention.mask(batch_size=1, kv_length=5)

    def attend(key, value):
        return attention.attention(torch.nn.Module(), x, key, value, mask)[0]

    k, v = cache.update(x, 2 * x, 0)
    assert k.shape == (1, 2, 0, 16) and k.dtype == x.dtype and k.contiguous() is k
    for pair in ((v, k), (k, k), (k, x), (x, v)):
        with pytest.raises(UnsupportedError, match="was changed behind Cache.update"):
            attend(*pair)
    assert v.to(x.dtype) is v and "meta" in repr(v) and v.dim() == len(v.stride()) == 4
    changes = (
        *(lambda: v * 2, lambda: v.chunk(2, 1), lambda: torch.cat((v, x)), lambda: v.view(2, -1)),
        *(lambda: v.add_(1), lambda: v.__setitem__(0, 1)),
    )
    for change in changes:
        with pytest.raises(UnsupportedError, match="the model calls"):
            change()
    want = torch.nn.functional.scaled_dot_product_attention(x, x, 2 * x, is_causal=True)
    assert torch.allclose(attend(k, v), want.transpose(1, 2), atol=1e-6)


def test_dtypes_that_come_later():
    """A cache that is as the first keys are takes no others, which it would round; one with a spec
    rounds as it says."""
    models = {x: model_of("Llama", "pykv", x) for x in (torch.bfloat16, torch.float32)}
    ids, cache = torch.arange(6)[None], Cache(models[torch.float32].config)
    for dtype in models:
        logits(models[dtype], Cache(models[dtype].config, "bf16"), ids)
    logits(models[torch.bfloat16], cache, ids)
    for _ in range(2):
        with pytest.raises(DtypeError, match="float32 and torch.float32, expected bf16"):
            logits(models[torch.float32], cache, ids)
        cache.reset()
    x = torch.ones(1, 2, 3, 16)
    for k, v in ((x, x.bfloat16()), (x.bfloat16(), x), (x, x.double())):
        with pytest.raises(DtypeError, match="like the first keys, or a Cache with a spec"):
            Cache(models[torch.float32].config).update(k, v, 0)
    logits(models[torch.bfloat16], cache, ids)


def test_sdpa_behind_padding_appends_nothing():
    model, inputs = model_of("Llama", "pykv"), prompts(padding=7)
    logits(model, cache := Cache(model.config), **inputs)
    end = torch.ones(2, 1, dtype=torch.long)
    mask = torch.cat((inputs["attention_mask"], end), 1)
    model.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedError, match="the cache holds no rows of padding"):
        logits(model, cache, end, attention_mask=mask)
    assert cache._store.batch.columns == [20, 20]
    model.set_attn_implementation("pykv")  # goes on
    got = logits(model, cache, end, attention_mask=mask)
    ids = torch.cat((inputs["input_ids"], end), 1)
    want = logits(model, Cache(model.config), ids, attention_mask=mask)[:, -1:]
    assert torch.allclose(got, want, atol=1e-6)


def test_full_cache():
    model = model_of("Llama", "pykv")
    cache = Cache(model.config, pages=3)
    logits(model, cache, torch.arange(40)[None])
    with pytest.raises(CapacityError, match="pool exhausted"):
        logits(model, cache, torch.arange(9)[None])
    assert cache.get_seq_length() == 40
    logits(model, cache, torch.arange(8)[None])  # what fits still goes in


def test_refusals():
    model = model_of("Llama", "pykv")
    ids = torch.arange(12)[None]
    with pytest.raises(ParameterError, match="Cache: spec: 'int9' is no kind"):
        Cache(model.config, "int9")
    with pytest.raises(UnsupportedError, match="layer 0 of the model has chunked_attention"):
        Cache(transformers.LlamaConfig(**SIZES, layer_types=["chunked_attention"] * 2))
    with pytest.raises(UnsupportedError, match=r"attention_mask is torch.Size\(\[1, 1, 12, 12\]\)"):
        logits(model, Cache(model.config), ids, attention_mask=torch.zeros(1, 1, 12, 12))
    with pytest.raises(ShapeError, match=r"attention_mask has shape \(1, 5\), expected"):
        logits(model, Cache(model.config), ids, attention_mask=torch.ones(1, 5))
    with torch.enable_grad(), pytest.raises(UnsupportedError, match="requires a gradient"):
        logits(model, Cache(model.config), ids)
    cache = Cache(model.config)
    logits(model, cache, ids)
    with pytest.raises(UnsupportedError, match="attention_mask shows or hides tokens"):
        logits(model, cache, ids[:, :1], attention_mask=torch.tensor([[0] + [1] * 12]))
    with pytest.raises(ShapeError, match=r"B, H, D = \(2, 2, 16\), expected \(1, 2, 16\)"):
        logits(model, cache, ids.repeat(2, 1))
    with pytest.raises(ParameterError, match="head_dim is 12, expected a multiple of 8"):
        odd = model_of("Llama", "pykv", head_dim=12)
        logits(odd, Cache(odd.config), ids)
    attention = ours.pykv.integrations.transformers_attention.attention
    for word in (torch.ones(2), True):  # a tensor is neither true nor false
        with pytest.raises(UnsupportedError, match="given {'alibi': .*expected none of them"):
            attention(model, *[None] * 4, alibi=word)
    model.train()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with pytest.raises(UnsupportedError, match="given {'dropout': 0.5}"):
        logits(model, Cache(model.config), ids)


def test_masks_of_other_forms():
    """Mask functions that are not causal are refused, whoever makes them."""
    from transformers import masking_utils

    attention = ours.pykv.integrations.transformers_attention
    causal = masking_utils.causal_mask_function
    mask = attention.mask(batch_size=1, kv_length=3)
    assert mask.window is None and mask.seen.all()
    sliding = masking_utils.sliding_window_causal_mask_function(5)
    assert attention.mask(batch_size=1, kv_length=3, mask_function=sliding).window == 5
    both_ways = masking_utils.or_masks(causal, lambda b, h, q, kv: kv < 2)
    sorts = [torch.tensor([[0, 0, 0], [1, 1, 1]]), torch.tensor([[0, 0, 1]])]
    of = masking_utils.packed_sequence_mask_function
    whole, packed = (masking_utils.and_masks(sliding, of(x)) for x in sorts)
    assert attention.mask(batch_size=1, kv_length=3, mask_function=whole).window == 5
    for function in (both_ways, packed, lambda b, h, q, kv: q >= kv):
        with pytest.raises(UnsupportedError, match="mask_function is .*expected a causal one"):
            attention.mask(batch_size=1, kv_length=3, mask_function=function)
    with pytest.raises(UnsupportedError, match="has padding behind tokens"):
        attention.mask(
            batch_size=1,
            kv_length=3,
            mask_function=sliding,
            attention_mask=torch.tensor([[True, False, True]]),
        )


@implementations
def test_shared_scales_that_prove_too_small_can_be_seen(implementation):
    """Of tokens that are there: not of those that were forgotten."""
    model = model_of("Llama", implementation)
    cache, ids = Cache(model.config, "int8:head", page_size=4, margin=1.5), torch.arange(10)[None]
    assert cache.clamped() is None
    logits(model, cache, ids)
    shares = cache.clamped()
    assert shares.shape == (2, 2) and shares.max() == 0
    model.model.layers[1].self_attn.v_proj.weight.mul_(1000)
    logits(model, cache, ids)
    shares = cache.clamped()
    assert shares[1, 1] > 0.3 and shares[0].max() == shares[1, 0] == 0
    cache.crop(-12)
    assert cache.clamped().max() == 0


def test_an_interrupted_call_says_what_helps():
    model = model_of("Llama", "pykv")
    cache, ids = Cache(model.config), torch.arange(6)[None]

    def interrupt(*_):
        raise KeyboardInterrupt

    logits(model, cache, ids)
    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(model, cache, ids)
    hook.remove()
    with pytest.raises(ShapeError, match="after a failed call crop or reset the cache"):
        logits(model, cache, ids)
    cache.crop(6 - cache.get_seq_length())
    want = logits(model, Cache(model.config), torch.cat((ids, ids), 1))[:, 6:]
    assert torch.allclose(logits(model, cache, ids), want, atol=1e-6)


def test_wrong_calls_of_update():
    """Whoever calls it: a model with more layers than the config among them."""
    cache, x = sdpa_caches()[1], torch.ones(1, 2, 3, 16)
    for layer in (-1, 2):
        with pytest.raises(ParameterError, match=f"layer_idx is {layer}, expected 0 to 1"):
            cache.update(x, x, layer)
    with pytest.raises(ShapeError, match=r"value_states has shape \(2, 3, 16\), expected \[B"):
        cache.update(x, x[0], 0)
    with pytest.raises(DtypeError, match="key_states is a NoneType, expected a tensor"):
        cache.update(None, x, 0)
    assert cache.get_seq_length() == 0 and cache.pool is None


@pytest.mark.parametrize("cached", [False, True])
def test_copies_that_are_refused(cached):
    cache = sdpa_caches()[1]
    if cached:
        update((cache,), 1, 3)
    for call in (pickle.dumps, copy.copy):
        for x in (cache, cache.layers[0]):
            with pytest.raises(UnsupportedError, match="expected deepcopy of a Cache, or its pool"):
                call(x)
    for part in ("keys", "values"):  # not None, as of a cache without tokens
        with pytest.raises(UnsupportedError, match="keys and values lie in pages"):
            getattr(cache.layers[0], part)
    assert copy.deepcopy(cache).get_seq_length() == cache.get_seq_length() == 3 * cached


def test_rows_are_moved_as_bits():
    codes = np.arange(1 << 16, dtype=np.uint16).reshape(-1, 4)  # NaN of every payload among them
    x, rows = codes.view(ml_dtypes.bfloat16), [16383, 0, 4094]
    some = batch.rows_of(x, rows)
    assert some.dtype == x.dtype and (some.view(np.uint16) == codes[rows]).all()
    back = np.zeros_like(x)
    batch.set_rows(back, rows, some)
    assert (back.view(np.uint16)[rows] == codes[rows]).all() and back.view(np.uint16).any(
        1
    ).sum() == 3


# --- On a GPU -------------------------------------------------------------------------------------


def moved(inputs):
    return {name: x.cuda() for name, x in inputs.items()}


@pytest.fixture
def stream():
    """A stream of torch's own, which is not CuPy's."""
    if not torch.cuda.is_available():
        pytest.skip("torch is a build without CUDA")
    yield torch.cuda.Stream()


@pytest.mark.gpu
@implementations
@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_models_on_a_gpu(stream, implementation, padding, dtype):
    """A prompt, with rows of padding among those that are appended and attended, and a token."""
    own = model_of("Llama", "eager", dtype).cuda()
    model = model_of("Llama", implementation, dtype).cuda()
    dynamic, cache = transformers.DynamicCache(), Cache(model.config)
    inputs = moved(prompts(padding=padding))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    longer = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
    torch.cuda.synchronize()
    bound = 1e-4 if dtype == torch.float32 else 0.03
    with torch.cuda.stream(stream):
        for some, shown in ((ids, mask), (ids[:, -1:], longer)):
            want = logits(own, dynamic, some, attention_mask=shown)
            got = logits(model, cache, some, attention_mask=shown)
            real = shown[:, -some.shape[1] :].bool()
            assert got.is_cuda and got.dtype == dtype
            assert (got - want)[real].abs().max().item() < bound
    assert type(cache.pool.k).__module__.startswith("cupy")


@pytest.mark.gpu
@implementations
@pytest.mark.parametrize("spec", ["int8", "int4", "e4m3", "fp32:HND"])
def test_kinds_on_a_gpu(stream, implementation, spec):
    """Forks of a prefix, which share pages until they are written, and rows that are forgotten."""
    own, dynamic, model, cache = both(implementation, spec=spec)
    own, model = own.cuda(), model.cuda()
    ids = torch.randint(0, 99, (2, 40)).cuda()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for each in ((own, dynamic), (model, cache)):
            logits(*each, ids[:, :29])
        for first in (29, 31):
            want = logits(own, copy.deepcopy(dynamic), ids[:, first:])
            got = logits(model, fork := copy.deepcopy(cache), ids[:, first:])
            assert (got - want).abs().max().item() <= max(LOSSES[spec], 1e-4)
            fork.crop(-3)
            assert fork.get_seq_length() == 26 + ids[:, first:].shape[1]


def test_sequences_are_named_by_whole_numbers():
    """A mask is not taken for numbers, whether there are tokens or not."""
    cache, k = Cache(transformers.LlamaConfig(num_hidden_layers=1)), torch.ones(2, 2, 3, 16)
    for _ in range(2):
        for indices in (torch.tensor([True, False]), torch.tensor([[0]]), torch.tensor([0.5]), 1):
            with pytest.raises(DtypeError, match="batch_select_indices: indices"):
                cache.batch_select_indices(indices)
        for repeats, error in ((-1, ParameterError), (1.5, DtypeError)):
            with pytest.raises(error, match="batch_repeat_interleave: repeats is"):
                cache.batch_repeat_interleave(repeats)
        cache.update(k, k, 0)
    cache.batch_select_indices([1])
    assert cache.get_seq_length() == 6 and cache._store.batch.size == 1
    with pytest.raises(DtypeError, match="config is a NoneType, expected a model's config"):
        Cache(None)
