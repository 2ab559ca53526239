"""Compiled blocks: torch.compile for the blocks that repeat in a denoiser.

Blocks instead of the whole network: the same code is compiled once for each of its shapes, and what has been compiled
is kept on disk between runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
"""Classes of diffusers that most of a UNet's work is in."""

SECONDS, GAIN = 240.0, 0.2
"""What compiling costs the first time, and the share of a step's time that it saves: both measured on an H200."""


def compile_blocks(network: nn.Module) -> int:
    """Compile a network's blocks, each at its first call inside of `compiling()`; return their number."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path.home() / ".cache" / "alignprop" / "compiled"))
    # Every shape of a block, with and without a gradient, is a version of its own.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 128)
    blocks = [module for module in network.modules() if type(module).__name__ in _BLOCKS]
    for block in blocks:
        block.compile(dynamic=False)
    # Shapes that come up later, such as a last, smaller batch, are not worth minutes of compiling.
    torch.compiler.set_stance("eager_on_recompile")
    return len(blocks)


@contextmanager
def compiling() -> Iterator[None]:
    """Compile blocks that are called inside with a new shape."""
    with torch.compiler.set_stance("default"):
        yield
