"""What a config file of one's own may need."""

from mm_jax.config.errors import ConfigError, one_of, require

__all__ = ["ConfigError", "one_of", "require"]
