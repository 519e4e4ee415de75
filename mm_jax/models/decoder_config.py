"""What sets the families of decoders apart, their config.json, and their positions."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from mm_jax.config.errors import ConfigError
from mm_jax.config.model import LanguageModel, RopeScaling
from mm_jax.models.layers import activation, from_fields

SIZES = LanguageModel()


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets one family of decoders apart; `defaults` are what its config.json may leave out."""

    qkv_bias: bool
    qk_norm: bool
    architecture: str
    defaults: dict


def _defaults(**values) -> dict:
    """Returns the defaults of a config class of transformers; most families share these."""
    common = dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, rope_theta=1e4)
    return {**common, **values}


QWEN = dict(
    vocab_size=151936,
    intermediate_size=22016,
    num_key_value_heads=32,
    sliding_window=4096,  # only with use_sliding_window
)
FAMILIES = {
    "qwen2": Family(True, False, "Qwen2ForCausalLM", _defaults(**QWEN)),
    "qwen3": Family(False, True, "Qwen3ForCausalLM", _defaults(**QWEN, head_dim=128)),
    "llama": Family(
        False,
        False,
        "LlamaForCausalLM",
        _defaults(vocab_size=32000, intermediate_size=11008, max_position_embeddings=2048),
    ),
    "mistral": Family(
        False,
        False,
        "MistralForCausalLM",
        _defaults(
            vocab_size=32000,
            intermediate_size=14336,
            num_key_value_heads=8,
            max_position_embeddings=131072,
            sliding_window=4096,
        ),
    ),
}


