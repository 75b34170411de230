"""Write a safetensors file tensor by tensor: one layer in memory, and a whole file or none.

Room for the header is kept at the front and filled in last (the format allows trailing spaces there), so that
nothing about a layer must be known before its turn. Tensors whose size is not a multiple of 8 bytes wait for the
end, largest elements first, so that every tensor lies aligned in a file that may have no holes.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from ..svdquant.core.weights import LinearWeights
from .tensorfile import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}
ENTRY_BYTES = 160  # bound on one header entry without the name: four dimensions and two offsets of 16 digits
TENSORS_PER_LAYER = 10  # bound over all dialects we write
LONGEST_TAIL = 24  # bound on "smooth_factor_orig" and its like
UNPORTABLE = set('<>:"|?*')  # in a file's name on Windows
METADATA_BYTES = 2048  # what an encoder may add to the metadata


class DiskFull(ValueError):
    """No space left on the device; the sentence names the file."""

    # ComfyUI shows a type with its module, which for a pack is a path.
    __module__ = "builtins"


Encode = Callable[[LinearWeights], Mapping[str, Tensor]]
Progress = Callable[[str, int, int], None]


class TensorWriter:
    """A safetensors file in the making; it takes its final name when the `with` block ends well.

    path      the file to make or replace
    metadata  strings for the header, read when the file is finished
    room      bytes to keep for the header, see `header_room`
    """

    def __init__(self, path: Path, metadata: Mapping[str, str], room: int) -> None:
        self._path = Path(path)
        self._part = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}.part")
        self._metadata = metadata
        self._room = room + -room % 8
        self._entries: dict[str, object] = {}
        self._late: list[tuple[str, Tensor]] = []
        self._position = 0

    def __enter__(self) -> TensorWriter:
        folder = self._path.parent
        if not folder.is_dir():
            raise ValueError(f"{self._path.name}: expected a folder {folder}, got none. Make it first.")
        if self._path.is_dir():
            raise ValueError(f"{self._path}: expected a file name, got a folder. Add the file's name.")
        try:
            self._stream = self._part.open("wb")
        except PermissionError:
            raise ValueError(
                f"{self._path.name}: cannot be written in {folder}, permission denied. Name a folder you may write to."
            ) from None
        self._stream.seek(8 + self._room)
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor now, or keep it for the end if it would leave the next one misaligned."""
        if tensor.nbytes % 8:
            self._late.append((name, tensor))
        else:
            self._write(name, tensor)

    def _write(self, name: str, tensor: Tensor) -> None:
        if name in self._entries:
            raise ValueError(f"{self._path.name}: {name}: expected one tensor of this name, got two.")
        end = self._position + tensor.nbytes
        self._entries[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._position, end],
        }
        if tensor.nbytes:
            self._stream.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._position = end

    def _finish(self) -> None:
        for name, tensor in sorted(self._late, key=lambda item: -item[1].dtype.itemsize):
            self._write(name, tensor)
        first = {"__metadata__": dict(self._metadata)} if self._metadata else {}
        header = json.dumps({**first, **self._entries}, separators=(",", ":")).encode()
        if len(header) > self._room:
            raise RuntimeError(f"{self._path.name}: header of {len(header)} bytes, room for {self._room}.")
        self._stream.seek(0)
        self._stream.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._stream:
                if kind is None:
                    self._finish()
            if kind is None:
                self._part.replace(self._path)
        except PermissionError:
            raise ValueError(
                f"{self._path.name}: cannot be replaced, since a program has it open. Close it, or name another file."
            ) from None
        finally:
            self._part.unlink(missing_ok=True)


def header_room(names: Iterable[str], metadata: Mapping[str, str]) -> int:
    """Bytes that a header with these names takes at most; `metadata` may still grow by METADATA_BYTES."""
    entries = sum(len(json.dumps(name)) + ENTRY_BYTES for name in names)
    return entries + len(json.dumps(dict(metadata))) + METADATA_BYTES


def checkpoint_room(layers: Iterable[str], plain: Iterable[str], metadata: Mapping[str, str]) -> int:
    """Bytes kept for the header of a checkpoint with these layers and other tensors."""
    tails = [f"{name}.{'x' * LONGEST_TAIL}" for name in layers for _ in range(TENSORS_PER_LAYER)]
    return header_room([*tails, *plain], metadata)


def write_checkpoint(
    path: Path,
    layers: Mapping[str, LinearWeights],
    plain: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    encode: Encode,
    *,
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint, one layer at a time.

    layers    name -> LinearWeights; asked for once each, in order, so a lazy mapping never holds two
    plain     name -> Tensor, written as it is
    metadata  the header's strings; read last, so that `encode` may complete them
    encode    LinearWeights -> {last part of the name: tensor}
    progress  called with (layer name, layers done, layers in all)

    Raises DiskFull, or ValueError for a missing folder or int8 layers; the target then is as it was.
    """
    try:
        with TensorWriter(path, metadata, checkpoint_room(layers, plain, metadata)) as out:
            for done, name in enumerate(layers, 1):
                _add_layer(out, name, encode(_storable(name, layers[name])))
                if progress:
                    progress(name, done, len(layers))
            for name in plain:
                out.add(name, plain[name])
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DiskFull(
            f"{Path(path).name}: the disk is full; nothing was written. Free space in {Path(path).parent}."
        ) from None


def _add_layer(out: TensorWriter, name: str, tensors: Mapping[str, Tensor]) -> None:
    """A function of its own, so that nothing holds a layer's last tensor while the next layer is made."""
    for tail, tensor in tensors.items():
        out.add(f"{name}.{tail}", tensor)


def _storable(name: str, weights: LinearWeights) -> LinearWeights:
    if weights.spec.format == "int8":
        raise ValueError(
            f"{name}: expected weights as files hold them, got int8, which is for computing only. "
            "Write the 4-bit layer that it was made of."
        )
    return weights
