"""What waits for what on a GPU, of whose streams a made-up one keeps account: the SIMT machine, on
which all is done when a call returns, cannot see an order that nobody asked for."""

from types import SimpleNamespace

import numpy as np
import pytest

from pykv.tiers import moves, rows
from pykv.tiers.moves import Moved, Moves
from tests.tiers.made import World


class Stream:
    """Knows all work that is over before what is enqueued next."""

    within = []

    def __init__(self, non_blocking=False):
        self.past = frozenset()

    def __enter__(self):
        Stream.within.append(self)

    def __exit__(self, *error):
        Stream.within.pop()

    def wait_event(self, event):
        self.past |= event.past


class Event:
    def __init__(self):
        self.past = frozenset()

    def record(self, stream):
        self.past = stream.past


class Form:
    """Notes pieces of work on the current stream: what it does, in which piece of rows of the
    device, and all that is over before."""

    nbytes = 8

    def __init__(self):
        self.done = []

    def view(self, rows, cache):
        return "rows"

    def staging(self, cache, count):
        piece = object()
        return piece, piece

    def _note(self, name, memory):
        stream = Stream.within[-1]
        self.done.append((name, memory, stream.past))
        stream.past |= {len(self.done) - 1}

    def put(self, source, target, *places):
        self._note("put", target)

    def take(self, source, target, *places):
        self._note("take", source)

    def over_link(self, way, source, target, *places):
        self._note(*{"d2h": ("down", source), "h2d": ("up", target)}[way])


@pytest.fixture
def form(monkeypatch):
    """That of `made`, on a compute stream."""
    compute = Stream()
    monkeypatch.setattr(Stream, "within", [compute])
    cuda = SimpleNamespace(Stream=Stream, Event=Event, get_current_stream=lambda: Stream.within[-1])
    monkeypatch.setattr(moves, "load_cupy", lambda: SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(moves, "on_gpu", lambda x: True)
    form = Form()
    monkeypatch.setattr(moves, "_over_link", form.over_link)
    return form


def made(form):
    return Moves(SimpleNamespace(k=None), form, np.empty((8, 8), np.uint8))


def before(form, name, of):
    """Which works of a name are over before those of another, as (of, name) by their count each."""
    at = {x: [i for i, done in enumerate(form.done) if done[0] == x] for x in (name, of)}
    return [
        (n, m) for n, i in enumerate(at[of]) for m, j in enumerate(at[name]) if j in form.done[i][2]
    ]


def test_pieces_take_turns(form):
    """None is written to before it was copied from; each copy comes behind what filled it."""
    each = made(form)
    for n in range(4):
        each.out([n], [n], [0])
    assert {(n, n) for n in range(4)} <= {*before(form, "put", "down")}
    assert {(2, 0), (3, 1)} <= {*before(form, "down", "put")}
    for n in range(4):
        each.back([n], [n], [0])
    assert {(n, n) for n in range(4)} <= {*before(form, "up", "take")}
    assert {(2, 0), (3, 1)} <= {*before(form, "take", "up")}
    for name in ("down", "up"):
        used = [memory for done, memory, _ in form.done if done == name]
        assert used[0] == used[2] != used[1] == used[3]


def test_rows_and_pages_are_read_when_they_are_whole(form):
    """Rows behind the copies that filled them; pages are written to behind what read them last, and
    the compute stream goes on meanwhile, until it joins."""
    each = made(form)
    each.out([0], [0], [0])
    form._note("step", None)  # of the model
    moved = each.back([0], [0], [0])
    assert (0, 0) in before(form, "down", "up") and (0, 0) in before(form, "step", "take")
    each.out([1], [1], [0])
    assert not before(form, "up", "put") and not before(form, "take", "put")
    moved.join()
    each.out([2], [2], [0])
    assert (2, 0) in before(form, "take", "put")
    assert each.outs().end.past >= {i for i, done in enumerate(form.done) if done[0] == "down"}


def test_a_codec_has_one_workspace(form, monkeypatch):
    """Nothing is coded while pages are decoded, nor the other way round."""
    monkeypatch.setattr(moves, "CodedForm", Form)
    each = made(form)
    each.back([0], [0], [0])
    each.out([1], [1], [0])
    each.back([2], [2], [0])
    assert (0, 0) in before(form, "take", "put") and (1, 0) in before(form, "put", "take")


def test_rows_are_given_up_once_no_copy_reads_them(monkeypatch):
    """The next page that falls takes them."""
    order, tiers = [], World(host="1KB").tiers
    (each,) = tiers._rows
    monkeypatch.setattr(each.moves, "wait", lambda: order.append("waited"))
    monkeypatch.setattr(each.host, "clear", lambda: order.append("cleared"))
    tiers.clear_host()
    assert order == ["waited", "cleared"]


def test_threads_wait_for_the_link():
    """A row is written to a file behind the copy that filled it, and read into behind what was
    copied there before."""
    order = []
    each = rows.Rows.__new__(rows.Rows)
    each.form = form = SimpleNamespace(
        heads_shape=(1, 8), to_heads=lambda row: row, from_heads=lambda heads, row: None
    )
    each.file_form, each.places, each._exact_pages = form, [0], 0
    each.host = SimpleNamespace(rows=np.empty((1, 8), np.uint8))
    moved = Moved(0.0, None, SimpleNamespace(synchronize=lambda: order.append("waited")))
    files = SimpleNamespace(
        write=lambda *given: order.append("written"), read=lambda *given: order.append("read")
    )
    each.write(files, b"key", 0, moved)
    each.read(files, b"key", 0, 0, moved)
    assert order == ["waited", "written", "waited", "read"]
