"""One forward per family, weights in and out, the VAE and the text encoder."""
