"""The choice of forms keeps its limit and is as good as trying everything, but for a step."""

from __future__ import annotations

import itertools
import random

import pytest

from svdquant_nodes.svdquant.quantizer.budget import Form, hull, loss, size, within_loss, within_size

CASES = range(40)


def make_units(seed):
    """Up to four units of up to five forms each, more bytes not always repairing more."""
    draw = random.Random(seed)
    return [
        [Form(draw.randint(1, 60), draw.random() * draw.choice((1, 10))) for _ in range(draw.randint(1, 5))]
        for _ in range(draw.randint(1, 4))
    ]


def every_choice(units):
    return list(itertools.product(*units))


def largest_step(units):
    """What the best single step along a unit's hull repairs at most."""
    lines = [hull(unit) for unit in units]
    return max((a.loss - b.loss for line in lines for a, b in zip(line, line[1:], strict=False)), default=0.0)


@pytest.mark.parametrize("seed", CASES)
def test_within_a_size_as_good_as_trying_everything_but_for_a_step(seed):
    units = make_units(seed)
    tried = every_choice(units)
    for limit in range(min(map(size, tried)), max(map(size, tried)) + 1, 7):
        found = within_size(units, limit)
        best = min(loss(choice) for choice in tried if size(choice) <= limit)
        assert size(found) <= limit
        assert all(form in unit for form, unit in zip(found, units, strict=True))
        assert best - 1e-9 <= loss(found) <= best + largest_step(units) + 1e-9


@pytest.mark.parametrize("seed", CASES)
def test_at_a_size_that_its_own_steps_hit_the_choice_is_the_best_there_is(seed):
    """Everett's theorem: of all that are no larger, the forms that one price of a byte chooses lose the least."""
    units = make_units(seed)
    tried = every_choice(units)
    for slope in (0.0, 0.01, 0.1, 1.0):
        limit = size([min(hull(unit), key=lambda f: f.loss + slope * f.nbytes) for unit in units])
        best = min(loss(choice) for choice in tried if size(choice) <= limit)
        assert loss(within_size(units, limit)) == pytest.approx(best)


@pytest.mark.parametrize("seed", CASES)
def test_within_a_loss_nearly_as_small_as_trying_everything(seed):
    units = make_units(seed)
    tried = every_choice(units)
    largest = max(form.nbytes for unit in units for form in unit)
    for limit in (min(map(loss, tried)), *(loss(choice) for choice in tried[::9])):
        found = within_loss(units, limit + 1e-9)
        best = min(size(choice) for choice in tried if loss(choice) <= limit + 1e-9)
        assert loss(found) <= limit + 2e-9
        assert best <= size(found) <= best + largest


def test_enough_bytes_lose_the_least():
    units = make_units(3)
    sizes = range(min(map(size, every_choice(units))), 260, 5)
    losses = [loss(within_size(units, limit)) for limit in sizes]
    assert losses[-1] == pytest.approx(sum(min(f.loss for f in unit) for unit in units))
    assert losses[-1] <= losses[0]


def test_a_hull_bends_one_way_and_drops_forms_that_are_beaten():
    forms = [Form(10, 9.0), Form(20, 8.9), Form(30, 3.0), Form(30, 4.0), Form(40, 5.0), Form(50, 2.5)]
    assert [f.nbytes for f in hull(forms)] == [10, 30, 50]


def test_limits_that_nothing_keeps():
    units = [[Form(10, 2.0), Form(20, 1.0)], [Form(5, 1.0)]]
    with pytest.raises(ValueError, match=r"size: expected at least 15 bytes, got 14"):
        within_size(units, 14)
    with pytest.raises(ValueError, match=r"error: expected a limit that some choice of forms keeps"):
        within_loss(units, 1.9)


def test_what_no_step_can_use_goes_to_a_form_inside_the_hull():
    """20 bytes are not enough for the one step there is, from 10 to 21, but for the form beside it."""
    unit = [Form(10, 10.0), Form(20, 9.0), Form(21, 0.0)]
    assert [f.nbytes for f in hull(unit)] == [10, 21]
    assert [f.nbytes for f in within_size([unit], 20)] == [20]
    assert [f.nbytes for f in within_loss([unit], 9.5)] == [20]
