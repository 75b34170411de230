"""What waits is what it stands for, to everyone who looks; what hands it on computes nothing."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu, linear

from svdquant_nodes.svdquant.core.deferred import Columns, Deferred, Gelu, beside
from svdquant_nodes.tests import layers

A, B = 8, 16  # columns that there are, and columns that wait


class Recipe:
    """A tensor that counts how often it is made."""

    def __init__(self, value):
        self.value, self.count = value, 0

    def make(self):
        self.count += 1
        return self.value.clone()


@pytest.fixture(autouse=True)
def inference_mode():
    with torch.inference_mode():
        yield


@pytest.fixture
def head():
    return layers.random(2, 5, A, seed=1, dtype=torch.bfloat16)


@pytest.fixture
def recipe():
    return Recipe(layers.random(2, 5, B, seed=2, dtype=torch.bfloat16))


@pytest.fixture
def tail(recipe):
    return Deferred(recipe, recipe.value.shape, recipe.value)


READERS = {
    "add": lambda x: x + 1,
    "columns": lambda x: x[..., 3:5],
    "view": lambda x: x.view(10, -1),
    "halves": lambda x: torch.cat(x.chunk(2, dim=-1)),
    "other-columns": lambda x: torch.cat(torch.split(x, [3, x.shape[-1] - 3], dim=-1)[::-1], dim=-1),
    "tokens": lambda x: torch.split(x, [2, 3], dim=1)[1],
    "gelu-of-the-textbook": gelu,
    "silu": torch.nn.functional.silu,
    "among-three": lambda x: torch.cat((x, torch.zeros_like(x), x), dim=-1),
    "in-front": lambda x: torch.cat((x, torch.ones(2, 5, 4, dtype=x.dtype)), dim=-1),
    "under-another": lambda x: torch.cat((torch.ones(2, 1, x.shape[-1], dtype=x.dtype), x), dim=1),
    "beside-fp32": lambda x: torch.cat((torch.ones(2, 5, 4), x), dim=-1),
    "fp32": lambda x: x.float(),
    "copied-from": lambda x: torch.zeros(2, 5, x.shape[-1]).copy_(x),
    "added-to": lambda x: torch.zeros(2, 5, x.shape[-1]).add_(x),
    "written-elsewhere": lambda x: torch.add(x, 1, out=torch.empty(2, 5, x.shape[-1], dtype=x.dtype)),
    "multiplied": lambda x: linear(x, torch.ones(3, x.shape[-1], dtype=x.dtype)),
    "one-number": lambda x: torch.tensor(x[1, 2, 3].item()),
    "moved-and-back": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "detached": lambda x: x.detach().clone(),
    "iterated": lambda x: torch.stack(list(x)),
    "written": lambda x: x.mul_(2).clone(),
    "printed": lambda x: torch.tensor([ord(c) for c in str(x.float())]),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("of", ["what-waits", "columns", "gelu"])
def test_whatever_is_done_is_done_with_its_numbers(head, recipe, tail, read, of):
    plain = recipe.value.clone()
    made = {
        "what-waits": lambda: (tail, plain),
        "columns": lambda: (beside(head, tail), torch.cat((head, plain), dim=-1)),
        "gelu": lambda: (gelu(tail, approximate="tanh"), gelu(plain, approximate="tanh")),
    }
    mine, theirs = made[of]()
    got, want = read(mine), read(theirs)
    assert type(got) is torch.Tensor and recipe.count == 1
    assert got.dtype == want.dtype and torch.equal(got, want)


def test_it_has_shape_dtype_and_device(head, recipe, tail):
    whole = beside(head, tail)
    assert whole.shape == (2, 5, A + B) and whole.dtype == torch.bfloat16 and whole.device == head.device
    assert whole.is_contiguous() and not whole.requires_grad and recipe.count == 0


def test_handed_on_from_layer_to_layer_nothing_is_made(head, recipe, tail):
    """The host's lines: a split, GELU, a concatenation."""
    first, rest = torch.split(beside(head, tail), [A, B], dim=-1)
    assert first is head and rest is tail
    attention = first * 2
    handed_on = torch.cat((attention, torch.nn.GELU(approximate="tanh")(rest)), 2)
    columns = handed_on.waiting
    assert isinstance(columns, Columns) and columns.head is attention
    assert isinstance(columns.tail.waiting, Gelu) and columns.tail.waiting.of is tail
    assert tail.waiting is recipe and recipe.count == 0
    want = torch.cat((attention, gelu(recipe.value, approximate="tanh")), dim=2)
    assert torch.equal(handed_on.clone(), want)


