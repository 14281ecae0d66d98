"""Networks: those of the priors, the codec, the U-Nets, the text transformer, and the embedding space they work in."""
