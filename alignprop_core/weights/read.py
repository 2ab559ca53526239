"""Reading weights files without unpickling; torch is imported only to read tensors."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alignprop_core.errors import WeightsError
from alignprop_core.weights.checksum import READ

_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"  # protocol 2 and later, as torch wrote before its zip format
_CHECKED = 4096  # numbers at the start of each tensor; checking all would add a tenth to the loading time


def load_state_dict(path: Path) -> dict[str, Any]:
    """Read the tensors of a weights file onto the CPU.

    The format is detected from the first bytes, not from the name. torch files are read with
    `torch.load(weights_only=True)`.

    Returns:
        The content of the file: name -> Tensor. A torch file may nest it ("state_dict", "model") or contain numbers as
        well; the caller handles that.

    Raises:
        WeightsError: the file needs unpickling, is incomplete or damaged, has another format, cannot be read, or comes
            from a training that diverged: a tensor begins with NaN or infinity (only beginnings are checked).
    """
    path = Path(path)
    READ.append(path)
    try:
        with open(path, "rb") as stream:
            start = stream.read(9)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not start:
        raise WeightsError(f"{path} is empty. Fetch or copy it again.")
    # Checked first: the eight bytes before it are the header's length and may look like another format.
    if start[8:] == b"{":
        found = _load_safetensors(path)
    elif start.startswith((_ZIP, _PICKLE)):
        found = _load_torch(path, zipped=start.startswith(_ZIP))
    else:
        hint = " It is a Git LFS pointer: fetch the file itself (`git lfs pull`)." if start == b"version h" else ""
        raise WeightsError(f"{path} is not a weights file: it is neither safetensors nor written by torch.save.{hint}")
    _check_finite(path, found)
    return found


def read_header(path: Path) -> dict[str, Any]:
    """Return a weights file's own description of its architecture: the safetensors metadata key "config", as JSON.

    Returns:
        The parsed mapping; {} if the file has none (every torch file, and the real full-size weights).

    Raises:
        WeightsError: the file is damaged, or its "config" is not a JSON mapping.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with open(path, "rb") as stream:
            if stream.read(9)[8:] != b"{":
                return {}
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get("config")
        config = {} if text is None else json.loads(text)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    except ValueError as error:
        raise WeightsError(f'{path}: the "config" in its header is not JSON: {error}.') from error
    if not isinstance(config, dict):
        raise WeightsError(f'{path}: the "config" in its header is a {type(config).__name__}; it must be a mapping.')
    return config


def _load_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Any] = load_file(path, device="cpu")
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    return tensors


def _load_torch(path: Path, *, zipped: bool) -> dict[str, Any]:
    import pickle

    import torch

    try:
        with open(path, "rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about TorchScript archives, which are then refused
            # Mapped into memory where that is possible, so that a checkpoint of gigabytes is not there twice while it
            # is copied into a module. (torch goes by the name of a .safetensors path; this file is none.)
            mapped = zipped and path.suffix != ".safetensors"
            source = str(path) if mapped else stream
            found = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise _pickled(path) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, AttributeError) as error:
        if "TorchScript" in str(error):
            raise _pickled(path) from error
        raise _damaged(path, error) from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path} contains a {type(found).__name__}; a weights file contains tensors by name.")
    return found


def _check_finite(path: Path, found: Mapping[Any, Any], inside: str = "") -> None:
    """Refuse weights that make every score NaN. Minus infinity alone is accepted: attention masks contain it."""
    import torch

    for key, value in found.items():
        if isinstance(value, Mapping):
            _check_finite(path, value, f"{inside}{key}.")
        elif isinstance(value, torch.Tensor) and value.is_floating_point() and not value.is_sparse:
            start = value.flatten()[:_CHECKED].float()
            if start.isnan().any() or start.isposinf().any():
                raise WeightsError(
                    f"{path} cannot be used: its tensor {inside}{key} contains NaN or infinity. The training "
                    "that wrote it diverged, or the file is damaged. Use an earlier checkpoint, or fetch it again."
                )


def _pickled(path: Path) -> WeightsError:
    return WeightsError(
        f"{path} contains more than tensors: reading it would need unpickling, which can run any code, so it "
        "is refused. Convert it to safetensors if you trust it, and name that file."
    )


def _damaged(path: Path, error: Exception) -> WeightsError:
    reason = " ".join(str(error).split())[:200]
    return WeightsError(f"{path} is cut off or damaged ({reason}). Fetch or copy it again.")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that contains a mapping; `WeightsError` if it does not."""
    try:
        READ.append(path)
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read as JSON: {error}. Fetch or copy it again.") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path}: contains a {type(found).__name__}; it must be a mapping. Fetch or copy it again.")
    return found


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress transformers' load reports and progress bars; the caller reports problems itself."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
