"""From an open file to a runner: the GPU, the weights and the cache of an LLM."""

from __future__ import annotations

from functools import partial
from typing import Any

from pykv import cuda
from pykv.eviction.parts import check_size, most_pages
from pykv.llm import memory, scales
from pykv.llm.config import Config
from pykv.llm.gguf import ModelFile
from pykv.llm.options import Options
from pykv.llm.prefill_device import PrefillDevice, check_prefill_device
from pykv.llm.runner import ModelRunner
from pykv.llm.tokenizer import Tokenizer
from pykv.llm.weights import load_with_bar
from pykv.pool import PagedKVCache


def check_devices(device: str, xp: Any, options: Options) -> None:
    """Check, without a model, that there is a device as asked for, and another one for prompts.

    Raises:
        As cuda.pick_device and check_prefill_device.
    """
    require_sm, evicts = options.require_sm, options.policy is not None
    picked = cuda.pick_device(device, xp, require_sm=require_sm)
    if (prefill := options.prefill_device) is not None:
        check_prefill_device(picked, prefill, evicts=evicts, require_sm=require_sm)


def open_runner(
    file: ModelFile, config: Config, tokenizer: Tokenizer, device: str, xp: Any, options: Options
) -> tuple[str, ModelRunner, int | None]:
    """The one device that `device` stands for, see cuda.pick_device; a runner there; and how many
    pages its cache may grow to, None: as memory allows.

    Raises:
        CapacityError: weights and cache need more memory than is free, or where rows are evicted
            the pool is too large.
        As LLM, of a file that cannot be read.
    """
    spec, dtype, prefill_device = options.spec, options.dtype, options.prefill_device
    page_size, pages = options.page_size, -(-(options.pool_tokens or 1) // options.page_size)
    most = None
    if options.policy is not None:
        check_size("LLM", pages, spec, page_size, config.kv_heads)
        most = most_pages(spec, page_size, config.kv_heads)
    # Without `pool_tokens` or `context` the cache grows as calls need it.
    tokens = options.pool_tokens or options.context or page_size
    need = memory.needed(file, config, dtype, spec, tokens, xp)
    device = cuda.pick_device(device, xp, nbytes=need.total, require_sm=options.require_sm)
    load = partial(load_with_bar, file, xp, dtype, spec.wants_hadamard, options.progress)
    if prefill_device is not None:
        check_prefill_device(device, prefill_device)  # "auto" may be another by now
        with cuda.use_device(prefill_device):
            memory.require(need, xp, dtype)
    with cuda.use_device(device):
        memory.require(need, xp, dtype)
        model = load()
        sizes = config.num_layers, pages, config.kv_heads, config.head_dim
        of_pages = dict(page_size=page_size, spec=spec, margin=scales.MARGIN, xp=xp)
        cache = PagedKVCache(*sizes, **of_pages)
        if spec.has_given_scales:
            ids = tokenizer.encode(scales.TEXT)[: config.context - 1]
            scales.calibrate(model, cache, ids, xp)
        prefill = None if prefill_device is None else PrefillDevice(prefill_device, load, cache)
        bounds = options.max_tokens_resident, options.max_sms_resident
        runner = ModelRunner(model, cache, xp, options.policy, options.decode, prefill, *bounds)
    return device, runner, most
