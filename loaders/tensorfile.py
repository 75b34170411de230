"""A safetensors file, or several that belong together, opened without trusting them.

    8 bytes   n, little-endian
    n bytes   {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, "__metadata__": {...}}
    the rest  tensor bytes, no holes, no overlaps; offsets count from here

The header is checked here and not left to the safetensors library, so that a user reads what is wrong and what
to do about it. Tensors are views of one private memory map: opening costs the header, bytes are read when touched.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
LARGEST = 2**56  # elements of a tensor, its empty axes not counted; torch fails at 2^63
HOST_PREFIX = "model.diffusion_model."  # full ComfyUI checkpoints carry it

_FOREIGN = {
    b"PK\x03\x04": "a zip archive, perhaps a PyTorch checkpoint under another name, which can run code",
    b"\x80\x02": "a Python pickle, which can run code",
    b"\x80\x03": "a Python pickle, which can run code",
    b"\x80\x04": "a Python pickle, which can run code",
    b"\x80\x05": "a Python pickle, which can run code",
    b"GGUF": "a GGUF file, which is another quantization",
    b"version https://git-lfs": "a Git LFS pointer, not the file it points to",
    b"<": "a web page, perhaps saved by a download that failed",
}
_AGAIN = "Download the file again."


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor; `begin` and `end` are byte positions in `file`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class TensorFile(Mapping[str, Tensor]):
    """Tensors by name, each a view of the memory-mapped file it lies in.

    path      the file, or the folder of the files
    metadata  the header's own strings
    info      name -> TensorInfo, from the headers alone
    """

    def __init__(self, path: Path, metadata: Mapping[str, str], info: Mapping[str, TensorInfo]) -> None:
        self.path = path
        self.metadata = dict(metadata)
        self.info = dict(info)
        self._maps: dict[Path, Tensor] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.info)

    def __len__(self) -> int:
        return len(self.info)

    def __contains__(self, name: object) -> bool:
        return name in self.info

    def __getitem__(self, name: str) -> Tensor:
        info = self.info[name]
        if info.begin == info.end:
            return torch.empty(info.shape, dtype=info.dtype)
        raw = self._map(info.file)[info.begin : info.end]
        if info.begin % info.dtype.itemsize:  # legal in the format, but torch cannot view it in place
            raw = raw.clone()
        return raw.view(info.dtype).reshape(info.shape)

    def _map(self, file: Path) -> Tensor:
        if file not in self._maps:
            size = file.stat().st_size
            self._maps[file] = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
        return self._maps[file]


def open_file(path: Path) -> TensorFile:
    """Open one safetensors file. ValueError if it is anything else, or damaged."""
    return join_files(path, [path])


def join_files(path: Path, files: Iterable[Path]) -> TensorFile:
    """Open several files as one mapping called `path`. ValueError if two hold the same tensor."""
    metadata: dict[str, str] = {}
    joined: dict[str, TensorInfo] = {}
    for file in files:
        strings, infos = read_header(file)
        metadata |= strings
        for stored, info in infos.items():
            name = stored.removeprefix(HOST_PREFIX)
            if name in joined:
                raise ValueError(
                    f"{path.name}: {name}: expected one tensor of this name, got two "
                    f"(in {joined[name].file.name} and {file.name}). Keep one of them."
                )
            joined[name] = info
    return TensorFile(path, metadata, joined)


def read_header(path: Path) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Metadata and tensor descriptions of a safetensors file, checked against the file's size.

    Raises ValueError for a missing, empty or truncated file, another format, a header that contradicts itself.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise ValueError(f"{path.name}: expected a safetensors file, got {found} at {path}. Check the path.")
    if not os.access(path, os.R_OK):
        raise ValueError(
            f"{path.name}: expected a file that may be read, got permission denied at {path}. Change its permissions."
        )
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(64)
        length = _header_length(path, start, size)
        stream.seek(8)
        entries = _parse(path, stream.read(length))
    metadata = _metadata(path, entries.pop("__metadata__", {}))
    infos = {name: _tensor_info(path, name, entry, 8 + length) for name, entry in entries.items()}
    _check_layout(path, infos, 8 + length, size)
    return metadata, infos


def _header_length(path: Path, start: bytes, size: int) -> int:
    if not start:
        raise ValueError(f"{path.name}: expected a safetensors file, got an empty one. {_AGAIN}")
    if start[8:9] != b"{":
        for magic, what in _FOREIGN.items():
            if start.startswith(magic):
                raise ValueError(
                    f"{path.name}: expected a safetensors file, got {what}. Get the .safetensors file."
                )
    length = int.from_bytes(start[:8], "little")
    if size < 8 or length > MAX_HEADER_BYTES:
        raise ValueError(f"{path.name}: expected a safetensors file, got something else. {_AGAIN}")
    if length > size - 8:
        raise ValueError(
            f"{path.name}: expected a header of {length} bytes, got {size - 8} (truncated). {_AGAIN}"
        )
    return length


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: header: expected JSON, got an error: {error}. {_AGAIN}") from None
    if not isinstance(entries, dict):
        raise ValueError(
            f"{path.name}: header: expected a JSON object, got {type(entries).__name__}. {_AGAIN}"
        )
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name, value in pairs:
        if name in entries:
            raise ValueError(f"the name {name!r} stands twice")
        entries[name] = value
    return entries


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise ValueError(f"{path.name}: __metadata__: expected strings by name, got {value!r:.80}. {_AGAIN}")
    return value


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(
            f"{path.name}: {name}: expected dtype, shape and data_offsets, got {entry!r:.80}. {_AGAIN}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(
            f"{path.name}: {name}: expected a dtype of {', '.join(DTYPES)}, got {dtype!r:.40}. "
            "The file was made by a newer tool than this pack."
        )
    if not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2:
        raise ValueError(
            f"{path.name}: {name}: expected shape and data_offsets as non-negative whole numbers, "
            f"got {shape!r:.40} and {offsets!r:.40}. {_AGAIN}"
        )
    begin, end = offsets
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != expected:
        raise ValueError(
            f"{path.name}: {name}: expected {expected} bytes for {dtype} {shape}, got offsets {offsets} "
            f"({end - begin} bytes). {_AGAIN}"
        )
    if math.prod(size or 1 for size in shape) > LARGEST:  # strides count past an empty axis
        raise ValueError(
            f"{path.name}: {name}: expected a shape within {LARGEST} elements, got {shape!r:.80}. {_AGAIN}"
        )
    return TensorInfo(DTYPES[dtype], tuple(shape), path, data_start + begin, data_start + end)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def _check_layout(path: Path, infos: Mapping[str, TensorInfo], data_start: int, size: int) -> None:
    position = data_start
    for name, info in sorted(infos.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            what = "overlaps the tensor before it" if info.begin < position else "leaves a hole before it"
            raise ValueError(
                f"{path.name}: {name}: expected to begin at byte {position - data_start}, "
                f"got {info.begin - data_start}: it {what}. {_AGAIN}"
            )
        position = info.end
    if position != size:
        what = "truncated" if size < position else "bytes after the last tensor"
        raise ValueError(
            f"{path.name}: expected {position} bytes by its header, got {size} ({what}). {_AGAIN}"
        )
