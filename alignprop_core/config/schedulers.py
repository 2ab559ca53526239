"""The schedulers of `sampling.scheduler`: their names here, in diffusers and elsewhere."""

from __future__ import annotations

import re

from alignprop_core.errors import did_you_mean
from alignprop_core.validation import Problems

SCHEDULERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ddim": ("DDIMScheduler", ()),
    "euler": ("EulerDiscreteScheduler", ("k_euler", "euler_discrete")),
    "euler_a": ("EulerAncestralDiscreteScheduler", ("euler_ancestral", "k_euler_a", "k_euler_ancestral")),
    "dpmpp_2m": (
        "DPMSolverMultistepScheduler",
        ("dpmsolverpp", "dpmsolver_multistep", "dpmsolverpp_2m", "k_dpmpp_2m"),
    ),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", ("dpmsolverpp_2m_karras", "k_dpmpp_2m_karras")),
    "lcm": ("LCMScheduler", ()),
    "flow_match_euler": ("FlowMatchEulerDiscreteScheduler", ("flowmatch_euler", "flow_match_euler_discrete")),
}
"""Name -> its class in diffusers, and other names in lower case; a class stands for the first name that has it."""


def canonical_scheduler(value: str) -> str:
    """Return the name of a scheduler here, given any of its names: "DPM++ 2M Karras" is dpmpp_2m_karras.

    Raises:
        Problems: no supported scheduler has the name.
    """
    plain = re.sub(r"[\s-]+", "_", value.strip().lower().replace("++", "pp"))
    known: dict[str, str] = {}
    for name, (kind, aliases) in SCHEDULERS.items():
        for other in (name, *aliases, kind.lower(), kind.removesuffix("Scheduler").lower()):
            known.setdefault(other, name)
    if plain in known:
        return known[plain]
    message = f'must be {", ".join(SCHEDULERS)}, or the name of its class in diffusers, not "{value}".'
    raise Problems([("", message + did_you_mean(plain, SCHEDULERS))])
