"""A persistent decode loop: one launch computes many tokens of a few sequences, and the host reads
them while it runs.

Dimensions: T rows, each of a sequence or free; M pages a sequence at most; E tokens that end a
sequence. Kernel: kernels_cu/resident_program.cu. Messages: programs/host_rings.py; commands of the
host: programs/resident_commands.py.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pykv import cuda, interrupts
from pykv.arrays import like, on_gpu
from pykv.errors import DeviceError, ParameterError, UnsupportedError
from pykv.ops import phase_program
from pykv.options import check_number, check_whole
from pykv.programs import resident_commands
from pykv.programs.draw_phases import Adjust, Logprobs
from pykv.programs.host_rings import SLOTS, Pinned, RingKernel, State
from pykv.programs.phases import Attention, Embed
from pykv.programs.resident_commands import Command
from pykv.programs.resident_tokens import (
    Drawn,
    Inputs,
    Why,
    check_inputs,
    of_word,
    reference,
    with_logprobs,
)

MOST_TOKENS = SLOTS  # granted and not taken: all results fit into the ring, so a launch never waits
ENDS = resident_commands.MOST_ENDS
_MOST_SECONDS = 3600.0
_LOOKS = 64  # polls of the ring between two of the kernel's stream, which take longer

# One program, which draws; phase_program has the other variants of these phases.
VARIANTS: list[dict[str, Any]] = [phase_program.VARIANTS[-2] | dict(RING_SLOTS=SLOTS, DRAWS=1)]
VARIANTS_SMS = range(0)  # none at import: compiled by the first program of its kinds


class Counts(NamedTuple):
    """Launches, tokens that the host has taken, and how often launches ended in each state."""

    launches: int
    tokens: int
    ends: dict[State, int]


class ResidentProgram:
    """Runs the phases of a token repeatedly in one launch, which draws tokens, ends sequences and
    writes the inputs of the next token without the host. Meanwhile other sequences may start in
    rows whose sequences have ended.

    Args:
        phases: of one token, see PhaseProgram. They read `inputs`, and an Argmax or a Draw writes
            `peaks`. With a Logprobs, results have log probabilities.
        inputs: of T sequences, 1 to 8.
        page_size: tokens of a page.
        blocks: of the launch at most; None: as many as the GPU runs at once and have work.
        silence: seconds without a method call after which a launch ends at the next token. Nothing
            is lost: launch again.

    Raises:
        As PhaseProgram of `phases`, and ShapeError, DtypeError, DeviceError of `inputs`.
        ParameterError: `page_size` or `silence` is out of its range, pools have pages of another
            size, a phase writes an input other than `peaks`, or none writes `peaks`.
        UnsupportedError: the vocabulary has more than 2^24 tokens.

    A launch never waits for the host. It draws a bounded number of tokens, which `extend` raises
    while it runs; the ring has room for all results; a missing page ends it. Later work on the
    stream that was current in `launch` waits for its end. Creating a program on a GPU synchronises
    once. Not thread-safe. With NumPy arrays there is no kernel: tokens are computed when they are
    waited for. The idea of a decode loop on the GPU that is fed by rings is from m40-llm.

    >>> ids, positions, slots, lengths, peaks = np.array([[3], [0], [-1], [1], [0]], np.int32)
    >>> table, x, logits = np.zeros((1, 4), np.int32), np.ones((1, 8), "f4"), np.ones((1, 8), "f4")
    >>> eye, phases = np.eye(8, dtype=np.float16), pykv.programs.phases
    >>> of_token = [phases.Embed(ids, eye, "F16", x)]
    >>> of_token += [phases.Product(x, np.roll(eye, 1, 0), "F16", logits)]
    >>> of_token += [phases.Argmax(logits, peaks)]
    >>> inputs = pykv.programs.resident_tokens.Inputs(ids, positions, slots, lengths, table, peaks)
    >>> program = pykv.ops.resident_program.ResidentProgram(of_token, inputs, page_size=16)
    >>> program.launch(3, limits=[100], ends=[[]])
    >>> [program.take()[0].token for _ in range(3)]
    [4, 5, 6]
    """

    __reduce_ex__ = cuda.refuse_copy

    def __init__(
        self,
        phases: Sequence[Any],
        inputs: Inputs,
        page_size: int,
        *,
        blocks: int | None = None,
        silence: float = 1.0,
    ) -> None:
        self._phases, blocks = phase_program.checked(_OP, phases, blocks)
        self._inputs = inputs
        self._page_size = check_whole(_OP, "page_size", page_size, 1, resident_commands.MOST)
        seconds = check_number(_OP, "silence", silence, positive=True)
        if seconds > _MOST_SECONDS:
            raise ParameterError(
                f"{_OP}: silence is {silence}, expected up to {_MOST_SECONDS} seconds"
            )
        dims = check_inputs(_OP, inputs, self._phases, self._page_size)
        self._T = dims["T"]
        pools = [p.checked(_OP).dims["N"] for p in self._phases if isinstance(p, Attention)]
        self._num_pages = min(pools, default=resident_commands.MOST + 1)
        self._found = next((p.out for p in self._phases if isinstance(p, Logprobs)), None)
        self._results: deque[list[Drawn]] = deque()
        self._runs, self._state = False, State.OVER
        self._launches = self._tokens = 0
        self._ends: Counter[State] = Counter()
        self._number = self._command = 1  # numbers of the next result and command
        self._epochs = [0] * self._T  # of the sequence started last in each row
        self._busy = set(range(self._T))  # rows that are not known to be free
        self._kernel: RingKernel | None = None
        if on_gpu(inputs.ids):
            self._prepare(dims, blocks, seconds)

    def _prepare(self, dims: dict[str, int], blocks: int | None, seconds: float) -> None:
        """Load the kernel and allocate the memory of launches."""
        T = self._T
        packed = phase_program.pack(_OP, self._phases)
        W = 0 if self._found is None else int(self._found.shape[1])
        scalars = dict(T=T, M=dims["M"], P=self._page_size, E=ENDS, W=W, N=dims.get("N", 0))
        scalars |= dict(limit=int(seconds * 1e9))
        self._launch = packed.launch("resident_program", blocks, scalars, RING_SLOTS=SLOTS)
        self._words = like(self._inputs.ids, (T + T * ENDS + 4,), np.int32)  # of a launch
        self._scratch, self._device = packed.scratch, packed.device
        self._arrays = packed.arrays | self._inputs._asdict()
        self._arrays |= dict(
            limits=self._words[:T], ends=self._words[T:-4], control=self._words[-4:].view(np.uint32)
        )
        self._told = Pinned((SLOTS, T, W), np.uint64) if W else None
        self._arrays |= dict(found=self._found, told=self._told and self._told.on_gpu)
        self._kernel = RingKernel(_OP)

    def launch(self, tokens: int, limits: Sequence[int], ends: Sequence[Sequence[int]]) -> None:
        """Start a launch from the present contents of `inputs`. Waits for the current stream.

        Args:
            tokens: of each sequence at most, up to 64.
            limits: total tokens, prompt included, at which each sequence ends.
            ends: tokens that end each sequence, up to 32.

        Raises:
            ParameterError: an argument is out of its range, or there is not one for each sequence.
            DtypeError: `limits` or `ends` has another type.
            DeviceError: a launch has not ended, or its results are not taken.
            UnsupportedError: the call is being prepared or captured.
        """
        cuda.refuse_prepare(_OP, "how many tokens are drawn depends on them")
        cuda.refuse_capture(_OP, "how many tokens are drawn depends on them")
        tokens = check_whole(_OP, "tokens", tokens, 1, MOST_TOKENS)
        told = resident_commands.of_launch(_OP, self._T, limits, ends)
        if self._runs or self._results:
            raise DeviceError(f"{_OP}: a launch is not over, expected all of its results taken")
        self._left, self._limits = tokens, told[: self._T]
        self._ends_of = told[self._T :].reshape(self._T, ENDS)
        self._due = tokens  # results that have not arrived
        self._epochs, self._busy = [0] * self._T, set(range(self._T))
        self._posted = 0  # commands
        if self._kernel is not None:
            phase_program.check_device(_OP, self._device)
            self._launch_kernel(told, tokens)
        self._launches += 1
        self._runs, self._state = True, State.RUNNING

    def _launch_kernel(self, told: np.ndarray, tokens: int) -> None:
        assert self._kernel is not None
        numbers = self._number & 0xFFFFFFFF, self._command & 0xFFFFFFFF
        control = np.array([*numbers, tokens, 0], np.uint32).view(np.int32)
        self._words.set(np.concatenate([told, control]))
        self._kernel.rings.beat()
        self._kernel.launch(self._launch, self._arrays, (self._phases, self._scratch))
        self._kernel.let_current_wait()

    def await_result(self) -> bool:
        """Wait for the next result. False: the launch has ended, and there is none.

        Raises:
            UnsupportedError: the call is being prepared.
            CudaError: the kernel has failed.
        """
        cuda.refuse_prepare(_OP, "tokens follow from each other")
        while not self._results and self._runs:
            self._advance()
        return bool(self._results)

    def take(self) -> list[Drawn]:
        """The next result: a token for each row. Waits for it.

        Raises:
            DeviceError: there is no launch, or it has ended and all its results are taken.
            UnsupportedError: the call is being prepared.
            CudaError: the kernel has failed.
        """
        if not self.await_result():
            raise DeviceError(
                f"{_OP}: the launch has ended, {self._state.name.lower()}, and its results are "
                "taken; expected another"
            )
        drawn = self._results.popleft()
        self._tokens += sum(x.why < Why.TAKEN_BACK for x in drawn)
        return drawn

    def stop(self, row: int) -> None:
        """End a sequence. Once this returns, nothing is written for it any more; earlier results
        that are not taken yet may still have tokens of it.

        Args:
            row: of the sequence.

        Raises:
            ParameterError: there is no such sequence.
            CudaError: the kernel has failed.
        """
        row = check_whole(_OP, "row", row, 0, self._T - 1)
        if not self._runs or row not in self._busy:
            return
        self._tell([resident_commands.STOP, row])
        if self._kernel is None:
            self._busy.discard(row)
        while self._runs and row in self._busy:
            self._advance()

    def start(
        self,
        row: int,
        token: int,
        length: int,
        limit: int,
        *,
        ends: Sequence[int] = (),
        pages: Sequence[int],
        params: Sequence[tuple[int, Sequence[int]]] = (),
    ) -> int:
        """Start a sequence in a free row while the launch runs, as if the launch had begun with it.

        Args:
            row: a row whose sequence has ended, according to a result of this launch.
            token: the last token of the sequence, which the cache does not hold yet; below the
                number of rows of an Embed.
            length: tokens of the sequence, `token` included.
            limit: total tokens, prompt included, at which the sequence ends.
            ends: tokens that end it, up to 32.
            pages: its pages, enough for `length` tokens; they become its row of `page_table`. The
                cache holds all tokens before `token`.
            params: (place, words) sets words of `params` from `place` on, as int32.

        Returns:
            The `epoch` of its results, from 1 on; 0 if the launch is known to have ended. A launch
            that ends before it takes up the sequence gives no result of that epoch; it may have
            written the row's pages and `params`, but no other inputs of the row.

        Raises:
            ParameterError: an argument is out of its range, or the row is not known to be free.
            DtypeError: an argument has another type.
            UnsupportedError: phases have an Adjust, whose tallies and biases no command sets.
            CudaError: the kernel has failed.

        Waits only while the command ring is full: for more than 200 pages, or after many other
        commands.
        """
        row = check_whole(_OP, "row", row, 0, self._T - 1)
        for p in self._phases:
            if isinstance(p, Embed):  # a kernel would read beyond its rows
                token = check_whole(_OP, "token", token, 0, len(p.w) - 1)
        pool, asked = (self._num_pages, self._page_size), (row, token, length, limit)
        of_start = resident_commands.of_start
        commands = of_start(_OP, self._inputs, pool, self._epochs, *asked, ends, pages, params)
        if any(isinstance(p, Adjust) for p in self._phases):
            raise UnsupportedError(f"{_OP}: phases have an Adjust, expected none to start a row")
        if not self._runs:
            return 0
        if row in self._busy:
            raise ParameterError(f"{_OP}: row is {row}, whose sequence goes on, expected another")
        self._epochs[row] += 1  # first: after an interrupt, `stop` still ends the sequence
        self._busy.add(row)
        return self._epochs[row] if all(map(self._tell, commands)) else 0

    def extend(self, tokens: int, pages: Sequence[tuple[int, int, Sequence[int]]] = ()) -> bool:
        """Let the launch draw more tokens.

        Args:
            tokens: of each sequence, beyond those granted so far; at most 64 may be granted and not
                taken.
            pages: (row, place, pages) sets entries of `page_table` from `place` on, which the row's
                sequence has not reached yet.

        Returns:
            Whether the commands were sent: not if the launch is known to have ended, or if the
            command ring has too little room.

        Raises:
            ParameterError: an argument is out of its range, or there is no such row or place.
            DtypeError: an argument has another type.
        """
        room = MOST_TOKENS - self._due - len(self._results) if self._runs else MOST_TOKENS
        tokens = check_whole(_OP, "tokens", tokens, 0, room)
        table = self._inputs.page_table.shape
        commands = resident_commands.of_pages(_OP, pages, table, self._num_pages)
        commands.append([resident_commands.GRANT, tokens])
        if not self._runs or not self._has_room(len(commands)):
            return False
        self._due += tokens  # first: an interrupt must not leave more granted than fits the ring
        for command in commands:
            self._tell(command)
        return True

    def _has_room(self, commands: int) -> bool:
        """Whether the command ring has room for so many."""
        if self._kernel is None:
            return True
        return self._posted - self._kernel.rings.taken() + commands <= SLOTS

    def _tell(self, command: Command) -> bool:
        """Send a command, waiting for room. False: the launch has ended."""
        while self._runs and not self._has_room(1):
            self._advance()
        if not self._runs:
            return False
        if self._kernel is None:
            given = self._inputs, self._page_size, self._limits, self._ends_of
            resident_commands.reference(command, *given)
            self._left += command[1] if command[0] == resident_commands.GRANT else 0
        else:
            number, self._command = self._command, self._command + 1
            self._posted += 1  # first: an interrupt must not let the number be used twice
            self._kernel.rings.beat()
            self._kernel.rings.post(number, [word & 0xFFFFFFFF for word in command])
        return True

    def end(self) -> None:
        """End the launch after the token under way; results that are not taken stay.

        Raises:
            CudaError: the kernel has failed.
        """
        if not self._runs:
            return
        if self._kernel is None:
            self._close(State.ABORTED)
            return
        self._kernel.rings.abort()
        while self._runs:
            self._advance()

    def drop(self) -> None:
        """End the launch, and discard results that are not taken."""
        self.end()
        self._results.clear()

    @property
    def state(self) -> State:
        """How the last launch ended; RUNNING until that is known."""
        return self._state

    def counts(self) -> Counts:
        """Totals so far."""
        return Counts(self._launches, self._tokens, dict(self._ends))

    def _advance(self) -> None:
        """Poll for a result or for the launch's end; on NumPy compute a token."""
        if self._kernel is None:
            self._advance_on_host()
            return
        rings = self._kernel.rings
        rings.beat()
        for _ in range(_LOOKS):
            if self._receive():
                return
        if self._kernel.has_ended():
            try:
                self._kernel.wait()
            finally:
                while self._receive():  # results between the last poll and the end
                    pass
                self._close(rings.state())
        time.sleep(0)  # lets other threads run

    def _receive(self) -> bool:
        """Take a result from the ring. False: none has arrived."""
        assert self._kernel is not None
        words = self._kernel.rings.result(self._number)
        if words is None:
            return False
        self._note_words(words)
        return True

    @interrupts.finished
    def _note_words(self, words: list[int]) -> None:
        drawn = [of_word(word, epoch) for word, epoch in zip(words, self._epochs, strict=False)]
        if self._told is not None:
            found = self._told.host[self._number % SLOTS]
            drawn = with_logprobs(drawn, found.astype(np.uint32).view(np.int32))
        self._number += 1
        self._note(drawn)

    def _note(self, drawn: list[Drawn]) -> None:
        self._results.append(drawn)
        self._due -= 1
        for row, x in enumerate(drawn):
            if x.why != Why.NEXT and x.epoch == self._epochs[row]:
                self._busy.discard(row)

    def _advance_on_host(self) -> None:
        for phase in self._phases:
            phase_program.reference(phase)
        self._follow_on_host()

    @interrupts.finished
    def _follow_on_host(self) -> None:
        self._left -= 1
        drawn = reference(self._inputs, self._page_size, self._limits, self._ends_of)
        drawn = [x._replace(epoch=epoch) for x, epoch in zip(drawn, self._epochs, strict=True)]
        if self._found is not None:
            drawn = with_logprobs(drawn, self._found)
        self._note(drawn)
        whys = {x.why for x in drawn}
        if not whys & {Why.NEXT, Why.OUT_OF_PAGES}:
            self._close(State.OVER)
        elif Why.OUT_OF_PAGES in whys:
            self._close(State.NO_PAGES)
        elif self._left == 0:
            self._close(State.SPENT)

    def _close(self, state: State) -> None:
        self._runs, self._state = False, state
        self._ends[state] += 1


_OP = "resident_program.ResidentProgram"
