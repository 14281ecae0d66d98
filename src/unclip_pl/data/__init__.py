"""From shards to batches: the embedding store, samplers and the LightningDataModules."""
