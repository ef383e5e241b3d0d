"""Oracles of all ops but attention, token by token and head by head.

Dimensions: T tokens, H heads, D head size, F rotated pairs of a head, B sequences or requests, V
vocabulary. Functions with a parameter `dtype` do all arithmetic in it; the others are exact.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

# --- Arithmetic -----------------------------------------------------------------------------------


def total(terms: Any) -> Any:
    """The sum along the first axis, one term after the other: of the orders in which kernels add,
    the one that errs most, so that a float32 run measures what any of them may cost."""
    if terms.ndim == 1:
        return np.add.accumulate(terms)[-1]
    return np.ascontiguousarray(terms).sum(0)  # NumPy adds whole rows, in order


def rms_norm(x: Any, weight: Any, eps: float, offset: float, dtype: Any) -> Any:
    """x [..., D] scaled to unit root mean square, times weight + offset."""
    rows = x.reshape(-1, x.shape[-1]).astype(dtype)
    factors = weight.astype(dtype) + dtype(offset)
    out = np.empty_like(rows)
    for i, row in enumerate(rows):
        out[i] = row / np.sqrt(total(row * row) / dtype(len(row)) + dtype(eps)) * factors
    return out.reshape(x.shape)


def rope(x: Any, positions: Any, inv_freq: Any, pairing: str, dtype: Any) -> Any:
    """Heads x [T, H, D] with pair j turned by positions[t] * inv_freq[j], as complex numbers."""
    out = x.astype(dtype)
    for t, head in np.ndindex(x.shape[:2]):
        for j, frequency in enumerate(inv_freq):
            a, b = (2 * j, 2 * j + 1) if pairing == "adjacent" else (j, j + len(inv_freq))
            angle = float(positions[t]) * float(frequency)
            cosine, sine = dtype(math.cos(angle)), dtype(math.sin(angle))
            first, second = out[t, head, a], out[t, head, b]
            out[t, head, a] = first * cosine - second * sine
            out[t, head, b] = second * cosine + first * sine
    return out


def llama3_frequencies(dim: int, base: float, factor: float) -> Any:
    """Radians per position [dim / 2], scaled as Llama 3.1's: by wavelength, in a context of 8192
    tokens with low_freq_factor 1 and high_freq_factor 4."""
    found = []
    for j in range(dim // 2):
        frequency = base ** (-2 * j / dim)
        wavelength = 2 * math.pi / frequency
        if wavelength > 8192:
            frequency /= factor
        elif wavelength > 8192 / 4:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            frequency = (1 - smooth) * frequency / factor + smooth * frequency
        found.append(frequency)
    return np.array(found)


def frequencies(dim: int, base: float, factor: float, divisors: Any) -> Any:
    """Radians per position [dim / 2], those of all positions divided by `factor` and by
    `divisors`."""
    return np.array([base ** (-2 * j / dim) / factor / divisors[j] for j in range(dim // 2)])


def yarn_frequencies(dim: int, base: float, factor: float, context: int) -> Any:
    """Radians per position [dim / 2], scaled as YaRN's with 32 and 1 turns in `context` tokens:
    kept up to the last whole j of 32 turns or more, divided from the first of 1 turn or fewer."""
    turns = [context * base ** (-2 * j / dim) / (2 * math.pi) for j in range(dim)]
    low = max((j for j in range(dim) if turns[j] >= 32), default=0)
    high = min((j for j in range(dim) if turns[j] <= 1), default=dim - 1)
    found = []
    for j in range(dim // 2):
        share = 0.0 if j <= low else 1.0 if j >= high else (j - low) / (high - low)
        frequency = base ** (-2 * j / dim)
        found.append(frequency * (1 - share) + frequency / factor * share)
    return np.array(found)


def hadamard(x: Any, dtype: Any) -> Any:
    """x [..., D] mixed by sums and differences at distances 1, 2, 4 ... below the largest power of
    two that divides D. The order of these sums is part of the op's definition."""
    D = x.shape[-1]
    size = next(n for n in (2**i for i in range(20, -1, -1)) if D % n == 0)
    out, distance = x.astype(dtype), 1
    while distance < size:
        for i in range(D):
            if i // distance % 2 == 0:
                a, b = out[..., i].copy(), out[..., i + distance].copy()
                out[..., i], out[..., i + distance] = a + b, a - b
        distance *= 2
    return out * dtype(1 / math.sqrt(size))


