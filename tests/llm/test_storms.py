"""Storms over a whole LLM: resident launches, steps ahead, tiers, sessions, a second GPU for
prompts and pages of other processes, beside each other and in little room. Whatever happens, each
sequence draws what it draws alone, and no page and no row is lost."""

import gc
import os
import random
import shutil
import threading
from collections import deque

import numpy as np
import pytest

from pykv.errors import CapacityError, TransportError
from pykv.llm import SamplingParams, memory, steps
from pykv.llm.prompts import answer_to
from pykv.pages import swap_in, swap_out
from pykv.transport import Handover, Local, local
from tests import peers
from tests.helpers import swept
from tests.llm import token_model
from tests.simt import cupy as simt
from tests.tiers.conftest import no_floor  # noqa: F401

HERE, THERE = f"cuda:{simt.DEVICE}", f"cuda:{simt.OTHER}"
# What happens beside steps, and how often.
CALLS = dict(abort=4, save=1, load=1, swap=1, look=1, flush=1, take=2)


class Planted(BaseException):
    pass


class Storm:
    def __init__(self, open_, draws, folder, streams, **options):
        self.draws, self.streams, self.folder = draws, streams, folder
        self.alone = open_(device="cpu", decode="steps", prefix_cache=False)
        self.llm = open_(device=HERE, **options)
        self.prefixes = [[draws.randrange(3, 250) for _ in range(40)] for _ in range(3)]
        self.given, self.sequences, self.stopped = [], [], set()
        self.saved, self.kept, self.engines = [], [], []
        self.codec = f"{folder}/tokens.kvtc:2"
        self.is_stepping, self.fails = False, draws.choice([0, 0, 0.03])
        token_model.hooks[0] = self.fail
        if self.llm.is_exact and self.llm.prefix_cache:
            alike = {name: options[name] for name in ("kv_dtype", "page_size", "pool_tokens")}
            peer = open_(device=HERE, **alike)
            self.shared = local.default_folder().parent / f"pykv-storm-{os.getpid()}"
            self.engines = [Local(name, self.shared) for name in ("here", "there")]
            pairs = zip((self.llm, peer), self.engines, strict=True)
            self.ends = [Handover(*pair, size="64KB") for pair in pairs]
            self.peer = peer

    def close(self):
        for engine in self.engines:
            engine.close()
        if self.engines:
            shutil.rmtree(self.shared)
        vars(self).clear()
        token_model.hooks[0] = lambda: None
        gc.collect()

    def fail(self):
        if self.is_stepping and self.draws.random() < self.fails:
            raise Planted

    # --- Sequences ---

    def some(self):
        """A prompt, what is asked of it, and whether a mask is."""
        draws = self.draws
        prompt = draws.choice(self.prefixes)[: draws.choice([0, 1, 4, 8, 16, 17, 33])]
        done = [s.tokens for s in self.sequences[-9:] if s.finish_reason == "length"]
        if done and draws.random() < 0.3:
            prompt = draws.choice(done)[:60]
        prompt = prompt + [draws.randrange(3, 250) for _ in range(draws.choice([1, 1, 2, 5]))]
        most = draws.choice([1, 2, 3, 7, 12, 25])
        asked = dict(temperature=draws.choice([0, 0, 0.8]), seed=draws.randrange(99))
        least, again = dict(min_tokens=min(4, most)), dict(repetition_penalty=1.3)
        asked |= draws.choice([{}] * 5 + [least, again])
        asked |= draws.choice([{}, {}, {}, dict(logprobs=2), dict(logit_bias={9: 3.0})])
        if draws.random() < 0.3:
            asked |= dict(stop_token_ids=tuple(draws.sample(range(250), 25)))
        params = SamplingParams(max_tokens=most, ignore_eos=True, **asked)
        return prompt, params, draws.random() < 0.1

    def add(self):
        given = [self.some() for _ in range(self.draws.choice([1, 1, 2, 3]))]
        if self.draws.random() < 0.2:  # answers to one prompt
            forked = dict(max_tokens=9, temperature=0.9, ignore_eos=True)
            params = [SamplingParams(seed=seed, **forked) for seed in range(3)]
            given = [(given[0][0], each, False) for each in params]
        new = [sequence_of(self.llm, *x) for x in given]
        with self.llm.turn():
            self.llm._scheduler.add(*new)
        self.given += given
        self.sequences += new

    def tokens(self):
        found = self.llm._scheduler.running + self.llm._scheduler.waiting
        return (self.draws.choice(found).tokens if found else self.draws.choice(self.prefixes))[:60]

    # --- What happens ---

    def step(self):
        if self.streams is not None and self.draws.random() < 0.1:
            self.streams.switch()
        with self.llm.turn():
            self.is_stepping = True
            try:
                self.llm._scheduler.step()
            except Planted:
                pass
            finally:
                self.is_stepping = False

    def abort(self):
        scheduler = self.llm._scheduler
        if not scheduler.has_work:
            return
        s = self.draws.choice(scheduler.running + scheduler.waiting)
        if not s.finish_reason:
            self.stopped.add(s)
        if self.draws.random() < 0.5:
            s.finish_reason = s.finish_reason or "abort"  # as another thread may
            return
        with self.llm.turn():
            scheduler.abort(s)

    def save(self):
        if self.llm.prefix_cache:
            path = self.folder / f"{len(self.saved)}.session"
            codec = self.codec if self.draws.random() < 0.3 else None
            self.llm.save(path, self.tokens(), codec=codec)
            self.saved.append((path, codec))

    def load(self):
        if self.saved:
            path, codec = self.draws.choice(self.saved)
            self.llm.load(path, codec=codec)

    def swap(self):
        """Out, and back in as new pages."""
        llm, ids = self.llm, self.tokens()
        if not llm.prefix_cache:
            return
        with llm.turn(), llm.pages.known(ids) as pages:
            if not pages:
                return
            self.kept.append(swap_out(llm.cache, pages))
            with llm.pages.new(ids[: len(pages) * llm.cache.page_size]) as new:
                swap_in(llm.cache, new, self.kept[-1])

    def look(self):
        ids = self.tokens()
        np.testing.assert_array_equal(self.llm.logits(ids), self.alone.logits(ids))

    def flush(self):
        self.llm.flush()
        if self.llm.tiers is not None and self.draws.random() < 0.5:
            with self.llm.turn():
                self.llm.tiers.clear_host()

    def take(self):
        """Pages of another process, some of them damaged."""
        if not self.engines or not self.llm.is_exact:
            return
        (here, there), ids = self.ends, self.tokens()
        self.peer.generate([ids], SamplingParams(max_tokens=1))
        there.offer(ids)
        if self.draws.random() < 0.3:
            rows = there._region.rows
            rows[self.draws.randrange(len(rows)), self.draws.randrange(rows.shape[1])] ^= 4
        here.take("there", ids)

    def run(self, count):
        for _ in range(4000):
            if count and (self.draws.random() < 0.25 or not self.llm._scheduler.has_work):
                self.add()
                count -= 1
            if self.draws.random() < 0.15:
                (name,) = self.draws.choices(list(CALLS), CALLS.values())
                try:
                    getattr(self, name)()
                except (CapacityError, TransportError):  # of a full pool, or a damaged page
                    pass
            if self.streams is not None and self.draws.random() < 0.3:
                self.streams.run(most=self.draws.choice([1, 5, 50, 500]))
            self.step()
            if not count and not self.llm._scheduler.has_work:
                break
        self.check()

    def check(self):
        llm = self.llm
        assert all(s.finish_reason for s in self.sequences)
        assert llm.cache.manager.num_free == llm.cache.manager.num_pages
        for given, s in zip(self.given, self.sequences, strict=True):
            one = answered(self.alone, *given)
            if s in self.stopped:
                assert one.generated[: len(s.generated)] == s.generated
                continue
            assert (s.generated, s.finish_reason) == (one.generated, one.finish_reason)
            logprobs = s.logprobs[: len(s.generated)]
            assert not logprobs or [x.token_id for x in logprobs] == s.generated
        self.look()
        if llm.tiers is None:
            return
        llm.flush()
        if self.streams is not None:
            self.streams.run()
        llm.tiers.settle()
        assert not llm.tiers._fetches and not llm.tiers.is_busy
        for rows in llm.tiers._rows:
            slots = [*rows.host._free, *rows.host._slots.values()]
            assert sorted(slots) == list(range(len(rows.host.rows)))


