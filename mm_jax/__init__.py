"""mm_jax: multimodal emotional-support models in JAX/Flax."""

__version__ = "0.1.0"
