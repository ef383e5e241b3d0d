"""Policies: the scores of a cache's rows, and how many rows stay.

Dimensions: as in pykv/eviction; n heads, that is B * n sequences of one head.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np

from pykv.errors import ParameterError, UnsupportedError, quoted
from pykv.eviction.parts import Rows
from pykv.eviction.rotary import ahead
from pykv.number_texts import number_of, whole_of
from pykv.ops import kv_scores
from pykv.options import check_number, check_type, check_whole, hold_python_numbers
from pykv.terminal import meant

_RUN = 512  # rows in each partial mean of KeyDiff
_MOST = 2**31 - 1
_MOST_SLOTS = 2**24  # float32 represents all whole numbers up to here
_ALWAYS = ("sinks", "recent")  # fields: rows that always stay
_FRACTIONS = ("ratio", "threshold", "epsilon")  # fields that are no whole numbers
_FAR = np.float32(1e38)  # bound of logits, so that their differences are finite in float32
_MOST_AHEAD = 1 << 16  # limit of positions whose rotations the host averages


def _share_of(rows: Any, ratio: float) -> Any:
    """The share `ratio` of `rows`, to thousandths: a float is rarely the number that was meant.

    >>> float(pykv.eviction.policies._share_of(100, 0.55)), 100 * 0.55
    (55.0, 55.00000000000001)
    """
    return np.rint(np.float64(ratio) * rows * 1000) / 1000


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Which rows stay; the base of all policies.

    Args:
        budget: most rows that each head of a sequence keeps.
        ratio: instead of `budget`, the share of its rows, above 0 and at most 1, rounded up. Less
            than half a thousandth of a row is ignored: .55 of 100 rows are 55, though the float is
            above .55.
        threshold: keep only rows with a higher score, besides sinks and recent rows.
        sinks, recent: numbers of first and last rows that always stay.

    Rows with score NaN, such as those with a NaN in their key, go first, and do not change other
    scores; except that with policies that use attention, a query that sees such a key gives NaN to
    all rows. Of rows with equal scores, NaN included, the first stay.

    Raises:
        ParameterError: budget, ratio and threshold are all None, or both budget and ratio are
            given; one is out of its range; or `budget` is below `sinks` + `recent`.
        DtypeError: an argument is no number.
    """

    budget: int | None = None
    ratio: float | None = None
    threshold: float | None = None
    sinks: int = 0
    recent: int = 0

    per_head: ClassVar[bool] = True  # KV heads choose rows separately; else once for a layer
    needs: ClassVar[str] = ""  # the argument of `evict` that it scores by
    looks_ahead: ClassVar[bool] = False  # whether it also needs `rotary`

    def __post_init__(self) -> None:
        op = type(self).__name__
        hold_python_numbers(self)
        if self.budget is None and self.ratio is None and self.threshold is None:
            raise ParameterError(
                f"{op}: budget, ratio and threshold are None, expected one of them, such as "
                f"budget=512, as a text '{op.lower()}:512'"
            )
        if self.budget is not None and self.ratio is not None:
            raise ParameterError(f"{op}: budget and ratio are given, expected one of them")
        for name in _ALWAYS:
            check_whole(op, name, getattr(self, name), 0, _MOST)
        if self.budget is not None:
            check_whole(op, "budget", self.budget, 1, _MOST)
            if self.budget < self.always:
                raise ParameterError(
                    f"{op}: budget is {self.budget}, expected at least the {self.always} of sinks "
                    "and recent rows"
                )
        if self.ratio is not None and not 0 < check_number(op, "ratio", self.ratio) <= 1:
            raise ParameterError(f"{op}: ratio is {self.ratio}, expected more than 0, at most 1")
        if self.threshold is not None:
            check_number(op, "threshold", self.threshold)

    @property
    def last(self) -> int:
        """How many last rows always stay."""
        return self.recent

    @property
    def always(self) -> int:
        """How many rows always stay."""
        return self.sinks + self.last

    @property
    def asked(self) -> int:
        """How many of the last queries it uses."""
        return getattr(self, "window", 1) if self.needs == "queries" else 0

    def counts(self, lengths: Any) -> Any:
        """The most rows that stay, int32, of heads that hold `lengths` rows."""
        if self.budget is not None:
            return np.minimum(lengths, self.budget).astype(np.int32)
        if self.ratio is None:
            return lengths.astype(np.int32)
        kept = np.ceil(_share_of(lengths, self.ratio))
        return np.clip(kept, np.minimum(max(self.always, 1), lengths), lengths).astype(np.int32)

    def score(self, rows: Rows) -> Any:
        """The scores of `rows`, [B, n, C] float32; larger is better."""
        raise NotImplementedError


