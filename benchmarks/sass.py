"""What the main loops of the GPU kernels ask of a card: instructions by pipe, counted in machine code, no GPU needed.

    python benchmarks/sass.py [--cards 80,86,89,90a,120a] [--kernels gemm_int4,quantize_int] [--listing]

nvcc compiles each kernel, nvdisasm takes it apart. Of the innermost loop that holds what the kernel is for, one way
through is counted: the shortest that passes every product, copy and store. Divided by published rates that is a bound
in clocks an SM, not a measurement: it knows nothing of latencies, of memory, or of how well pipes overlap.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

CUDA = Path(__file__).resolve().parents[1] / "csrc" / "cuda"


# ---- machine code ----


@dataclass
class Block:
    """Instructions with one way in at the top and the ways out at the bottom."""

    code: list[str] = field(default_factory=list)
    next: list[int] = field(default_factory=list)


LABEL = re.compile(r"\s*(\.L_x_\d+):")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")
RARE = "FCHK"  # a correctly rounded division, which loops do without where they can
ENDS = ("BRA", "EXIT", "RET", "BRX", "JMP")


def functions(listing: str) -> dict[str, list[str]]:
    """Lines of each kernel of nvdisasm's text, labels among them."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in listing.splitlines():
        if name := re.match(r"\.text\.(\S+):", line):
            lines = found.setdefault(name[1], [])
        elif line.lstrip().startswith(".section"):
            lines = []
        else:
            lines.append(line)
    return found


def opcode(instruction: str) -> str:
    """IMAD.WIDE.U32 of `@!P0 IMAD.WIDE.U32 R2, R3, R4, R5`."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def blocks(lines: Iterable[str]) -> list[Block]:
    """The control flow of a kernel."""
    made, starts = [Block()], {}
    for line in lines:
        if label := LABEL.match(line):
            if made[-1].code:
                made.append(Block())
            starts[label[1]] = len(made) - 1
        elif found := INSTRUCTION.match(line):
            made[-1].code.append(found[1])
            if opcode(found[1]).startswith(ENDS):
                made.append(Block())
    for i, block in enumerate(made):
        last = block.code[-1] if block.code else ""
        if TARGET.search(last) and opcode(last).startswith("BRA"):
            block.next.append(starts[TARGET.search(last)[1]])
        always = (
            opcode(last).startswith(ENDS) and re.match(r"(BRA(\.U)? `|EXIT|RET|BRX|JMP)", last)
            if last
            else False
        )
        if not always and i + 1 < len(made):
            block.next.append(i + 1)
    return made


def dominators(flow: list[Block]) -> list[set[int]]:
    """Of each block, the blocks that every way to it passes."""
    every = set(range(len(flow)))
    found = [{0}, *(set(every) for _ in flow[1:])]
    before: list[list[int]] = [[] for _ in flow]
    for i, block in enumerate(flow):
        for to in block.next:
            before[to].append(i)
    changed = True
    while changed:
        changed = False
        for i in range(1, len(flow)):
            now = {i}.union(set.intersection(*(found[p] for p in before[i])) if before[i] else set())
            changed |= now != found[i]
            found[i] = now
    return found


def loops(flow: list[Block]) -> Iterator[tuple[int, set[int]]]:
    """First block and all blocks of every natural loop."""
    over = dominators(flow)
    before: dict[int, list[int]] = {}
    for i, block in enumerate(flow):
        for to in block.next:
            before.setdefault(to, []).append(i)
    for head in range(len(flow)):
        ends = [i for i in before.get(head, []) if head in over[i] and len(over[i]) < len(flow)]
        inside, todo = {head}, ends[:]
        while todo:
            at = todo.pop()
            if at not in inside:
                inside.add(at)
                todo += before.get(at, [])
        if ends:
            yield head, inside


def way_through(flow: list[Block], head: int, inside: set[int], wanted: str) -> list[str]:
    """Of the ways round a loop that pass most of the wanted instructions, and none for rare cases, the shortest."""
    over = dominators(flow)
    known: dict[int, tuple[int, int, int | None]] = {}

    def best(at: int) -> tuple[int, int, int | None]:
        """Wanted instructions, minus all instructions, and the block that follows; from here to the loop's end."""
        if at not in known:
            further = [to for to in flow[at].next if to in inside and to not in over[at]]
            ends = any(to == head for to in flow[at].next)
            ways = [(*best(to)[:2], to) for to in further] + ([(0, 0, None)] if ends else [])
            found = max(ways, key=lambda way: way[:2], default=(-(10**6), 0, None))
            here = sum(
                bool(re.match(wanted, opcode(i))) - 1000 * opcode(i).startswith(RARE) for i in flow[at].code
            )
            known[at] = (found[0] + here, found[1] - len(flow[at].code), found[2])
        return known[at]

    best(head)
    code, at = [], head
    while at is not None:
        code += flow[at].code
        at = known[at][2]
    return code


