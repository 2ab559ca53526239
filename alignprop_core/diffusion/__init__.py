"""Differentiable sampling: model families, pure schedulers, the sampler, truncation. Knows nothing about rewards."""
