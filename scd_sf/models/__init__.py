"""F2, the models: one forward per family, weights in and out, the VAE and the text encoder."""
