"""One translation unit through NVRTC, which compiles CUDA C++ without a C++ compiler and without a CUDA toolkit.

A program, with an order in JSON on its standard input and an answer in JSON on its output. It runs in a Python of its
own, where a compiler that crashes or hangs takes nothing with it, and imports neither torch nor anything of ours.

    order    library   where NVRTC is
             source    CUDA C++
             headers   name -> content, of all that the source may include
             names     C++ names of the kernels to make: "gemm_int8_kernel<SmallTile>"
             options   of the compiler
             output    the file to write a cubin to
    answer   kernels   C++ name -> name in the cubin
             version   of NVRTC: "13.0"
             words     what the compiler said
             problem   why there is no cubin, "" if there is one
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Failed(Exception):
    """A call of NVRTC's did not succeed."""


class Nvrtc:
    """The functions of the library; each is called by its name without the prefix."""

    def __init__(self, path: Path) -> None:
        if hasattr(os, "add_dll_directory"):
            os.add_dll_directory(str(path.parent))
        for builtins in path.parent.glob("*nvrtc-builtins*"):  # it looks for them by name alone
            if ".alt." not in builtins.name:
                ctypes.CDLL(str(builtins), getattr(ctypes, "RTLD_GLOBAL", 0))
        self._library = ctypes.CDLL(str(path))
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, f"nvrtc{name}")(*arguments)
        if code:
            raise Failed(f"nvrtc{name}: {self._library.nvrtcGetErrorString(code).decode()}")

    def version(self) -> str:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.call("Version", ctypes.byref(major), ctypes.byref(minor))
        return f"{major.value}.{minor.value}"


class Program:
    """A source with its headers, and the kernels to make of it."""

    def __init__(self, nvrtc: Nvrtc, source: str, headers: Mapping[str, str], names: Sequence[str]) -> None:
        self._nvrtc, self._names, self._handle = nvrtc, names, ctypes.c_void_p()
        included = _strings(headers.values()), _strings(headers)
        nvrtc.call(
            "CreateProgram",
            ctypes.byref(self._handle),
            source.encode(),
            b"kernels.cu",
            len(headers),
            *included,
        )
        for name in names:
            nvrtc.call("AddNameExpression", self._handle, name.encode())

    def compile(self, options: Sequence[str]) -> None:
        self._nvrtc.call("CompileProgram", self._handle, len(options), _strings(options))

    def words(self) -> str:
        return self._read("ProgramLog").rstrip(b"\0").decode(errors="replace").strip()

    def cubin(self) -> bytes:
        return self._read("CUBIN")

    def kernels(self) -> dict[str, str]:
        """C++ name -> name in the cubin."""
        found, name_there = {}, ctypes.c_char_p()
        for name in self._names:
            self._nvrtc.call("GetLoweredName", self._handle, name.encode(), ctypes.byref(name_there))
            found[name] = (name_there.value or b"").decode()
        return found

    def _read(self, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._nvrtc.call(f"Get{what}Size", self._handle, ctypes.byref(size))
        content = ctypes.create_string_buffer(size.value)
        self._nvrtc.call(f"Get{what}", self._handle, content)
        return content.raw


def _strings(texts: Any) -> ctypes.Array:
    encoded = [text.encode() for text in texts]
    return (ctypes.c_char_p * len(encoded))(*encoded)


def carry_out(order: dict[str, Any]) -> dict[str, Any]:
    """The order's cubin written to its file; returns the answer."""
    nvrtc = Nvrtc(Path(order["library"]))
    program = Program(nvrtc, order["source"], order["headers"], order["names"])
    answer = {"version": nvrtc.version(), "problem": ""}
    try:
        program.compile(order["options"])
    except Failed as error:
        return {**answer, "problem": str(error), "words": program.words(), "kernels": {}}
    Path(order["output"]).write_bytes(program.cubin())
    return {**answer, "words": program.words(), "kernels": program.kernels()}


if __name__ == "__main__":
    try:
        said = carry_out(json.load(sys.stdin))
    except (OSError, AttributeError, Failed) as error:
        said = {"problem": str(error), "words": "", "kernels": {}, "version": ""}
    print(json.dumps(said))
