"""Options of a test that are tried in pairs by default, in every combination with --all."""

import itertools

import pytest


def parametrize_pairs(**choices):
    """pytest.mark.parametrize over the product of `choices`, of which all are thorough but some in which every two
    values meet: what goes wrong with three at once, and with no two of them, is rare."""
    every = [*itertools.product(*(range(len(values)) for values in choices.values()))]
    pairs = {places: {*itertools.combinations(enumerate(places), 2)} for places in every}
    missing, kept = set().union(*pairs.values()), set()
    while missing:
        best = max(every, key=lambda places: len(pairs[places] & missing))
        kept.add(best)
        missing -= pairs[best]
    cases = [
        pytest.param(
            *(values[place] for values, place in zip(choices.values(), places, strict=True)),
            marks=() if places in kept else pytest.mark.thorough,
        )
        for places in every
    ]
    return pytest.mark.parametrize([*choices], cases)
