"""Published checkpoints, from the Hugging Face Hub into a model folder.

Nothing is downloaded unless it is asked for by name. The hub's own client finds the file, authenticates and
transfers it (HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean there); the partial file is ours and lies
beside the final name, because the client's own is thrown away with the process and a 7 GB file is not.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import get_hf_file_metadata
from huggingface_hub.file_download import HfFileMetadata, http_get
from huggingface_hub.utils import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    build_hf_headers,
)

from .published import PUBLISHED, Source, parse

__all__ = ["PUBLISHED", "Source", "Unreachable", "fetch", "parse"]

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
_CHUNK = 1 << 22


class Unreachable(ValueError):
    """The hub did not answer: offline mode, no network, or a connection that broke for good."""

    # ComfyUI shows a type with its module, which for a pack is a path.
    __module__ = "builtins"


def fetch(source: str, folder: str | Path, *, progress: Progress | None = None, verify: bool = False) -> Path:
    """Bring a published checkpoint into a folder, once; a download that was cut goes on where it stopped.

    source    a name of `PUBLISHED`, or owner/repo/path/file.safetensors[@revision]
    folder    made if it does not exist
    progress  called with (bytes done, bytes in all); an exception it raises stops the download and keeps the part
    verify    compare the SHA-256 of a file that is already there, not its size alone

    Raises ValueError with what to do: bad name, no network, no access, no such file, no space, another file in the way.
    """
    wanted = parse(source)
    target = Path(folder) / wanted.name
    report = progress if progress is not None else lambda done, total: None
    try:
        remote = _look_up(wanted, target)
    except Unreachable as unreachable:
        if not target.is_file():
            raise
        log.warning("%s is used as it is: %s", target, unreachable)
        return target
    if target.exists():
        return _same(target, remote, verify=verify)
    part = target.with_name(f"{target.name}.{re.sub('[^0-9A-Za-z]', '', remote.etag or '')[:16]}.part")
    _transfer(wanted, remote, part, report)
    _check(part, wanted, remote)
    part.replace(target)
    return target


def _look_up(wanted: Source, target: Path) -> HfFileMetadata:
    """Ask the hub for the file's size, hash and commit."""
    with _explaining(wanted, target):
        remote = get_hf_file_metadata(wanted.url())
    if remote.size is None or remote.commit_hash is None:
        raise ValueError(
            f"{wanted.url()}: not the answer of a Hugging Face Hub. Check HF_ENDPOINT and your proxy."
        )
    return remote


def _same(target: Path, remote: HfFileMetadata, *, verify: bool) -> Path:
    """The file that is already there, if it is the published one."""
    found = target.stat().st_size
    if found != remote.size:
        difference = f"{found} bytes, the published one {remote.size}"
    elif verify and _is_sha256(remote.etag) and _sha256(target) != remote.etag:
        difference = "another SHA-256 than the published one"
    else:
        return target
    raise ValueError(
        f"{target}: there is another file of this name, with {difference}. Move it away or choose another folder."
    )


def _transfer(wanted: Source, remote: HfFileMetadata, part: Path, report: Progress) -> None:
    """Fill the part, connection after connection, as long as each one brings something."""
    done = _size(part)
    while True:
        try:
            _append(wanted, remote, part, report)
            return
        except Unreachable:
            before, done = done, _size(part)
            if done <= before:
                raise


