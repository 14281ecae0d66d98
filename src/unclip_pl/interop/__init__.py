"""What other people's programs write and read: Karlo's checkpoints, dumps of embeddings, folders of diffusers."""
