"""How a text goes on after its cache was changed, against how it goes on exactly.

A window of a text is N tokens whose keys and values are computed exactly (float32), M tokens that
follow, and one that is predicted last. The M tokens are put in one after another whatever the model
would have said (teacher forcing), once behind the exact rows and once behind the changed ones. Rows
of the M tokens are exact both times. Judge by the mean KL: perplexity of a few hundred tokens moves
by chance, and may fall where the KL says that much is lost.

Dimensions: N tokens before, M tokens scored, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pykv.arrays import module_of, to_host
from pykv.errors import CapacityError, ParameterError, quoted
from pykv.eval.changes import Change, changed, check_job, check_llm
from pykv.eval.replay import ExactCache, Place, check_finite, last_logits, steps
from pykv.number_texts import counted
from pykv.options import check_whole

if TYPE_CHECKING:
    from pykv.llm import LLM

PREFILL, SCORE = 1536, 256  # N and M unless told otherwise
_ROWS = 32  # of logits made float64 at a time: 12.6 MB an array for a vocabulary of 49,152


def windows(
    llm: LLM, text: str, *, count: int = 1, prefill: int = PREFILL, score: int = SCORE
) -> list[list[int]]:
    """Token ids of `count` windows of a text, spread over it, none of which overlap.

    Args:
        llm: whose tokenizer is used; each window begins with its start token, if it has one.
        text: any.
        count, prefill, score: how many windows; N; M.

    Returns:
        Lists of N + M + 1 ids.

    Raises:
        ParameterError: a number is below 1, or the text is too short: how long it is, and should
            be.
        CapacityError: the model's context is shorter than a window.
    """
    op = "eval.windows"
    sizes = dict(count=count, prefill=prefill, score=score)
    count, prefill, score = (check_whole(op, name, x, 1) for name, x in sizes.items())
    check_llm(op, llm)
    begin = llm.tokenize("")
    ids = llm.tokenize(text)[len(begin) :]
    size = prefill + score + 1
    if size - 1 > llm.context:
        raise CapacityError(
            f"{op}: a window has {size - 1} tokens (prefill {prefill}, score {score}), expected at "
            f"most the context of {llm.context}"
        )
    own = size - len(begin)
    if own < 1 or len(ids) < count * own:
        raise ParameterError(
            f"{op}: text has {counted(len(ids), 'token')}, expected at least {count * own:,} for "
            f"{counted(count, 'window')}"
        )
    starts = [0] if count == 1 else np.linspace(0, len(ids) - own, count).astype(int)
    return [begin + ids[start : start + own] for start in starts]


@dataclass
class Cost:
    """What a change cost, token by token.

    Attributes:
        kl: [tokens] float64, sum of p * (log p - log q) over the vocabulary, in nats, where p is
            what the exact model says of the next token, and q what the changed one says.
        agrees: [tokens] bool, whether both hold the same token to be the likeliest.
        loss, exact_loss: [tokens] float64, -log q and -log p of the token that follows.
        nbytes, tokens: of the rows before, as the change keeps them; and how many tokens they were.
    """

    kl: np.ndarray
    agrees: np.ndarray
    loss: np.ndarray
    exact_loss: np.ndarray
    nbytes: int
    tokens: int

    def as_dict(self) -> dict[str, float]:
        """Means over all tokens: bytes_per_token, kl, kl_p99, top1, perplexity and that of the
        exact model."""
        return {
            "bytes_per_token": self.nbytes / self.tokens,
            "kl": float(self.kl.mean()),
            "kl_p99": float(np.quantile(self.kl, 0.99)),
            "top1": float(self.agrees.mean()),
            "perplexity": float(np.exp(self.loss.mean())),
            "exact_perplexity": float(np.exp(self.exact_loss.mean())),
        }


def join(costs: Sequence[Cost]) -> Cost:
    """The cost of several windows or texts, whose `costs` these are: of all their tokens."""
    arrays = ("kl", "agrees", "loss", "exact_loss")
    joined = {name: np.concatenate([getattr(one, name) for one in costs]) for name in arrays}
    return Cost(
        **joined, nbytes=sum(one.nbytes for one in costs), tokens=sum(one.tokens for one in costs)
    )


def measure(
    llm: LLM,
    windows: Sequence[Sequence[int]],
    changes: Mapping[str, Change],
    *,
    prefill: int = PREFILL,
    progress: Callable[[int], object] = lambda tokens: None,
) -> dict[str, Cost]:
    """What each change costs, over all windows.

    Args:
        llm: a model whose kv_dtype is one of floats; its own cache is left alone.
        windows: token ids, N + M + 1 each, see `windows`.
        changes: by name, see pykv.eval.changes.
        prefill: N.
        progress: called with numbers of tokens that were computed: in all, N + M * (1 + changes)
            for each window.

    Returns:
        A Cost for each name.

    Raises:
        ParameterError: there is no window or no change, a window is not of N + 2 token ids or more,
            or the model mixes heads for integers.
        CapacityError: a window is longer than the model's context.
        DtypeError: an argument has another type.
        UnsupportedError: from a change.
        NumberError: logits are not finite.

    Exact rows and logits of a window are computed once, for all changes. Holds two float32 caches
    of N + M tokens and M * V float32 logits, and one step's beside them. Waits for the GPU.
    """
    op = "eval.continuation"
    prefill = check_whole(op, "prefill", prefill, 1)
    check_job(op, llm, changes, progress)
    _check_windows(op, llm, windows, prefill)
    found: dict[str, list[Cost]] = {name: [] for name in changes}
    with llm.turn():
        for ids in windows:
            size = len(ids) - 1
            exact, trial = ExactCache(llm, size), ExactCache(llm, size)
            pages = exact.manager.allocate(size)
            before, after = ids[:prefill], ids[prefill:size]
            last_logits(llm, exact, Place(pages), before)
            progress(prefill)
            logits = list(steps(llm, exact, Place(pages, prefill, prefill), after))
            progress(len(after))
            for name, change in changes.items():
                where = (exact, pages, trial, prefill, len(after))
                place, kept = changed(change, *where)
                got = steps(llm, trial, place, after)
                found[name].append(_cost(logits, got, ids[prefill + 1 :], kept.nbytes, prefill))
                trial.manager.free(place.pages)
                progress(len(after))
    return {name: join(costs) for name, costs in found.items()}


def _check_windows(op: str, llm: LLM, windows: Any, prefill: int) -> None:
    most = llm.model.config.vocab - 1
    if not isinstance(windows, Sequence) or not len(windows):
        raise ParameterError(f"{op}: windows are {quoted(windows)}, expected lists of token ids")
    for i, one in enumerate(windows):
        try:
            ids = np.asarray(one)
        except ValueError:  # windows of several lengths
            ids = np.empty((0, 0))
        if (
            ids.ndim != 1
            or ids.dtype.kind not in "iu"
            or ids.min(initial=0) < 0
            or ids.max() > most
        ):
            expected = f"token ids from 0 to {most}"
            raise ParameterError(f"{op}: windows[{i}] is {quoted(one)}, expected {expected}")
        if not prefill + 2 <= len(ids) <= llm.context + 1:
            error = CapacityError if len(ids) > llm.context else ParameterError
            raise error(
                f"{op}: windows[{i}] has {counted(len(ids), 'token')}, expected "
                f"prefill + 2 = {prefill + 2} to the context + 1 = {llm.context + 1}"
            )


def _cost(exact: list[Any], changed: Any, targets: Sequence[int], nbytes: int, tokens: int) -> Cost:
    """Compare logits [n, V] of steps; both are of the same tokens, in the same steps."""
    parts, start = [], 0
    for p, q in zip(exact, changed, strict=True):
        parts.append(compare(p, q, np.array(targets[start : start + len(p)])))
        start += len(p)
    kl, agrees, loss, exact_loss = map(np.concatenate, zip(*parts, strict=True))
    return Cost(kl, agrees, loss, exact_loss, nbytes, tokens)


def compare(exact: Any, changed: Any, targets: np.ndarray) -> tuple[np.ndarray, ...]:
    """The fields `kl`, `agrees`, `loss` and `exact_loss` of Cost, on the host, for logits `exact`
    and `changed` [n, V] and the n tokens that follow, `targets`; raises as `losses`."""
    kl, loss, exact_loss = np.empty((3, len(targets)))
    for rows, few in _by_rows(targets):
        p, q = _log_softmax(exact[rows]), _log_softmax(changed[rows])
        loss[rows], exact_loss[rows] = _of_targets(q, few), _of_targets(p, few)
        kl[rows] = to_host((module_of(p).exp(p) * (p - q)).sum(axis=1))
    agrees = exact.argmax(axis=1) == changed.argmax(axis=1)
    return kl, to_host(agrees), loss, exact_loss


def losses(logits: Any, targets: np.ndarray) -> np.ndarray:
    """-log p of `targets`, the n tokens that follow logits [n, V], float64 on the host.

    Raises:
        NumberError: a logit is not finite.

    Waits for the GPU.
    """
    found = np.empty(len(targets))
    for rows, few in _by_rows(targets):
        found[rows] = _of_targets(_log_softmax(logits[rows]), few)
    return found


def _by_rows(targets: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    for start in range(0, len(targets), _ROWS):
        rows = slice(start, start + _ROWS)
        yield rows, targets[rows]


def _log_softmax(logits: Any) -> Any:
    """Of rows, in float64."""
    check_finite(logits)
    xp, x = module_of(logits), logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    x -= xp.log(xp.exp(x).sum(axis=1, keepdims=True))
    return x


def _of_targets(log_p: Any, targets: np.ndarray) -> np.ndarray:
    xp = module_of(log_p)
    chosen: np.ndarray = to_host(log_p[xp.arange(len(targets)), xp.asarray(targets)])
    return -chosen
