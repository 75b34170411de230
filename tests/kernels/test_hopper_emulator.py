"""Emulated engines of sm_90a: a product against the tables of the PTX ISA, every mistake they have to notice."""

from __future__ import annotations

import ctypes

import pytest
import torch

from svdquant_nodes.tests.kernels.emulated import COMPILER, ready
from svdquant_nodes.tests.kernels.emulated_hopper import ARCH

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is missing: the kernels cannot be emulated")

ROWS, COLUMNS, DEPTH = 64, 96, 256

MISTAKES = {
    "no-barrier-after-init": "its initialisation",
    "no-init-fence": "without a fence after its initialisation",
    "bytes-that-never-come": "lacks 0 arrivals and 16 bytes",
    "unaligned-copy": "not a multiple of 128 bytes",
    "every-lane-speaks": "deadlock",
    "no-wait-for-full": "a product reads shared memory",
    "no-wait-for-empty": "more arrivals in a phase",
    "empty-too-early": "overwritten while a product reads it",
    "one-warp-speaks": "overwritten while a product reads it",
    "one-copy-too-many": "ended while a copy was on its way",
    "stored-without-fence": "without a fence for asynchronous reads",
    "no-wgmma-fence": "starts without a wgmma_fence",
    "sums-changed-after-fence": "changed after the last wgmma_fence",
    "sums-before-wait": "used before the product was waited for",
    "sums-written-before-wait": "changed while a product was running",
    "half-a-warpgroup": "which its warpgroup does not reach",
    "different-operands": "bring different operands",
    "never-waited": "ended while a product was running",
}


IN_CLUSTERS = {
    "blocks-do-not-meet-first": "its initialisation",
    "blocks-do-not-meet-last": "its block has ended",
    "one-block-stops-early": "ended while others may arrive at its barriers",
    "tells-its-own-block-only": "deadlock",
    "tells-a-third-block": "a block that the cluster does not have",
    "hears-its-own-warps-only": "overwritten while a copy to it is on its way",
    "tells-before-it-has-read": "overwritten while a product reads it",
    "sent-to-itself-alone": "lacks 0 arrivals and 6144 bytes",
    "sent-to-a-third-block": "blocks that the cluster does not have",
    "expects-its-own-half": "while a copy to it is on its way",
    "both-bring-the-same-half": "overwritten while a copy to it is on its way",
    "halves-overlap": "overwritten while a copy to it is on its way",
    "left-is-sent-too": "overwritten while a copy to it is on its way",
}


def run(name, *, backwards, blocks=1):
    generator = torch.Generator().manual_seed(2)
    left, right = (
        torch.randint(-128, 128, (rows, DEPTH * (blocks + 1) // 2), generator=generator).to(torch.int8)
        for rows in (ROWS * blocks, COLUMNS)
    )
    out = torch.zeros(blocks, 128, COLUMNS // 2, dtype=torch.int32)
    kernels = ready(ARCH, backwards=backwards)
    for tensor, writable in ((left, False), (right, False), (out, True)):
        size = ctypes.c_int64(tensor.numel() * tensor.element_size())
        kernels.allow(ctypes.c_void_p(tensor.data_ptr()), size, writable)
    make = kernels.make_hopper_mistake if blocks == 1 else kernels.make_cluster_mistake
    make.restype = ctypes.c_char_p
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (left, right, out)]
    answer = make(name.encode(), *pointers)
    return answer and answer.decode(), left, right, out


@pytest.mark.parametrize("blocks", [1, 2], ids=["one-block", "cluster"])
@pytest.mark.parametrize("backwards", [False, True], ids=["in-order", "backwards"])
def test_right_kernel_multiplies(backwards, blocks):
    """Row and column of a thread's sums: "Register fragments for wgmma", matrix D of m64nNk32."""
    answer, left, right, out = run("none", backwards=backwards, blocks=blocks)
    assert answer is None
    thread, i = torch.meshgrid(torch.arange(128), torch.arange(COLUMNS // 2), indexing="ij")
    row = thread // 32 * 16 + thread % 32 // 4 + torch.where(i % 4 < 2, 0, 8)
    column = i // 4 * 8 + thread % 4 * 2 + i % 2
    products = (left.int() @ right.int().T).view(blocks, ROWS, COLUMNS)
    assert torch.equal(out, products[:, row, column])


@pytest.mark.parametrize("backwards", [False, True], ids=["in-order", "backwards"])
@pytest.mark.parametrize(("name", "sentence"), MISTAKES.items(), ids=MISTAKES)
def test_mistake_is_noticed(name, sentence, backwards):
    assert sentence in (run(name, backwards=backwards)[0] or "nothing")


@pytest.mark.parametrize("backwards", [False, True], ids=["in-order", "backwards"])
@pytest.mark.parametrize(("name", "sentence"), IN_CLUSTERS.items(), ids=IN_CLUSTERS)
def test_mistake_of_a_cluster_is_noticed(name, sentence, backwards):
    assert sentence in (run(name, backwards=backwards, blocks=2)[0] or "nothing")
