"""bench model: a decode step of a tiny model, and that its check can fail."""

from argparse import Namespace

import numpy as np
import pytest

from pykv.bench import model
from tests.helpers import assert_same_bits, to_numpy, without_simt
from tests.llm import tiny


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    found = tmp_path_factory.mktemp("tiny") / "llama.gguf"
    tiny.write(found, "llama")
    return str(found)


@without_simt
@pytest.mark.parametrize("kv", ["fp16", "int8"])
def test_a_step_is_checked_on_the_host(xp, rng, path, kv):
    """Right after a step; not before one, and not with another layer's weights."""
    work = model.make(dict(model=path, B=3, L=20, kv=kv), xp, rng)
    assert not work.check()
    work.run()
    assert work.check()
    weights = model._load(path, xp, kv == "int8").layers[1].down
    kept = to_numpy(weights).copy()
    weights *= 4
    work.run()
    if xp is not np:
        assert not work.check()
    weights[...] = xp.asarray(kept)
    work.run()
    assert work.check()


def test_bytes_by_hand(rng, path):
    """2 layers of 64 columns: Q, K and V of 4 + 2 + 2 heads of 16, O of 64, gate and up of 96, and
    down; a head of V rows. Then 3 x 20 tokens of 2 layers, K and V, 2 heads of 16 + 2 bytes."""
    work = model.make(dict(model=path, B=3, L=20, kv="int8"), np, rng)
    rows = np.dtype(np.float32).itemsize  # the host's matrices
    vocab = len(model._load(path, np, True).head)
    matrices = 2 * (128 * 64 + 64 * 64 + 192 * 64 + 64 * 96) + vocab * 64
    assert work.bytes == rows * matrices + 3 * 20 * 2 * 2 * 2 * (16 + 2)


def test_options_and_the_closing_line():
    cases = model.select(Namespace(quick=False, model="m.gguf"))
    assert len(cases) == 18 and {case["model"] for case in cases} == {"m.gguf"}
    case = dict(model="m", B=16, L=512, kv="fp8")
    record = dict(bench="model", ok=True, case=case, median=2000.0)
    assert model.conclude([record, {**record, "ok": False}]) == (
        "m, 16 x 512 tokens, fp8: 8000 tokens/s, 2.00 ms a step"
    )


@pytest.mark.parametrize("kv", ["fp16", "int8", "e4m3", "int4"])
def test_a_step_on_the_host_keeps_the_rows_that_are_there(rng, kv):
    """A new row near to the one that is there is passed over; another one is seen, and passed over
    all the same."""
    cache = model._AsWritten(1, 2, 2, 16, page_size=model.PAGE_SIZE, spec=kv)
    heads = rng.standard_normal((1, 4 + 2 * 2, 16)).astype(np.float32)
    slots = np.array([17], np.int32)
    super(model._AsWritten, cache).append_qkv(0, heads.reshape(1, -1), slots)
    kept = [x.copy() for x in cache._paged()]
    for factor, least, most in ((1 + 2**-10, 0, model.ROW_TOLERANCE), (-1, 1.5, 2.5)):
        given = heads * np.float32(factor)
        q = cache.append_qkv(0, given.reshape(1, -1), slots)
        assert_same_bits(q, given[:, :4])
        assert least <= cache.off <= most
        for x, y in zip(cache._paged(), kept, strict=True):
            assert_same_bits(x, y)