# ---- pipes ----

# Which pipe takes an instruction: the first pattern that its opcode begins with; integers' if none.
PIPES = (
    ("tensor", r"IMMA|HMMA|OMMA"),
    ("control", r"BRA|BAR|DEPBAR|LDGDEPBAR|BSSY|BSYNC|EXIT|CALL|RET|WARPSYNC|JMP|NOP"),
    ("shared", r"LDS|STS|SHFL|LDGSTS"),
    ("global", r"LDG|STG|LDC|ULDC"),
    ("convert", r"F2I|I2F\b|F2F\b|FRND|MUFU|FCHK"),
    ("fp32", r"FADD|FMUL|FFMA"),
    ("fp16", r"HADD|HMUL|HFMA"),
    ("imad", r"IMAD"),
    ("uniform", r"U[A-Z0-9]+|R2UR|S2R|VOTE"),
)


def pipe(code: str) -> str:
    return next((name for name, pattern in PIPES if re.match(rf"(?:{pattern})", code)), "alu")


# Lanes a clock and SM: CUDA C++ Programming Guide, "Arithmetic Instructions"; IMAD takes every other place of the fp32
# pipe. Products: multiply-adds a clock and SM, of dense datasheet peaks; mma.sync has about 0.62 of Hopper's.
RATES = {
    "80": dict(fp32=64, fp16=128, alu=64, imad=64, convert=16, half=1024, s8=2048, s4=4096),
    "86": dict(fp32=128, fp16=64, alu=64, imad=64, convert=16, half=256, s8=1024, s4=2048),
    "89": dict(fp32=128, fp16=64, alu=64, imad=64, convert=16, half=256, s8=1024, s4=2048),
    "90a": dict(fp32=128, fp16=128, alu=64, imad=64, convert=16, half=1270, s8=2540, s4=0),
    "120a": dict(fp32=128, fp16=64, alu=64, imad=64, convert=16, half=256, s8=1024, s4=0, f4=2048),
}
PRODUCTS = (  # opcode -> multiply-adds, and whose rate
    (r"IMMA\.16864", 16 * 8 * 64, "s4"),
    (r"IMMA\.16832", 16 * 8 * 32, "s8"),
    (r"HMMA\.16816", 16 * 8 * 16, "half"),
    (r"OMMA", 16 * 8 * 64, "f4"),
)
SCHEDULERS = 4


def wavefronts(code: str) -> int:
    """Of an access without bank conflicts: 128 bytes each."""
    if code.startswith("SHFL"):
        return 1
    bits = re.search(r"\.(64|128)", code.replace("LTC128B", ""))
    return {"64": 2, "128": 4}[bits[1]] if bits else 1


def clocks(code: Iterable[str], card: str) -> dict[str, float]:
    """Clocks that one warp's instructions keep each pipe of an SM busy, and the schedulers."""
    rates, spent = RATES[card], Counter()
    for instruction in map(opcode, code):
        name = pipe(instruction)
        spent["issue"] += 1 / SCHEDULERS
        if name == "tensor":
            work, kind = next((m, k) for pattern, m, k in PRODUCTS if re.match(pattern, instruction))
            spent[name] += work / rates[kind]
        elif name == "shared":
            spent[name] += wavefronts(instruction)
        elif name in rates:
            spent[name] += 32 / rates[name]
    spent["fp32"] += spent.pop("imad", 0)
    return dict(spent)


# ---- kernels ----


