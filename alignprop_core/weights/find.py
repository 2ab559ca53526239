"""Finding the local file that a `weights` option means. Imports no torch, uses no network.

The option takes four forms:

    default                          the reward's own weights, from the local hub cache, size and checksum verified
    starter                          a named set a plugin offers for the reward (`distribution/starter` chooses one)
    hub:owner/name/file.safetensors  another file of the hub, from the local hub cache; hub:owner/name@REVISION/file
                                     for a branch, tag or commit
    path/to/file.safetensors         a file
"""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from alignprop_core.errors import PluginError, WeightsError
from alignprop_core.registry.licenses import LicensePolicy
from alignprop_core.registry.registry import Registry, default_registry
from alignprop_core.specs import WeightsFile
from alignprop_core.weights.checksum import READ, checksum

HUB = "hub:"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pkl")
FORMS = 'takes "default", the name of a set, the path of a file, or hub:owner/name/file.safetensors'


def find_weights(
    value: str,
    *,
    reward: str,
    default: WeightsFile | None = None,
    registry: Registry | None = None,
    option: str = "weights",
    sets_of: str | None = None,
) -> Path:
    """Return the local file that a `weights` option means.

    Args:
        value: the option, in one of the forms above.
        reward: the reward's name: named sets are looked up for it, and messages name it.
        default: the file that "default" means. An empty repository means a file inside a package, written
            "package:relative/file".
        registry: where named sets are looked up; this environment's if None.
        option: the option's name, for messages.
        sets_of: the reward whose named sets it takes, if they are another's.

    Raises:
        WeightsError: the file is not on this machine (the message names repository, file and the command that fetches
            it) or fails verification, or the reward has no set of that name.
    """
    READ.append(_find(value, reward, default, registry, option, sets_of))
    return READ[-1]


def _find(
    value: str, reward: str, default: WeightsFile | None, registry: Registry | None, option: str, sets_of: str | None
) -> Path:
    """Return the file that `find_weights` finds."""
    if value == "default":
        if default is None:
            raise WeightsError(f'Reward "{reward}" has no default weights; the option {option} {FORMS}.')
        _require_license(default.license, f'The default weights of reward "{reward}" ({title(default)})')
        return _find_file(default, reward, f"alignprop rewards fetch {reward}", option)
    if value.startswith(HUB):
        return _find_file(parse_hub_file(value), reward, f"alignprop rewards fetch {value}", option)
    path = Path(value).expanduser()
    if _is_path(value):
        return _local(path, reward)
    try:
        return _named(value, sets_of or reward, registry)
    except PluginError as error:
        if os.path.isfile(path):  # Path.is_file() raises an error for a name that is too long
            return path
        raise WeightsError(f"{error} The option {option} {FORMS}.") from error


def check_named_file(value: str, *, reward: str) -> None:
    """Raise `WeightsError` if a `weights` option names a file, here or on the hub, that is not on this machine.

    Called before the reward is built. "default", named sets and folders are not checked.
    """
    if value.startswith(HUB) or (_is_path(value) and not Path(value).expanduser().exists()):
        find_weights(value, reward=reward)


def _is_path(value: str) -> bool:
    path = Path(value).expanduser()
    return path.is_absolute() or value.startswith((".", "~")) or path.suffix.lower() in SUFFIXES


def parse_hub_file(value: str) -> WeightsFile:
    """Parse `hub:owner/name/file` or `hub:owner/name@REVISION/file`; `WeightsError` if it has neither form."""
    parts = value.removeprefix(HUB).split("/")
    name, at, revision = parts[1].partition("@") if len(parts) > 2 else ("", "", "")
    if not value.startswith(HUB) or not name or bool(at) != bool(revision) or not all(parts) or ".." in parts:
        raise WeightsError(
            f'"{value}" is not a file of the hub. Write {HUB}owner/name/file (owner/name@REVISION/file for a branch, '
            f"tag or commit), such as {HUB}yuvalkirstain/PickScore_v1/model.safetensors."
        )
    return WeightsFile(repository=f"{parts[0]}/{name}", file="/".join(parts[2:]), revision=revision)


def cached(file: WeightsFile) -> Path | None:
    """Return a file of the hub from the local cache, unverified; None if it is not there.

    Raises:
        WeightsError: no repository or file of the hub can have that name.
    """
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(file.repository, file.file, revision=file.revision or None)
    except ValueError as error:
        raise WeightsError(
            f"{HUB}{file.repository}/{file.file} is not a file of the hub: {' '.join(str(error).split())}"
        ) from error
    return Path(found) if isinstance(found, str) else None


