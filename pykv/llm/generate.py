"""LLM: text in, text out, through a paged KV cache."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from pykv import cuda, forks
from pykv.errors import UnsupportedError
from pykv.eviction import AdaKV, Policy
from pykv.kvtc.codec import Codec
from pykv.llm import matrices, scoring, sessions, shared_steps
from pykv.llm.answer import Completion, Stream
from pykv.llm.fingerprint import contents, fingerprint
from pykv.llm.language import Language
from pykv.llm.opening import check_devices, open_runner
from pykv.llm.options import Options
from pykv.llm.prompts import answer_to, answers_to
from pykv.llm.sampling import SamplingParams
from pykv.llm.scheduler import Scheduler, Stats
from pykv.llm.sequence_pages import SequencePages
from pykv.llm.sessions import Session
from pykv.llm.tiering import open_tiers
from pykv.llm.weights import Model
from pykv.pool import PagedKVCache
from pykv.specs import KVSpec


class LLM(Language):
    """A model, its tokenizer and its paged cache.

    Args:
        model: the path of a GGUF file, or a model to download at the first use: "smollm2-135m",
            "gemma3-270m", "hf:owner/repo/file.gguf" or a URL, see pykv.llm.models.fetch.
        device: "cuda" (CuPy's current GPU), "cuda:1" and the like, "cpu", or "auto": the GPU of the
            highest SM with room for the weights, else the CPU. Weights, cache and work stay on that
            device, whichever GPU is current when a method is called; the current GPU is restored.
        prefill_device: another GPU, such as "cuda:1", that computes prompts, see
            pykv/llm/README.md. It holds a second copy of the weights and a cache of equal size.
            Tokens are those of one GPU. Excludes `eviction`. None: `device` computes prompts.
        kv_dtype: element kind of the cache: a KVSpec, or "fp16", "int8", "fp8", "k8v4", ... Each
            token and head has a scale. Scales shared by heads or tensors ("int8:head") are found
            when the model is loaded, and stay; loading warns if their steps are too coarse, and
            calls warn if they clamp more than a thousandth of a layer's keys or values.
        weights: dtype of the matrices, "fp16", "bf16" or "fp32"; or "stored": they stay in the
            blocks of the file and take as much memory; products dequantise them on the fly, to the
            numbers of "fp32". That reads less on a GPU, but is many times slower on the host. With
            a `kv_dtype` of int8 or int4 attention's output matrix is float32.
        context: most tokens of prompt and answer; None: the model's limit.
        pool_tokens: capacity of the cache in tokens. When it is full, new sequences wait, and the
            latest one gives up its pages and is computed again later; an answer that fills the pool
            alone ends with "length". None: the cache grows as calls need.
        page_size: tokens a page.
        prefix_cache: keep the pages of finished calls, until others need them, for prompts with the
            same beginning; pykv/llm/README.md describes the effect on the last bits of logits.
            None: yes, unless `eviction` is H2O, which needs all queries of a prompt and excludes a
            prefix cache.
        eviction: which rows stay in the cache after a prompt, and as an answer grows: a policy of
            pykv.eviction, or a text such as "snapkv:512". A `budget` holds from then on, give or
            take EVERY rows; a `ratio` applies to the prompt alone. Policies with queries get the
            last ones of the prompt, which are always computed, and later the last one; H2O gets
            all. Heads that share a budget (AdaKV) may hold up to H times the budget, and pages for
            that are reserved. Layers with a sliding window keep their last rows. Rows are evicted
            from copies; the prefix cache keeps the pages of prompts unchanged. `logits` and
            `perplexity` see all tokens. None: all rows stay.
        host_cache: size of host memory for full pages that the prefix cache would forget, for later
            prompts with the same beginning: "4GiB" or an integer; "4GiB:lfu" keeps those used most
            often; "4GiB:int8", "4GiB:int4" or "4GiB:FILE:RATIO", an artefact of pykv.kvtc, store
            codes. None: pages are forgotten.
        disk_cache: folder and size for pages of host memory, which other processes with equal
            model, weights, kv_dtype and page_size find as well: "DIR:50GiB", with policy and codec
            as above; see `flush` and pykv/tiers/README.md.
        decode: how a GPU computes the next token of each answer: "graph", a CUDA graph of a step's
            launches; "persistent", one launch for a whole step or several, of up to 8 answers, from
            sm_70 on, else "graph"; or "steps", separate launches. "auto": a graph, or what
            pykv.llm.calibrate found to be faster here. Tokens are equal up to the order of sums.
            See pykv/llm/README.md.
        max_tokens_resident: most tokens of each answer that a "persistent" launch draws. Other work
            on the GPU waits for its end; prompts of this LLM wait for the token under way only.
        max_sms_resident: most SMs of a "persistent" launch; None: all.
        progress: show a progress bar on stderr while weights are read.
        require_sm: refuse devices other than GPUs of at least this SM, such as 80.

    Raises:
        FetchError: the model cannot be downloaded.
        FormatError, UnsupportedError: the file is damaged, or not supported.
        CapacityError: weights and cache need more memory than is free.
        DeviceError: `device` is "cuda" and no GPU is usable, the GPU does not exist or is older
            than `require_sm`, or `prefill_device` is the same GPU or has no peer access to it.
        ParameterError: an option is unknown or out of its range.
        DtypeError: an argument has another type.
        InstallError: a package of the extra `llm` is not installed.

    Attributes:
        runner: computes the steps; further Schedulers may use it in turns with this LLM's, as
            `pykv serve` does.
        prefix_cache: whether prompts reuse pages of others.
        is_exact: whether reused pages are bit for bit as computed: none came from codes of a tier
            or a session.

    Thread-safe: sequences of concurrent calls are decoded as one batch; one of the threads runs
    each step, under a lock. A step has up to 512 tokens, on a GPU up to 2,048, one of each answer
    among them. Streams advance while other calls step. `stats` cover all calls since the latest
    began.
    Sources: GGUF, vLLM's paged attention.

    >>> llm = pykv.LLM("smollm2-135m", kv_dtype="int8")  # doctest: +SKIP
    >>> params = pykv.SamplingParams(max_tokens=8, stop=".")  # doctest: +SKIP
    >>> llm.generate(["The capital of France is"], params)[0].text  # doctest: +SKIP
    ' Paris'
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "smollm2-135m",
        *,
        device: str = "auto",
        prefill_device: str | None = None,
        kv_dtype: KVSpec | str = "fp16",
        weights: str = "fp16",
        context: int | None = None,
        pool_tokens: int | None = None,
        page_size: int = 16,
        prefix_cache: bool | None = None,
        eviction: Policy | AdaKV | str | None = None,
        host_cache: str | int | None = None,
        disk_cache: str | None = None,
        decode: str = "auto",
        max_tokens_resident: int = 64,
        max_sms_resident: int | None = None,
        progress: bool = False,
        require_sm: int = 0,
    ):
        options = Options(
            kv_dtype=kv_dtype,
            weights=weights,
            context=context,
            pool_tokens=pool_tokens,
            page_size=page_size,
            prefix_cache=prefix_cache,
            eviction=eviction,
            host_cache=host_cache,
            disk_cache=disk_cache,
            prefill_device=prefill_device,
            decode=decode,
            max_tokens_resident=max_tokens_resident,
            max_sms_resident=max_sms_resident,
            progress=progress,
            require_sm=require_sm,
        )
        self.spec, dtype = options.spec, options.dtype
        self.weights_dtype: str = matrices.STORED if dtype is None else np.dtype(dtype).name
        self.xp = cuda.array_module(device)
        check_devices(device, self.xp, options)  # before a fetch
        self._lock = forks.waits_for(threading.RLock())
        super().__init__(model, context=options.context)
        self._given = os.fsdecode(model), weights
        if dtype is None:
            matrices.check_stored(self.file)
        opened = open_runner(self.file, self.config, self.tokenizer, device, self.xp, options)
        self._device, self.runner, most_of_pool = opened
        with cuda.use_device(self._device):
            # Now, as the file may change or go before a session is saved.
            self.fingerprint = fingerprint(self.file, self.model)
            self.contents = contents(self.file)
            self._done = None if self.xp is np else self.xp.cuda.Event(disable_timing=True)
            with cuda.behind(self._done):  # so that the first turn waits for all of this
                self.tiers = open_tiers(self, host_cache, disk_cache)
        self.prefix_cache = options.keeps_prefixes
        self.is_exact = self.tiers is None or self.tiers.is_exact
        self._scheduler = Scheduler(
            self.runner,
            self.cache,
            may_grow=pool_tokens is None,
            prefix_cache=self.prefix_cache,
            tiers=self.tiers,
            most_pages=most_of_pool,
        )

    def __reduce__(self) -> Any:
        raise UnsupportedError(
            f"{self} is neither copied nor pickled, expected one in each process"
        )

    def __repr__(self) -> str:
        model, weights = self._given
        return (
            f'LLM({model!r}, device="{self._device}", kv_dtype="{self.spec}", weights="{weights}", '
            f"context={self.context})"
        )

    @property
    def device(self) -> str:
        """The name of the device that the model runs on."""
        with cuda.use_device(self._device):
            return cuda.device_name(self.xp)

    @property
    def model(self) -> Model:
        """The weights and their configuration."""
        return self.runner.model

    @property
    def cache(self) -> PagedKVCache:
        """The pages of all calls."""
        return self.runner.cache

    @property
    def pages(self) -> SequencePages:
        """Which sequence holds which pages; for work between calls, in a `turn`."""
        return self._scheduler.pages

    @property
    def stats(self) -> Stats:
        """Tokens and seconds since the latest call began; its own, if no other ran meanwhile."""
        return self._scheduler.stats

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A context for work on `model` and `cache` between steps: no other thread runs a step, and
        the model's GPU is current. Work enqueued on this thread's current stream waits for that of
        the turn before.

        Raises:
            UnsupportedError: a signal handler interrupted a step of this thread.
        """
        with self._lock:
            scheduler = getattr(self, "_scheduler", None)  # None: the LLM is being made
            if scheduler is not None and scheduler.is_stepping:
                raise UnsupportedError(
                    "LLM: a signal handler calls it in the midst of a step, expected a call after "
                    "that; Stream.stop may be called at any time"
                )
            with cuda.use_device(self._device), cuda.behind(self._done):
                if scheduler is not None and scheduler.abandoned:
                    scheduler.abort_abandoned()
                yield

    # --- Text ---

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        special: bool = False,
    ) -> list[Completion]:
        """Answer prompts of any lengths, decoded as one batch.

        Args:
            prompts: a text or several; a prompt may also be a list of token ids.
            params: for all prompts or one for each; None is greedy with 128 tokens.
            special: parse control tokens such as <|im_start|> in prompts. Leave it False if a
                prompt has text of others, which could forge a turn.

        Returns:
            One Completion a prompt, in order.

        Raises:
            ParameterError: a prompt is empty or holds no token ids, or params do not match the
                prompts.
            CapacityError: a prompt is longer than the context or the pool, or the pool cannot grow;
                no token has been computed.
            NumberError: logits are not finite.
            UnsupportedError: the call is being prepared by pykv.prepare.
        """
        _refuse_prepare("LLM.generate")
        answers = answers_to(self, prompts, params, special)
        shared_steps.run(self._scheduler, self.turn, answers)
        return [answer.completion() for answer in answers]

    def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        special: bool = False,
    ) -> Stream:
        """Answer one prompt piece by piece; the pieces joined are `generate`'s text.

        Args, Raises: as `generate`. Closing the iterator frees the sequence's pages; if it is
        dropped instead, the next call does.

        Returns:
            An iterator of pieces, which can also `stop` the answer and knows its `completion`.
        """
        _refuse_prepare("LLM.stream")
        params = SamplingParams() if params is None else params
        answer = answer_to(self, prompt, params, special)
        pieces = shared_steps.pieces(self._scheduler, self.turn, answer)
        end = partial(shared_steps.abort, self._scheduler, self.turn, [answer])
        return Stream(answer, pieces, end)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        template_variables: Mapping[str, Any] | None = None,
    ) -> Completion:
        """Answer a conversation, formatted by the file's own chat template.

        Args:
            messages: {"role": ..., "content": ...} each; the template defines the roles, usually
                system, user and assistant. Contents are text, never control tokens.
            params: as `generate`.
            template_variables: further variables of the template, for example
                {"enable_thinking": False} or {"tools": [...]}.

        Raises:
            UnsupportedError: the file has no chat template.
            FormatError: its template fails, or takes too much time or memory.
            As `generate`.
        """
        ids = self.chat_ids(messages, template_variables=template_variables)
        return self.generate([ids], params)[0]

    # --- Sessions ---

    def save(
        self,
        path: str | os.PathLike[str],
        prompt: str | Sequence[int] | Sequence[Mapping[str, Any]],
        *,
        template_variables: Mapping[str, Any] | None = None,
        codec: Codec | str | None = None,
    ) -> int:
        """Write a conversation to a file, with the pages of the cache that hold its beginning.

        Args:
            path: of the file. One that exists is replaced at once, when all is on the disk; a new
                one is readable by its owner alone.
            prompt: messages as of `chat`, the last answer among them; or what `generate` was given,
                token ids followed by those of the answer, or a text.
            template_variables: as of `chat`, for messages.
            codec: makes the file smaller, at a loss: a pykv.kvtc.Codec on the LLM's device, or
                "FILE:RATIO" of an artefact, such as "smollm2.kvtc:16". None: pages are kept bit
                for bit.

        Returns:
            How many of the first tokens the file keeps the pages of: full pages, which calls have
            computed and the cache still holds. The others are computed when they are needed.

        Raises:
            ParameterError: the prompt is none, has variables but no messages, `path` is no regular
                file, the codec is for another model, or the LLM has no `prefix_cache`.
            CapacityError: a text, or token ids, exceed the context.
            DtypeError: `path` or `codec` is nothing of the kind.
            OSError: the file cannot be written; what was there before is still there.

        Waits for the GPU.

        >>> llm = pykv.LLM("smollm2-135m")  # doctest: +SKIP
        >>> talk = [{"role": "user", "content": "Hello"}]  # doctest: +SKIP
        >>> talk += [{"role": "assistant", "content": llm.chat(talk).text}]  # doctest: +SKIP
        >>> llm.save("talk.session", talk)  # doctest: +SKIP
        >>> talk = llm.load("talk.session").messages  # in another process  # doctest: +SKIP
        """
        said = sessions.conversation(self, prompt, template_variables)
        return sessions.save(self, self.pages, path, *said, codec)

    def load(self, path: str | os.PathLike[str], *, codec: Codec | str | None = None) -> Session:
        """Read what `save` wrote, of the same model, weights, kv_dtype and page_size; calls whose
        prompts begin with its tokens reuse its pages as if this LLM had computed them.

        Pages that were coded, by a codec or on their way through a tier (`is_exact`), are near what
        the model computes, and serve every prompt that begins so, unless the cache has exact ones.
        Beside a `disk_cache`, which others read, they are left out, and computed where needed.

        Args:
            path: of the file.
            codec: of the artefact and ratio that the file was saved with; not used if it was saved
                without.

        Returns:
            Its token ids, its messages if it has any, and how many tokens need no computing. Like
            pages of finished calls, those that no call uses go when others need room.

        Raises:
            FormatError: this is no such file, it is damaged, or of another version, model, spec,
                page size or codec; the LLM is as before.
            CapacityError: its pages exceed the context or the pool, or what answers of other
                threads leave of a `pool_tokens`.
            ParameterError: `path` is no regular file, the codec is for another model, or the LLM
                has no `prefix_cache`.
            DtypeError: `path` or `codec` is nothing of the kind.
            OSError: the file cannot be read.

        Waits for the GPU.
        """
        return sessions.load(self, self.pages, path, codec)

    def flush(self) -> None:
        """Write the full pages of the prefix cache and of `host_cache` to `disk_cache`, for another
        process to find. Waits. Without a disk_cache it does nothing."""
        with self.turn():
            if self.tiers is not None:
                self.runner.join()
                self.tiers.flush()

    # --- Numbers ---

    def logits(self, token_ids: str | Sequence[int]) -> np.ndarray:
        """The logits after each of T `token_ids`, or of a text, [T, vocab] float32, on the host.

        Args, Raises: as a prompt of `generate`; it does not wait for pages, so that a CapacityError
        also says that answers of other threads hold those of a `pool_tokens`.
        """
        _refuse_prepare("LLM.logits")
        return scoring.logits(self, token_ids)

    def perplexity(self, text_or_ids: str | Sequence[int]) -> float:
        """exp of the mean negative log-likelihood of every token but the first, given those before.

        Args:
            text_or_ids: a text, or at least two token ids.

        Raises: as `logits`.
        """
        _refuse_prepare("LLM.perplexity")
        return scoring.perplexity(self, text_or_ids)


def _refuse_prepare(method: str) -> None:
    cuda.refuse_prepare(method, "what it does next depends on logits, which it waits for")