ORIGINAL = "original_max_position_embeddings"
# Fields of config.json that may be null.
NULLABLE = (
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "use_sliding_window",
    "layer_types",
    "attention_bias",
    "mlp_bias",
)
# Kind of scaled positions -> the fields that it reads.
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        ORIGINAL,
        "low_freq_factor",
        "high_freq_factor",
    ),
    "yarn": (
        "factor",
        ORIGINAL,
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "truncate",
    ),
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The fields that transformers' configs of the families share, and two of ours.

    `head_dim` 0 is hidden_size / num_attention_heads. `residual_dropout` is 0 in every release. The
    last `vocab_padding` of the `vocab_size` rows are no tokens and never get probability.
    """

    vocab_size: int = 152064
    hidden_size: int = SIZES.hidden_size
    intermediate_size: int = SIZES.intermediate_size
    num_hidden_layers: int = SIZES.num_hidden_layers
    num_attention_heads: int = SIZES.num_attention_heads
    num_key_value_heads: int = SIZES.num_key_value_heads
    head_dim: int = SIZES.head_dim
    family: str = SIZES.family
    rms_norm_eps: float = SIZES.rms_norm_eps
    rope_theta: float = SIZES.rope_theta
    rope_scaling: RopeScaling = SIZES.rope_scaling
    max_position_embeddings: int = SIZES.max_position_embeddings
    tie_word_embeddings: bool = SIZES.tie_word_embeddings
    hidden_act: str = SIZES.hidden_act
    residual_dropout: float = SIZES.residual_dropout
    vocab_padding: int = 0

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f"family: expected one of {list(FAMILIES)}, got {self.family!r}")
        if min(self.num_attention_heads, self.num_key_value_heads) < 1:
            raise ValueError(
                f"{self.family}: expected at least one attention and key-value head, got "
                f"{self.num_attention_heads} and {self.num_key_value_heads}"
            )
        if self.head_dim == 0:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"{self.family}: hidden_size {self.hidden_size} is not a multiple of "
                    f"num_attention_heads {self.num_attention_heads}"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.head_dim % 2:
            raise ValueError(
                f"{self.family}: head_dim: expected an even number, got {self.head_dim}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.family}: num_attention_heads {self.num_attention_heads} is not a multiple "
                f"of num_key_value_heads {self.num_key_value_heads}"
            )
        activation(self.hidden_act)

    @classmethod
    def from_hf_config(cls, values: dict) -> DecoderConfig:
        """Reads a config.json. Raises ValueError for what this decoder does not compute."""
        family = values.get("model_type", "qwen2")
        if family not in FAMILIES:
            raise ValueError(f"model_type: expected one of {list(FAMILIES)}, got {family!r}")
        given = {k: v for k, v in values.items() if v is not None or k not in NULLABLE}
        # Null differs from absent: no window, and as many key-value heads as query heads.
        defaults = {k: v for k, v in FAMILIES[family].defaults.items() if k not in values}
        values = {**defaults, **given}
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
        windowed = values.get("use_sliding_window") or family == "mistral"
        if windowed and values.get("sliding_window"):
            raise ValueError(
                f"{family}: sliding_window: expected none, got {values['sliding_window']}"
            )
        other = sorted(set(values.get("layer_types", ())) - {"full_attention"})
        if other:
            raise ValueError(f"{family}: layer_types: expected 'full_attention', got {other}")
        for name in ("attention_bias", "mlp_bias"):
            if values.get(name):
                raise ValueError(f"{family}: {name}: expected false, got {values[name]!r}")
        # transformers 5 writes rope_parameters, with the base inside; earlier ones rope_scaling.
        rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
        values["rope_theta"] = rope.pop("rope_theta", values["rope_theta"])
        values["family"] = family
        own = from_fields(cls, {k: v for k, v in values.items() if k != "rope_scaling"})
        original = values.get(ORIGINAL)  # next to rope_scaling it comes first, as in transformers
        if original and ORIGINAL in ROPE_FIELDS.get(rope.get("rope_type", rope.get("type")), ()):
            rope[ORIGINAL] = original
        scaling = read_rope_scaling(rope, own.max_position_embeddings, family)
        return dataclasses.replace(own, rope_scaling=scaling)

    def to_hf_config(self) -> dict:
        values = dataclasses.asdict(self)
        for name in ("residual_dropout", "vocab_padding", "family", "rope_scaling"):
            del values[name]
        if self.rope_scaling.rope_type != "default":
            values["rope_scaling"] = written_rope_scaling(self.rope_scaling)
        if self.family == "mistral":
            values["sliding_window"] = None
        architecture = FAMILIES[self.family].architecture
        return {"model_type": self.family, "architectures": [architecture], **values}


def read_rope_scaling(values: dict, positions: int, family: str = "decoder") -> RopeScaling:
    """Reads a rope_scaling (rope_parameters without the base). Raises ValueError.

    positions: max_position_embeddings, the original number where none is given.
    """
    values = {k: v for k, v in values.items() if v is not None}
    kind = values.pop("rope_type", values.pop("type", "default"))
    values.pop("type", None)
    if kind not in ROPE_FIELDS:
        raise ValueError(f"{family}: rope_type: expected one of {list(ROPE_FIELDS)}, got {kind!r}")
    if values.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{family}: partial_rotary_factor: expected 1.0")
    fields = ROPE_FIELDS[kind]
    foreign = sorted(set(values) - set(fields))
    if foreign and kind != "default":
        raise ValueError(f"{family}: rope_type {kind}: no such field {', '.join(foreign)}")
    own = {name: values[name] for name in fields if name in values}
    required = {"linear": fields, "llama3": fields, "yarn": ("factor",)}.get(kind, ())
    lacking = [name for name in required if name not in own and name != ORIGINAL]
    if lacking:
        raise ValueError(f"{family}: rope_type {kind}: lacks {', '.join(lacking)}")
    if ORIGINAL in fields:
        own.setdefault(ORIGINAL, positions)
    whole = (ORIGINAL, "truncate")
    own = {k: v if k in whole or type(v) is not int else float(v) for k, v in own.items()}
    try:
        return RopeScaling(rope_type=kind, **own)
    except ConfigError as error:
        raise ValueError(f"{family}: rope_scaling: {error}") from None


def written_rope_scaling(scaling: RopeScaling) -> dict:
    """Returns the rope_scaling of a config.json."""
    values = {name: getattr(scaling, name) for name in ROPE_FIELDS[scaling.rope_type]}
    if not values.get("attention_factor", 1.0):
        del values["attention_factor"]
    return {"rope_type": scaling.rope_type, **values}


def inverse_frequencies(config: DecoderConfig) -> tuple[np.ndarray, float]:
    """Returns the rotary frequencies float32[head_dim / 2] and the factor on cosines and sines.

    llama3: long wavelengths are stretched by `factor`, short ones not, with a linear transition.
    yarn (arXiv 2309.00071): the same, by the number of turns within the original positions.
    """
    s, dim = config.rope_scaling, config.head_dim
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    base = 1.0 / np.float32(config.rope_theta) ** exponents
    if s.rope_type == "default":
        return base, 1.0
    if s.rope_type == "linear":
        return base / np.float32(s.factor), 1.0
    if s.rope_type == "llama3":
        turns = np.float32(getattr(s, ORIGINAL)) * base / np.float32(2 * np.pi)
        low, high = s.low_freq_factor, s.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)  # 1: as trained, 0: stretched
    else:

        def dimension(rotations: float) -> float:
            positions = getattr(s, ORIGINAL) / (rotations * 2 * math.pi)
            return dim * math.log(positions) / (2 * math.log(config.rope_theta))

        low, high = dimension(s.beta_fast), dimension(s.beta_slow)
        if s.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        high += 0.001 if low == high else 0
        kept = 1 - np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    frequencies = base / np.float32(s.factor) * (1 - kept) + base * kept
    scale = 1.0
    if s.rope_type == "yarn":
        scale = s.attention_factor or (0.1 * math.log(s.factor) + 1.0 if s.factor > 1 else 1.0)
    return frequencies.astype(np.float32), scale
