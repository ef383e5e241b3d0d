"""Policies: what rows of a cache are worth, and how many stay.

Dimensions: as in pykv/eviction; n heads, that is B * n sequences of one head.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np

from pykv.errors import ParameterError, UnsupportedError
from pykv.eviction.parts import Rows
from pykv.eviction.rotary import ahead
from pykv.number_texts import number_of, whole_of
from pykv.ops import kv_scores
from pykv.options import check_number, check_type, check_whole, hold_python_numbers
from pykv.terminal import meant

_RUN = 512  # rows that KeyDiff averages in one sum
_MOST = 2**31 - 1
_MOST_SLOTS = 2**24  # float32 represents all whole numbers up to here
_ALWAYS = ("sinks", "recent")  # fields: rows that always stay
_FRACTIONS = ("ratio", "threshold", "epsilon")  # fields that are no whole numbers
_FAR = np.float32(1e38)  # bound of logits, so that float32 holds their differences
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
        budget: rows that each head of a sequence keeps at most.
        ratio: or the share of its rows, above 0 and at most 1, rounded up. Less than half a
            thousandth of a row adds none: .55 of 100 rows are 55, though the float is above .55.
        threshold: only rows are kept whose score is above it, sinks and recent ones aside.
        sinks, recent: first and last rows that always stay.

    A row that is worth NaN goes first, as one whose key is NaN does, which changes the worth of no
    other: but to policies that look at attention, where the query that sees it gives NaN to all.
    Of rows that are worth the same, as all of these, the first stay.

    Raises:
        ParameterError: there is neither budget nor ratio nor threshold, or both of the first; one
            is out of its range; or `budget` is below `sinks` + `recent`.
        DtypeError: an argument is no number.
    """

    budget: int | None = None
    ratio: float | None = None
    threshold: float | None = None
    sinks: int = 0
    recent: int = 0

    per_head: ClassVar[bool] = True  # each KV head keeps rows of its own; else all of a layer agree
    needs: ClassVar[str] = ""  # name of the argument of `evict` that it scores by
    looks_ahead: ClassVar[bool] = False  # it needs `rotary` as well

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
        """The last rows that always stay."""
        return self.recent

    @property
    def always(self) -> int:
        """Rows that always stay."""
        return self.sinks + self.last

    @property
    def asked(self) -> int:
        """The last queries that are looked at."""
        return getattr(self, "window", 1) if self.needs == "queries" else 0

    def counts(self, lengths: Any) -> Any:
        """Of heads that hold `lengths` rows how many stay at most, int32."""
        if self.budget is not None:
            return np.minimum(lengths, self.budget).astype(np.int32)
        if self.ratio is None:
            return lengths.astype(np.int32)
        kept = np.ceil(_share_of(lengths, self.ratio))
        return np.clip(kept, np.minimum(max(self.always, 1), lengths), lengths).astype(np.int32)

    def score(self, rows: Rows) -> Any:
        """What `rows` are worth, [B, n, C] float32 of n heads; larger is better."""
        raise NotImplementedError


class Streaming(Policy):
    """The first `sinks` rows and the last ones: StreamingLLM. Without a budget, `recent` of them.

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
        """Slots: the last rows are worth most.

        Raises:
            UnsupportedError: there are more than float32 tells apart.
        """
        if rows.capacity > _MOST_SLOTS:
            raise UnsupportedError(
                f"Streaming: page_table has {rows.capacity} slots, expected at most {_MOST_SLOTS}"
            )
        slots = np.arange(rows.capacity, dtype=np.float32)
        return rows.send(np.broadcast_to(slots, (rows.B, rows.n, rows.capacity)))


@dataclass(frozen=True, kw_only=True)
class Random(Policy):
    """Any rows; what a policy must be better than.

    Args:
        seed: of the numbers that rows get; the others as of `Policy`.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("Random", "seed", self.seed, 0)

    def score(self, rows: Rows) -> Any:
        """The same numbers for the same seed, layer and sizes."""
        rng = np.random.default_rng([self.seed, rows.layer, rows.first])
        return rows.send(rng.random((rows.B, rows.n, rows.capacity), np.float32))


class KeyNorm(Policy):
    """Keys of the smallest Euclidean norm. It fails where others do not, as on prompts whose
    answer is a single passage: a baseline to be warned by, no advice.

    Args, Raises: as `Policy`.
    """

    def score(self, rows: Rows) -> Any:
        """-|k| of the rows' keys."""
        return -rows.of_keys("norm")


class Largest(Policy):
    """Keys by their largest magnitude, with a `threshold` those above it.

    Args, Raises: as `Policy`.
    """

    def score(self, rows: Rows) -> Any:
        """max |k| of the rows' keys."""
        return rows.of_keys("largest")


