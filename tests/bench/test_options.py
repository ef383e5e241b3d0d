"""Options that choose cases: own shapes of every benchmark that has them, and --case."""

from argparse import ArgumentParser

import numpy as np
import pytest

from pykv import bench
from pykv.bench import options
from pykv.errors import ParameterError
from tests.bench.test_paged import check_case
from tests.helpers import without_simt

# Of each benchmark: options, and a case that they make, by hand.
SHAPES = {
    "decode": (
        "--batch 3 --keys 50 --heads 10/2 --dim 24 --page 8 --kv int8 --dtype fp16",
        dict(B=3, L=50, HQ=10, H=2, D=24, P=8, kv="int8", dtype="fp16"),
    ),
    "evict": (
        "--batch 3 --keys 50 --heads 10/2 --dim 24 --page 8 --kv fp16 --dtype fp32",
        dict(job="score", B=3, L=50, HQ=10, H=2, D=24, P=8, kv="fp16", dtype="fp32", keep=0.25),
    ),
    "prefill": (
        "--batch 3 --keys 20 --queries 7 --heads 4/2 --dim 24 --page 8 --kv int8",
        dict(B=3, L=20, Q=7, HQ=4, H=2, D=24, P=8, kv="int8", dtype="bf16"),
    ),
    "append": (
        "--tokens 9 --heads 3 --dim 24 --page 8 --kv int4",
        dict(tokens=9, H=3, D=24, P=8, kv="int4", dtype="fp16", N=23),
    ),
    "gather": (
        "--pages 9 --heads 3 --dim 24 --page 8 --kv int8 --dtype bf16",
        dict(op="rows", pages=9, H=3, D=24, P=8, kv="int8", dtype="bf16"),
    ),
    "convert": (
        "--pages 9 --heads 3 --dim 24 --page 8 --kv int8 --to fp16:HND",
        dict(pages=9, H=3, D=24, P=8, kv="int8", to="fp16:HND"),
    ),
    "pages": (
        "--layers 3 --pages 9 --heads 3 --dim 24 --page 8 --kv k8v4",
        dict(op="zero", L=3, pages=9, H=3, D=24, P=8, kv="k8v4"),
    ),
    "compaction": (
        "--elements 900 --keep 0.25 --dtype fp16",
        dict(op="indices", n=900, keep=0.25, dtype="fp16", by="pykv"),
    ),
    "elastic": (
        "--batch 3 --seq 50 --heads 4/2 --dim 24 --kv int8 --compress 3 --inference "
        "--decode-tokens 2",
        dict(what="cycle", B=3, L=50, HQ=4, H=2, D=24, kv="int8", keep=0.3333, steps=2),
    ),
    "kvtc_codec": (
        "--tokens 9 --layers 3 --kv int8",
        dict(op="gather", kv="int8", tokens=9, L=3, H=2, D=32, r=32),
    ),
    "calls": (
        "--batch 3 --keys 50 --heads 10/2 --dim 24 --page 8 --kv int8",
        dict(job="decode", how="plan", B=3, L=50, HQ=10, H=2, D=24, P=8, kv="int8"),
    ),
}


def cases(name, text):
    """What the command's options choose among the quick cases."""
    module, parser = bench.load(name), ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    options.add_arguments(parser, module)
    words = [word.replace("~", " ") for word in text.split()]
    return options.select(name, module, parser.parse_args(["--quick", *words]))


def test_every_benchmark_with_shapes_is_here():
    listed = {name for name in bench.names() if hasattr(bench.load(name), "OPTIONS")}
    assert listed == {*SHAPES, "model", "persistent"}  # the last two check the call themselves


@without_simt
@pytest.mark.parametrize("name", SHAPES)
def test_own_shapes_are_measured_as_the_listed_ones_are(xp, rng, name):
    """A case is as by hand, and its check fails before the call and holds after it."""
    text, want = SHAPES[name]
    made = cases(name, text)
    assert want in made
    for case in made:
        check_case(xp, rng, bench.load(name), case)


def test_query_heads_make_the_fused_append(rng):
    (case,) = cases("append", "--heads 6/2 --tokens 5 --kv int8")
    assert (case["op"], case["HQ"], case["H"], case["tokens"]) == ("qkv", 6, 2, 5)
    work = bench.load("append").make(case, np, rng)
    work.run()
    assert work.check()


def test_lists_make_every_combination_and_the_rest_is_of_the_first_case():
    made = cases("decode", "--batch 1,5 --kv int8,bf16:HND")
    assert [(case["B"], case["kv"]) for case in made] == [
        *((1, "int8"), (1, "bf16:HND"), (5, "int8"), (5, "bf16:HND"))
    ]
    first = bench.load("decode").QUICK[0]
    assert all({**case, "B": first["B"], "kv": first["kv"]} == first for case in made)


def test_the_ceiling_of_prompts_is_measured_once_beside_own_shapes():
    made = cases("prefill", "--keys 3,4")
    assert ["matmul" in case for case in made] == [True, False, False]


def test_a_scatter_needs_scales_of_rows():
    ops = {case["op"] for case in cases("gather", "--kv int8:head")}
    assert ops == {"gather", "rows"}


def test_case_keeps_what_fits():
    every = cases("decode", "")
    assert every == bench.load("decode").QUICK
    assert cases("decode", "--case kv=int8~B=2") == [c for c in every if c["kv"] == "int8"]
    either = cases("decode", "--case kv=int8 --case kv=int4")
    assert [case["kv"] for case in either] == ["int8", "int4"]
    assert cases("decode", "--keys 3,4 --case L=4")[0]["L"] == 4


@pytest.mark.parametrize("text", ["kv=int8~B=3", "nothing=1", "int8", "kv=int"])
def test_case_that_fits_nothing_lists_what_there_is(text):
    with pytest.raises(ParameterError, match="fits no case, expected values of HQ=4 H=2 .* kv=bf1"):
        cases("decode", f"--case {text}")
