"""Training of the decoder."""

from unclip_pl.parts.decoder import DecoderPart
from unclip_pl.tasks.base import EmbeddingTask
from unclip_pl.types import DecoderBatch


class DecoderTask(DecoderPart, EmbeddingTask):
    """Trains the decoder."""

    batch_type = DecoderBatch
    edges = ("net.conv_in", "net.conv_out")
