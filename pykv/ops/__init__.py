"""One module for each operation: checks, NumPy reference and kernel launch.

Dimension letters, here and in kernels_cu: L layers, B sequences, T tokens, S context length,
HQ query heads, H KV heads, G = HQ / H, D head size, N pages, P tokens a page, M pages a sequence at
most, E features of a token, V vocabulary.
"""
