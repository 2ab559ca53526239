"""Reward weights: find, verify, download and read the files. Imports no torch."""

from __future__ import annotations

from alignprop_core.weights.fetch import Fetched, fetch_weights
from alignprop_core.weights.find import find_weights, parse_hub_file, verify
from alignprop_core.weights.read import load_state_dict, quiet_transformers, read_header, read_json

__all__ = [
    "Fetched",
    "fetch_weights",
    "find_weights",
    "load_state_dict",
    "parse_hub_file",
    "quiet_transformers",
    "read_header",
    "read_json",
    "verify",
]
