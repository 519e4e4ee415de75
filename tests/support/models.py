"""Wraps a language model to look like the whole network."""

from flax import nnx

from mm_jax.models.decoder_config import DecoderConfig

TINY_DECODER = DecoderConfig(
    vocab_size=83,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)


class Shell(nnx.Module):
    """Stands in for a MultiMood with a language model only, as the sampler needs it."""

    def __init__(self, language_model):
        self.language_model = language_model

    def embed(self, batch, features=None, memory=None):
        return self.language_model.embed(batch.tokens)
