"""Downloading weights from the Hugging Face Hub, verified by size and sha256. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from alignprop_core._files import disk_is_full, space_problem
from alignprop_core.errors import WeightsError
from alignprop_core.specs import WeightsFile
from alignprop_core.weights.find import cached, packaged, title, verify

_SHA256 = re.compile(r"[0-9a-f]{64}")  # the hub tags large files with their sha256, small ones with a git hash


@dataclass(frozen=True)
class Fetched:
    """A weights file on this machine.

    Attributes:
        file: the requested file.
        path: its local path.
        status: "fetched" now, "present" before, or "packaged" (ships inside an installed package).
        verified: what was checked: its "sha256", its "size" only, or "" where neither is known.
    """

    file: WeightsFile
    path: Path
    status: Literal["fetched", "present", "packaged"]
    verified: Literal["sha256", "size", ""]


def fetch_weights(file: WeightsFile, *, folder: Path | None = None) -> Fetched:
    """Download a weights file unless it is on this machine, and verify it.

    A local file with the wrong size or checksum is removed and downloaded again. Where no checksum is declared, the
    one in the hub's cache is used; for a file in `folder` the hub is asked, if it answers. A download that fails leaves
    no file under the final name.

    Args:
        file: what to fetch; a file that ships in a package is only verified.
        folder: download to `folder/OWNER--NAME/FILE` (many repositories have a model.safetensors) instead of into the
            hub's cache.

    Raises:
        WeightsError: offline, not found, gated, no space, interrupted, or a wrong file (which is then removed).
    """
    if not file.repository:
        path = packaged(file.file, "This reward")
        verify(path, file, f"Reinstall {file.file.partition(':')[0]}.")
        return Fetched(file, path, "packaged", _checked(file))
    # A revision is part of the folder's name, so that two versions of a file do not replace each other.
    name = file.repository.replace("/", "--") + (f"@{file.revision}" if file.revision else "")
    target = None if folder is None else folder.expanduser().absolute() / name
    with _clear_errors(file, target):
        here = cached(file) if target is None else target / file.file
        if here is not None and here.is_file():
            known = _known(file, here, in_cache=target is None)
            try:
                _verify_or_remove(here, known)
            except WeightsError:
                pass  # the wrong file is removed, and the right one is downloaded
            else:
                return Fetched(file, here, "present", _checked(known))
        return _download(file, target)


def _download(file: WeightsFile, target: Path | None) -> Fetched:
    from huggingface_hub import constants, hf_hub_download

    offered = _offered(file)
    if problem := space_problem(target or Path(constants.HF_HUB_CACHE), offered.bytes or 0):
        raise WeightsError(f"{problem} Free some space, or choose another folder with --to or HF_HOME.")
    # Forced for a folder: otherwise a file in the hub's cache is copied there, which is not atomic.
    path = Path(
        hf_hub_download(
            file.repository,
            file.file,
            revision=file.revision or None,
            local_dir=target,
            force_download=target is not None,
        )
    )
    _verify_or_remove(path, offered)
    return Fetched(file, path, "fetched", _checked(offered))


def _offered(file: WeightsFile) -> WeightsFile:
    """Return the file with the hub's size and checksum where none is declared; refuse one that differs from these."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    found = get_hf_file_metadata(hf_hub_url(file.repository, file.file, revision=file.revision or None))
    sha256 = found.etag if _SHA256.fullmatch(found.etag or "") else None
    wrong = ""
    if file.bytes is not None and found.size not in (None, file.bytes):
        wrong = f"{found.size:,} bytes where {file.bytes:,} are expected"
    elif file.sha256 is not None and sha256 not in (None, file.sha256.lower()):
        wrong = f"sha256 {sha256} where {file.sha256} is expected"
    if wrong:
        raise WeightsError(
            f"{file.repository} offers another {file.file} than this version of the plugin knows: {wrong}. Nothing was "
            "fetched. Update the plugin; or fetch the file yourself and name it with the option weights: PATH."
        )
    return file.model_copy(update={"sha256": file.sha256 or sha256, "bytes": file.bytes or found.size})


def _known(file: WeightsFile, here: Path, *, in_cache: bool) -> WeightsFile:
    """Return a local file's declared size and checksum, else those of the hub."""
    if file.sha256 is not None:
        return file
    if in_cache:  # where the file is a link to its content, named by the hub's tag
        tag = here.resolve().name
        return file.model_copy(update={"sha256": tag}) if _SHA256.fullmatch(tag) else file
    try:
        return _offered(file)
    except _hub_errors():
        return file  # the file is here, and is reported as not verified


def _verify_or_remove(path: Path, file: WeightsFile) -> None:
    try:
        verify(path, file, "It was removed; fetch it again.")
    except WeightsError:
        content = path.resolve()  # in the hub's cache the name is a link to the content
        path.unlink()
        content.unlink(missing_ok=True)
        raise


def _checked(file: WeightsFile) -> Literal["sha256", "size", ""]:
    return "sha256" if file.sha256 is not None else "size" if file.bytes is not None else ""


def _hub_errors() -> tuple[type[Exception], ...]:
    """Return what the hub's library raises; its HTTP library, and so the errors' base class, differs by version."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    bases: tuple[Any, ...] = HfHubHTTPError.__bases__
    return (*bases, HFValidationError, OSError, RuntimeError)  # hf_xet raises RuntimeError


@contextmanager
def _clear_errors(file: WeightsFile, folder: Path | None) -> Iterator[None]:
    """Turn errors of the hub's library and of the disk into one clear message."""
    try:
        yield
    except _hub_errors() as error:
        raise WeightsError(_message(error, file, folder)) from error


def _message(error: Exception, file: WeightsFile, folder: Path | None) -> str:
    from huggingface_hub import constants, errors

    what, page = title(file), f"{constants.ENDPOINT}/{file.repository}"
    revision = file.revision or "main"
    log_in = "log in with `hf auth login` (or set HF_TOKEN)"
    again = "Nothing incomplete was kept; fetch it again"
    match error:
        case errors.GatedRepoError():
            return f"{what} is gated: ask for access on {page}, then {log_in}."
        case errors.RepositoryNotFoundError():
            return (
                f"There is no repository {file.repository} at {constants.ENDPOINT}, or it is private: check its name; "
                f"if it is yours, {log_in}."
            )
        case errors.RevisionNotFoundError():
            return f"{file.repository} has no revision {revision}: see {page}/commits/main."
        case errors.EntryNotFoundError() if not isinstance(error, errors.LocalEntryNotFoundError):
            return f"{file.repository} has no file {file.file}: see {page}/tree/{revision}."
        case errors.HFValidationError():
            return f"{file.repository} is not a repository id of the hub: {error}."
        case errors.OfflineModeIsEnabled():
            return (
                f"{what} is not on this machine, and HF_HUB_OFFLINE forbids fetching it. Unset it, or fetch the file "
                f"elsewhere from {page}/resolve/{revision}/{file.file} and name it with the option weights: PATH."
            )
        case PermissionError():
            return f"Cannot write {error.filename}: {error.strerror}. Choose another folder with --to or HF_HOME."
    if disk_is_full(error, folder or Path(constants.HF_HUB_CACHE)):
        return f"Not enough disk space for {what}. {again} when there is, or choose a folder with --to or HF_HOME."
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return f"Fetching {what} from {constants.ENDPOINT} failed: {reason}. {again}."
