"""LLM: text in, text out, through a paged KV cache.

One step of the loop is the same for one prompt and for many: pack the tokens that are due into a
`Batch`, run `model.forward`, draw a token for every sequence whose last token was in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from pykv import blocks, cuda
from pykv.errors import CapacityError, ParameterError
from pykv.kinds import KVSpec
from pykv.llm import gguf, models, sampling
from pykv.llm.chat import chat_prompt
from pykv.llm.model import Batch, Model, decode_step, forward, load, read_config
from pykv.llm.sampling import SamplingParams
from pykv.llm.tokenizer import Tokenizer
from pykv.pool import PagedKVCache, float_kind

PREFILL_TOKENS = 512  # tokens of one prompt step at most; bounds the scratch memory
# Of scales that are found from the first tokens alone, see LLM. After a prompt of five tokens, the
# perplexity of SmolLM2 with int8:head is 13.72 for a margin of 1, 13.03 for 1.5, 13.06 for 2, while
# that with fp16 is 12.99.
SCALE_MARGIN = 1.5
LOGIT_BYTES = 1 << 27  # logits of one step at most, where all positions are asked for


@dataclass(frozen=True)
class Completion:
    """What a model answered to one prompt.

    Attributes:
        text: the answer, without stop strings and special tokens.
        token_ids: the generated tokens, without the end token.
        prompt_token_ids: the prompt as the model saw it.
        finish_reason: "stop" (an end token or a stop string) or "length".
    """

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: str


@dataclass
class Stats:
    """Tokens and seconds of the last call, and the tokens that its cache held.

    Of the prompts' tokens, `reused_tokens` were in the cache from earlier calls; the seconds are
    those of the others.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    cached_tokens: int = 0


@dataclass(eq=False)
class _Sequence:
    """One prompt on its way."""

    prompt: list[int]
    params: SamplingParams
    decoder: Any
    limit: int  # tokens of prompt and answer together
    pages: list[int] = field(default_factory=list)
    cached: int = 0  # tokens whose keys and values are in the cache
    generated: list[int] = field(default_factory=list)
    text: str = ""
    emitted: int = 0  # characters already handed out
    finish_reason: str = ""


