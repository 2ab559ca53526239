"""Weights of rewards: from a hub id, a named set or a path to a verified local file, and what is inside it.

Importing this imports no torch, and finding a file never touches the network: only `fetch_weights` does.
"""

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
