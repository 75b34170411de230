"""The emulator itself: matrix instructions against the tables of the PTX ISA, and every mistake it has to notice."""

from __future__ import annotations

import ctypes

import pytest
import torch

from svdquant_nodes.tests.kernels.emulated import COMPILER, ready

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is missing: the kernels cannot be emulated")


def call(name, *args, kernels=None):
    function = getattr(kernels or ready(80), name)
    function.restype = ctypes.c_char_p
    pointers = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in args]
    answer = function(*pointers)
    return answer.decode() if answer else None


# ---- matrix fragments: row and column of element i of a lane, as the ISA's tables state them ----
# m16n8k16 .f16 .bf16, m16n8k32 .s8, m16n8k64 .s4 .u4: "Matrix Fragments for mma.m16n8k16/32/64"; m8n8k16, m8n8k32 and
# m16n8k8 likewise. groupID = lane >> 2, threadID_in_group = lane % 4.


def a_m16n8k8_f16(group, t, i):
    return (group if i < 2 else group + 8), t * 2 + (i & 1)


def b_m16n8k8_f16(group, t, i):
    return t * 2 + i, group


def a_m16n8k16_f16(group, t, i):
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    return row, t * 2 + (i & 1) if i < 4 else t * 2 + (i & 1) + 8


def b_m16n8k16_f16(group, t, i):
    return (t * 2 + (i & 1) if i < 2 else t * 2 + (i & 1) + 8), group


def a_m16n8k32_s8(group, t, i):
    row = group if 0 <= i < 4 or 8 <= i < 12 else group + 8
    return row, t * 4 + (i & 3) if i < 8 else t * 4 + (i & 3) + 16


def b_m16n8k32_s8(group, t, i):
    return (t * 4 + (i & 3) if i < 4 else t * 4 + (i & 3) + 16), group


def a_m16n8k64_s4(group, t, i):
    row = group if 0 <= i < 8 or 16 <= i < 24 else group + 8
    return row, t * 8 + (i & 7) if i < 16 else t * 8 + (i & 7) + 32


def b_m16n8k64_s4(group, t, i):
    return (t * 8 + (i & 7) if i < 8 else t * 8 + (i & 7) + 32), group


def c_m16(group, t, i):
    return (group if i < 2 else group + 8), t * 2 + (i & 1)


def a_m8n8k16_s8(group, t, i):
    return group, t * 4 + i


def b_m8n8k16_s8(group, t, i):
    return t * 4 + i, group


def a_m8n8k32_s4(group, t, i):
    return group, t * 8 + i


def b_m8n8k32_s4(group, t, i):
    return t * 8 + i, group


def c_m8(group, t, i):
    return group, t * 2 + i


INSTRUCTIONS = {  # shape, tables of A, B and C, bits of an element, smallest and largest integer, signed A
    "m16n8k8_f16": ((16, 8), a_m16n8k8_f16, b_m16n8k8_f16, c_m16, 16),
    "m16n8k16_f16": ((16, 16), a_m16n8k16_f16, b_m16n8k16_f16, c_m16, 16),
    "m16n8k16_bf16": ((16, 16), a_m16n8k16_f16, b_m16n8k16_f16, c_m16, 16),
    "m16n8k32_s8": ((16, 32), a_m16n8k32_s8, b_m16n8k32_s8, c_m16, 8),
    "m16n8k64_s4": ((16, 64), a_m16n8k64_s4, b_m16n8k64_s4, c_m16, 4),
    "m16n8k64_u4": ((16, 64), a_m16n8k64_s4, b_m16n8k64_s4, c_m16, 4),
    "m8n8k16_s8": ((8, 16), a_m8n8k16_s8, b_m8n8k16_s8, c_m8, 8),
    "m8n8k32_s4": ((8, 32), a_m8n8k32_s4, b_m8n8k32_s4, c_m8, 4),
    "m8n8k32_u4": ((8, 32), a_m8n8k32_s4, b_m8n8k32_s4, c_m8, 4),
}


