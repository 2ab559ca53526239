"""One module per model family; each adapts a diffusers pipeline to the sampler."""
