"""`import alignprop` is the core's public API."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import alignprop
import pytest

import alignprop_core


def test_every_public_name_is_the_cores() -> None:
    assert dir(alignprop) == dir(alignprop_core)
    for name in alignprop_core.__all__:
        assert getattr(alignprop, name) is getattr(alignprop_core, name)


def test_names_can_be_imported() -> None:
    from alignprop import Reward, train

    assert (Reward, train) == (alignprop_core.Reward, alignprop_core.train)
    with pytest.raises(ImportError, match="trian"):
        from alignprop import trian  # noqa: F401
    with pytest.raises(AttributeError, match="module 'alignprop' has no attribute 'cli'"):
        alignprop.cli  # noqa: B018


def test_importing_it_imports_no_torch() -> None:
    code = (
        "import sys, alignprop; assert 'train' in dir(alignprop); assert not {'torch', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


def test_type_checkers_see_every_public_name() -> None:
    stub = Path(alignprop.__file__).with_suffix(".pyi").read_text()
    assert set(re.findall(r"^from alignprop_core import (\w+) as \1$", stub, re.MULTILINE)) == set(
        alignprop_core.__all__
    )