def registers(matrix, table, bits, name):
    """A matrix as 32 lanes hold it: uint32 [32, registers], by the ISA's table."""
    patterns = matrix.long()
    if bits == 16:
        dtype = torch.bfloat16 if name.endswith("bf16") else torch.float16
        patterns = matrix.to(dtype).view(torch.int16).long()
    per, count = 32 // bits, matrix.numel() // 32
    words = [[0] * (count // per) for _ in range(32)]
    for lane in range(32):
        for i in range(count):
            row, column = table(lane >> 2, lane % 4, i)
            words[lane][i // per] |= (int(patterns[row, column]) & ((1 << bits) - 1)) << (i % per * bits)
    return torch.tensor(words, dtype=torch.int64).to(torch.uint32)


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_matrix_instruction(name):
    (m, k), a_table, b_table, c_table, bits = INSTRUCTIONS[name]
    limits = {"s8": (-128, 128), "s4": (-8, 8), "u4": (0, 16), "f16": (-32, 33), "bf16": (-32, 33)}
    low, high = limits[name.rpartition("_")[2]]
    a = torch.randint(low, high, (m, k))
    b = torch.randint(*limits[name.rpartition("_")[2].replace("u4", "s4")], (k, 8))
    start = torch.randint(-1000, 1000, (m, 8))
    c = torch.empty(32, m * 8 // 32, dtype=torch.float32 if bits == 16 else torch.int32)
    places = [(lane, i, *c_table(lane >> 2, lane % 4, i)) for lane in range(32) for i in range(c.shape[1])]
    for lane, i, row, column in places:
        c[lane, i] = start[row, column]
    assert (
        call(
            "run_instruction",
            name.encode(),
            *(registers(*x, bits, name) for x in ((a, a_table), (b, b_table))),
            c,
        )
        is None
    )
    got = torch.empty(m, 8)
    for lane, i, row, column in places:
        got[row, column] = c[lane, i]
    assert torch.equal(got, (start + a @ b).float())


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


def scale_registers(of_a, of_b):
    """Scales of ue4m3, [16, 4] and [8, 4], as 32 lanes hold them for selectors of 0 (CUTLASS, traits for sm_120).

    Lanes 4g and 4g + 1 hold rows g and g + 8, lane 4g holds column g; the others' registers, 448 here, are not read.
    """
    lanes = torch.full((32, 2, 4), 0x7E, dtype=torch.uint8)
    for g in range(8):
        lanes[4 * g, 0], lanes[4 * g + 1, 0], lanes[4 * g, 1] = of_a[g], of_a[g + 8], of_b[g]
    return lanes.view(torch.uint32).squeeze(-1)


def test_scaled_instruction():
    a, b, scales = torch.randint(0, 16, (16, 64)), torch.randint(0, 16, (64, 8)), torch.randperm(127)[:96]
    of_a, of_b, c = scales[:64].view(16, 4), scales[64:].view(8, 4), torch.zeros(32, 4)
    codes = (registers(a, a_m16n8k64_s4, 4, ""), registers(b, b_m16n8k64_s4, 4, ""))
    assert call("run_scaled", *codes, scale_registers(of_a, of_b), c) is None
    got = torch.empty(16, 8)
    for lane in range(32):
        for i in range(4):
            got[c_m16(lane >> 2, lane % 4, i)] = c[lane, i]
    left, right = (s.to(torch.uint8).view(torch.float8_e4m3fn).double() for s in (of_a, of_b))
    left = E2M1[a] * left.repeat_interleave(16, 1)
    assert torch.equal(got, (left @ (E2M1[b] * right.repeat_interleave(16, 1).T)).float())


def test_scale_with_a_sign_is_noticed():
    words = torch.zeros(32, 2, dtype=torch.uint32)
    words.view(torch.int32)[5, 1] = -(2**31)
    zeros = (torch.zeros(32, size, dtype=torch.uint32) for size in (4, 2))
    assert "a scale of ue4m3 with a sign" in call("run_scaled", *zeros, words, torch.zeros(32, 4))


# ---- floats ----


def test_every_half_is_widened():
    bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    got = torch.empty(65536)
    call("widen_f16", bits, got, ctypes.c_int64(65536))
    assert torch.equal(got.nan_to_num(7e4), bits.view(torch.float16).float().nan_to_num(7e4))


def test_rounding_to_16_bits():
    anything = (
        torch.randint(-(2**31), 2**31 - 1, (50_000,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    )
    halves = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16).float()
    ties = (halves[:-1].double() + halves[1:].double()).div(2).float()
    values = torch.cat([anything, halves, ties, torch.tensor([0.0, -0.0, float("inf"), 65519.9, 65520.0])])
    values = values[~values.isnan()].contiguous()
    bf16, f16 = (torch.empty(len(values), dtype=torch.uint16) for _ in range(2))
    call("round_16", values, bf16, f16, ctypes.c_int64(len(values)))
    assert torch.equal(bf16.view(torch.int16), values.bfloat16().view(torch.int16))
    assert torch.equal(f16.view(torch.int16), values.half().view(torch.int16))


# ---- mistakes ----

MISTAKES = {
    "no-barrier-before-write": "without a barrier between",
    "no-barrier-before-read": "race: read and written without a barrier",
    "refill-too-early": "read while a copy to it is on its way",
    "no-wait": "read while a copy to it is on its way",
    "no-barrier-after-wait": "on its way",
    "written-twice": "race: written twice",
    "never-written": "read before it was written",
    "divergent-barrier": "reached by 40 of 64 threads",
    "half-a-warp": "not all lanes reached shuffle_xor",
    "two-instructions": "not all lanes reached shuffle_xor",
    "load-behind-the-end": "load outside every tensor",
    "store-to-an-input": "store outside every tensor",
    "unaligned-vector": "16 bytes is not aligned",
    "beyond-shared-memory": "outside the block's memory",
    "unaligned-shared": "8 bytes is not aligned",
}


def make_mistake(name, *, backwards):
    memory = torch.ones(80)
    kernels = ready(80, backwards=backwards)
    kernels.allow(ctypes.c_void_p(memory.data_ptr()), ctypes.c_int64(64), False)
    kernels.allow(ctypes.c_void_p(memory[16:].data_ptr()), ctypes.c_int64(256), True)
    return call("make_mistake", name.encode(), memory[16:], kernels=kernels)


@pytest.mark.parametrize("backwards", [False, True], ids=["in-order", "backwards"])
@pytest.mark.parametrize(("name", "sentence"), MISTAKES.items(), ids=MISTAKES)
def test_mistake_is_noticed(name, sentence, backwards):
    assert sentence in (make_mistake(name, backwards=backwards) or "nothing")


@pytest.mark.parametrize("backwards", [False, True], ids=["in-order", "backwards"])
def test_right_kernel_passes(backwards):
    assert make_mistake("none", backwards=backwards) is None
