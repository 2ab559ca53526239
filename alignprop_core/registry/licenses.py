"""License policy: SPDX expressions checked against the list in ALIGNPROP_ALLOW_LICENSES. Imports no torch."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageMetadata

LICENSES_VARIABLE = "ALIGNPROP_ALLOW_LICENSES"

# Trove classifiers that mean exactly one SPDX license, for metadata older than License-Expression (PEP 639).
_CLASSIFIERS = {
    "Apache Software License": "Apache-2.0",
    "MIT License": "MIT",
    "MIT No Attribution License (MIT-0)": "MIT-0",
    "ISC License (ISCL)": "ISC",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "The Unlicense (Unlicense)": "Unlicense",
    "GNU General Public License v2 (GPLv2)": "GPL-2.0-only",
    "GNU General Public License v2 or later (GPLv2+)": "GPL-2.0-or-later",
    "GNU General Public License v3 (GPLv3)": "GPL-3.0-only",
    "GNU General Public License v3 or later (GPLv3+)": "GPL-3.0-or-later",
    "GNU Affero General Public License v3": "AGPL-3.0-only",
    "GNU Affero General Public License v3 or later (AGPLv3+)": "AGPL-3.0-or-later",
}


@dataclass(frozen=True)
class LicensePolicy:
    """The licenses that are allowed.

    Attributes:
        allowed: SPDX identifiers in lower case; None allows everything.
    """

    allowed: frozenset[str] | None = None

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> LicensePolicy:
        """Read the policy; a variable that is not set allows everything, one that is set and empty allows nothing."""
        value = environment.get(LICENSES_VARIABLE)
        if value is None:
            return cls()
        return cls(frozenset(name.lower() for name in re.split(r"[,\s]+", value) if name))

    def problem(self, expression: str) -> str | None:
        """Return why a license may not be used; None if it may.

        Args:
            expression: an SPDX expression. Of `A OR B` one must be allowed, of `A AND B` both; `A WITH exception` is
                allowed where A is, for an exception only adds permissions. An empty one is not allowed.
        """
        if self.allowed is None:
            return None
        if not expression.strip():
            return f"it declares no license, and {LICENSES_VARIABLE} allows only {self._listed()}"
        if _is_allowed(expression, self.allowed):
            return None
        return f"its license is {expression}, and {LICENSES_VARIABLE} allows only {self._listed()}"

    def _listed(self) -> str:
        return ", ".join(sorted(self.allowed or ())) or "nothing"


def _is_allowed(expression: str, allowed: frozenset[str]) -> bool:
    """Evaluate an SPDX expression with every license replaced by whether it is allowed."""
    from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

    if expression.strip().lower() in allowed:  # also names that are not in SPDX's list, such as OpenRAIL-M
        return True
    try:
        spdx = canonicalize_license_expression(expression)
    except InvalidLicenseExpression:
        return False
    words = re.sub(r" WITH [^\s()]+", "", spdx)  # an exception only adds permissions
    python = re.sub(r"[^\s()]+", lambda word: _operand(word[0], allowed), words)
    return _value(ast.parse(python, mode="eval").body)


def _operand(word: str, allowed: frozenset[str]) -> str:
    if word in ("AND", "OR"):
        return word.lower()
    return str(word.lower() in allowed or word.lower().removesuffix("+") in allowed)


def _value(node: ast.expr) -> bool:
    if isinstance(node, ast.BoolOp):
        return (all if isinstance(node.op, ast.And) else any)(map(_value, node.values))
    return bool(ast.literal_eval(node))


def license_of(metadata: PackageMetadata) -> str:
    """Return the SPDX expression in a distribution's metadata: License-Expression, a short License, a classifier.

    Empty if there is none. Nothing of the distribution is imported.
    """

    def values(field: str) -> list[str]:
        return [str(value).strip() for value in metadata.get_all(field) or ()]

    # A short License field is an identifier; some put the whole text of a license there.
    for value in (*values("License-Expression"), *values("License")):
        if value and "\n" not in value and len(value) < 100:
            return value
    prefix = "License :: OSI Approved :: "
    named = [line.removeprefix(prefix) for line in values("Classifier") if line.startswith(prefix)]
    found = [_CLASSIFIERS[name] for name in named if name in _CLASSIFIERS]
    # Several classifiers do not state whether one may choose, so all must be allowed.
    return " AND ".join(found) if len(found) == len(named) else ""
