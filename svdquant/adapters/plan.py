"""What to write: the jobs, the tensors around them, and the layout of the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from ...loaders.source import Job, SourceModel


@dataclass(frozen=True, eq=False)
class Plan:
    """What to write.

    family    shown to users
    source    the model under the names that jobs speak of
    jobs      the linears, in the file's order
    plain     the other tensors
    metadata  the header's strings
    dialect   the module of loaders/ that writes the file
    """

    family: str
    source: SourceModel
    jobs: tuple[Job, ...]
    plain: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    dialect: ModuleType
