"""Pages of a sequence through a codec: in host memory, and in files."""

import numpy as np
import pytest

from pykv import PagedKVCache, page_files, pages
from pykv.errors import DtypeError, FormatError, ParameterError
from pykv.kvtc import Codec, parse
from tests.helpers import to_numpy
from tests.kvtc import made
from tests.kvtc.made import D, H, L, P

N = 14  # tokens, in four pages


@pytest.fixture
def artefact(rng):
    return made.artefact(rng)


def other(xp, spec="fp16"):
    return PagedKVCache(L, 6, H, D, page_size=P, spec=spec, xp=xp)


def direct(codec, cache, ids, hadamard=False, **how):
    """What the codec makes of the tokens, in pages 1, 2, 4, 5 of another cache."""
    target = other(codec._xp, **how)
    coded = codec.compress(cache, ids, range(N))
    codec.decompress(coded, target, [1, 2, 4, 5], hadamard=hadamard)
    return target, coded.to_bytes()


def test_swapped_tokens_are_those_of_the_codec(xp, rng, artefact):
    cache, table, *_ = made.sequence(rng, xp, artefact, N)
    ids, codec = to_numpy(table).tolist(), Codec(artefact, 4, xp)
    want, stream = direct(codec, cache, ids)
    store = pages.swap_out(cache, ids, codec=codec, tokens=N)
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()
    assert isinstance(store.data, np.ndarray) and store.to_bytes() == stream
    back = other(xp)
    pages.swap_in(back, [1, 2, 4, 5], store, codec=codec)
    for a, b in ((back.k, want.k), (back.v, want.v)):
        np.testing.assert_array_equal(to_numpy(a), to_numpy(b))


def test_a_file_is_a_stream(xp, rng, artefact, tmp_path):
    cache, table, *_ = made.sequence(rng, xp, artefact, N)
    ids, codec, path = to_numpy(table).tolist(), Codec(artefact, 4, xp), tmp_path / "tokens"
    want, stream = direct(codec, cache, ids, spec="int8", hadamard=True)
    page_files.save(path, cache, ids, codec=codec, tokens=N)
    assert path.read_bytes() == stream and parse(stream).header.tokens == N
    back = other(xp, "int8")
    where = [1, 2, 4, 5, 0]  # a page more
    assert page_files.load(path, back, where, codec=codec, hadamard=True) == 4
    np.testing.assert_array_equal(to_numpy(back.k), to_numpy(want.k))
    np.testing.assert_array_equal(to_numpy(back.v_scales), to_numpy(want.v_scales))


def test_what_does_not_fit_is_refused(rng, artefact, tmp_path):
    cache, table, *_ = made.sequence(rng, np, artefact, N)
    ids, codec, path = table.tolist(), Codec(artefact, 4), tmp_path / "tokens"
    page_files.save(path, cache, ids, codec=codec, tokens=N)
    back, damaged = other(np), tmp_path / "damaged"
    damaged.write_bytes(path.read_bytes()[:-1])
    plain = tmp_path / "plain"
    page_files.save(plain, cache)
    for at, text in ((damaged, "damaged: stream.parse: stream has bytes"), (plain, "has magic")):
        with pytest.raises(FormatError, match=text):
            page_files.load(at, back, [0, 1, 2, 3], codec=codec)
    with pytest.raises(FormatError, match="coded has artefact="):
        foreign = Codec(made.artefact(np.random.default_rng(3)), 4)
        page_files.load(path, back, [0, 1, 2, 3], codec=foreign)
    with pytest.raises(FormatError, match="no file of pages"):
        page_files.load(path, back, [0, 1, 2, 3])
    with pytest.raises(ParameterError, match="coded has 14 tokens, expected at most the 12"):
        page_files.load(path, back, [0, 1, 2], codec=codec)
    twice = r": pages\[{}\] is {}, expected no page twice"
    for at, by in ((path, codec), (plain, None)):
        with pytest.raises(ParameterError, match="load" + twice.format(2, 1)):
            page_files.load(at, back, [0, 1, 1, 2], codec=by)
    for by in (codec, None):
        with pytest.raises(ParameterError, match="swap_in" + twice.format(1, 3)):
            pages.swap_in(back, [3, 3], pages.swap_out(cache, ids, codec=by), codec=by)
    for how, text in (
        (dict(tokens=3), "tokens is given, expected none without a codec"),
        (dict(hadamard=True), "hadamard is given, expected none without a codec"),
        (dict(codec=codec, model="mine"), "model is 'mine', expected none with a codec"),
        (dict(codec=codec, tokens=17), "tokens is 17, expected 0 to 16"),
    ):
        with pytest.raises(ParameterError, match=text):
            page_files.save(path, cache, ids, **how)
    with pytest.raises(DtypeError, match="codec is a str, expected a pykv.kvtc.Codec"):
        pages.swap_out(cache, ids, codec="kvtc")
    assert not back.k.any()
