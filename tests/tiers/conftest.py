"""Tiers on whatever disk the tests run on."""

import pytest

from pykv.tiers import disk


@pytest.fixture(autouse=True)
def no_floor(monkeypatch):
    """A disk that is nearly full will do."""
    monkeypatch.setattr(disk, "FLOOR", 0)