def swiglu(x: Any, dtype: Any) -> Any:
    """gate / (1 + exp(-gate)) * up of x [T, 2F] = [gate | up]."""
    gate, up = (half.astype(dtype) for half in np.split(x, 2, axis=-1))
    return gate / (dtype(1) + np.exp(-gate)) * up


def geglu(x: Any, dtype: Any) -> Any:
    """gelu(gate) * up of x [T, 2F] = [gate | up], by the tanh approximation."""
    gate, up = (half.astype(dtype) for half in np.split(x, 2, axis=-1))
    inner = dtype(math.sqrt(2 / math.pi)) * (gate + dtype(0.044715) * gate * gate * gate)
    return dtype(0.5) * gate * (dtype(1) + np.tanh(inner)) * up


def linear(x: Any, w: Any, bias: Any, dtype: Any) -> Any:
    """x [T, I] times w [O, I] plus bias [O], one product after the other."""
    x, w, bias = (a.astype(dtype) for a in (x, w, bias))
    return np.stack([total(row[:, None] * w.T) + bias for row in x])


# --- Exact ----------------------------------------------------------------------------------------


def page_table(indices: Any, indptr: Any, last: Any, page_size: int, width: int) -> tuple[Any, Any]:
    """The table [B, width] of requests whose pages are listed, and their lengths [B]."""
    rows, lengths = [], []
    for b in range(len(last)):
        pages = indices[indptr[b] : indptr[b + 1]].tolist()
        rows.append(pages + [-1] * (width - len(pages)))
        length = (len(pages) - 1) * page_size + int(last[b]) if pages else 0
        lengths.append(max(length, 0))
    return np.array(rows, np.int32), np.array(lengths, np.int32)


def sums_of_tiles(x: Any, count: int, tile: int) -> Any:
    """Entry g is the sum, modulo 2^32, of the tiles g, g + count, ... of the words x."""
    words, sums = x.reshape(-1), [0] * count
    for i, first in enumerate(range(0, len(words), tile)):
        sums[i % count] += sum(words[first : first + tile].tolist())
    return np.array([total % 2**32 for total in sums], np.uint32)


# --- Sampling -------------------------------------------------------------------------------------


def argmax(logits: Any) -> Any:
    """The first index [B] of each row's largest logit that is a number; -1 where none is, and where
    it is infinite."""
    found = []
    for row in logits.tolist():
        numbers = [i for i, x in enumerate(row) if not math.isnan(x)]
        best = max(numbers, key=lambda i: row[i], default=-1)
        found.append(best if best >= 0 and math.isfinite(row[best]) else -1)
    return np.array(found, np.int32)


def random_fraction(seed: int, step: int) -> float:
    """Output step + 1 of splitmix64, whose state begins as the hash of the seed, as a fraction."""
    return _splitmix(_splitmix(seed) + (step + 1) * 0x9E3779B97F4A7C15) / 2**64


