"""Low-rank adapters (LoRA) on the denoiser: attach, set their strength, save and load.

A layer's weight W becomes W + scale * B A, with A (rank, in) and B (out, rank); W is frozen, B starts at zero
(LoRA, https://arxiv.org/abs/2106.09685). `scale` is alpha / rank, or alpha / sqrt(rank) where it is rank-stabilized
(https://arxiv.org/abs/2312.03732). Files contain `scale * B` and alpha = rank, so every reader gets the same weight
change whether or not it knows alpha or rank-stabilized scaling.
"""
