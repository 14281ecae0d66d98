"""Making pictures: priors, decoding, manipulations, and the run that they come from."""
