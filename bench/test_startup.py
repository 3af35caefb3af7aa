"""The time from the start of `python -m cramfast.pretrain` to its first update, by preset and state of the caches."""

import pytest

from .startup import COLD, WARM, StartupWork

WORKS = [StartupWork(preset, cache) for preset in ("cramfast-small", "crammed-bert") for cache in (COLD, WARM)]


@pytest.mark.parametrize("work", WORKS, ids=lambda work: f"{work.preset}-{work.cache}")
def test_startup(startup_measured, work):
    startup_measured(work)
