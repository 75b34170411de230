"""Which spelling of an op runs where: pure functions of what is asked, with the reasons against every other.

A spelling is one way to write the ops for one kind of processor. The table lists all there are, best first on each
device; the first that has nothing against it is chosen. Where all have, the CPU runs core.reference, which means the
same to the bit; any other device runs core.weight_only, which is faster there and more accurate than W4A4.

A fused op is several ops in one kernel, which has a row of its own beside the spelling whose product it begins with. It
runs where that spelling would; elsewhere the ops run apart, one after the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

REFERENCE, WEIGHT_ONLY = "reference", "weight_only"  # op sets in plain torch, for any device
TORCH_SCALED = "torch_scaled"  # in plain torch too, for some GPUs: a row of the table
BLOCK_SCALED = "block_scaled"  # a GPU's feature: torch multiplies 4-bit floats and their scales
APART = "apart"  # what a fused op does without a kernel of its own
QUANTIZERS = ("quantize_int4", "quantize_int4_unsigned", "quantize_nvfp4")
GEMMS = ("gemm_int4", "gemm_nvfp4")
FILE_OPS = (*QUANTIZERS, *GEMMS, "gemv_awq")  # for layers as files hold them
INT8_OPS = ("quantize_int8", "gemm_int8")
LAYER_OPS = (*FILE_OPS, *INT8_OPS)  # each a part of one layer
FUSED_OPS = tuple(f"{op}_gelu" for op in GEMMS)  # each begins with the product that it is named after
FUSED_ROWS = 64  # of the first weight, in whole tiles of which its outputs must come
OPS = (*LAYER_OPS, *FUSED_OPS)
# Columns a scale; gemv_awq takes multiples, int8 has one for the whole row.
GROUPS = {op: 16 if "nvfp4" in op else 64 for op in (*FILE_OPS, *FUSED_OPS)} | dict.fromkeys(INT8_OPS)
INT4_OPS = ("quantize_int4", "quantize_int4_unsigned", "gemm_int4")
NVFP4_OPS = ("quantize_nvfp4", "gemm_nvfp4")
OLDEST_GPU, NEWEST_GPU = (7, 5), (12, 9)

WITHOUT_COMPILER = "built without a C++ compiler"
MOST_AWQ_TOKENS = 24  # beyond, dequantizing the weight once beats reading it for every four of them
FEW_TOKENS = 128  # for one row of tiles Hopper's pass over the weights would cost more than it saves
# Numbers of tokens at which a choice changes, by op.
LIMITS = {"gemv_awq": MOST_AWQ_TOKENS} | dict.fromkeys((*INT4_OPS, "gemm_int4_gelu"), FEW_TOKENS)


@dataclass(frozen=True)
class Device:
    """What a device can do.

    type         "cpu" | "cuda" | any other of torch's names
    features     cpu: names of the spellings its library can run here; cuda: BLOCK_SCALED or nothing
    capability   cuda: compute capability
    missing      why none of its library's kernels may run, "" if they may
    distrusted   names of spellings that failed the self-test
    by_nvrtc     cuda: its kernels were built without a C++ compiler
    """

    type: str
    features: frozenset[str] = frozenset()
    capability: tuple[int, int] = (0, 0)
    missing: str = ""
    distrusted: frozenset[str] = frozenset()
    by_nvrtc: bool = False


@dataclass(frozen=True)
class Request:
    """One call, as far as it matters.

    op      a name in OPS
    dtype   of activations: "float32" | "bfloat16" | "float16" | any other of torch's names
    group   columns that share a weight scale, None for the op's usual one
    tokens  M, None where it is not known
    wanted  "auto", "off", or the name of a spelling
    """

    op: str
    dtype: str
    group: int | None = None
    tokens: int | None = None
    wanted: str = "auto"


@dataclass(frozen=True)
class Spelling:
    """A row of the table: what a spelling is for, and what it needs.

    needs       what a device lacks for it, "" if nothing
    on_request  why it runs only where it is asked for by name, "" if it may be chosen
    library     whether it is in our library, without which it cannot run
    fewest      tokens below which it runs only where it is asked for by name
    e4m3        whether its quantizers write integers as carrier.py says, and its product reads no other
    yields      those of its ops that it does only where no other row can, wherever it stands
    beside      of a fused op: the spelling that must be the one for its product, "" of any other
    """

    name: str
    device: str
    ops: tuple[str, ...]
    needs: Callable[[Device], str]
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    on_request: str = ""
    library: bool = True
    fewest: int = 0
    e4m3: bool = False
    yields: tuple[str, ...] = ()
    beside: str = ""


def _feature(name: str) -> Callable[[Device], str]:
    return lambda device: "" if name in device.features else f"this processor has no {name}"


def _capability(low: tuple[int, int], high: tuple[int, int], instruction: str) -> Callable[[Device], str]:
    def needs(device: Device) -> str:
        if low <= device.capability <= high:
            return ""
        range_ = _dotted(low) if low == high else f"{_dotted(low)} to {_dotted(high)}"
        return f"{instruction} needs compute capability {range_}, this is {_dotted(device.capability)}"

    return needs


def _block_scaled(device: Device) -> str:
    lack = _capability((10, 0), NEWEST_GPU, "torch's block-scaled product")(device)
    return lack or ("" if BLOCK_SCALED in device.features else "this torch has no block-scaled product")


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


_TURING_WITHOUT_TENSOR_CORES = r"GTX 16\d\d|MX[45]50|\bT(400|500|550|600|1000|1200|2000)\b"


def unfit(capability: tuple[int, int], name: str) -> str:
    """Why no kernel of ours is for a GPU, "" if some are: capability as torch says it, the name as its driver does."""
    if capability < OLDEST_GPU:
        return f"compute capability {_dotted(capability)} is below {_dotted(OLDEST_GPU)}"
    if capability == (7, 5) and re.search(_TURING_WITHOUT_TENSOR_CORES, name):
        return f"{name} has no tensor cores"
    return ""


_HALVES = ("bfloat16", "float16")


def _carried(name: str) -> Spelling:
    """Of exact W4A4 on Hopper."""
    needs = _capability((9, 0), (9, 0), "wgmma")
    return Spelling(name, "cuda", INT4_OPS, needs, fewest=FEW_TOKENS + 1, e4m3=True)


def _fused(
    name: str, format: str, needs: Callable[[Device], str], beside: str, dtypes: tuple[str, ...] = _HALVES
) -> Spelling:
    return Spelling(name, "cuda", (f"gemm_{format}_gelu",), needs, dtypes, beside=beside)


SPELLINGS = (
    Spelling("avx512", "cpu", LAYER_OPS, _feature("avx512")),
    Spelling("avx2", "cpu", LAYER_OPS, _feature("avx2")),
    Spelling("neon", "cpu", LAYER_OPS, _feature("neon")),
    Spelling(
        "portable", "cpu", LAYER_OPS, _feature("portable"), on_request="slower than torch for a whole picture"
    ),
    _carried("wgmma_e4m3_x4"),
    _carried("wgmma_e4m3"),
    Spelling("wgmma_s8_x2", "cuda", INT8_OPS, _capability((9, 0), (9, 0), "wgmma")),
    Spelling("wgmma_s8", "cuda", INT8_OPS, _capability((9, 0), (9, 0), "wgmma")),
    Spelling("mxf4_sm120", "cuda", NVFP4_OPS, _capability((12, 0), NEWEST_GPU, "mxf4nvf4 mma")),
    Spelling(TORCH_SCALED, "cuda", NVFP4_OPS, _block_scaled, library=False, yields=("quantize_nvfp4",)),
    Spelling("mma_s4", "cuda", INT4_OPS, _capability((8, 0), (8, 9), "mma.s4")),
    Spelling("mma_sm75", "cuda", INT4_OPS, _capability((7, 5), (7, 5), "mma.m8n8k32")),
    Spelling("mma_s8", "cuda", (*INT4_OPS, *INT8_OPS), _capability(OLDEST_GPU, NEWEST_GPU, "mma.s8")),
    Spelling("mma_f16", "cuda", NVFP4_OPS, _capability(OLDEST_GPU, NEWEST_GPU, "mma.f16")),
    Spelling("gemv", "cuda", ("gemv_awq",), _capability(OLDEST_GPU, NEWEST_GPU, "gemv")),
    _fused("gelu_s4", "int4", _capability((8, 0), (8, 9), "mma.s4"), "mma_s4"),
    _fused("gelu_sm75", "int4", _capability((7, 5), (7, 5), "mma.m8n8k32"), "mma_sm75", _HALVES[1:]),
    _fused("gelu_s8", "int4", _capability((8, 0), NEWEST_GPU, "mma.s8"), "mma_s8"),
    _fused("gelu_mxf4", "nvfp4", _capability((12, 0), NEWEST_GPU, "mxf4nvf4 mma"), "mxf4_sm120"),
    _fused("gelu_f16", "nvfp4", _capability((8, 0), NEWEST_GPU, "mma.f16"), "mma_f16"),
)

E4M3 = frozenset(row.name for row in SPELLINGS if row.e4m3)


@dataclass(frozen=True)
class Choice:
    """The spelling that runs, how it came about if not as usual, and why no better one does: name -> reasons."""

    spelling: str
    against: dict[str, tuple[str, ...]]
    built: str = ""

    def sentence(self) -> str:
        """For people: "avx2 (not avx512: this processor has no avx512)"."""
        parts = [self.built] if self.built else []
        parts += [f"not {name}: {', '.join(why)}" for name, why in self.against.items()]
        return f"{self.spelling} ({'; '.join(parts)})" if parts else self.spelling


def choose(device: Device, request: Request) -> Choice:
    """The first spelling with nothing against it, else an op set in plain torch."""
    against: dict[str, tuple[str, ...]] = {}
    rows = [row for row in SPELLINGS if row.device == device.type and request.op in row.ops]
    for row in sorted(rows, key=lambda row: request.op in row.yields):
        why = tuple(reasons(row, device, request))
        if not why:
            return Choice(row.name, against, WITHOUT_COMPILER if device.by_nvrtc and row.library else "")
        against[row.name] = why
    exact = device.type == "cpu" or request.wanted in ("off", REFERENCE)
    plain = REFERENCE if exact and request.wanted != WEIGHT_ONLY else WEIGHT_ONLY
    plain = APART if request.op in FUSED_OPS else plain
    return Choice(plain, against or {"kernels": (f"none is written for {request.op} on {device.type}",)})


def to_try(device: Device) -> list[Spelling]:
    """What a device could run, of which nothing is known yet."""
    rows = [row for row in SPELLINGS if row.device == device.type and not (row.library and device.missing)]
    return [row for row in rows if not row.needs(device)]


def about(op: str, tokens: int) -> int | None:
    """The number of tokens as far as a choice depends on it: a comparison, of which torch.compile makes a constant."""
    limit = LIMITS.get(op)
    return None if limit is None else limit if tokens <= limit else limit + 1


def reasons(row: Spelling, device: Device, request: Request) -> list[str]:
    """Everything that speaks against one spelling."""
    usual = GROUPS[request.op]
    group = request.group or usual
    wrong_group = group % usual if request.op == "gemv_awq" else group != usual
    tokens = None if request.wanted == row.name else request.tokens
    too_many = request.op == "gemv_awq" and tokens is not None and tokens > MOST_AWQ_TOKENS
    too_few = tokens is not None and tokens < row.fewest
    insists = request.wanted in ("off", row.name) or not row.beside
    first = request.op.removesuffix("_gelu")
    product = row.beside if insists else choose(device, replace(request, op=first)).spelling
    unbuilt = row.library and bool(device.missing)
    checks = (
        (bool(row.on_request) and request.wanted != row.name, row.on_request),
        (request.wanted == "off", "SVDQUANT_KERNELS is off"),
        (
            request.wanted not in ("auto", "off", row.name, row.beside),
            f"SVDQUANT_KERNELS asks for {request.wanted}",
        ),
        (unbuilt, device.missing),
        (row.name in device.distrusted, "it failed the self-test"),
        (request.dtype not in row.dtypes, f"activations are {request.dtype}"),
        (wrong_group, f"weight groups of {group} instead of {usual}"),
        (too_many, f"more than {MOST_AWQ_TOKENS} tokens"),
        (too_few, f"fewer than {row.fewest} tokens"),
        (product != row.beside, f"{first} is computed by {product}"),
    )
    found = [text for wrong, text in checks if wrong]
    lack = "" if unbuilt else row.needs(device)
    return [*found, lack] if lack else found


def eight_bits_pay(device: Device, wanted: str = "auto") -> bool:
    """Whether the 8-bit ops beat the 4-bit ones on a device, and are to be had.

    Hopper and the large Blackwells have no 4-bit integer products, and the A100's would wait for the scales of every
    64 columns; all three have 8-bit ones to spare. Elsewhere 8 bits win accuracy, not time, and cost memory.
    """
    fast = device.capability in ((8, 0), (9, 0)) or device.capability[0] == 10
    found = choose(device, Request("gemm_int8", "bfloat16", wanted=wanted)).spelling
    return fast and found not in (REFERENCE, WEIGHT_ONLY)
