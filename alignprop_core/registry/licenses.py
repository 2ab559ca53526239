"""Which licences may be used here: SPDX expressions held against the list in ALIGNPROP_ALLOW_LICENSES. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import Distribution

LICENSES_VARIABLE = "ALIGNPROP_ALLOW_LICENSES"

# Trove classifiers that mean exactly one SPDX licence, for metadata older than License-Expression (PEP 639).
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
    """The licences that are allowed.

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
        """Say why a licence may not be used; None if it may.

        Args:
            expression: an SPDX expression. Of `A OR B` one must be allowed, of `A AND B` both; `A WITH exception` is
                allowed where A is, for an exception only adds permissions. An empty one is not allowed.
        """
        if self.allowed is None:
            return None
        if not expression.strip():
            return f"it says no licence, and {LICENSES_VARIABLE} allows only {self._listed()}"
        try:
            allowed = _Expression(expression, self.allowed).value()
        except ValueError as error:
            return (
                f'its licence "{expression}" is no SPDX expression ({error}), so {LICENSES_VARIABLE} does not allow it'
            )
        if allowed:
            return None
        return f"its licence is {expression}, and {LICENSES_VARIABLE} allows only {self._listed()}"

    def _listed(self) -> str:
        return ", ".join(sorted(self.allowed or ())) or "nothing"


class _Expression:
    """A recursive-descent reader of SPDX expressions: OR binds weakest, then AND, then WITH and +."""

    def __init__(self, text: str, allowed: frozenset[str]) -> None:
        self.tokens: list[str] = re.findall(r"\(|\)|[A-Za-z0-9.:+-]+|\S", text)
        self.allowed = allowed

    def value(self) -> bool:
        """Return whether the whole is allowed; `ValueError` if it is no expression."""
        result = self._any()
        if self.tokens:
            raise ValueError(f'unexpected "{self.tokens[0]}"')
        return result

    def _next_is(self, word: str) -> bool:
        if self.tokens and self.tokens[0].upper() == word:
            self.tokens.pop(0)
            return True
        return False

    def _any(self) -> bool:
        result = self._all()
        while self._next_is("OR"):
            result = self._all() or result
        return result

    def _all(self) -> bool:
        result = self._one()
        while self._next_is("AND"):
            result = self._one() and result
        return result

    def _one(self) -> bool:
        if self._next_is("("):
            result = self._any()
            if not self._next_is(")"):
                raise ValueError("a bracket is not closed")
            return result
        name = self._identifier()
        if self._next_is("WITH"):
            exception = self._identifier()
            return name in self.allowed or f"{name}-with-{exception}" in self.allowed
        return name in self.allowed or (name.endswith("+") and name[:-1] in self.allowed)

    def _identifier(self) -> str:
        if not self.tokens or not re.fullmatch(r"[A-Za-z0-9.:+-]+", self.tokens[0]):
            raise ValueError(f"a licence is missing{f' before {self.tokens[0]}' if self.tokens else ' at the end'}")
        name = self.tokens.pop(0)
        if name.upper() in ("OR", "AND", "WITH"):
            raise ValueError(f"a licence is missing beside {name}")
        return name.lower()


def license_of(distribution: Distribution) -> str:
    """Return the SPDX expression a distribution's metadata say: License-Expression, a short License, a classifier.

    Empty if they say none. Nothing of the distribution is imported.
    """

    def said(field: str) -> list[str]:
        return [str(value).strip() for value in distribution.metadata.get_all(field) or ()]

    # A short License field is an identifier; some put the whole text of a licence there.
    for value in (*said("License-Expression"), *said("License")):
        if value and "\n" not in value and len(value) < 100:
            return value
    prefix = "License :: OSI Approved :: "
    named = [line.removeprefix(prefix) for line in said("Classifier") if line.startswith(prefix)]
    found = [_CLASSIFIERS[name] for name in named if name in _CLASSIFIERS]
    # Several classifiers do not say whether one may choose; the strict reading is that all hold.
    return " AND ".join(found) if len(found) == len(named) else ""
