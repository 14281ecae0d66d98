"""Training with Lightning: callbacks, exact resume, sharding and the trainer's command line."""
