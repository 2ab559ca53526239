"""Downloading weights from the hub: resumable, verified, and never half a file under the final name. No torch.

The hub's own `hf_hub_download` throws a half-loaded file away when its process ends. So the bytes are brought here,
into a partial file named after the content's tag, which the next attempt goes on with; when it is whole and has the
right checksum it is renamed to where the hub's cache keeps it, and the hub's library links it in.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal
from urllib.parse import urlparse

from alignprop_core._files import says_full
from alignprop_core.errors import WeightsError
from alignprop_core.specs import WeightsFile
from alignprop_core.weights.find import cached, packaged, verify

Progress = Callable[[int, int | None], None]
"""Called with the bytes that are here and, where the hub says so, all there will be."""

_SHA256 = re.compile(r"[0-9a-f]{64}")  # the hub tags large files with their sha256, small ones with a git hash


@dataclass(frozen=True)
class Fetched:
    """A weights file that is here now.

    Attributes:
        file: what was asked for.
        path: where it is.
        status: "fetched" now, "present" before, or "packaged" (ships inside an installed package).
        verified: how far it was checked: its "sha256", its "size" only, or "" where nothing is known of it.
    """

    file: WeightsFile
    path: Path
    status: Literal["fetched", "present", "packaged"]
    verified: Literal["sha256", "size", ""]


def fetch_weights(file: WeightsFile, *, folder: Path | None = None, progress: Progress | None = None) -> Fetched:
    """Bring a weights file to this machine, or find it here, and verify it.

    A file that is here already but has the wrong size or checksum is removed and fetched anew. Where neither is
    declared, the hub cache's own name of the content is its checksum; for a folder the hub is asked, if it answers.

    Args:
        file: what to fetch; one that ships in a package is only looked for.
        folder: put it there (as `folder/OWNER--NAME/FILE`, since many repositories have a model.safetensors) instead of
            into the hub's cache.
        progress: told of every piece that arrives.

    Raises:
        WeightsError: offline, not found, gated, no room, cut off, or the wrong checksum (the file is then removed).
    """
    if not file.repository:
        path = packaged(file.file, "This reward")
        verify(path, file, f"Reinstall {file.file.partition(':')[0]}.")
        return Fetched(file, path, "packaged", _checked(file))
    with _explained(file):
        target = None if folder is None else _place(folder, file)
        with _lock(file, target):
            here = cached(file) if target is None else target
            if here is not None and here.is_file():
                known = _known(file, here, asks=target is not None)
                if _is_right(here, known):
                    return Fetched(file, here, "present", _checked(known))
            path, sha256 = _bring(file, target, progress)
            return Fetched(file, path, "fetched", "sha256" if sha256 else "size")


def _place(folder: Path, file: WeightsFile) -> Path:
    return folder.expanduser().absolute() / file.repository.replace("/", "--") / file.file


def _known(file: WeightsFile, here: Path, *, asks: bool) -> WeightsFile:
    """Return what is known of a file that is here: what is declared, else what its name in the hub's cache says.

    Args:
        file: what is declared.
        here: the file; in the hub's cache a link to the content, which is named by its tag.
        asks: whether the hub is asked where there is no such name.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if file.sha256 is not None:
        return file
    tag, size = here.resolve().name, file.bytes
    if asks:
        try:
            found = get_hf_file_metadata(hf_hub_url(file.repository, file.file))
            tag, size = found.etag or "", size or found.size
        except (OfflineModeIsEnabled, *HfHubHTTPError.__bases__, OSError):
            return file  # the file is here, and what is said of it is that it is not verified
    return file.model_copy(update={"sha256": _sha256(tag), "bytes": size})


def _sha256(tag: str) -> str | None:
    return tag if _SHA256.fullmatch(tag) else None


def _bring(file: WeightsFile, target: Path | None, progress: Progress | None) -> tuple[Path, str | None]:
    """Download a file to its place; return it and the sha256 it was held to, if one is known."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    url = hf_hub_url(file.repository, file.file)
    found = get_hf_file_metadata(url)
    tag = found.etag or ""
    sha256 = (file.sha256 or "").lower() or _sha256(tag)
    expected = WeightsFile(repository=file.repository, file=file.file, sha256=sha256, bytes=file.bytes or found.size)
    _check_offer(file, found.size, tag)

    final = target if target is not None else _blob(file, tag)
    partial = final.with_name(f".{final.name}.{tag[:16]}.part")
    final.parent.mkdir(parents=True, exist_ok=True)
    headers: dict[str, Any] = _hub_utilities().build_hf_headers()
    if urlparse(found.location).netloc != urlparse(url).netloc:
        headers.pop("authorization", None)  # the token is for the hub, not for the store it points to
    _download(found.location, partial, headers, found.size, progress)
    try:
        verify(partial, expected, "It was removed; fetch it again.")
    except WeightsError:
        partial.unlink()
        raise
    os.replace(partial, final)
    if target is not None:
        return target, sha256
    return Path(hf_hub_download(file.repository, file.file)), sha256


def _download(url: str, partial: Path, headers: dict[str, Any], size: int | None, progress: Progress | None) -> None:
    """Append to `partial` what it lacks."""
    from huggingface_hub.file_download import http_get

    done = partial.stat().st_size if partial.is_file() else 0
    if size is not None and done > size:
        partial.unlink()
        done = 0
    if size is not None and (free := shutil.disk_usage(partial.parent).free) < size - done:
        raise WeightsError(
            f"No room in {partial.parent}: {(size - done) / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free. "
            "Free some space, or choose another folder with --to or HF_HOME."
        )
    with open(partial, "ab") as stream:
        sink: Any = _Counted(stream, size, progress)
        http_get(url, sink, resume_size=done, headers=headers, expected_size=size)
        stream.flush()
        os.fsync(stream.fileno())


class _Counted:
    """A file opened for appending that tells of what is written to it."""

    def __init__(self, stream: IO[bytes], size: int | None, progress: Progress | None) -> None:
        self._stream, self._size, self._progress = stream, size, progress

    def write(self, data: bytes) -> int:
        written = self._stream.write(data)
        if self._progress is not None:
            self._progress(self._stream.tell(), self._size)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _blob(file: WeightsFile, tag: str) -> Path:
    """Where the hub's cache keeps the content of a file."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    name: str = repo_folder_name(repo_id=file.repository, repo_type="model")
    return Path(constants.HF_HUB_CACHE) / name / "blobs" / tag