class KeyDiff(Policy):
    """Keys that differ most, by their cosine, from the mean direction of all that are finite.

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
        """What was given for the rows."""
        return rows.given


@dataclass(frozen=True, kw_only=True)
class H2O(Scores):
    """Heavy hitters: rows by the attention that they got from all queries so far, and recent ones,
    which had no time to get any.

    `scores` are those of `attention_mass`, or of `attention_scores.score(..., accumulate=True)`,
    call for call. Rows that move take theirs along: see `Evicted.moved`.

    Args, Raises: as `Policy`.
    """

    recent: int = 64


@dataclass(frozen=True, kw_only=True)
class TOVA(Policy):
    """Rows by the attention that the last query gave them, on average over the heads: all heads of
    a layer keep the same.

    Args, Raises: as `Policy`.
    """

    per_head = False
    needs = "queries"

    def score(self, rows: Rows) -> Any:
        """The mass that rows got from the last query."""
        return rows.mass(1)


@dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    """Rows by the attention that the last `window` queries gave them and their neighbours. These
    queries' own rows always stay.

    Args:
        window: of `queries`, that are asked; where there are fewer, all are.
        pooling: rows, an odd number, of which each counts as the best. The others as of `Policy`.
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
        """The largest mass of `pooling` neighbours."""
        mass = rows.mass(self.window)
        # The window's rows stay anyway; pooling must not spread what they gave each other.
        slots, ends = np.arange(rows.capacity), (rows.lengths - self.window)[:, None]
        mass = mass * rows.send((slots < ends).astype(np.float32).reshape(rows.B, rows.n, -1))
        best = mass.copy()
        for step in range(1, min(self.pooling // 2, rows.capacity - 1) + 1):
            for to, of in ((slice(step, None), slice(-step)), (slice(-step), slice(step, None))):
                best[..., to] = rows.xp.maximum(best[..., to], mass[..., of])
        return best


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Policy):
    """Rows by the attention that queries to come are expected to give them, and by the norms of
    their values.

    Queries to come are taken to be normal, with the mean and the covariance of the last `window`
    ones before their rotation, rotated as the next `future` positions do on average: exp(q.k) of
    such a q is exp(mean.k + k.covariance.k / 2) on average. A row is worth |v| times its share of
    that among all rows but the sinks, plus `epsilon`: where that is far above a share, norms decide
    alone, and where it is 0, rows that nobody is expected to see go whatever they hold.

    Args:
        window: of `queries`, that are looked at; where there are fewer, all are.
        future: positions behind the last one.
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
        # Queries before a sequence begins are none, whatever they hold.
        T, none = queries.shape[1], np.float32(0)
        is_query = rows.send(np.arange(T) >= T - rows.lengths[:, None])[:, :, None, None]
        counts = np.clip(rows.lengths, 1, T)[:, None, None]
        mean = xp.where(is_query, queries, none).sum(1) / rows.send(counts.astype(np.float32))
        # k.covariance.k / 2 is a sum of squares: of k times each query's deviation from the mean.
        roots = rows.send(np.sqrt(0.5 / counts[..., None]).astype(np.float32))
        factors = xp.where(is_query, queries - mean[:, None], none).swapaxes(1, 2) * roots
        given = dict(vectors=mean, factors=xp.ascontiguousarray(factors))
        found = kv_scores.score(**rows.keys, measure="squares", **given)
        slots = np.arange(rows.capacity)
        is_there = (slots >= self.sinks) & (slots < rows.lengths[:, None])
        # Beyond float32 all are worth as much; NaN, as of two infinities, is worth nothing.
        found = xp.where(found == found, xp.clip(found, -_FAR, _FAR), np.float32(-np.inf))
        found = xp.where(rows.send(is_there)[:, None], found, np.float32(-np.inf))
        peak = xp.maximum(found.max(-1)[..., None], -_FAR)
        shares = xp.exp(found - peak)
        shares = (shares / xp.maximum(shares.sum(-1)[..., None], np.float32(1e-30))).mean(1)
        norms = kv_scores.score(**rows.values, measure="norm")[:, 0]
        return ((shares + np.float32(self.epsilon)) * norms).reshape(rows.B, rows.n, -1)


@dataclass(frozen=True)
class AdaKV:
    """The heads of a layer share their budget: rows compete across heads, by the scores of another
    policy.

    Args:
        policy: whose scores, budget, sinks and recent rows these are; each head keeps rows of its
            own.
        floor: the share of its budget that each head keeps in any case, from 0 to 1; of rows to
            thousandths, as a `ratio`, but rounded down.

    Raises:
        ParameterError: `floor` is out of its range, or heads of the policy keep the same rows.
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
        """Of heads with such `budgets` how many rows each keeps in any case, int32."""
        return np.floor(_share_of(budgets, self.floor)).astype(np.int32)


def base_of(policy: Policy | AdaKV) -> Policy:
    """The policy whose scores and budget these are.

    >>> pykv.eviction.policies.base_of(pykv.eviction.parse("adakv:random:8")).budget
    8
    """
    return policy.policy if isinstance(policy, AdaKV) else policy


def as_policy(op: str, given: Any, name: str = "policy") -> Policy | AdaKV:
    """The policy that is given as such or as its text; `op` and `name` are for messages.

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
    """The policy that a text names: a name, then after colons a budget, or a ratio with a point in
    it, and fields of the policy; "adakv:" before it lets heads share.

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
            f"{op}: text {text!r:.80} has no policy {name!r:.80}, expected one of {known}"
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
                f"{op}: text {text!r:.80} has {word!r:.80}, expected each once of {expected}"
            )
        given[field] = number_of(value) if field in _FRACTIONS else whole_of(value, -_MOST)
        if given[field] is None:
            raise ParameterError(f"{op}: text {text!r:.80} has {word!r:.80}, expected a number")
    return kind(**given)
