"""Eviction: a paged cache that keeps the rows it needs, and gives the pages of the others back.

Dimensions: L layers, B sequences, H KV heads, HQ query heads, G = HQ / H, T queries of a sequence,
D head size, P tokens a page, M pages a sequence at most, C = M * P slots.

`evict` does, for each layer, three things on the device:

    score     a number for each row, what it is worth: `kv_scores`, `attention_scores`, yours
    select    the best rows within a budget, ties by position: `kv_select`
    compact   kept rows move to the front slots, in place, with their scales: `kv_compact`

Then slot j of a head holds the j-th row that it keeps, and pages behind the longest head of all
layers go back to the `BlockManager`. Pages that others hold, or find by their tokens, are copied
where rows move, and never written.

Attention needs nothing new. Keys were rotated before they were stored, so rows know their
positions and are not renumbered. Where all heads keep as many rows, as with a budget for each head,
page table, slots and `decode` are those of a dense cache with other lengths, whichever rows a head
keeps. Where lengths differ between heads (a threshold, `AdaKV`), each KV head is a sequence of its
own: a pool of H heads is, by its strides, a pool of more pages with one head, and [B, H] lengths
are B * H sequences of G query heads for the same kernels. `decode` and `append` here do that.

`decode_blocks` evicts nothing: it attends to the blocks of a sequence whose mean keys suit a query
best, and to its recent rows, by page tables of its own.

Windows and ALiBi ask for distances, which slots no longer tell: there `decode` is given the
`positions` that `evict` returns.

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
