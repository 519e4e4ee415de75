"""The config of an exported mm_jax model."""

import transformers
from transformers import AutoConfig, PretrainedConfig

NEEDED = (5, 23)  # the first transformers that this code was tried with
if tuple(int(x) for x in transformers.__version__.split(".")[:2]) < NEEDED:
    raise ImportError(
        f"mm_jax: expected transformers {NEEDED[0]}.{NEEDED[1]} or newer, got "
        f"{transformers.__version__}"
    )


class MmJaxConfig(PretrainedConfig):
    """A language model and the parts that it reads through: a missing part's config is None.

    `text_config` is the config of the decoder's own family, `vision_config` SigLIP's,
    `audio_config` that of BEATs (a dict), `compressor_config` Mamba's. The placeholder ids stand
    for video, sound and memory vectors in `input_ids` and are never embedded. The last
    `vocab_padding` rows of the tables are no tokens.
    """

    model_type = "mm_jax"
    sub_configs = {
        "text_config": AutoConfig,
        "vision_config": AutoConfig,
        "compressor_config": AutoConfig,
    }

    def __init__(
        self,
        text_config=None,
        vision_config=None,
        audio_config=None,
        compressor_config=None,
        vision_select_layer=-2,
        connector_type="stc_connector_v35",
        connector_depth=4,
        audio_projector_type="linear",
        video_token_id=None,
        audio_token_id=None,
        history_token_id=None,
        vocab_padding=0,
        **kwargs,
    ):
        self.text_config = _config(text_config or {"model_type": "qwen2"})
        self.vision_config = _config(vision_config)
        self.audio_config = audio_config
        self.compressor_config = _config(compressor_config)
        self.vision_select_layer = vision_select_layer
        self.connector_type = connector_type
        self.connector_depth = connector_depth
        self.audio_projector_type = audio_projector_type
        self.video_token_id = video_token_id
        self.audio_token_id = audio_token_id
        self.history_token_id = history_token_id
        self.vocab_padding = vocab_padding
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)


def _config(values):
    if isinstance(values, dict):
        values = dict(values)
        return AutoConfig.for_model(values.pop("model_type"), **values)
    return values
