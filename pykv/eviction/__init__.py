"""Eviction: drop the rows of a paged cache that attention needs least, and free their pages.

Dimensions: L layers, B sequences, H KV heads, HQ query heads, G = HQ / H, T queries of a sequence,
D head size, P tokens a page, M pages a sequence at most, C = M * P slots.

`evict` has three steps for each layer, all on the device:

    score     a number for each row, larger is better: `kv_scores`, `attention_scores`, or yours
    select    the best rows within a budget, ties by position: `kv_select`
    compact   moves kept rows to the front slots, in place, with their scales: `kv_compact`

Then slot j of a head holds the j-th row that it keeps, and pages behind the longest head of all
layers go back to the `BlockManager`. Shared and published pages are copied instead of written.

Attention needs no new kernel. Keys are stored rotated, so rows keep their positions. If all heads
keep equally many rows, as with a budget for each head, page table, slots and `decode` are those of
a dense cache with smaller lengths, whichever rows a head keeps. If lengths differ between heads (a
threshold, `AdaKV`), each KV head becomes a sequence of its own: strides turn a pool of H heads into
a pool of more pages with one head, and [B, H] lengths into B * H sequences of G query heads, for
the same kernels. `decode` and `append` here do that.

`decode_blocks` evicts nothing: by page tables of its own it attends to the recent rows of a
sequence, and to the blocks whose mean keys fit a query best.

Sliding windows and ALiBi need distances, which slots do not give after an eviction: pass `decode`
the `positions` that `evict` returns.

Sources: StreamingLLM (2023), H2O (2023), TOVA (2024), SnapKV (2024), keys of small norm (Devoto et
al. 2024), Ada-KV (2024), KeyDiff (2025), expected attention (2025); NVIDIA's kvpress for formulas.
"""

from pykv.eviction.block_selection import BlockSelection, block_means, decode_blocks
from pykv.eviction.heads import append, attention_mass, decode
from pykv.eviction.policies import (
    H2O,
    POLICIES,
    TOVA,
    AdaKV,
    ExpectedAttention,
    KeyDiff,
    KeyNorm,
    Largest,
    Policy,
    Random,
    Scores,
    SnapKV,
    Streaming,
    parse,
)
from pykv.eviction.rotary import Rotary
from pykv.eviction.steps import Evicted, evict

__all__ = [
    "H2O",
    "POLICIES",
    "TOVA",
    "AdaKV",
    "BlockSelection",
    "Evicted",
    "ExpectedAttention",
    "KeyDiff",
    "KeyNorm",
    "Largest",
    "Policy",
    "Random",
    "Rotary",
    "Scores",
    "SnapKV",
    "Streaming",
    "append",
    "attention_mass",
    "block_means",
    "decode",
    "decode_blocks",
    "evict",
    "parse",
]
