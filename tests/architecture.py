"""The rules of the house, as code that reads code: who may import whom, and how large things may be.

    __init__ -> nodes -> adapters -> {kernels, loaders} -> core
                nodes -> quantizer -> {loaders, core}

An arrow may be skipped (nodes may use core), never reversed. `findings(root)` lists every breach under a folder.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# What a room may import of ours: everything its arrows lead to.
BELOW = {
    "entry": {"nodes"},
    "nodes": {"adapters", "quantizer", "kernels", "loaders", "core"},
    "adapters": {"kernels", "loaders", "core"},
    "quantizer": {"loaders", "core"},
    "kernels": {"core"},
    "loaders": {"core"},
    "core": set(),
}
ROOMS = {  # the most particular first
    "svdquant/core": "core",
    "svdquant/kernels": "kernels",
    "svdquant/adapters": "adapters",
    "svdquant/quantizer": "quantizer",
    "loaders": "loaders",
    "nodes": "nodes",
    "__init__.py": "entry",
}
OUTSIDE = ("tools", "tests", "benchmarks", "demo")  # commands: may import anything of ours

HOST = {"comfy", "comfy_api", "comfy_execution", "comfy_kitchen"}
HOST |= {"folder_paths", "latent_preview", "node_helpers", "nodes", "server"}
FILES = {"safetensors", "huggingface_hub"}
# Packages a room may import besides the standard library and what the tables above give it.
PACKAGES = {
    "entry": set(),
    "nodes": {"torch", "typing_extensions"} | HOST,
    "adapters": {"torch", "einops", "numpy", "psutil"} | HOST,
    "quantizer": {"torch", "einops", "lpips"},
    "kernels": {"torch"},
    "loaders": {"torch"} | FILES,
    "core": {"torch", "einops"},
}
OURS = {"svdquant", "loaders", "csrc", "demo", "tools", "tests", "benchmarks", "svdquant_nodes"}
UNSAFE = {"pickle", "dill", "joblib", "shelve"}

PYTHON_LINES, FAMILY_LINES, CSRC_LINES = 400, 120, 600
FUNCTION_LINES, NODE_METHOD_LINES, KERNEL_LINES = 60, 25, 200
PARAMETERS = 10
FAMILY_MACHINERY = {"__init__.py", "table.py"}  # beside the tables: what reads them
DECLARATIONS = {"define_schema"}  # a node's table of inputs, not a body


Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Finding:
    """One breach. `path:rule` is its key in the table of exceptions."""

    path: str
    rule: str
    text: str

    @property
    def key(self) -> str:
        return f"{self.path}:{self.rule}"


@dataclass(frozen=True)
class Import:
    """One imported module, absolute or resolved against the pack's root (`ours`)."""

    module: str  # "torch.nn", or "svdquant/core/int4" when ours
    line: int
    ours: bool


def findings(root: Path) -> list[Finding]:
    """Every breach in the Python and C++ files of the pack at `root`."""
    found: list[Finding] = []
    for file in _sources(root, ".py"):
        path = file.relative_to(root).as_posix()
        tree = ast.parse(file.read_text())
        found += _import_findings(path, tree, root)
        found += _unpickling(path, tree)
        found += _size_findings(path, tree, len(file.read_text().splitlines()))
    for file in _sources(root, ".cu", ".cuh", ".cpp", ".h"):
        found += _csrc_findings(file.relative_to(root).as_posix(), file.read_text())
    return found


def room_of(path: str) -> str | None:
    """The room of a file; None for commands and tests, and for svdquant/__init__.py, which holds no code."""
    return next(
        (room for folder, room in ROOMS.items() if path == folder or path.startswith(f"{folder}/")), None
    )