def test_what_was_read_waits_no_more(head, recipe, tail):
    tail.add_(1)
    assert tail.waiting is None and recipe.count == 1
    want = gelu(recipe.value + 1, approximate="tanh")
    assert torch.equal(gelu(tail, approximate="tanh"), want)
    whole = torch.cat((head, tail), dim=-1)
    assert type(whole) is torch.Tensor and torch.equal(whole, torch.cat((head, recipe.value + 1), dim=-1))
    assert recipe.count == 1


def test_writes_are_kept_and_seen_through_views(recipe, tail):
    tail[..., :4] = 0
    part = tail[..., 2:6]
    part += 3
    want = recipe.value.clone()
    want[..., :4] = 0
    want[..., 2:6] += 3
    assert torch.equal(tail.clone(), want) and recipe.count == 1


def test_a_whole_read_before_it_is_split_shares_memory_with_its_columns(head, tail):
    whole = beside(head, tail)
    whole.mul_(2)
    _, rest = torch.split(whole, [A, B], dim=-1)
    rest.zero_()
    assert torch.equal(whole.clone(), torch.cat((head * 2, torch.zeros(2, 5, B)), dim=-1).bfloat16())


def test_a_whole_that_was_split_is_what_its_columns_are_by_then(head, recipe, tail):
    whole = beside(head, tail)
    first, rest = torch.split(whole, [A, B], dim=-1)
    first.zero_(), rest.mul_(2)
    assert torch.equal(whole.clone(), torch.cat((torch.zeros_like(head), recipe.value * 2), dim=-1))
    first.fill_(1)
    assert torch.equal(whole[..., :A], torch.ones_like(head))


WRITTEN = {
    "after-its-gelu": lambda whole, tail: (gelu(tail, approximate="tanh"), tail.mul_(2)),
    "after-a-concatenation": lambda whole, tail: (torch.cat((whole[..., :A], tail), -1), tail.zero_()),
    "after-its-split": lambda whole, tail: (torch.split(whole, [A, B], dim=-1), whole.mul_(2)),
    "as-an-output": lambda whole, tail: (
        gelu(tail, approximate="tanh"),
        torch.add(torch.zeros(2, 5, B, dtype=tail.dtype), 1, out=tail),
    ),
}


@pytest.mark.parametrize("write", WRITTEN.values(), ids=WRITTEN)
def test_what_others_wait_for_is_not_written_to(head, recipe, write):
    waiting, other = (Deferred(recipe, recipe.value.shape, recipe.value) for _ in range(2))
    with pytest.raises(RuntimeError, match=r"written to by aten\.\w+.* after it was handed on"):
        write(beside(head, other), waiting)


def test_reading_what_others_wait_for_is_allowed(recipe, tail):
    activated, buffer = gelu(tail, approximate="tanh"), torch.zeros(2, 5, B, dtype=torch.bfloat16)
    assert torch.equal(buffer.copy_(tail), recipe.value)
    assert torch.equal(activated.clone(), gelu(recipe.value, approximate="tanh")) and recipe.count == 1


def test_addresses_are_those_of_the_numbers(recipe, tail):
    """Other languages' kernels ask for them; what cannot be asked so is refused, and never 0."""
    assert tail.data_ptr() == tail.read().data_ptr() != 0
    with pytest.raises(RuntimeError, match="data pointer"):
        torch.utils.dlpack.to_dlpack(Deferred(recipe, recipe.value.shape, recipe.value))


def test_an_error_on_the_way_leaves_it_waiting(recipe, tail):
    class Failing(Recipe):
        def make(self):
            self.count += 1
            if self.count == 1:
                raise RuntimeError("out of memory")
            return self.value.clone()

    waiting = Deferred(Failing(recipe.value), recipe.value.shape, recipe.value)
    with pytest.raises(RuntimeError, match="out of memory"):
        waiting.clone()
    assert torch.equal(waiting.clone(), recipe.value)
