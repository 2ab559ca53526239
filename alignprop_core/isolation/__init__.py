"""Rewards that run in a Python environment of their own, beside packages the run could not live with.

    rewards:
      - {name: hpsv2_original, isolation: {python: envs/hpsv2/bin/python}}

`describe` answers from that environment what the reward is and whether its options are right; a worker process there
scores batches and returns each image's gradient. Images and gradients travel in a memory-mapped file, the rest as JSON:
nothing is pickled. What runs there needs torch, pydantic, pluggy, packaging and safetensors of the core's dependencies.
"""
