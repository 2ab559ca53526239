"""The scripts that made everything in this package: artwork, autoencoder, judge, denoiser, evaluation."""
