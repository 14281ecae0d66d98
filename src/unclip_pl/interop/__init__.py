"""Other people's checkpoints of the same networks: Karlo's, in its own layout and in diffusers'."""
