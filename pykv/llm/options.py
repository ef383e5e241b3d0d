"""The options of LLM, checked before anything is fetched or opened."""

from __future__ import annotations

from dataclasses import dataclass

from pykv.eviction import AdaKV, Policy
from pykv.llm import matrices, steps
from pykv.llm.evictor import keeps_prefixes, policy_for
from pykv.llm.runner import DECODES
from pykv.llm.tiering import check_tiers
from pykv.options import check_choice, check_flag, check_whole
from pykv.specs import KVSpec, as_spec


@dataclass
class Options:
    """Options of LLM, as it takes them; whole numbers are Python's then.

    Attributes:
        spec: of the cache, by `kv_dtype`.
        dtype: of matrices, by `weights`; None: as they are stored.
        policy: by `eviction`.
        keeps_prefixes: by `prefix_cache` and the policy.

    Raises:
        As LLM, of what can be said without the model.
    """

    kv_dtype: KVSpec | str
    weights: str
    context: int | None
    pool_tokens: int | None
    page_size: int
    prefix_cache: bool | None
    eviction: Policy | AdaKV | str | None
    host_cache: str | int | None
    disk_cache: str | None
    prefill_device: str | None
    decode: str
    max_tokens_resident: int
    max_sms_resident: int | None
    progress: bool
    require_sm: int

    def __post_init__(self) -> None:
        self.spec = as_spec("LLM", self.kv_dtype, "kv_dtype")
        self.dtype = matrices.weights_dtype("weights", self.weights)
        check_flag("LLM", "progress", self.progress)
        check_choice("LLM", "decode", self.decode, DECODES)
        for name, least in (("max_tokens_resident", 1), ("require_sm", 0), ("page_size", 1)):
            setattr(self, name, check_whole("LLM", name, getattr(self, name), least))
        for name in ("max_sms_resident", "context", "pool_tokens"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, check_whole("LLM", name, value, 1))
        self.policy = policy_for("LLM", self.eviction, steps.PREFILL_TOKENS, self.spec)
        self.keeps_prefixes = keeps_prefixes("LLM", self.policy, self.prefix_cache)
        check_tiers("LLM", self.host_cache, self.disk_cache, self.keeps_prefixes)
