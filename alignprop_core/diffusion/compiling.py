"""Compiled blocks: torch.compile for the blocks that repeat in a denoiser.

Blocks instead of the whole network: the same code is compiled once for each of its shapes, and what has been compiled
is kept on disk between runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

_BLOCKS = {
    "UNet2DConditionModel": ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"),
    "SD3Transformer2DModel": ("JointTransformerBlock",),
}
"""Network -> the blocks that do nearly all of its work, where diffusers does not name them (`_repeated_blocks`)."""

COMPILE_SECONDS, COMPILE_GAIN = 240.0, 0.16
"""What compiling costs the first time, and the share of a step's time that it saves: measured with Stable Diffusion 1.5
on an H200, batch 4 (docs/results/gpu_step.md)."""


def _keep_compiled_code() -> None:
    """Move torch's cache of compiled code out of the folder for temporary files, unless the user has chosen one."""
    # torch itself writes its default into the variable as soon as anything asks for the folder.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path.home() / ".cache" / "alignprop" / "compiled")


class CompiledBlocks:
    """A network's compiled blocks, used only inside of `active()`: the network itself stays as it is.

    So shapes that come up later, such as that of a last, smaller batch, cost no minutes of compiling.

    Args:
        network: the network; None for no compiled blocks.
    """

    def __init__(self, network: nn.Module | None = None) -> None:
        kinds = _BLOCKS.get(type(network).__name__) or getattr(network, "_repeated_blocks", None) or ()
        blocks = [] if network is None else [m for m in network.modules() if type(m).__name__ in kinds]
        if network is not None and blocks:
            _keep_compiled_code()
            # What cuDNN computes in. It pays only here: without compiling, group normalization would convert back.
            network.to(memory_format=torch.channels_last)
            # Every shape of a block, with and without a gradient, is a version of its own.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 128)
        self._compiled: dict[nn.Module, Any] = {
            block: torch.compile(block._call_impl, dynamic=False) for block in blocks
        }

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run the compiled blocks inside; each is compiled at its first call with a new shape."""
        blocks: Any = self._compiled  # what `Module.compile` sets
        try:
            for block, compiled in blocks.items():
                block._compiled_call_impl = compiled
            yield
        finally:
            for block in blocks:
                block._compiled_call_impl = None
