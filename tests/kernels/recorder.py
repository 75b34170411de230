"""Run as a program by test_launches.py: what csrc/ops.cpp launches for each case, and what cuda_ops.py does.

csrc/ops.cpp is compiled for CPU tensors and linked with the .cu files on the emulated card, which records launches
instead of running them. Both sides get the same tensors. Says in JSON, for each case, two lists of launches or errors.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import pack

pack.alias()

import torch  # noqa: E402

from svdquant_nodes.svdquant.kernels import cuda_ops, launches, ops, structs  # noqa: E402
from svdquant_nodes.tests.kernels.fake_driver import Grid  # noqa: E402
from svdquant_nodes.tests.kernels.launch_cases import cases  # noqa: E402

PARAMS = {  # header of a kernel -> what it takes
    "quantize": structs.QuantizeParams,
    "quantize_int8": structs.QuantizeParams,
    "gemm_w8a8": structs.GemmInt8,
    "gemv_awq": structs.Gemv,
}


class Recording:
    """The card of the Python side."""

    def __init__(self, arch: int) -> None:
        self.arch, self.starts = arch, []

    def launch(self, start: launches.Start) -> None:
        self.starts.append(start)


def fields(struct: ctypes.Structure, known: dict[int, str], path: str = "") -> dict[str, Any]:
    """Every number in a struct by its path; an address by the tensor that begins there, "new" for all others."""
    found: dict[str, Any] = {}
    for name, kind in struct._fields_:
        value, where = getattr(struct, name), f"{path}{name}"
        if issubclass(kind, ctypes.Structure):
            found |= fields(value, known, f"{where}.")
        elif kind is ctypes.c_void_p:
            found[where] = known.get(value, "new") if value else None
        else:
            found[where] = value
    return found


def of_cpp(library: ctypes.CDLL, known: dict[int, str], arch: int) -> list[Any]:
    headers = {kernel.name: kernel.header for kernel in launches.kernels(arch)}
    library.recorded_name.restype = ctypes.c_char_p
    found = []
    for i in range(library.recorded()):
        name, grid, data = library.recorded_name(i).decode(), Grid(), ctypes.c_void_p()
        library.recorded_grid(i, ctypes.byref(grid))
        size = library.recorded_params(i, ctypes.byref(data))
        kind = PARAMS.get(headers.get(name, ""), structs.Gemm)
        params = fields(kind.from_address(data.value), known)
        found.append([name, [grid.x, grid.y], grid.threads, grid.shared_bytes, size, params])
    return found


def of_python(starts: list[launches.Start], known: dict[int, str]) -> list[Any]:
    found = []
    for start in starts:
        kernel, params = start.kernel, start.params
        shape = kernel.name, list(start.grid), kernel.threads, kernel.shared_bytes
        found.append([*shape, ctypes.sizeof(params), fields(params, known)])
    return found


def outcome(call: Any, arguments: tuple[Any, ...]) -> tuple[Any, str]:
    try:
        return call(*arguments), ""
    except RuntimeError as error:
        return None, str(error).splitlines()[0]


def main(emulator: str, library: str, arch: int) -> None:
    loaded = ctypes.CDLL(emulator, ctypes.RTLD_GLOBAL)
    ops.declare()
    torch.ops.load_library(library)
    said = {}
    for name, (op, arguments) in cases(arch).items():
        known = {
            t.data_ptr(): str(i) for i, t in enumerate(arguments) if isinstance(t, torch.Tensor) and t.numel()
        }
        loaded.record(True)
        made, problem = outcome(getattr(torch.ops.svdquant, op), arguments)
        cpp = of_cpp(loaded, known, arch) + ([problem] if problem else [])
        card = Recording(arch)
        also_made, problem = outcome(getattr(cuda_ops.CudaOps(lambda _, card=card: card), op), arguments)
        python = of_python(card.starts, known) + ([problem] if problem else [])
        said[name] = dict(cpp=cpp, python=python, results=[results(made), results(also_made)])
    print(json.dumps(said))


def results(made: Any) -> list[Any]:
    """Shapes and dtypes of what came back."""
    tensors = made if isinstance(made, tuple) else () if made is None else (made,)
    return [[list(t.shape), list(t.stride()), str(t.dtype)] for t in tensors]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
