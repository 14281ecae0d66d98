"""Shards in, batches out: packing, the embedding store, samplers and the LightningDataModules."""
