"""The network's fields (see schema.py)."""

from __future__ import annotations

from typing import Literal, Self, get_args

from pydantic import model_validator

from mm_jax.config.errors import require
from mm_jax.config.section import Section, field

Part = Literal["vision", "audio", "compressor"]
PARTS: tuple[Part, ...] = get_args(Part)
# Module of the network -> the entry of `model.parts` that adds it; None: always present.
MODULES: dict[str, str | None] = {
    "language_model": None,
    "vision_tower": "vision",
    "mm_projector": "vision",
    "audio_tower": "audio",
    "mm_projector_a": "audio",
    "mamba_compressor": "compressor",
}


class RopeScaling(Section):
    """Positions beyond those of pre-training (names of transformers' rope_scaling)."""

    rope_type: Literal["default", "linear", "llama3", "yarn"] = field(
        "default", "default: positions as they are."
    )
    factor: float = field(1.0, "How many times more positions.", ge=1)
    original_max_position_embeddings: int = field(
        8192, "llama3, yarn: positions of pre-training.", ge=1
    )
    low_freq_factor: float = field(
        1.0, "llama3: frequencies with fewer turns than this are stretched.", gt=0
    )
    high_freq_factor: float = field(
        4.0, "llama3: frequencies with more turns than this are kept.", gt=0
    )
    beta_fast: float = field(32.0, "yarn: frequencies with more turns than this are kept.", gt=0)
    beta_slow: float = field(
        1.0, "yarn: frequencies with fewer turns than this are stretched.", gt=0
    )
    attention_factor: float = field(
        0.0, "yarn: factor on queries and keys; 0: 0.1 ln(factor) + 1.", ge=0
    )
    truncate: bool = field(True, "yarn: the transition begins and ends at whole dimensions.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            self.low_freq_factor < self.high_freq_factor,
            f"high_freq_factor: expected above low_freq_factor {self.low_freq_factor:g}, got "
            f"{self.high_freq_factor:g}",
        )
        return self