def imports(path: str, tree: ast.Module, root: Path) -> Iterator[Import]:
    """Every module that a file imports, wherever in it the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(name.name, node.lineno, False) for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield Import(node.module or "", node.lineno, False)
            yield from (Import(f"{node.module}.{name.name}", node.lineno, False) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (Import(target, node.lineno, True) for target in _resolve(path, node, root))


def _resolve(path: str, node: ast.ImportFrom, root: Path) -> list[str]:
    """Files that a relative import names: `from ..core import int4` in adapters is svdquant/core/int4."""
    base = Path(path).parents[node.level - 1] if node.level <= len(Path(path).parents) else Path("..")
    target = base.joinpath(*(node.module or "").split("."))
    inner = [(target / name.name) for name in node.names]
    modules = [p for p in inner if (root / p).is_dir() or (root / p).with_suffix(".py").is_file()]
    return [p.as_posix() for p in modules or [target]]


def _import_findings(path: str, tree: ast.Module, root: Path) -> Iterator[Finding]:
    room = room_of(path)
    for item in imports(path, tree, root):
        where, top = f"{path}:{item.line}", item.module.split(".")[0]
        if top in UNSAFE and not path.startswith("tests/"):  # tests make such files, to be refused
            yield Finding(path, "unsafe", f"{where} imports {top}: only safetensors is read")
        if item.module.startswith("torch.utils.cpp_extension") and path != "svdquant/kernels/jit.py":
            yield Finding(path, "compiler", f"{where}: only svdquant/kernels/jit.py uses torch's compiler")
        if path.split("/")[0] in OUTSIDE:
            continue
        if item.ours:
            yield from _direction(path, room, item)
        else:
            yield from _package(path, room, item)


def _unpickling(path: str, tree: ast.Module) -> Iterator[Finding]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            yield Finding(path, "unsafe", f"{path}:{node.lineno}: torch.load opens a pickle")


def _direction(path: str, room: str | None, item: Import) -> Iterator[Finding]:
    target = room_of(item.module) or room_of(f"{item.module}.py")
    if target != room and target not in BELOW.get(room or "", set()):
        names = f"{room or path} imports {target or item.module}"
        yield Finding(path, "direction", f"{path}:{item.line}: {names}, against the arrows")


def _package(path: str, room: str | None, item: Import) -> Iterator[Finding]:
    top, where = item.module.split(".")[0], f"{path}:{item.line}"
    allowed = PACKAGES.get(room or "", set())
    if path.startswith("svdquant/adapters/families/"):
        allowed = allowed - HOST
    if top in OURS:
        yield Finding(path, "relative", f"{where}: {item.module} is ours, and ours is imported relatively")
    elif top not in allowed and top not in sys.stdlib_module_names:
        yield Finding(path, "package", f"{where}: {room or path} imports {top}")


def _size_findings(path: str, tree: ast.Module, lines: int) -> Iterator[Finding]:
    folder, _, name = path.rpartition("/")
    table = folder == "svdquant/adapters/families" and name not in FAMILY_MACHINERY
    cap = FAMILY_LINES if table else PYTHON_LINES
    if lines > cap:
        yield Finding(path, "lines", f"{path}: {lines} lines, cap {cap}")
    functions = [node for node in ast.walk(tree) if isinstance(node, Function)]
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    methods = [node for body in classes for node in body.body] if room_of(path) == "nodes" else []
    for node in functions:
        short = node in methods and node.name not in DECLARATIONS
        yield from _function_findings(path, node, NODE_METHOD_LINES if short else FUNCTION_LINES)


def _function_findings(path: str, node: Function, cap: int) -> Iterator[Finding]:
    where = f"{path}:{node.lineno} {node.name}"
    length = node.end_lineno - node.lineno + 1
    if length > cap:
        yield Finding(path, f"length of {node.name}", f"{where}: {length} lines, cap {cap}")
    words = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    count = sum(word.arg not in ("self", "cls") for word in words)
    if count > PARAMETERS:
        yield Finding(path, f"parameters of {node.name}", f"{where}: {count} parameters, cap {PARAMETERS}")


def unresolved(root: Path) -> Iterator[str]:
    """Imports of ours that lead nowhere; those of tests that run inside a host only are met too late otherwise."""
    for file in _sources(root, ".py"):
        for node in ast.walk(ast.parse(file.read_text())):
            target = _target(file, node, root)
            for name in node.names if target else ():
                if not (_is_module(target / name.name) or name.name in _top_names(target)):
                    where = f"{file.relative_to(root).as_posix()}:{node.lineno}"
                    yield f"{where}: no {name.name} in {target.relative_to(root).as_posix()}"


def _target(file: Path, node: ast.AST, root: Path) -> Path | None:
    """The module or folder of ours that an import takes names from."""
    if not isinstance(node, ast.ImportFrom):
        return None
    first, *inner = (node.module or "").split(".")
    if node.level:
        return file.parents[node.level - 1].joinpath(*filter(None, [first, *inner]))
    return root.joinpath(*inner) if first == "svdquant_nodes" else None


def _is_module(path: Path) -> bool:
    return path.is_dir() or path.with_suffix(".py").is_file()


@cache
def _top_names(module: Path) -> set[str]:
    """What a module defines or imports."""
    file = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())) if file.is_file() else ():
        if isinstance(node, (*Function.__args__, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {name.asname or name.name for name in node.names}
    return found


def _csrc_findings(path: str, text: str) -> Iterator[Finding]:
    lines = len(text.splitlines())
    if lines > CSRC_LINES:
        yield Finding(path, "lines", f"{path}: {lines} lines, cap {CSRC_LINES}")
    if re.search(r"#include\s*<(torch|ATen|c10)/", text) and path != "csrc/ops.cpp":
        yield Finding(path, "torch", f"{path}: only csrc/ops.cpp includes torch")
    for name, length in kernel_lengths(text):
        if length > KERNEL_LINES:
            yield Finding(path, f"length of {name}", f"{path} {name}: {length} lines, cap {KERNEL_LINES}")


def kernel_lengths(text: str) -> Iterator[tuple[str, int]]:
    """Name and lines of each __global__ function that has a body."""
    for start in re.finditer(r"__global__([^;{]*)\{", text):
        signature = re.sub(r"__launch_bounds__\s*\([^()]*\)", "", start.group(1))
        depth, end = 1, start.end()
        while depth and end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        yield re.search(r"(\w+)\s*\(", signature).group(1), text.count("\n", start.start(), end) + 1


def _sources(root: Path, *suffixes: str) -> list[Path]:
    """The pack's own files: not those in hidden folders, where the set-up keeps foreign ones."""
    found: list[Path] = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if not name.startswith(".")]
        found += [Path(folder, name) for name in names if Path(name).suffix in suffixes]
    return sorted(found)
