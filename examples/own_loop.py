"""Train with your own loop: the sampler without the trainer. Writes a LoRA that diffusers loads.

python examples/own_loop.py [STEPS] [FOLDER]
"""

import sys
from pathlib import Path

import torch

from alignprop_core import Sampler
from alignprop_core.lora.adapters import save

steps, folder = int((sys.argv[1:] or [20])[0]), Path((sys.argv[2:] or ["runs/own_loop"])[0])
sampler = Sampler.load("starter", rank=8, sampling={"steps": 12, "guidance_scale": 3.0})
optimizer = torch.optim.AdamW(sampler.trainable_parameters(), lr=1e-3)
prompts = ["a fox", "two owls", "a bear in the snow", "a cat on a blue background"]
for step in range(steps):
    out = sampler.sample(prompts, sampler.noise(prompts, seed=0, step=step))
    latents = out.latents.detach().requires_grad_()
    images = sampler.decode(latents)  # (4, 3, 128, 128) in [0, 1]
    reward = images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))  # red minus blue
    (gradient,) = torch.autograd.grad(-reward.mean(), latents)
    sampler.backward(out, gradient)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: {reward.mean():.4f}")
save(sampler.family.denoiser, folder, name="own_loop")
