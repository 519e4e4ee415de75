"""A language model in a shell that looks like the whole network."""

from flax import nnx


class Shell(nnx.Module):
    """A MultiMood with a language model only, as the sampler takes it."""

    def __init__(self, language_model):
        self.language_model = language_model

    def embed(self, batch, features=None, memory=None):
        return self.language_model.embed(batch.tokens)