class LanguageModel(Section):
    """Sizes of the language model (names of transformers' configs); defaults: Qwen2-7B."""

    family: Literal["qwen2", "qwen3", "llama", "mistral"] = field(
        "qwen2", "qwen2: biases on queries, keys, values; qwen3: norms on queries and keys."
    )
    hidden_size: int = field(3584, "Width.", ge=1)
    intermediate_size: int = field(18944, "Width of the MLP.", ge=1)
    num_hidden_layers: int = field(28, "Layers.", ge=1)
    num_attention_heads: int = field(28, "Query heads.", ge=1)
    num_key_value_heads: int = field(4, "Key and value heads.", ge=1)
    head_dim: int = field(0, "Width of a head; 0: hidden_size / num_attention_heads.", ge=0)
    rms_norm_eps: float = field(1e-6, "Epsilon of RMSNorm.", gt=0)
    rope_theta: float = field(1e6, "Base of the rotary embedding.", gt=0)
    rope_scaling: RopeScaling = RopeScaling()
    max_position_embeddings: int = field(32768, "Positions of the release.", ge=1)
    tie_word_embeddings: bool = field(False, "The head is the embedding table.")
    hidden_act: str = field("silu", "Activation of the MLP.")
    residual_dropout: float = field(
        0.0, "Dropout on residual branches in sft and compressor stages.", ge=0, lt=1
    )
    vocab_size: int = field(
        0, "Rows of the vocabulary's tables; 0: the tokenizer's tokens, padded.", ge=0
    )
    vocab_multiple: int = field(256, "Rows are padded to a multiple of this.", ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        heads, keys = self.num_attention_heads, self.num_key_value_heads
        require(
            self.head_dim > 0 or self.hidden_size % heads == 0,
            f"hidden_size: {self.hidden_size} is not a multiple of num_attention_heads {heads}",
        )
        require(self.head_dim % 2 == 0, f"head_dim: expected an even number, got {self.head_dim}")
        require(
            heads % keys == 0,
            f"num_attention_heads: {heads} is not a multiple of num_key_value_heads {keys}",
        )
        return self


class VisionTower(Section):
    """Sizes of SigLIP (names of transformers' SiglipVisionConfig); defaults: so400m patch14-384."""

    hidden_size: int = field(1152, "Width.", ge=1)
    intermediate_size: int = field(4304, "Width of the MLP.", ge=1)
    num_hidden_layers: int = field(27, "Layers.", ge=1)
    num_attention_heads: int = field(16, "Heads.", ge=1)
    image_size: int = field(384, "Side of a frame in pixels.", ge=1)
    patch_size: int = field(14, "Side of a patch in pixels.", ge=1)
    num_channels: int = field(3, "Colour channels.", ge=1)
    hidden_act: str = field("gelu_pytorch_tanh", "Activation of the MLP.")
    layer_norm_eps: float = field(1e-6, "Epsilon of LayerNorm.", gt=0)


class AudioTower(Section):
    """Sizes of BEATs (names of its released config); defaults: iter3+ AS2M."""

    input_patch_size: int = field(16, "Side of a patch, frames and mel bins.", ge=1)
    embed_dim: int = field(512, "Width of a patch embedding.", ge=1)
    encoder_layers: int = field(12, "Layers.", ge=1)
    encoder_embed_dim: int = field(768, "Width.", ge=1)
    encoder_ffn_embed_dim: int = field(3072, "Width of the MLP.", ge=1)
    encoder_attention_heads: int = field(12, "Heads.", ge=1)
    conv_pos: int = field(128, "Kernel of the positional convolution.", ge=1)
    conv_pos_groups: int = field(16, "Groups of the positional convolution.", ge=1)
    num_buckets: int = field(320, "Buckets of the relative position bias.", ge=1)
    max_distance: int = field(800, "Largest distance that the bias tells apart.", ge=1)
    layer_wise_gradient_decay_ratio: float = field(
        1.0, "Scales the gradient into each layer's input; released: 0.6.", gt=0, le=1
    )
    predictor_class: int = field(
        0, "Classes of BEATs' own classifier, which is kept but not used.", ge=0
    )


class Compressor(Section):
    """Sizes of the Mamba compressor (names of transformers' MambaConfig); defaults: mamba-370m."""

    hidden_size: int = field(1024, "Width.", ge=1)
    state_size: int = field(16, "States per channel.", ge=1)
    num_hidden_layers: int = field(48, "Layers.", ge=1)
    conv_kernel: int = field(4, "Kernel of the causal convolution.", ge=1)
    expand: int = field(2, "Inner width over hidden_size.", ge=1)
    time_step_rank: int = field(0, "Rank of the time step; 0: hidden_size / 16.", ge=0)
    layer_norm_epsilon: float = field(1e-5, "Epsilon of RMSNorm.", gt=0)
    use_bias: bool = field(False, "Biases of the linear layers.")
    use_conv_bias: bool = field(True, "Bias of the convolution.")
    vocab_size: int = field(0, "Rows of its table; 0: the tokenizer's tokens.", ge=0)


class Model(Section):
    """The network."""

    parts: tuple[Part, ...] = field(
        ("vision", "audio", "compressor"), "Parts next to the language model."
    )
    llm: LanguageModel = LanguageModel()
    vision: VisionTower = VisionTower()
    audio: AudioTower = AudioTower()
    compressor: Compressor = Compressor()
    connector_type: Literal["stc_connector", "stc_connector_v35"] = field(
        "stc_connector_v35", "Padding of the STC connector's convolution."
    )
    connector_depth: int = field(4, "Blocks in each of its two stages.", ge=1)
    vision_select_layer: int = field(-2, "Hidden states of SigLIP that are used.")
    audio_projector_type: Literal["linear", "mlp2x_gelu"] = field(
        "linear", "From BEATs' width to the language model's."
    )
    remat: Literal["none", "dots", "outputs", "full"] = field(
        "full",
        "What the backward pass recomputes: nothing, all but matrix products, all but the "
        "outputs of attention and MLP, or whole layers.",
    )
    attention: Literal["auto", "xla", "cudnn"] = field(
        "auto", "Attention kernel; auto: cuDNN where it can run."
    )