def _splitmix(z: int) -> int:
    z %= 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def distance_from_draw(
    token: int,
    logits: Any,
    random: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> tuple[float, float]:
    """How far a random fraction lies outside the token's share of 0 ... 1, and how far it may.

    Kept tokens share 0 ... 1 by their probabilities, in the order of their indices. A draw computes
    a probability from a float32 difference and product, which err by 2^-22 of the distance from
    the largest logit, and from a level of 2^-26 halvings.
    """
    below = (float(logits.max()) - logits.astype(np.float64)) / temperature  # in nats
    weights = np.exp(-below)
    kept = [i for i in np.argsort(below, kind="stable").tolist() if weights[i] >= min_p]
    if top_k:
        kept = kept[:top_k]
    if top_p < 1:
        goal, mass, prefix = top_p * weights[kept].sum(), 0.0, 0
        while mass < goal and prefix < len(kept):
            mass += weights[kept[prefix]]
            prefix += 1
        kept = kept[:prefix]
    if token not in kept:
        return 1.0, 0.0
    kept.sort()
    shares = weights[kept] / weights[kept].sum()
    place = kept.index(token)
    first = float(shares[:place].sum())
    end = first + float(shares[place])
    bound = 2 * float(shares @ (below[kept] * 2.0**-22 + 2.0**-25))
    return max(first - random, random - end, 0.0), bound


def adjusted_logits(
    logits: Any, dtype: Any, prompts: Any, answers: Any, penalties: Any, biases: Any, masks: Any
) -> Any:
    """Rows of logits [B, V] after penalties, biases and masks, one token at a time.

    Args:
        logits: [B, V] float32.
        dtype: what is computed in.
        prompts, answers: a list of token ids for each row, or None: no penalties.
        penalties: (repetition, presence, frequency) of each row.
        biases: a dict of tokens and what is added for each row.
        masks: the set of tokens that are allowed of each row, or None: all.
    """
    out = logits.astype(dtype)
    for b, row in enumerate(out):
        repetition, presence, frequency = (dtype(x) for x in penalties[b])
        for i in range(len(row)):
            if prompts[b] is not None:
                if i in prompts[b] or i in answers[b]:
                    row[i] = row[i] / repetition if row[i] > 0 else row[i] * repetition
                if i in answers[b]:
                    row[i] -= presence + frequency * dtype(answers[b].count(i))
            if i in biases[b]:
                row[i] += dtype(biases[b][i])
            if masks[b] is not None and i not in masks[b]:
                row[i] = -np.inf
    return out


def logprobs(logits: Any, dtype: Any) -> Any:
    """The log-softmax of each row [B, V], of which NaN count as -inf."""
    x = np.where(np.isnan(logits), -np.inf, logits).astype(dtype)
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def likeliest(row: Any, count: int) -> list[int]:
    """The tokens of the largest logits above -inf, the lowest first among equals."""
    known = [i for i, x in enumerate(row.tolist()) if x > -math.inf]
    return sorted(known, key=lambda i: (-row[i], i))[:count]


def exceeding(x: Any, threshold: float, mode: str) -> tuple[Any, Any]:
    """The elements of x whose magnitude exceeds a threshold ("gt"), or is no less ("ge"), and where
    they stand, as int32."""
    numbers = [abs(number) for number in x.astype(np.float64).tolist()]
    kept = [i for i, a in enumerate(numbers) if a > threshold or (mode == "ge" and a == threshold)]
    return x[kept], np.array(kept, np.int32)


def packed_codes(x: Any, steps: Any, widths: Any) -> Any:
    """A row of coefficients [C] as the bytes of one large integer: codes of 8, 7, ..., 1 bits, as
    many as `widths` says, each floor(x / step) within its bits, counted from the lowest one. Of 32
    in sequence at least one is not 0; if one of their coefficients is not finite, all are 0."""
    number = shift = at = 0
    for bits, count in zip(range(8, 0, -1), widths, strict=True):
        half = 2 ** (bits - 1)
        for first in range(at, at + count, 32):
            levels = [0] * 32
            if all(map(math.isfinite, x[first : first + 32])):
                for i, c in enumerate(range(first, first + 32)):
                    quotient = float(np.float32(x[c]) / np.float32(steps[c]))
                    levels[i] = math.floor(max(-half, min(quotient, half - 1))) + half
                levels[0] += not any(levels)
            for level in levels:
                number |= level << shift
                shift += bits
        at += count
    return np.frombuffer(number.to_bytes(shift // 8, "little"), np.uint8)


def middles(packed: Any, steps: Any, widths: Any, dtype: Any) -> Any:
    """The coefficients [C] of such bytes: the middle of each code's interval."""
    number = int.from_bytes(packed.tobytes(), "little")
    out: list[Any] = []
    for bits, count in zip(range(8, 0, -1), widths, strict=True):
        for i in range(count):
            if i % 32 == 0:
                is_nan = number % 2 ** (32 * bits) == 0
            code = number % 2**bits - 2 ** (bits - 1)
            middle = (dtype(code) + dtype(0.5)) * dtype(steps[len(out)])
            out.append(dtype("nan") if is_nan else middle)
            number >>= bits
    return np.array(out, dtype)
