"""LightningModules that only test: scores of one model, FID, and the cells of a comparison, which `report` draws."""