class LLM:
    """A model, its tokenizer and its paged cache.

    Args:
        model: "smollm2-135m", "gemma3-270m" (fetched at the first use) or the path of a GGUF file.
        device: "cuda", "cpu", or "auto": the GPU where one is usable.
        kv_dtype: what the cache stores: "fp16", "int8", "fp8", "k8v4", ..., see KVSpec.parse. Each
            token and head has a scale; where heads or tensors share one instead ("int8:head"), it
            is found from the first tokens that the LLM is given, of up to PREFILL_TOKENS, as
            SCALE_MARGIN times what their largest magnitude needs, and stays: what later exceeds it
            is clamped, so such an LLM should first be given a text like those to come. Before
            they become integers, heads are multiplied by a Hadamard matrix, which changes no
            product, but no element stands out then: int8 disturbs logits by half to a third, and
            int4 becomes of use.
        weights: what the file's matrices are rounded to, "fp16", "bf16" or "fp32".
        context: tokens of prompt and answer at most; None takes the model's own limit.
        pool_tokens: tokens that the cache holds in all; None makes it as large as each call needs.
        page_size: tokens a page.
        prefix_cache: keep the pages of finished calls, as long as no call needs them, for prompts
            that begin alike. Logits may then differ in their last bits, as they do between one
            prompt step and two.
        progress: show a bar on stderr while weights are read.

    Raises:
        FetchError: the model cannot be had.
        FormatError, UnsupportedError: the file is damaged, or not for pykv.
        DeviceError: `device` is "cuda" and no GPU is usable.

    Calls are not thread-safe. Sources: GGUF, vLLM's paged attention.
    """

    def __init__(
        self,
        model: str = "smollm2-135m",
        *,
        device: str = "auto",
        kv_dtype: str = "fp16",
        weights: str = "fp16",
        context: int | None = None,
        pool_tokens: int | None = None,
        page_size: int = 16,
        prefix_cache: bool = True,
        progress: bool = False,
    ):
        self.spec = KVSpec.parse(kv_dtype)
        weights_dtype = float_kind("weights", weights)
        for name, value in (("pool_tokens", pool_tokens), ("page_size", page_size)):
            if value is not None and value < 1:
                raise ParameterError(f"LLM: {name} is {value}, expected at least 1")
        self.xp = cuda.array_module(device)
        self.file = gguf.read(models.fetch(str(model)))
        limit = read_config(self.file).context
        if context is not None and not 1 <= context <= limit:
            raise ParameterError(f"LLM: context is {context}, expected 1 to {limit}")
        self.tokenizer = Tokenizer.from_file(self.file)
        self.model = _load(self.file, self.xp, weights_dtype, self.spec.wants_hadamard, progress)
        self.context = context or limit
        self.page_size = page_size
        self.prefix_cache = prefix_cache
        self.stats = Stats()
        self._may_grow = pool_tokens is None
        self.cache = self._new_cache(-(-(pool_tokens or 1) // page_size))

    @property
    def device(self) -> str:
        """The name of the device that the model runs on."""
        return cuda.device_name(self.xp)

    # --- Text ---

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Answer prompts of any lengths, decoded as one batch.

        Args:
            prompts: a text or several; a prompt may also be a list of token ids.
            params: for all prompts or one for each; None is greedy with 128 tokens.

        Returns:
            One Completion a prompt, in order.

        Raises:
            ParameterError: a prompt is empty, or params do not match the prompts.
            CapacityError: a prompt is longer than the context, or the pool is too small; no
                token has been computed then.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ParameterError(
                f"generate: {len(params)} params, expected one for each of {len(prompts)} prompts"
            )
        sequences = [self._sequence(*pair) for pair in zip(prompts, params, strict=True)]
        for _ in self._run(sequences):
            pass
        return [Completion(s.text, s.generated, s.prompt, s.finish_reason) for s in sequences]

    def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None
    ) -> Iterator[str]:
        """Answer one prompt piece by piece; the pieces joined are `generate`'s text.

        Args, Raises: as `generate`. Closing the iterator frees the sequence's pages.
        """
        sequence = self._sequence(prompt, params or SamplingParams())
        with closing(self._run([sequence])) as steps:  # or pages stay taken when we are closed
            for _ in steps:
                piece = sequence.text[sequence.emitted : _safe_length(sequence)]
                sequence.emitted += len(piece)
                if piece:
                    yield piece

    def chat(
        self, messages: Sequence[dict[str, str]], params: SamplingParams | None = None
    ) -> Completion:
        """Answer a conversation, formatted by the file's own chat template.

        Args:
            messages: {"role": ..., "content": ...} each; roles are the template's, usually
                system, user and assistant.
            params: as `generate`.

        Raises:
            UnsupportedError: the file has no chat template.
        """
        return self.generate([self.chat_ids(messages)], params)[0]

    def chat_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer.

        Args:
            messages: in order, each with "role" ("system", "user" or "assistant") and "content".
        """
        prompt = chat_prompt(self.file, list(messages))
        return self.tokenizer.encode(prompt, special=True)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with the start token where the model wants one."""
        return self.tokenizer.encode(text)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.tokenizer.decode(list(ids))

    # --- Numbers ---

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """The logits after each of T `token_ids`, [T, vocab] float32, on the host."""
        return np.concatenate([part for part, _ in self._all_logits(token_ids)])

    def perplexity(self, text_or_ids: str | Sequence[int]) -> float:
        """exp of the mean negative log-likelihood of every token but the first, given those before.

        Args:
            text_or_ids: a text, or at least two token ids.
        """
        ids = self._ids(text_or_ids)
        if len(ids) < 2:
            raise ParameterError(f"perplexity: {len(ids)} tokens, expected at least 2")
        total = 0.0
        for logits, start in self._all_logits(ids):
            targets = ids[start + 1 : start + 1 + len(logits)]
            logits = logits[: len(targets)]
            top = logits.max(axis=1)
            mass = np.exp(logits - top[:, None]).sum(axis=1, dtype=np.float64)
            chosen = logits[np.arange(len(targets)), targets]
            total += float((np.log(mass) + top - chosen).sum())
        return float(np.exp(total / (len(ids) - 1)))

    # --- The loop ---

    def _run(self, sequences: list[_Sequence]) -> Generator[None, None, None]:
        """Step until every sequence is finished; yields after each step."""
        self._reserve(sequences, reuse=self.prefix_cache)
        self.stats = stats = Stats(
            prompt_tokens=sum(len(s.prompt) for s in sequences),
            reused_tokens=sum(s.cached for s in sequences),
        )
        try:
            waiting = list(sequences)
            while waiting:
                started = time.perf_counter()
                self._prompt_step(waiting)
                stats.prompt_seconds += time.perf_counter() - started
                waiting = [s for s in waiting if not s.generated and not s.finish_reason]
                yield
            active: list[_Sequence] = []
            pool = None
            # A finished row costs a GPU little; another graph costs as much as a few steps.
            rows_for_one = 1 if self.xp is np else 2
            while unfinished := [s for s in sequences if not s.finish_reason]:
                started = time.perf_counter()
                fewer = len(active) > rows_for_one * len(unfinished)
                if not active or fewer or self.cache.k is not pool:  # another call enlarges it
                    active, pool = unfinished, self.cache.k
                    decode = self._decoder(active)
                self._draw(active, decode())
                stats.decode_seconds += time.perf_counter() - started
                stats.decode_tokens += len(unfinished)
                yield
        finally:
            stats.cached_tokens = sum(s.cached for s in sequences)
            self._release(sequences)

    def _prompt_step(self, waiting: list[_Sequence]) -> None:
        """The next tokens of the prompts, up to PREFILL_TOKENS, as one ragged batch."""
        room = PREFILL_TOKENS
        due: list[tuple[_Sequence, int]] = []  # a sequence and the tokens to take from it
        for sequence in waiting:
            count = min(room, len(sequence.prompt) - sequence.cached)
            if count:
                due.append((sequence, count))
                room -= count
        ids = [s.prompt[s.cached : s.cached + n] for s, n in due]
        batch = self._ragged_batch([s for s, _ in due], ids)
        last = np.cumsum([n for _, n in due]) - 1
        done = [i for i, (s, n) in enumerate(due) if s.cached + n == len(s.prompt)]
        rows = self.xp.asarray(last[done].astype(np.int32))
        logits = forward(self.model, batch, self.cache, rows)
        for sequence, count in due:
            sequence.cached += count
        if done:
            self._draw([due[i][0] for i in done], logits)

    def _decoder(self, active: list[_Sequence]) -> Callable[[], Any]:
        """A function that puts the last token of every sequence into the cache and gives the
        logits after it, [B, V]. The row of one that is finished has no meaning."""
        P = self.page_size
        inputs = self.xp.empty((4, len(active)), np.int32)  # one transfer for all four
        fill = partial(np.copyto, inputs) if self.xp is np else inputs.set
        ids, positions, slots, lengths = inputs
        batch = Batch(ids, positions, slots, None, self._page_table(active), lengths)
        step = decode_step(self.model, batch, self.cache)

        def decode() -> Any:
            packed = np.empty((4, len(active)), np.int32)
            for column, s in zip(packed.T, active, strict=True):
                if s.finish_reason:
                    column[:] = 0, 0, -1, 0  # not written, and without keys
                    continue
                slot = s.pages[s.cached // P] * P + s.cached % P
                column[:] = s.generated[-1], s.cached, slot, s.cached + 1
            fill(packed)
            logits = step()
            for s in active:
                s.cached += not s.finish_reason
            return logits

        return decode

    def _draw(self, sequences: list[_Sequence], logits: Any) -> None:
        """The next token of every sequence that is not finished, from its row."""
        params = [s.params for s in sequences]
        steps = [len(s.generated) for s in sequences]
        tokens = sampling.draw(logits, params, steps, self.xp)
        for sequence, token in zip(sequences, tokens, strict=True):
            if not sequence.finish_reason:
                self._accept(sequence, token)

    def _accept(self, s: _Sequence, token: int) -> None:
        """Take a drawn token into a sequence, and see whether it ends it."""
        if token in self.tokenizer.stop_ids and not s.params.ignore_eos:
            s.finish_reason = "stop"
            s.text += s.decoder.finish()
            return
        s.generated.append(token)
        known = len(s.text)
        s.text += s.decoder.push(token)
        for stop in s.params.stop:
            at = s.text.find(stop, max(0, known - len(stop) + 1))
            if at >= 0:
                s.text, s.finish_reason = s.text[:at], "stop"
        if not s.finish_reason and len(s.prompt) + len(s.generated) == s.limit:
            s.finish_reason = "length"
            s.text += s.decoder.finish()

    # --- Pages ---

    def _sequence(self, prompt: str | Sequence[int], params: SamplingParams) -> _Sequence:
        ids = self._ids(prompt)
        if len(ids) == self.context:
            raise CapacityError(
                f"prompt has {len(ids)} tokens, expected fewer than the context of {self.context}: "
                "the answer needs room"
            )
        limit = min(self.context, len(ids) + params.max_tokens)
        return _Sequence(ids, params, self.tokenizer.stream_decoder(), limit)

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str) and not prompt:
            raise ParameterError("prompt is empty, expected at least one character")
        ids = self.tokenize(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        vocab = self.model.config.vocab
        if not ids:
            raise ParameterError("prompt is empty, expected at least one token")
        for i in ids:
            if not 0 <= i < vocab:
                raise ParameterError(f"prompt has token id {i}, expected 0 to {vocab - 1}")
        if len(ids) > self.context:
            raise CapacityError(
                f"prompt has {len(ids)} tokens, expected at most the context of {self.context}"
            )
        return ids

    def _reserve(self, sequences: list[_Sequence], *, reuse: bool) -> None:
        """Pages for all tokens that the sequences may reach, or an error before any work. With
        `reuse`, a prompt's pages that are known begin it; its last token is always computed, as
        somebody must make its logits."""
        cache, manager = self.cache, self.cache.manager
        for s in sequences:
            if reuse:
                s.pages = manager.reuse(s.prompt[:-1])
                s.cached = len(s.pages) * self.page_size
        try:
            wanted = sum(manager.pages_for(s.limit) - len(s.pages) for s in sequences)
            missing = wanted - manager.num_free
            if missing > 0 and self._may_grow:
                cache.enlarge(manager.num_pages + missing)
            manager.require(wanted)
        except CapacityError:
            self._release(sequences)
            raise
        for s in sequences:
            cache.extend(s.pages, s.cached, s.limit)

    def _release(self, sequences: list[_Sequence]) -> None:
        """Give all pages back; what was computed on them may be reused."""
        for s in sequences:
            if self.prefix_cache:
                tokens = s.prompt + s.generated
                self.cache.manager.publish(s.pages, tokens[: s.cached])
            self.cache.manager.free(s.pages)

    def _new_cache(self, pages: int) -> PagedKVCache:
        config = self.model.config
        return PagedKVCache(
            config.num_layers,
            pages,
            config.kv_heads,
            config.head_dim,
            page_size=self.page_size,
            spec=self.spec,
            margin=SCALE_MARGIN,
            xp=self.xp,
        )

    def _page_table(self, sequences: list[_Sequence]) -> Any:
        width = max(len(s.pages) for s in sequences)
        return self.xp.asarray(blocks.page_table([s.pages for s in sequences], width))

    def _ragged_batch(self, sequences: list[_Sequence], ids: list[list[int]]) -> Batch:
        """A batch of the given tokens, which follow what each sequence has in the cache."""
        spans = [(s.cached, s.cached + len(i)) for s, i in zip(sequences, ids, strict=True)]
        slots = [
            blocks.slots(s.pages, *span, self.page_size)
            for s, span in zip(sequences, spans, strict=True)
        ]
        starts = np.cumsum([0] + [stop - start for start, stop in spans])
        asarray = self.xp.asarray
        return Batch(
            ids=asarray(np.concatenate(ids).astype(np.int32)),
            positions=asarray(np.concatenate([np.arange(*s) for s in spans]).astype(np.int32)),
            slots=asarray(np.concatenate(slots)),
            q_starts=asarray(starts.astype(np.int32)),
            page_table=self._page_table(sequences),
            lengths=asarray(np.array([stop for _, stop in spans], np.int32)),
        )

    def _all_logits(self, token_ids: Sequence[int]) -> Iterator[tuple[np.ndarray, int]]:
        """Logits of consecutive positions, [n, V] on the host, and the first position of each."""
        ids = self._ids(token_ids)
        step = max(1, min(PREFILL_TOKENS, LOGIT_BYTES // (4 * self.model.config.vocab)))
        sequence = _Sequence(ids, SamplingParams(), None, len(ids))
        self._reserve([sequence], reuse=False)  # or logits would be missing
        try:
            for start in range(0, len(ids), step):
                part = ids[start : start + step]
                batch = self._ragged_batch([sequence], [part])
                logits = forward(self.model, batch, self.cache)
                sequence.cached += len(part)
                yield (logits if self.xp is np else logits.get()), start
        finally:
            self._release([sequence])


def _safe_length(sequence: _Sequence) -> int:
    """Characters that no stop string can take back any more."""
    text = sequence.text
    if sequence.finish_reason:
        return len(text)
    hold = 0
    for stop in sequence.params.stop:
        for n in range(min(len(stop) - 1, len(text)), hold, -1):
            if text.endswith(stop[:n]):
                hold = n
                break
    return len(text) - hold


def _load(file: gguf.ModelFile, xp: Any, dtype: Any, hadamard: bool, progress: bool) -> Model:
    if not progress:
        return load(file, xp, dtype=dtype, hadamard=hadamard)
    from tqdm import tqdm

    total = sum(info.nbytes for info in file.tensors.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="weights", leave=False) as bar:
        return load(file, xp, dtype=dtype, hadamard=hadamard, progress=bar.update)
