"""Which lists of pages are sequences of a manager: those that it handed out, known by identity, as
a copy may name pages that have gone to others since."""

from __future__ import annotations

from typing import Any

from pykv.blocks.states import PageStates
from pykv.errors import ParameterError
from pykv.options import check_type


class Sequences:
    """The sequences on the pages of `states`.

    Attributes:
        held: those that hold pages, by identity.
        whole: of each sequence with evicted rows, by identity: how many pages come before them.
    """

    def __init__(self, states: PageStates):
        self._states = states
        self.held: dict[int, list[int]] = {}
        self.whole: dict[int, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy and pickle: sequences as they are, for identities of the copies."""
        whole = [self.whole.get(i) for i in self.held]
        return vars(self) | dict(held=list(self.held.values()), whole=whole)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.held = {id(pages): pages for pages in state["held"]}
        pairs = zip(state["held"], state["whole"], strict=True)
        self.whole = {id(pages): n for pages, n in pairs if n is not None}

    def add(self, pages: list[int]) -> None:
        """Note a sequence, unless it has no pages yet."""
        if pages:
            self.held[id(pages)] = pages

    def drop(self, pages: list[int]) -> None:
        """Forget a sequence, which must be done before its list is emptied."""
        self.held.pop(id(pages), None)
        self.whole.pop(id(pages), None)

    def first_moved(self, pages: list[int]) -> int | None:
        """The place of the first page from which rows of some sequence were evicted, or None."""
        if not self.whole:
            return None
        moved = {page for i, n in list(self.whole.items()) for page in self.held.get(i, [])[n:]}
        return next((i for i, page in enumerate(pages) if page in moved), None)

    def check(self, op: str, pages: list[int], first: int = 0, name: str = "pages") -> None:
        """Check that a list is a sequence, or empty as a new one, and its pages from `first` on."""
        is_known = self.held.get(id(pages), self) is pages
        if not is_known or first < len(pages):
            self.check_held(op, pages, first, name)
        if not is_known and pages:
            raise ParameterError(
                f"BlockManager.{op}: {name} are {pages} in another list, expected the list that "
                "the manager handed out, which may name other pages by now"
            )

    def check_held(self, op: str, pages: list[int], first: int = 0, name: str = "pages") -> None:
        """Check that pages from `first` on are distinct and in use."""
        counts = self._states.counts
        check_type(f"BlockManager.{op}", name, pages, list, "a list of pages")
        some = pages[first:]
        for page in some:
            if not (type(page) is int and 0 <= page < len(counts) and counts[page]):
                break
        else:
            if len(some) < 2 or len(set(some)) == len(some):
                return
        raise ParameterError(
            f"BlockManager.{op}: {name} are {pages}, expected distinct pages in use"
        )
