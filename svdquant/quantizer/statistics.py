"""What a model's linears read while it runs: a fair choice of rows, means and extremes, and nothing that grows.

Kept for each input of K channels, however long the run:

    rows            [T, K]   bf16   tokens chosen evenly from all that were seen
    held            [H, K]   bf16   the same from forward calls set apart, on which errors are reported
    mean, low, high [K]      fp32   over every token

T rows take 2 T K bytes. A second moment would take 4 K² - for FLUX.1's K = 12288 as much as 24,000 rows - and would
not tell how a token is rounded; moments are made from the rows when a layer's turn comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...loaders.tensorfile import open_file
from ...loaders.writer import write_checkpoint
from .task import Sample

FIELDS = ("rows", "held", "mean", "low", "high")
HELD_CALLS = 8  # about one call in so many is set apart


class Reservoir:
    """An even choice of `size` rows from all that pass: each row draws a number, the smallest stay."""

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self._size, self._generator = size, generator
        self._drawn = torch.zeros(0)
        self.rows: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Offer rows [M, K]; they are copied to main memory in bf16 if they stay."""
        drawn = torch.rand(len(rows), generator=self._generator)
        limit = self._drawn.max() if len(self._drawn) == self._size else 1.0
        chosen = (drawn < limit).nonzero().flatten()
        fresh = rows[chosen.to(rows.device)].to("cpu", torch.bfloat16)
        drawn = torch.cat((self._drawn, drawn[chosen]))
        rows = fresh if self.rows is None else torch.cat((self.rows, fresh))
        self._drawn, kept = drawn.topk(min(self._size, len(drawn)), largest=False)
        self.rows = rows[kept].clone()


class Recorder:
    """Statistics of one input, in the making."""

    def __init__(self, tokens: int, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._fit = Reservoir(tokens, self._generator)
        self._held = Reservoir(max(tokens // 4, 1), self._generator)
        self._sum: Tensor | None = None
        self._low = self._high = None
        self._count = self._calls = 0

    def see(self, x: Tensor) -> None:
        """Take in what a forward call read: [..., K]."""
        rows = x.detach().reshape(-1, x.shape[-1])
        apart = self._calls and int(torch.randint(HELD_CALLS, (), generator=self._generator)) == 0
        (self._held if apart else self._fit).add(rows)
        low, high, total = (t.float().cpu() for t in (*rows.aminmax(dim=0), rows.sum(0, dtype=torch.float32)))
        self._sum = total if self._sum is None else self._sum + total
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)
        self._count, self._calls = self._count + len(rows), self._calls + 1

    def sample(self) -> Sample:
        """What was seen so far. A run of very few calls gives up an eighth of its rows instead of whole calls."""
        rows, held = self._fit.rows, self._held.rows
        if held is None:
            rows, held = rows[len(rows) // HELD_CALLS :], rows[: max(len(rows) // HELD_CALLS, 1)]
        return Sample(rows, held, self._sum / self._count, self._low, self._high)


class Statistics(Mapping[str, Sample]):
    """Samples by the name of the linear that read them; `see` records, `save` and `load` keep them in a file."""

    def __init__(self, tokens: int = 2048, seed: int = 0) -> None:
        self._tokens, self._seed = tokens, seed
        self._recorders: dict[str, Recorder] = {}

    def see(self, name: str, x: Tensor) -> None:
        """Take in what the linear `name` read in one forward call: [..., K]."""
        if name not in self._recorders:
            self._recorders[name] = Recorder(self._tokens, self._seed + len(self._recorders))
        self._recorders[name].see(x)

    def __getitem__(self, name: str) -> Sample:
        return self._recorders[name].sample()

    def __iter__(self) -> Iterator[str]:
        return iter(self._recorders)

    def __len__(self) -> int:
        return len(self._recorders)


def save(path: Path, statistics: Mapping[str, Sample]) -> None:
    """Write samples to a safetensors file."""
    tensors = {
        f"{name}.{field}": getattr(sample, field) for name, sample in statistics.items() for field in FIELDS
    }
    write_checkpoint(path, {}, tensors, {"svdquant": "calibration"}, lambda weights: {})


def load(path: Path) -> Mapping[str, Sample]:
    """Samples from a file, memory-mapped. ValueError if it holds none."""
    files = open_file(path)
    names = [name.removesuffix(".rows") for name in files if name.endswith(".rows")]
    missing = [f"{n}.{field}" for n in names for field in FIELDS if f"{n}.{field}" not in files]
    if not names or missing:
        lacking = missing[0] if missing else "any .rows"
        raise ValueError(
            f"{path.name}: expected calibration statistics, got no tensor {lacking}. Calibrate again."
        )
    return {name: Sample(*(files[f"{name}.{field}"] for field in FIELDS)) for name in names}
