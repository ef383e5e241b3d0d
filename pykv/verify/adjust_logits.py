"""Penalties, biases and masks, one token at a time in float64, and the host's bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from pykv.ops import adjust_logits
from pykv.testing import host, judged, oracles, wrong_values
from pykv.verify import Cases

B, V = 5, 1500


def cases(rng: np.random.Generator, xp: Any) -> Cases:
    logits = (4 * rng.standard_normal((B, V))).astype(np.float32)
    prompts = [rng.integers(0, V, 400).tolist() for _ in range(B)]
    answers = [rng.integers(0, 300, 200).tolist() for _ in range(B)]
    asked = dict(
        penalties=[(1.3, 0.0, 0.0), (1.0, 0.7, 0.0), (1.0, 0.0, 0.3), (0.8, -1.5, 0.9), (2, 2, 2)],
        biases=[{}, {7: 3.5, V - 1: -100.0}, {}, {i: i / 300 for i in range(300)}, {0: -np.inf}],
        masks=[None, set(range(0, V, 3)), None, {V - 1}, {5, 31, 32, 1024}],
    )
    none = dict(penalties=[(1, 0, 0)] * B, biases=[{}] * B, masks=[None] * B)
    for name in asked:
        chosen = none | {name: asked[name]}
        yield name, *_judged(xp, logits, prompts, answers, **chosen)
    yield "all of them", *_judged(xp, logits, prompts, answers, **asked)
    prompts[0] = prompts[3] = None
    yield "some rows unpenalised", *_judged(xp, logits, prompts, answers, **asked)
    arguments = _arguments(prompts, answers, **asked)
    if xp is not np:  # a host would be held to itself
        got = adjust_logits.adjust(xp.asarray(logits), **_on(xp, arguments))
        want = adjust_logits.adjust(logits, **_on(np, arguments))
        yield "bits that differ from the host's", wrong_values(got, want), 0.0
    # The last token is counted by the call.
    tallies, given = xp.asarray(arguments["tallies"]), _on(xp, arguments)
    adjust_logits.adjust(xp.asarray(logits), **given | dict(tallies=tallies))
    want = np.stack([_tally(*pair) for pair in _penalised(prompts, answers)])
    yield "tallies", wrong_values(host(tallies), want), 0.0


def _judged(xp: Any, logits: Any, prompts: Any, answers: Any, **asked: Any) -> tuple[float, float]:
    arguments = _arguments(prompts, answers, **asked)
    got = adjust_logits.adjust(xp.asarray(logits), **_on(xp, arguments))

    def oracle(dtype: Any) -> Any:
        return oracles.adjusted_logits(logits, dtype, prompts, answers, **asked)

    return judged(got, oracle, np.float32)


def _on(xp: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Copies on a device: tallies are updated."""
    return {name: xp.asarray(x.copy()) for name, x in arguments.items()}


def _penalised(prompts: Any, answers: Any) -> list[tuple[Any, Any]]:
    pairs = zip(prompts, answers, strict=True)
    return [pair for pair in pairs if pair[0] is not None][::-1]  # tally rows need not be in order


def _tally(prompt: list[int], answer: list[int]) -> Any:
    return np.array([2 * answer.count(i) + (i in prompt) for i in range(V)], np.int32)


def _arguments(
    prompts: Any, answers: Any, penalties: Any, biases: Any, masks: Any
) -> dict[str, Any]:
    """As `adjust` takes them, without the last token of each answer in the tallies."""
    pairs = _penalised(prompts, answers)
    rows = [-1 if p is None else len(pairs) - 1 for p in prompts]
    left = len(pairs)
    for b, prompt in enumerate(prompts):
        left -= prompt is not None
        rows[b] = -1 if prompt is None else left
    allowed = [mask for mask in masks if mask is not None]
    words = np.zeros((len(allowed), -(-V // 32) * 32), np.uint8)
    for m, mask in enumerate(allowed):
        words[m, sorted(mask)] = 1
    counts = np.cumsum([mask is not None for mask in masks])
    return dict(
        tallies=np.stack([_tally(p, a[:-1]) for p, a in pairs]),
        penalties=np.array(penalties, np.float32),
        tally_rows=np.array(rows, np.int32),
        tokens=np.array([answer[-1] for answer in answers], np.int32),
        bias_indptr=np.cumsum([0] + [len(bias) for bias in biases]).astype(np.int32),
        bias_ids=np.array([i for bias in biases for i in bias], np.int32),
        bias_values=np.array([x for bias in biases for x in bias.values()], np.float32),
        masks=np.packbits(words, axis=1, bitorder="little").view("<i4").astype(np.int32),
        mask_rows=np.array(
            [-1 if mask is None else n - 1 for mask, n in zip(masks, counts, strict=True)], np.int32
        ),
    )