@dataclass(frozen=True)
class Kernel:
    """A kernel's main loop: where it is, what every way through it must pass, and what `unit` of work it does."""

    source: str
    name: str  # in the mangled name
    unit: str
    wanted: str = r"[IHO]MMA|LDGSTS"
    cards: tuple[str, ...] = tuple(RATES)


INTEGER = r"IMMA|LDGSTS"
LARGE = "TileILi128ELi64E"
KERNELS = {
    "gemm_int4": Kernel("gemm_int4.cu", f"{LARGE}.*Int4ProductILb0", "step", INTEGER, ("80", "86", "89")),
    "gemm_int4_wide": Kernel("gemm_int4_wide.cu", LARGE, "step", INTEGER),
    "gemm_w8a8": Kernel("gemm_w8a8.cu", "TileILi128ELi128E", "step", INTEGER),
    "gemm_nvfp4": Kernel("gemm_nvfp4.cu", LARGE, "step"),
    "gemm_mxf4": Kernel("gemm_mxf4.cu", LARGE, "step", cards=("120a",)),
    "quantize_int": Kernel("quantize_int.cu", "DTypeE1ELb0ELi32", "chunk", r"HMMA|STG|MUFU"),
    "quantize_nvfp4": Kernel("quantize_nvfp4.cu", "DTypeE1ELb1ELi32", "chunk", r"HMMA|STG|MUFU"),
    "quantize_e4m3": Kernel("quantize_e4m3.cu", "DTypeE1ELi32", "chunk", r"HMMA|STG|MUFU", ("90a",)),
    "gemv_awq": Kernel("gemv_awq.cu", "kernelILi1E", "step", r"LDS"),
}


def tool(name: str) -> str:
    """nvcc and nvdisasm: on the path, of the toolkit, or of the wheel nvidia-cuda-nvdisasm."""
    folders = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    folders += [str(Path(p, "nvidia/cu13/bin")) for p in sys.path]
    found = shutil.which(name, path=os.pathsep.join(folders))
    if not found:
        sys.exit(f"{name} is missing: install the CUDA toolkit, or pip install nvidia-cuda-nvdisasm.")
    return found


def disassembled(source: str, card: str) -> dict[str, list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        nvcc = [tool("nvcc"), "-std=c++17", "-cubin", f"-arch=sm_{card}", CUDA / source, "-o", cubin]
        subprocess.run(nvcc, check=True)
        return functions(
            subprocess.run([tool("nvdisasm"), cubin], check=True, capture_output=True, text=True).stdout
        )


def main_loop(lines: list[str], wanted: str) -> list[str]:
    """The innermost loop with the most of the wanted instructions, one way round."""
    flow = blocks(lines)
    ways = [way_through(flow, head, inside, wanted) for head, inside in loops(flow)]
    return max(ways, key=lambda code: (sum(bool(re.match(wanted, opcode(i))) for i in code), -len(code)))


COLUMNS = ("issue", "tensor", "shared", "fp32", "alu", "fp16", "convert")


def row(name: str, card: str, code: list[str]) -> str:
    spent, counted = clocks(code, card), Counter(pipe(opcode(i)) for i in code)
    limit = max(spent, key=spent.get)
    kinds = " ".join(f"{kind} {count}" for kind, count in counted.most_common())
    times = " | ".join(f"{spent.get(column, 0):.0f}" for column in COLUMNS)
    share = f"{spent['tensor'] / spent[limit]:.0%}" if spent.get("tensor") else ""
    return f"| {name} | {card} | {len(code)} | {times} | {limit} | {share} | {kinds} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cards", default=",".join(RATES))
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--listing", action="store_true", help="print the instructions too")
    asked = parser.parse_args()
    print(f"| kernel | sm | instructions | {' | '.join(COLUMNS)} | limit | tensor | of them |")
    print("| --- " * (len(COLUMNS) + 6) + "|")
    for name in asked.kernels.split(","):
        kernel = KERNELS[name]
        for card in (c for c in asked.cards.split(",") if c in kernel.cards):
            lines = next(
                code for f, code in disassembled(kernel.source, card).items() if re.search(kernel.name, f)
            )
            code = main_loop(lines, kernel.wanted)
            print(row(name, card, code), flush=True)
            if asked.listing:
                print("\n".join(code))


if __name__ == "__main__":
    main()
