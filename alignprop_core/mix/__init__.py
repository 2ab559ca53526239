"""The mix: many weighted rewards combined into one gradient at the images. Knows nothing about diffusion."""