def _check_offer(file: WeightsFile, size: int | None, tag: str) -> None:
    """Refuse before the download what could only be refused after it: the repository holds another file by now."""
    wrong = ""
    if file.bytes is not None and size is not None and size != file.bytes:
        wrong = f"{size:,} bytes where {file.bytes:,} are expected"
    elif file.sha256 is not None and _sha256(tag) not in (None, file.sha256.lower()):
        wrong = f"sha256 {tag} where {file.sha256} is expected"
    if wrong:
        raise WeightsError(
            f"{file.repository} offers another {file.file} than this version of the plugin knows: {wrong}. Nothing was "
            "fetched. Update the plugin; or fetch the file yourself and name it with the option weights: PATH."
        )


def _is_right(path: Path, file: WeightsFile) -> bool:
    """Whether a file that is here is the right one; a wrong one is removed."""
    try:
        verify(path, file, "")
    except WeightsError:
        content = path.resolve()  # in the hub's cache the name is a link to the content
        path.unlink()
        content.unlink(missing_ok=True)
        return False
    return True


def _checked(file: WeightsFile) -> Literal["sha256", "size", ""]:
    return "sha256" if file.sha256 is not None else "size" if file.bytes is not None else ""


def _hub_utilities() -> Any:
    """The hub library's documented helpers, which its types do not list."""
    from huggingface_hub import utils

    return utils


@contextmanager
def _lock(file: WeightsFile, target: Path | None) -> Iterator[None]:
    """Let one process at a time bring a file; another waits, then finds it here."""
    from huggingface_hub import constants

    name = hashlib.sha256(f"{file.repository}/{file.file}>{target or ''}".encode()).hexdigest()[:32]
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / "alignprop" / f"{name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with _hub_utilities().WeakFileLock(lock):
        yield


@contextmanager
def _explained(file: WeightsFile) -> Iterator[None]:
    """Turn the errors of the hub's library and of the disk into one clear message."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    what = f"{file.file} of {file.repository}"
    page = f"{constants.ENDPOINT}/{file.repository}"
    network: tuple[Any, ...] = HfHubHTTPError.__bases__  # the errors of the HTTP library it uses, which has changed
    try:
        yield
    except GatedRepoError as error:
        raise WeightsError(
            f"{what} is gated: ask for access on {page}, then log in with `hf auth login` (or set HF_TOKEN)."
        ) from error
    except RepositoryNotFoundError as error:
        raise WeightsError(
            f"There is no repository {file.repository} at {constants.ENDPOINT}, or it is private: check its name; if "
            "it is yours, log in with `hf auth login` (or set HF_TOKEN)."
        ) from error
    except EntryNotFoundError as error:
        raise WeightsError(f"{file.repository} has no file {file.file}: see {page}/tree/main.") from error
    except HFValidationError as error:
        raise WeightsError(f"{file.repository} is no repository id of the hub: {error}.") from error
    except OfflineModeIsEnabled as error:
        raise WeightsError(
            f"{what} is not here, and HF_HUB_OFFLINE forbids fetching it. Unset it, or fetch the file elsewhere from "
            f"{page}/resolve/main/{file.file} and name it with the option weights: PATH."
        ) from error
    except (*network, OSError) as error:
        if isinstance(error, OSError) and says_full(error, Path(constants.HF_HUB_CACHE)):
            raise WeightsError(
                f"No room to write {what}: {error.strerror or error}. What has come is kept: free some space, then "
                "fetch it again; or choose another folder with --to or HF_HOME."
            ) from error
        if isinstance(error, PermissionError):
            raise WeightsError(
                f"Cannot write {error.filename}: {error.strerror}. Choose another folder with --to or HF_HOME."
            ) from error
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise WeightsError(
            f"Fetching {what} from {constants.ENDPOINT} failed: {reason}. What has come is kept; fetch it again to go "
            "on from there."
        ) from error
