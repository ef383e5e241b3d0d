"""Judges and inputs: what `pykv verify`, `pykv bench` and the tests hold the ops against.

    compare    how results are compared: bit for bit, or within a bound against float64
    codes      how rows are encoded and decoded, from hand-worked tables of codes
    paged      caches of every kind for small cases, with poison where nothing may be read
    caches     caches of every kind for benchmarks, filled on the device
    blocks     blocks of GGUF types
    kvtc       streams of KVTC, code by code
    attention  float64 oracles of attention
    oracles    float64 oracles of all other ops

A judge is never the thing judged. No oracle imports an op, and nothing here encodes or decodes
with pykv.kinds, from which only the names and fields of a `KVSpec` come. An oracle is written from
the definition in the op's docstring: plain loops over tokens and heads. For blocks of GGUF files
the package gguf is the authority, and pykv.verify.dequant calls it itself.

How to add an oracle: write a function of NumPy arrays with a parameter `dtype`, in which all its
arithmetic is done; inputs are cast to it first. In float64 it is the oracle. In float32 it is the
measure of what rounding costs, from which `compare.judged` makes the bound. Neither run touches the
op, so a fault of the op shows on every machine: on a CPU the op's `reference` is what is judged.
What moves or encodes is exact, and takes no `dtype`: it returns the very bits that are expected.
tests/test_testing.py holds oracles to hand-worked values; pykv.verify says how a family of cases
uses them.
"""

from pykv.testing.compare import (
    error_and_bound,
    host,
    is_by_definition,
    is_close,
    judged,
    judged_states,
    wrong_values,
)

__all__ = [
    "error_and_bound",
    "host",
    "is_by_definition",
    "is_close",
    "judged",
    "judged_states",
    "wrong_values",
]