class Streaming(Policy):
    """StreamingLLM: the first `sinks` rows and the last ones. The budget defaults to `sinks` +
    `recent`.

    Args, Raises: as `Policy`.

    >>> pykv.eviction.Streaming(sinks=4, recent=508).budget
    512
    """

    def __post_init__(self) -> None:
        sizes = [check_whole("Streaming", x, getattr(self, x), 0, _MOST) for x in _ALWAYS]
        if self.budget is None and self.ratio is None and self.recent:
            object.__setattr__(self, "budget", sum(sizes))
        super().__post_init__()

    def score(self, rows: Rows) -> Any:
        """The slot: later rows score higher.

        Raises:
            UnsupportedError: there are more slots than float32 represents.
        """
        if rows.capacity > _MOST_SLOTS:
            raise UnsupportedError(
                f"Streaming: page_table has {rows.capacity} slots, expected at most {_MOST_SLOTS}"
            )
        slots = np.arange(rows.capacity, dtype=np.float32)
        return rows.send(np.broadcast_to(slots, (rows.B, rows.n, rows.capacity)))


@dataclass(frozen=True, kw_only=True)
class Random(Policy):
    """Random rows; the baseline of other policies.

    Args:
        seed: of the scores; the others as of `Policy`.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("Random", "seed", self.seed, 0)

    def score(self, rows: Rows) -> Any:
        """Random numbers; equal for equal seed, layer and sizes."""
        rng = np.random.default_rng([self.seed, rows.layer, rows.first])
        return rows.send(rng.random((rows.B, rows.n, rows.capacity), np.float32))


class KeyNorm(Policy):
    """Keys of the smallest Euclidean norm. A baseline, not a recommendation: it fails where others
    do not, as on prompts whose answer is in a single passage.

    Args, Raises: as `Policy`.
    """

    def score(self, rows: Rows) -> Any:
        """-|k| of the rows' keys."""
        return -rows.of_keys("norm")


class Largest(Policy):
    """Keys of the largest magnitude; with a `threshold`, those above it.

    Args, Raises: as `Policy`.
    """

    def score(self, rows: Rows) -> Any:
        """max |k| of the rows' keys."""
        return rows.of_keys("largest")


class KeyDiff(Policy):
    """Keys with the smallest cosine to the mean direction of all finite keys.

    Args, Raises: as `Policy`.
    """

    def score(self, rows: Rows) -> Any:
        """-cosine(k, mean of all rows' k / |k|)."""
        means = kv_scores.means(**rows.keys, run=_RUN, normalize=True)[:, 0]
        of_run = rows.lengths[:, None] - np.arange(means.shape[1]) * _RUN
        counts = rows.send(np.clip(of_run, 0, _RUN).astype(np.float32))
        return -rows.of_keys("cosine", vectors=(means * counts[..., None]).sum(1)[:, None])


class Scores(Policy):
    """Rows by the `scores` that `evict` is given.

    Args, Raises: as `Policy`.
    """

    needs = "scores"

    def score(self, rows: Rows) -> Any:
        """The scores that were given for `rows`."""
        return rows.given


@dataclass(frozen=True, kw_only=True)
class H2O(Scores):
    """Heavy hitters: rows with the most attention from all queries so far, and recent rows, which
    had no time to collect any.

    `scores` come from `attention_mass`, or `attention_scores.score(..., accumulate=True)`, summed
    over all calls. After an eviction move them along with their rows by `Evicted.moved`.

    Args, Raises: as `Policy`.
    """

    recent: int = 64


@dataclass(frozen=True, kw_only=True)
class TOVA(Policy):
    """Rows with the most attention from the last query, on average over heads; all heads of a layer
    keep the same rows.

    Args, Raises: as `Policy`.
    """

    per_head = False
    needs = "queries"

    def score(self, rows: Rows) -> Any:
        """The attention of the last query."""
        return rows.mass(1)


@dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    """Rows with the most attention from the last `window` queries, after max-pooling over
    neighbours. The rows of these queries always stay.

    Args:
        window: how many of the last `queries` are used; if there are fewer, all.
        pooling: odd number of rows in a max-pooling window. The others as of `Policy`.
    """

    window: int = 16
    pooling: int = 7

    needs = "queries"

    def __post_init__(self) -> None:
        hold_python_numbers(self)
        check_whole("SnapKV", "window", self.window, 1, _MOST)
        if check_whole("SnapKV", "pooling", self.pooling, 1) % 2 == 0:
            raise ParameterError(f"SnapKV: pooling is {self.pooling}, expected an odd number")
        super().__post_init__()

    @property
    def last(self) -> int:
        return max(self.recent, self.window)

    def score(self, rows: Rows) -> Any:
        """Max-pooled attention of the window's queries."""
        mass = rows.mass(self.window)
        # The window's own rows stay anyway; pooling must not spread their scores to others.
        slots, ends = np.arange(rows.capacity), (rows.lengths - self.window)[:, None]
        mass = mass * rows.send((slots < ends).astype(np.float32).reshape(rows.B, rows.n, -1))
        best = mass.copy()
        for step in range(1, min(self.pooling // 2, rows.capacity - 1) + 1):
            for to, of in ((slice(step, None), slice(-step)), (slice(-step), slice(step, None))):
                best[..., to] = rows.xp.maximum(best[..., to], mass[..., of])
        return best


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Policy):
    """Rows by the attention expected from future queries, times the norms of their values.

    Future queries are modelled as normal, with the mean and the covariance of the last `window`
    queries before their rotation, times the mean rotation of the next `future` positions. For such
    a q the expectation of exp(q.k) is exp(mean.k + k.covariance.k / 2). A row's share is this
    divided by the sum over all rows but the sinks; its score is |v| * (share + `epsilon`). A large
    `epsilon` lets norms decide alone; with 0, rows without expected attention go whatever their
    values.

    Args:
        window: how many of the last `queries` are used; if there are fewer, all.
        future: how many positions after the last one.
        epsilon: at least 0. The others as of `Policy`.
    """

    sinks: int = 4
    window: int = 128
    future: int = 512
    epsilon: float = 0.02

    needs = "queries"
    looks_ahead = True

    def __post_init__(self) -> None:
        op = "ExpectedAttention"
        hold_python_numbers(self)
        check_whole(op, "window", self.window, 1, _MOST)
        check_whole(op, "future", self.future, 1, _MOST_AHEAD)
        check_number(op, "epsilon", self.epsilon, least=0)
        super().__post_init__()

    def score(self, rows: Rows) -> Any:
        """(softmax(mean.k + k.covariance.k / 2), on average over query heads, + epsilon) * |v|."""
        xp = rows.xp
        queries = rows.queries[:, -self.window :].astype(np.float32) * np.float32(rows.scale)
        queries = ahead(queries, rows.layer, rows.rotary, self.future)
        # Ignore queries at positions before the sequence begins.
        T, none = queries.shape[1], np.float32(0)
        is_query = rows.send(np.arange(T) >= T - rows.lengths[:, None])[:, :, None, None]
        counts = np.clip(rows.lengths, 1, T)[:, None, None]
        mean = xp.where(is_query, queries, none).sum(1) / rows.send(counts.astype(np.float32))
        # k.covariance.k / 2 is half the mean of (k . (query - mean))^2 over the queries.
        roots = rows.send(np.sqrt(0.5 / counts[..., None]).astype(np.float32))
        factors = xp.where(is_query, queries - mean[:, None], none).swapaxes(1, 2) * roots
        given = dict(vectors=mean, factors=xp.ascontiguousarray(factors))
        found = kv_scores.score(**rows.keys, measure="squares", **given)
        slots = np.arange(rows.capacity)
        is_there = (slots >= self.sinks) & (slots < rows.lengths[:, None])
        # Clip values beyond float32; NaN, such as inf - inf, gets no share.
        found = xp.where(found == found, xp.clip(found, -_FAR, _FAR), np.float32(-np.inf))
        found = xp.where(rows.send(is_there)[:, None], found, np.float32(-np.inf))
        peak = xp.maximum(found.max(-1)[..., None], -_FAR)
        shares = xp.exp(found - peak)
        shares = (shares / xp.maximum(shares.sum(-1)[..., None], np.float32(1e-30))).mean(1)
        norms = kv_scores.score(**rows.values, measure="norm")[:, 0]
        return ((shares + np.float32(self.epsilon)) * norms).reshape(rows.B, rows.n, -1)


@dataclass(frozen=True)
class AdaKV:
    """One budget for all heads of a layer: rows compete across heads, by the scores of another
    policy.

    Args:
        policy: gives scores, budget, sinks and recent rows; its heads must choose separately.
        floor: the share of its own budget that each head keeps in any case, from 0 to 1; to
            thousandths of rows, as `ratio`, but rounded down.

    Raises:
        ParameterError: `floor` is out of its range, or all heads of `policy` keep the same rows.
        DtypeError: an argument has another type.
    """

    policy: Policy
    floor: float = 0.2

    def __post_init__(self) -> None:
        hold_python_numbers(self)
        check_type("AdaKV", "policy", self.policy, Policy, "a policy")
        if not self.policy.per_head:
            given = type(self.policy).__name__
            raise ParameterError(f"AdaKV: policy is {given}, expected one whose heads may differ")
        if not 0 <= check_number("AdaKV", "floor", self.floor) <= 1:
            raise ParameterError(f"AdaKV: floor is {self.floor}, expected 0 to 1")

    def floors(self, budgets: Any) -> Any:
        """The rows that heads with these `budgets` keep in any case, int32."""
        return np.floor(_share_of(budgets, self.floor)).astype(np.int32)


def base_of(policy: Policy | AdaKV) -> Policy:
    """The policy that gives scores and budget: that of an AdaKV, or the policy itself.

    >>> pykv.eviction.policies.base_of(pykv.eviction.parse("adakv:random:8")).budget
    8
    """
    return policy.policy if isinstance(policy, AdaKV) else policy


def as_policy(op: str, given: Any, name: str = "policy") -> Policy | AdaKV:
    """The policy `given` as such or as its text; `op` and `name` are for messages.

    Raises:
        ParameterError: as `parse`.
        DtypeError: it is neither.
    """
    policy = parse(given) if isinstance(given, str) else given
    check_type(op, name, policy, Policy | AdaKV, "a policy of pykv.eviction or its text")
    return policy


POLICIES: dict[str, type[Policy]] = {
    policy.__name__.lower(): policy
    for policy in (
        *(Streaming, H2O, TOVA, SnapKV, KeyDiff, ExpectedAttention),
        *(KeyNorm, Largest, Scores, Random),
    )
}


def parse(text: str) -> Policy | AdaKV:
    """Parse a policy: its name, then, each after a colon, a budget (a ratio if it has a decimal
    point) and fields as name=value; the prefix "adakv:" makes it an AdaKV.

    Raises:
        ParameterError: the name or a field is unknown, or a value is out of its range.
        DtypeError: `text` is no text.

    >>> pykv.eviction.parse("snapkv:512:window=32")
    SnapKV(budget=512, ratio=None, threshold=None, sinks=0, recent=0, window=32, pooling=7)
    >>> pykv.eviction.parse("adakv:keydiff:0.5").policy.ratio
    0.5
    """
    op = "eviction.parse"
    check_type(op, "text", text, str, "one such as 'snapkv:512'")
    name, *words = text.split(":")
    if name == "adakv":
        return AdaKV(parse(":".join(words)))  # type: ignore[arg-type]  # refuses another AdaKV
    if name not in POLICIES:
        known = ", ".join((*POLICIES, "adakv"))
        raise ParameterError(
            f"{op}: text {quoted(text)} has no policy {quoted(name)}, expected one of {known}"
            + meant(name, (*POLICIES, "adakv"))
        )
    kind = POLICIES[name]
    given: dict[str, Any] = {}
    for word in words:
        field, is_field, value = word.rpartition("=")
        field = field if is_field else "ratio" if "." in value else "budget"
        if field not in {x.name for x in fields(kind)} or field in given:
            expected = ", ".join(x.name for x in fields(kind))
            raise ParameterError(
                f"{op}: text {quoted(text)} has {quoted(word)}, expected each once of {expected}"
            )
        given[field] = number_of(value) if field in _FRACTIONS else whole_of(value, -_MOST)
        if given[field] is None:
            raise ParameterError(f"{op}: text {quoted(text)} has {quoted(word)}, expected a number")
    return kind(**given)
