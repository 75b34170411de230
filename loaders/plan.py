"""What a file is to hold: the jobs, the tensors around them, and how it is laid out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from .source import Change, Job, SourceModel, plain_tensors


@dataclass(frozen=True, eq=False)
class Plan:
    """What to write.

    family    shown to users
    source    the model under the names that jobs speak of
    jobs      the linears, in the file's order
    write     writes the file: (path, layers, plain, metadata) as in writer.write_checkpoint
    mixed     the same for a file that mixes precisions, ranks and 16-bit linears
    metadata  the header's strings
    rename    a source name -> (name in the file, name in the source, change) of a tensor that stays 16-bit
    """

    family: str
    source: SourceModel
    jobs: tuple[Job, ...]
    write: Callable[..., None]
    mixed: Callable[..., None]
    metadata: Mapping[str, str]
    rename: Callable[[str], tuple[str, str, Change]] = lambda name: (name, name, None)

    @property
    def plain(self) -> Mapping[str, Tensor]:
        """The tensors that no job takes, lazily."""
        used = {f"{job.source}.{end}" for job in self.jobs for end in ("weight", "bias")}
        return plain_tensors(
            self.source, [self.rename(name) for name in self.source.shapes if name not in used]
        )

    def mixing(self, jobs: Iterable[Job]) -> Plan:
        """The plan with other forms of its linears; those in 16 bits (plain) stay with the tensors around."""
        jobs = [job for job in centred_together(list(jobs)) if job.precision != "plain"]
        if not jobs:
            raise ValueError(
                f"{self.source.path.name}: expected linears to quantize, got 16 bits for all of them. "
                "Ask for a smaller file or a larger error."
            )
        return replace(self, jobs=tuple(jobs), write=self.mixed)


def centred_together(jobs: list[Job]) -> list[Job]:
    """Take centring back where a 16-bit linear would have to do its part: it keeps the bias that it has."""
    plain = [job for job in jobs if job.precision == "plain"]
    lost = {job.center for job in plain} | {fold.input for job in plain for fold in job.folds}
    return [
        replace(
            job,
            center=None if job.center in lost else job.center,
            folds=tuple(fold for fold in job.folds if fold.input not in lost),
        )
        for job in jobs
    ]
