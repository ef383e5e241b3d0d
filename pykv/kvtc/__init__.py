"""KVTC: caches of keys and values as coefficients of a basis, which a few bits each store.

    v0         the operations and the stream of NVIDIA Dynamo's kvbm-kernels: rows of blocks
    stream_v0  that stream: ranges of coefficients, sizes, headers

Source: K. Staniszewski and A. Łańcucki, "KV Cache Transform Coding for Compact Storage in LLM
Inference", ICLR 2026.
"""