def packaged(path: str, owner: str) -> Path:
    """Return the file that "package:relative/file" means.

    Args:
        path: package and file.
        owner: what the file belongs to, for messages.

    Raises:
        WeightsError: the package is not installed or lacks the file.
    """
    package, _, relative = path.partition(":")
    try:
        found = Path(str(files(package).joinpath(relative)))
    except ModuleNotFoundError as error:
        raise WeightsError(
            f"{owner}: its weights {path} ship in the package {package}, which is not installed. Install it with pip."
        ) from error
    if not found.is_file():
        raise WeightsError(
            f"{owner}: the installed package {package} lacks the weights file {relative}. Reinstall it (in a checkout: "
            "check that the file was fetched)."
        )
    return found


def verify(path: Path, file: WeightsFile, remedy: str) -> None:
    """Check a file's size and sha256; those that the spec leaves open are not checked.

    The size is always checked. The sha256 is computed once for a path, size and time of change.

    Args:
        path: the file.
        file: the expected size and checksum.
        remedy: how to get the right file, a sentence for the message.

    Raises:
        WeightsError: size or checksum differ.
    """
    status = path.stat()
    if file.bytes is not None and status.st_size != file.bytes:
        raise WeightsError(
            f"{path} is not {title(file)}: it has {status.st_size:,} bytes and should have {file.bytes:,}. It is "
            f"incomplete or of another version. {remedy}"
        )
    if file.sha256 is None:
        return
    if (found := checksum(path)) != file.sha256.lower():
        raise WeightsError(
            f"{path} is not {title(file)}: its sha256 is {found} and should be {file.sha256}. It is damaged "
            f"or of another version. {remedy}"
        )


def _require_license(license: str, what: str) -> None:
    """Refuse declared weights whose license is not allowed; a file that the user names is the user's choice."""
    if problem := LicensePolicy.read(os.environ).problem(license):
        raise WeightsError(f"{what} may not be used here: {problem}.")


def title(file: WeightsFile) -> str:
    """Return what messages call a file."""
    revision = f" at {file.revision}" if file.revision else ""
    return f"{file.file} of {file.repository}{revision}" if file.repository else file.file


def _find_file(file: WeightsFile, reward: str, command: str, option: str) -> Path:
    """Return a hub file from the local cache or a packaged file, verified."""
    if not file.repository:
        path = packaged(file.file, f'Reward "{reward}"')
        verify(path, file, f"Reinstall {file.file.partition(':')[0]}.")
        return path
    found = cached(file)
    if found is None:
        raise _missing(file, reward, command, option)
    verify(found, file, f"`{command}` replaces it.")
    return found


def _missing(file: WeightsFile, reward: str, command: str, option: str) -> WeightsError:
    from huggingface_hub import constants

    size = "" if file.bytes is None else f" ({file.bytes / 1e6:,.0f} MB)"
    license = f" Their license: {file.license}." if file.license else ""
    revision = f" at {file.revision}" if file.revision else ""
    sets = [offer.name for offer in default_registry().weights() if offer.spec.reward == reward.rpartition("/")[2]]
    here = f" Installed instead: {', '.join(f'{option}: {name}' for name in sets)}." if sets else ""
    return WeightsError(
        f'The weights of reward "{reward}" are not on this machine: file {file.file} of repository '
        f"{file.repository}{revision}{size}. Fetch them with `{command}` (into {constants.HF_HUB_CACHE}); or download "
        f"{constants.ENDPOINT}/{file.repository}/resolve/{file.revision or 'main'}/{file.file} yourself, put it "
        f"anywhere and name it with the option {option}: PATH.{license}{here}"
    )


def _local(path: Path, reward: str) -> Path:
    if path.is_file():
        return path
    if path.is_dir():
        inside = ", ".join(sorted(p.name for p in path.iterdir() if p.suffix.lower() in SUFFIXES)[:5])
        hint = f" (it contains {inside})" if inside else ""
        raise WeightsError(f'Weights of reward "{reward}": {path} is a folder; name the file inside it{hint}.')
    raise WeightsError(
        f'Weights of reward "{reward}": there is no file {path} (in full: {path.absolute()}). Write a file of the hub '
        f"as {HUB}owner/name/file."
    )


def _named(name: str, reward: str, registry: Registry | None) -> Path:
    """Return the file of a named set; `PluginError` if there is no such set."""
    if registry is None:
        registry = default_registry()
    offer = registry.weights_for(reward, name)
    for license in {offer.spec.license, *(file.license for file in offer.spec.weights)} - {""}:
        _require_license(license, f'Weights "{name}" of {offer.distribution} {offer.version}')
    path = packaged(offer.spec.path, f'Weights "{name}" of {offer.distribution} {offer.version}')
    for file in offer.spec.weights:
        if offer.spec.path.endswith(file.file):
            verify(path, file, f"Reinstall {offer.distribution}.")
    return path