def sequence_of(llm, prompt, params, is_masked):
    s = answer_to(llm, prompt, params).sequence
    words = -(-llm.config.vocab // 32)

    def mask():
        return np.full(words, 0x0F0F0F0F << len(s.generated) % 4).astype(np.uint32).view(np.int32)

    s.mask = mask if is_masked else None
    return s


def answered(llm, *given):
    s = sequence_of(llm, *given)
    with llm.turn():
        llm._scheduler.add(s)
        while llm._scheduler.has_work:
            llm._scheduler.step()
    return s


def options_of(draws, folder, lazy):
    page_size = draws.choice([1, 2, 4, 4, 16])
    decode = draws.choice(["graph", "persistent", "persistent", "auto"])
    options = dict(page_size=page_size, decode=decode)
    options |= dict(max_tokens_resident=draws.choice([1, 4, 64, 200]))
    options |= dict(pool_tokens=draws.choice([None, 120, 160, 300]))
    options |= dict(kv_dtype=draws.choice(["fp16", "fp32", "bf16"]))
    if lazy and draws.random() < 0.5:
        options |= dict(prefill_device=THERE)
    if draws.random() < 0.15:
        return options | dict(prefix_cache=False)
    size = draws.choice([2, 5, 12, 60]) * page_size * 520  # of about so many pages
    how = draws.choice(["", ":lfu", *([":int8", ":int4"] if page_size > 2 else [])])
    if draws.random() < 0.15:
        how, size = f":{folder}/tokens.kvtc:2", size * 5
    if draws.random() < 0.6:
        options |= dict(host_cache=f"{size}B{how}")
    if draws.random() < 0.5:
        place, limit = folder / f"tier{draws.randrange(10**9)}", draws.choice([30, 10000])
        options |= dict(disk_cache=f"{place}:{limit}KB{draws.choice(['', ':lfu'])}")
    return options


@pytest.fixture
def open_of(device, hopper, monkeypatch, tmp_path):
    """open_of(draws, lazy): opens LLMs of the model in place of one, and streams, whose work waits
    if they are lazy."""
    if device is not simt:
        pytest.skip("the model in place of one is the host's")
    monkeypatch.setattr("pykv.cuda.array_module", lambda name: np if name == "cpu" else simt)
    monkeypatch.setattr(memory, "STEP_TOKENS", 24)
    monkeypatch.setattr(steps, "PREFILL_TOKENS", 24)

    def opened(draws, lazy):
        streams = token_model.lazy_streams(monkeypatch, draws) if lazy else None
        open_ = token_model.opener(tmp_path, monkeypatch, draws)
        token_model.artefact_of(open_(device="cpu")).save(tmp_path / "tokens.kvtc")
        return open_, streams

    return opened


FEW, MORE = [(0, True), (1, True), (2, True), (3, False)], [(n, n % 3 > 0) for n in range(4, 40)]


@pytest.mark.parametrize("seed, lazy", [*FEW, *swept(MORE)])
def test_storms_draw_what_each_sequence_draws_alone(open_of, tmp_path, seed, lazy):
    draws = random.Random(seed)
    open_, streams = open_of(draws, lazy)
    for _ in range(3):
        options = options_of(draws, tmp_path, lazy)
        storm = Storm(open_, draws, tmp_path, streams, **options)
        try:
            storm.run(draws.choice([3, 8, 14]))
        finally:
            storm.close()
            if streams is not None:
                streams.run()


def test_what_another_thread_adds_meanwhile_is_no_deadlock(monkeypatch):
    streams, event = token_model.lazy_streams(monkeypatch, random.Random(1)), peers.Event()
    first, second = streams.make(), streams.make()

    class Watched(deque):
        def __bool__(self):
            was_due = len(self) > 0
            if event.mark is None:
                event.record(first)
                second.wait_event(event)
                streams.make().wait_event(event)
            return was_due

    first.queue = Watched()
    streams.run()
    assert event.done and not any(lane.queue for lane in streams.made)


@pytest.mark.parametrize("decode", ["graph", "persistent"])
def test_threads_that_share_an_llm(open_of, tmp_path, decode):
    """Each with calls of its own, in a pool that is too small for all."""
    open_, _ = open_of(random.Random(5), False)
    alone = open_(device="cpu", decode="steps", prefix_cache=False)
    options = dict(page_size=4, pool_tokens=120, host_cache="20KB", max_tokens_resident=9)
    llm = open_(device=HERE, decode=decode, **options)
    answers, errors = [], []

    def one(draws, i):
        start = [7] * draws.choice([0, 8, 20])
        prompt = start + [draws.randrange(3, 250) for _ in range(draws.choice([1, 9]))]
        params = SamplingParams(max_tokens=draws.choice([2, 9, 20]), ignore_eos=True, temperature=0)
        how = draws.choice(["generate", "generate", "stream", "close", "save", "look", "flush"])
        if how == "generate":
            answers.append((prompt, params, llm.generate([prompt], params)[0].text))
        elif how == "stream":
            answers.append((prompt, params, "".join(llm.stream(prompt, params))))
        elif how == "close":
            stream = llm.stream(prompt, params)
            next(stream, None)
            stream.close()
        elif how == "save":
            llm.save(tmp_path / f"{i}.session", prompt)
            llm.load(tmp_path / f"{i}.session")
        elif how == "look":
            llm.logits(prompt)
        else:
            llm.flush()

    def work(i):
        draws = random.Random(i)
        for _ in range(8):
            try:
                one(draws, i)
            except CapacityError:  # of what does not wait for pages
                pass
            except BaseException as error:
                errors.append(error)
                raise

    threads = [threading.Thread(target=work, args=[i]) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(answers) > 12
    assert llm.cache.manager.num_free == llm.cache.manager.num_pages
    for prompt, params, text in answers:
        assert text == alone.generate([prompt], params)[0].text
