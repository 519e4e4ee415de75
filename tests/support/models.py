"""Wraps a language model to look like the whole network."""

from flax import nnx


class Shell(nnx.Module):
    """Stands in for a MultiMood with a language model only, as the sampler needs it."""

    def __init__(self, language_model):
        self.language_model = language_model

    def embed(self, batch, features=None, memory=None):
        return self.language_model.embed(batch.tokens)
