"""The steps that a scheduler plans: tokens packed into batches, run through the model, and drawn.

Answers are decoded by a step of their own, one row each; pieces of prompts are one ragged batch; on
a GPU both are CUDA graphs. So a row of an answer is computed alike, whatever prompts come beside
it.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as Several
from typing import Any

import numpy as np

from pykv import cuda, interrupts
from pykv.errors import UnsupportedError
from pykv.eviction import AdaKV, Policy
from pykv.llm import memory, steps, token_program
from pykv.llm.decode_ways import DecodeWays, Times
from pykv.llm.decoder import Decoder
from pykv.llm.evictor import Evictor
from pykv.llm.head_rows import HeadRows
from pykv.llm.model import forward, graph_rows
from pykv.llm.prefill_device import PrefillDevice
from pykv.llm.prompt_steps import PromptSteps, Span, of_spans
from pykv.llm.residency import Residency, can_stay
from pykv.llm.sampler import Sampler
from pykv.llm.sampling import TokenLogprobs
from pykv.llm.sequence import Sequence
from pykv.llm.steps import Piece
from pykv.llm.steps_ahead import StepsAhead, can_go_on
from pykv.llm.weights import Model
from pykv.ops import paged_check
from pykv.ops.resident_program import MOST_TOKENS
from pykv.pool import PagedKVCache

CLAMPED_SHARE = 1e-3  # of a layer's keys or values: if shared scales clamp more, warn
LOGIT_BYTES = 1 << 27  # limit of a step's logits, where all positions are asked for
DECODES = ("auto", "graph", "persistent", "steps")  # how answers go on, see LLM
DECODERS = 32  # kept, by rows and pages; each may be a graph with its memory
TABLE_PAGES = 16  # least width of a decoder's table; 256 keys of 16 a page need no splits


class ModelRunner:
    """Runs the steps of a Scheduler; see steps.Runner for its methods.

    Args:
        model: the weights.
        cache: the pages, on the model's device.
        xp: the array module of both.
        eviction: which rows sequences keep behind their prompts; None: all. Where rows are evicted,
            sequences take all the pages that they may need at once: computed again, they would keep
            others.
        decode: one of DECODES; of more sequences than token_program.TOKENS, and where PYKV_CHECK
            asks to look at all page tables, "persistent" is what "graph" is. "auto" is the faster
            one of both on a GPU, as of DecodeWays.
        prefill: computes prompts on another GPU; None: this one does.
        max_tokens_resident: tokens that a launch of "persistent" draws of each sequence, at most,
            where nothing else is due, and none needs the host; 1: each is a launch.
        max_sms_resident: SMs that a launch of "persistent" takes, at most; None: all.

    Raises:
        UnsupportedError: `decode` is "persistent" with an eviction, or token_program.check says so.
    """

    def __init__(
        self,
        model: Model,
        cache: PagedKVCache,
        xp: Any,
        eviction: Policy | AdaKV | None = None,
        decode: str = "graph",
        prefill: PrefillDevice | None = None,
        max_tokens_resident: int = 1,
        max_sms_resident: int | None = None,
    ) -> None:
        self.model, self.cache, self.xp = model, cache, xp
        if decode == "persistent":
            if eviction is not None:
                raise UnsupportedError(
                    "LLM: decode is 'persistent' with an eviction, expected another: no phase "
                    "evicts rows"
                )
            token_program.check("LLM", model)
        self._decode, self._max_resident = decode, max_tokens_resident
        self._ways: DecodeWays | None = None
        self._max_sms = max_sms_resident
        if decode == "auto" and xp is not np and eviction is None:
            bounds = min(max_tokens_resident, MOST_TOKENS), max_sms_resident

            def make(cache: PagedKVCache, way: str) -> ModelRunner:
                return ModelRunner(model, cache, xp, None, way, None, *bounds)

            self._ways = DecodeWays(model, cache, *bounds, make)
        self._residency: Residency | None = None
        self._answers: list[Sequence] = []  # of the step whose prompts come next
        self._ahead: StepsAhead | None = None
        self._link = None if xp is np else xp.cuda.Stream(non_blocking=True)
        self._evictor = None if eviction is None else Evictor(eviction, model, cache)
        # The last tokens of a prompt are a step of their own: somebody must make their logits, and
        # the queries that eviction asks for.
        self.last = max(1, self._evictor.asked if self._evictor else 0)
        self._decoders: OrderedDict[tuple[int, int], Decoder] = OrderedDict()
        self._pool: Any = None  # the pool that the decoders were made for
        # Steps follow each other, so their graphs share what they need meanwhile.
        self._memory = None if xp is np else cuda.GraphMemory()
        self._prefill = prefill
        self._prompts = prefill or PromptSteps(model, cache, xp, self._memory)
        self._sampler = Sampler(xp)

    @property
    def most(self) -> int:
        """Tokens of a step, at most; fewer where eviction asks for their queries of all layers,
        which take more memory than activations."""
        if self._evictor is not None and (self._evictor.asked or self._evictor.sums):
            return steps.PREFILL_TOKENS
        return memory.most_tokens(self.model.config, self.xp)

    def room(self, sequence: Sequence) -> int | None:
        """Rows to set aside for all that a sequence may hold, where rows are evicted."""
        if self._evictor is None:
            return None
        return self._evictor.room(len(sequence.tokens), sequence.limit)

    def prompts(self, pieces: list[Piece]) -> list[int]:
        """Compute the next tokens of prompts as one ragged batch."""
        if self._residency is not None:
            self._residency.stop()
        spans = [Span(s.pages, s.cached, s.tokens[s.cached : s.cached + n]) for s, n in pieces]
        done = [i for i, (s, n) in enumerate(pieces) if s.due == n]
        evictor = self._evictor
        asks = evictor is not None and bool(evictor.sums or (done and evictor.asked))
        if self._prefill is not None:
            self._prefill.bring([s for s, _ in pieces])
        logits, queries = interrupts.allowing(self._prompts.run, spans, done, asks)
        end = 0
        for i, (s, n) in enumerate(pieces):
            s.cached += n
            start, end = end, end + n
            if evictor is not None:
                asked = None if queries is None else queries[:, start:end]
                evictor.see_prompt(s, asked, i in done)
        whole = [pieces[i][0] for i in done]
        tokens = self._draw_behind(whole, logits)
        for s in whole:
            s.is_sent = False  # waiting for logits has waited for the pages, too
        return tokens

    def _draw_behind(self, whole: list[Sequence], logits: Any) -> list[int]:
        """The first token of each sequence of `whole`, from its row of a step of prompts. Before
        the host waits for these, it launches the next step of answers, which these join."""
        drawn = self._sampler.begin(logits, whole, _masks(whole)) if whole else None
        link, done = self._link, None
        if link is not None:
            done = self.xp.cuda.Event(disable_timing=True)
            done.record(self.xp.cuda.get_current_stream())
        self._follow_cache()
        answers, self._answers = [s for s in self._answers if not s.finish_reason], []
        come = [s if len(s.prompt) + len(s.generated) + 1 < s.limit else None for s in whole]
        going = [s for s in come if s is not None] + answers
        is_there = self._ahead is not None and self._ahead.is_under_way
        is_free = self._residency is None and self._prefill is None and not is_there
        if going and is_free and self._overlaps(going) and not self._stays(going):
            decoder = interrupts.allowing(self._decoder_for, going)
            rows = [*come, *answers]
            self._ahead = StepsAhead(decoder, self._sampler, link, rows, drawn)
        if drawn is None:
            return []
        if link is not None:
            link.wait_event(done)
        tokens, found = drawn.read(drawn.words if link is None else drawn.words.get(link))
        _note(whole, found)
        return tokens

    def ahead(self, sequences: list[Sequence]) -> int:
        """How many tokens of each answer may be begun before the host looks at the first."""
        if self._stays(sequences):
            return min(self._max_resident, MOST_TOKENS)
        return 2 if self._overlaps(sequences) else 1

    def _stays(self, sequences: list[Sequence]) -> bool:
        """Whether answers go on by a launch that draws token after token."""
        way = self._way(graph_rows(len(sequences), self.xp))
        return self._max_resident > 1 and way == "persistent" and all(map(can_stay, sequences))

    def _overlaps(self, sequences: list[Sequence]) -> bool:
        """Whether a step of answers may be launched ahead. What eviction keeps is known only once a
        step's queries are; where all page tables are looked at, the host waits anyway."""
        is_launch = self.xp is not np and self._decode != "steps" and not paged_check.ALWAYS
        return is_launch and self._evictor is None and all(map(can_go_on, sequences))

    def decode(self, sequences: list[Sequence], beside: int) -> Several[int | None]:
        """Put the last token of answers into the cache, and draw the next. Beside many tokens of
        prompts the next step is launched behind these: ahead of them, who joins behind them would
        miss it, and wait for another such step."""
        stays = beside == 0 and self._stays(sequences)
        goes_on = beside <= steps.PREFILL_TOKENS and not stays
        if any(s.is_sent for s in sequences):  # computed again, up to a token of the answer
            self.join()
            for s in sequences:
                s.is_sent = False
        self._follow_cache()
        self._answers = sequences
        tokens = self._begun(sequences, goes_on)
        if tokens is None:
            self._end_residency()
            self._ahead = None
            decoder = interrupts.allowing(self._decoder_for, sequences)
            if stays:
                # Who copies pages to tiers, or from another GPU, does so behind a launch, which
                # must get no more of them meanwhile.
                copies = self.cache.manager.on_forget is not None or self._prefill is not None
                most = min(self._max_resident, MOST_TOKENS) if copies else self._max_resident
                self._residency = decoder.stay(sequences, most)
            elif goes_on and self._overlaps(sequences):
                self._ahead = StepsAhead(decoder, self._sampler, self._link, sequences)
            tokens = self._begun(sequences, goes_on)
        if tokens is not None:
            for s, token in zip(sequences, tokens, strict=True):
                s.cached += token is not None
            return tokens
        logits = decoder.run(sequences)
        for i, s in enumerate(sequences):
            s.cached += 1
            if self._evictor is not None:
                queries = decoder.queries
                self._evictor.see_answer(s, None if queries is None else queries[:, i : i + 1])
        return self._draw(sequences, logits, decoder.peaks)

    def warm_up(self, slots: int) -> None:
        """Make the graphs of the steps that up to so many answers and their prompts usually take,
        so that no answer waits for one; there are none on the host. What evicts rows, or has
        another GPU compute prompts, makes them when they are needed."""
        prompts = self._prompts
        makes_none = self.xp is np or paged_check.ALWAYS or self._evictor is not None
        if makes_none or not isinstance(prompts, PromptSteps):
            return
        self._follow_cache()
        interrupts.allowing(prompts.warm_up, self.most)
        for rows in sorted({graph_rows(n, self.xp) for n in range(1, slots + 1)}):
            if self._way(rows) == "graph":
                for width in (TABLE_PAGES, 2 * TABLE_PAGES, 4 * TABLE_PAGES):
                    interrupts.allowing(self._decoder_of(rows, width).warm_up)

    def _follow_cache(self) -> None:
        """Forget what was made for a cache that has grown or was replaced."""
        if self._pool is not self.cache.k:
            self._end_residency()
            self._decoders.clear()
            self._ahead, self._pool = None, self.cache.k

    def _begun(self, sequences: list[Sequence], goes_on: bool) -> Several[int | None] | None:
        """The tokens of a launch or a step that is under way; None if there is none of these
        sequences. With `goes_on` the step after that may be launched."""
        if self._residency is not None:
            return self._residency.take(sequences)
        return None if self._ahead is None else self._ahead.take(sequences, goes_on)

    def times(self, count: int, *, force: bool) -> Times | None:
        """Microseconds of a step of so many answers by each way, for "auto"; None where there is no
        choice, see DecodeWays.times.

        Raises:
            UnsupportedError: ways are not chosen by their times here.
        """
        if self._ways is None:
            has = "is on the CPU, expected a GPU"
            if self._decode != "auto":
                has = f"has decode {self._decode!r}, expected 'auto'"
            elif self._evictor is not None:
                has = "has an eviction, expected none"
            raise UnsupportedError(f"llm.calibrate: llm {has}")
        self._end_residency()
        self._ahead = None
        self._decoders.clear()  # they may go another way from now on
        rows = graph_rows(count, self.xp)
        has_choice = rows <= token_program.TOKENS and not paged_check.ALWAYS
        return self._ways.times(rows, force=force) if has_choice else None

    def join(self) -> None:
        """Let work that is enqueued from now on wait for pages that another GPU sends."""
        if self._prefill is not None:
            self._prefill.join()

    def grow(self, pages: int) -> None:
        """Make room for so many pages; on the GPU of prompts first, so that the cache is never the
        larger one.

        Raises:
            CapacityError: the memory cannot be had.
        """
        if self._prefill is not None:
            self._prefill.grow(pages)
        self.cache.grow(pages)

    def free(self) -> int | None:
        """Bytes that a cache may still take of each GPU that has one; see memory.free."""
        free = memory.free(self.xp)
        return free if self._prefill is None else min(free or 0, self._prefill.free())

    def leave(self, sequence: Sequence) -> None:
        """Write no more to the pages of a sequence."""
        self._answers = [x for x in self._answers if x is not sequence]
        if self._residency is not None:
            self._residency.leave(sequence)
        if self._ahead is not None:
            self._ahead.leave(sequence)

    def end(self, sequence: Sequence) -> None:
        """Say so where scales that heads or tensors share do not fit a sequence."""
        if not self.cache.spec.has_given_scales:
            return
        self.join()
        pages = sequence.pages[: self.cache.manager.pages_for(sequence.held)]
        shares = self.cache.clamped(pages)
        if shares.max() > CLAMPED_SHARE:
            layer, side = np.unravel_index(shares.argmax(), shares.shape)
            warnings.warn(
                f"{self.cache.spec}: {shares.max():.1%} of the {('keys', 'values')[side]} of layer "
                f"{layer} exceed the scales of the cache, and are clamped; take a kv_dtype with a "
                "scale for each token, such as int8",
                stacklevel=2,
            )

    def logits(self, ids: list[int], pages: list[int]) -> Iterator[tuple[np.ndarray, int]]:
        """Logits of consecutive positions, [n, V] on the host, and the first position of each; on
        pages that nobody else holds."""
        most = steps.PREFILL_TOKENS
        if self._residency is not None:
            self._residency.stop()
        step = max(1, min(most, LOGIT_BYTES // (4 * self.model.config.vocab)))
        for start in range(0, len(ids), step):
            part = ids[start : start + step]
            batch = of_spans([Span(pages, start, part)], self.cache.page_size, self.xp)
            logits = forward(self.model, batch, self.cache)
            yield (logits if self.xp is np else logits.get()), start

    def _draw(self, sequences: list[Sequence], logits: Any, peaks: Any) -> list[int]:
        """The next token of each answer, from its row; `peaks` as of Sampler.draw. What it draws
        goes by the tokens of its answer, however often these were computed."""
        tokens, found = self._sampler.draw(logits, sequences, _masks(sequences), peaks)
        _note(sequences, found)
        return tokens

    def _end_residency(self) -> None:
        if self._residency is not None:
            self._residency.drop()
            self._residency = None

    def _decoder_for(self, sequences: list[Sequence]) -> Decoder:
        """One with rows and pages enough."""
        most = max(len(s.pages) for s in sequences)
        width = max(TABLE_PAGES, 1 << (most - 1).bit_length())
        return self._decoder_of(graph_rows(len(sequences), self.xp), width)

    def _decoder_of(self, rows: int, width: int) -> Decoder:
        """One of so many rows and pages."""
        size = rows, width
        decoder = self._decoders.pop(size, None) or self._decoder(*size)
        self._decoders[size] = decoder  # moved to the end: the latest used
        if len(self._decoders) > DECODERS:
            self._decoders.popitem(last=False)
        return decoder

    def _queries(self, tokens: int) -> Any:
        """Where a step puts the queries of its tokens."""
        config = self.model.config
        shape = config.num_layers, tokens, config.heads, config.head_dim
        return self.xp.empty(shape, np.float32)

    def _decoder(self, rows: int, width: int) -> Decoder:
        evictor, queries, heads = self._evictor, None, None
        if evictor is not None and (evictor.asked or evictor.sums):
            queries = self._queries(rows)
        if evictor is not None and evictor.is_ragged:
            heads = HeadRows(self.cache, self.model.config.heads, rows, width, self.xp)
        way = self._way(rows), self._max_sms
        sizes, memory = (rows, width), self._memory
        return Decoder(self.model, self.cache, self.xp, sizes, queries, heads, memory, way)

    def _way(self, rows: int) -> str:
        """How so many answers are decoded."""
        if rows > token_program.TOKENS or paged_check.ALWAYS:
            return "steps" if self._decode == "steps" else "graph"
        if self._decode == "auto":
            return "graph" if self._ways is None else self._ways.fastest(rows)
        return self._decode


def _masks(sequences: list[Sequence]) -> list[Any] | None:
    """The tokens that each may draw, as of Sampler.draw."""
    masks = [s.mask() if s.mask else None for s in sequences]
    return None if all(mask is None for mask in masks) else masks


def _note(sequences: list[Sequence], found: list[TokenLogprobs | None]) -> None:
    """Give sequences the log probabilities of their new tokens."""
    for s, logprobs in zip(sequences, found, strict=True):
        if logprobs is not None:
            s.logprobs.append(logprobs)
