"""The LLM runtime: GGUF files, tokenizers, and generation through a paged KV cache."""

from pykv.llm.generate import LLM, Completion
from pykv.llm.sampling import SamplingParams

__all__ = ["LLM", "Completion", "SamplingParams"]
