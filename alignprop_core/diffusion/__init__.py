"""Differentiable sampling: family adapters, pure schedulers, the sampler, and what is backpropagated.

Knows nothing of rewards: it takes prompts and noise and gives images, and takes a gradient at the images back.
"""

from alignprop_core.diffusion.families import family_for
from alignprop_core.diffusion.family import Conditioning, Family
from alignprop_core.diffusion.loading import load_pipeline, prepare
from alignprop_core.diffusion.noise import Noise
from alignprop_core.diffusion.sampler import SampleOutput, Sampler

__all__ = ["Conditioning", "Family", "Noise", "SampleOutput", "Sampler", "family_for", "load_pipeline", "prepare"]