def _append(wanted: Source, remote: HfFileMetadata, part: Path, report: Progress) -> None:
    """Append to the part what it lacks. The commit is pinned, so that both ends are of one file."""
    total = remote.size or 0
    with _explaining(wanted, part, total):
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            done, free = file.tell(), shutil.disk_usage(part.parent).free
            if free < total - done:
                raise OSError(errno.ENOSPC, f"{free} bytes are free")
            http_get(
                wanted.url(remote.commit_hash),
                _Reporting(file, total, report),  # type: ignore[arg-type]
                resume_size=done,
                headers=build_hf_headers(),
                expected_size=total,
                displayed_filename=wanted.name,
            )
    report(total, total)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class _Reporting:
    """A file that reports how far it has been written: never backwards, whatever is written again."""

    def __init__(self, file: BinaryIO, total: int, report: Progress) -> None:
        self._file, self._total, self._report = file, total, report
        self._done = file.tell()
        report(self._done, total)

    def write(self, data: bytes) -> int:
        count = self._file.write(data)
        self._done = max(self._done, self._file.tell())
        self._report(min(self._done, self._total), self._total)
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _check(part: Path, wanted: Source, remote: HfFileMetadata) -> None:
    """Refuse a part whose bytes are not the published ones; it cannot be continued, so it goes."""
    if _is_sha256(remote.etag) and _sha256(part) != remote.etag:
        part.unlink()
        raise ValueError(
            f"{wanted.name}: the download is damaged (SHA-256 differs) and was removed. Run it again."
        )


def _is_sha256(etag: str | None) -> bool:
    return re.fullmatch("[0-9a-f]{64}", etag or "") is not None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _explaining(wanted: Source, target: Path, total: int = 0) -> Iterator[None]:
    """Turn what the client, the network or the disk raises into the error a user can act on."""
    try:
        yield
    except Exception as error:
        explained = _explained(error, wanted, target, total)
        if explained is error:
            raise
        raise explained from error


def _explained(error: Exception, wanted: Source, target: Path, total: int) -> Exception:
    by_hand = f"Or download {wanted.url()} elsewhere and put the file at {target.with_name(wanted.name)}."
    repo = f"https://huggingface.co/{wanted.repo}"
    if isinstance(error, OfflineModeIsEnabled):
        return Unreachable(
            f"{wanted.name}: offline mode is on. Unset HF_HUB_OFFLINE to download it. {by_hand}"
        )
    if isinstance(error, GatedRepoError):
        return ValueError(
            f"{wanted.repo}: access is gated. Accept its terms at {repo} and set HF_TOKEN. {by_hand}"
        )
    if isinstance(error, RevisionNotFoundError):
        return ValueError(f"{wanted.repo}: has no revision {wanted.revision!r}. See {repo}/branches.")
    if isinstance(error, EntryNotFoundError):
        return ValueError(f"{wanted.repo}: has no file {wanted.file}. See {repo}/tree/{wanted.revision}.")
    if isinstance(error, RepositoryNotFoundError):
        return ValueError(
            f"{wanted.repo}: no such repository, or it is private. Check the name, or set HF_TOKEN."
        )
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return _refused(error.response.status_code, wanted, by_hand)
    return _broken(error, wanted, target, total, by_hand)


def _refused(status: int, wanted: Source, by_hand: str) -> Exception:
    if status in (401, 403):
        return ValueError(
            f"{wanted.repo}: access denied ({status}). Set HF_TOKEN to a token that may read it. {by_hand}"
        )
    return Unreachable(f"{wanted.name}: the hub answered {status}. Try again later. {by_hand}")


def _broken(error: Exception, wanted: Source, target: Path, total: int, by_hand: str) -> Exception:
    """Disk and network. requests' errors are OSErrors, httpx's are not and have come under two module names."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG):
        return ValueError(
            f"{wanted.name}: no space in {target.parent} for {total} bytes ({error}). Free some, run it again."
        )
    if isinstance(error, OSError) and error.filename is not None:
        return ValueError(f"{target.parent}: cannot be written to ({error}). Choose another folder.")
    if not isinstance(error, OSError) and not type(error).__module__.startswith("http"):
        return error
    done = _size(target) if total else 0
    if done > total:  # a server that ignores ranges, below a client that does not notice
        target.unlink()
    kept = f"{done} of {total} bytes are kept, run it again to go on. " if 0 < done <= total else ""
    return Unreachable(
        f"{wanted.name}: cannot reach the hub ({error}). {kept}Check the connection. {by_hand}"
    )
