"""Networks: both priors, the codec, the UNet, the text transformer, and the embedding space they work in."""
