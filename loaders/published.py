"""Names of published checkpoints, and what a name or an owner/repo/path/file.safetensors means.

Nothing here opens a connection. The names follow the repositories of nunchaku-tech on the Hugging Face Hub.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from huggingface_hub import hf_hub_url
from huggingface_hub.utils import validate_repo_id

ENDING = ".safetensors"


@dataclass(frozen=True)
class Published:
    """A checkpoint of the built-in list: its short name, where it is, and ComfyUI's folder for it."""

    name: str
    source: str
    folder: str = "diffusion_models"


_FLUX = ("dev", "schnell", "fill-dev", "canny-dev", "depth-dev", "kontext-dev", "krea-dev")
_RANKED = ("qwen-image", "qwen-image-edit", "qwen-image-edit-2509", "z-image-turbo")


def _published() -> dict[str, Published]:
    """Rows are: short name, repository after nunchaku-tech/nunchaku-, file with {p} for a precision, precisions."""
    both, int4 = ("int4", "fp4"), ("int4",)
    rows = [
        *((f"flux.1-{x}", f"flux.1-{x}", f"svdq-{{p}}_r32-flux.1-{x}", both) for x in _FLUX),
        *((f"{x}-r{r}", x, f"svdq-{{p}}_r{r}-{x}", both) for x in _RANKED for r in (32, 128)),
        *((x, x, f"svdq-{{p}}_r32-{x}", int4) for x in ("sdxl", "sdxl-turbo")),
    ]
    listed = [
        Published(f"{name}-{p}", f"nunchaku-tech/nunchaku-{repo}/{file.format(p=p)}{ENDING}")
        for name, repo, file, precisions in rows
        for p in precisions
    ]
    t5 = Published("t5xxl-int4", f"nunchaku-tech/nunchaku-t5/awq-int4-flux.1-t5xxl{ENDING}", "text_encoders")
    return {entry.name: entry for entry in [*listed, t5]}


PUBLISHED = _published()


@dataclass(frozen=True)
class Source:
    """One file of one repository."""

    repo: str
    file: str
    revision: str = "main"

    @property
    def name(self) -> str:
        """The file's name in the model folder: subfolders of the repository are dropped."""
        return PurePosixPath(self.file).name

    def url(self, revision: str | None = None) -> str:
        endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
        return hf_hub_url(self.repo, self.file, revision=revision or self.revision, endpoint=endpoint)


_HUBS = r"https://(?:huggingface\.co|hf\.co|hf-mirror\.com)/"
_PAGE = re.compile(
    _HUBS + r"(?P<repo>[^/]+/[^/]+)/(?:resolve|blob)/(?P<revision>[^/]+)/(?P<file>[^?#]+)(?:[?#].*)?"
)


def parse(source: str) -> Source:
    """A name of `PUBLISHED`, or owner/repo/path/file.safetensors with an optional @revision, or a file's address.

    Raises ValueError for anything else, other kinds of files included: only safetensors is read.
    """
    text = PUBLISHED[source].source if source in PUBLISHED else source
    address = _PAGE.fullmatch(text)
    text = address.expand(r"\g<repo>/\g<file>@\g<revision>") if address else text
    path, _, revision = text.partition("@")
    parts = path.split("/")
    plain = all(re.fullmatch(r"[\w.+-]+", part) and part not in (".", "..") for part in parts)
    if len(parts) < 3 or not plain:
        raise ValueError(
            f"{source}: expected a published name ({', '.join(list(PUBLISHED)[:2])}, ...) or "
            f"owner/repo/path/file{ENDING}, optionally with @revision. `tools/svdquant fetch --list` shows the names."
        )
    if not path.endswith(ENDING):
        raise ValueError(
            f"{source}: expected a {ENDING} file. Other formats can run code, so none is fetched."
        )
    validate_repo_id("/".join(parts[:2]))
    return Source("/".join(parts[:2]), "/".join(parts[2:]), revision or "main")
