"""LightningModules that only test: scores of one model, the comparison of the priors, and the report of it."""
