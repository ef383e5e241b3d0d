"""The LLM runtime: GGUF files, tokenizers, and generation through a paged KV cache."""

from pykv.llm.answer import Completion, Stream
from pykv.llm.decode_ways import calibrate
from pykv.llm.generate import LLM
from pykv.llm.sampling import SamplingParams, TokenLogprobs

__all__ = ["LLM", "Completion", "SamplingParams", "Stream", "TokenLogprobs", "calibrate"]
