"""Tests shapes and checkpoint keys at the real 7B sizes, without allocating anything."""

import json

from flax import nnx

from mm_jax.models.beats import BeatsConfig
from mm_jax.models.decoder_config import DecoderConfig
from mm_jax.models.mamba import MambaConfig
from mm_jax.models.multimood import MultiMood, MultiMoodConfig
from mm_jax.models.siglip import SiglipConfig
from mm_jax.weights import keymap
from mm_jax.weights.load import param_shapes
from tests.conftest import GOLDEN


def test_keys_and_shapes_are_those_of_the_released_model():
    listed = json.loads((GOLDEN / "state_dict_keys_7b.json").read_text())
    c = listed["config"]
    config = MultiMoodConfig(
        llm=DecoderConfig.from_hf_config(c["qwen2"]),
        vision=SiglipConfig.from_hf_config(c["siglip"]),
        audio=BeatsConfig.from_hf_config(c["beats"]),
        compressor=MambaConfig.from_hf_config({**c["mamba"], "vocab_size": c["tokenizer_len"]}),
        connector_type=c["multimodal"]["mm_projector_type"],
        vision_select_layer=c["multimodal"]["mm_vision_select_layer"],
    )
    _, state = nnx.split(nnx.eval_shape(lambda: MultiMood(config, rngs=nnx.Rngs(0))))
    shapes = param_shapes(state)
    ours = {
        key: list(e.torch_shape(shapes[e.path]))
        for e in keymap.entries(shapes, keymap.MULTIMOOD)
        for key in e.keys
    }
    assert ours == {k: v["shape"] for k, v in listed["keys"].items() if v["parameter"]}


def test_default_config_is_the_7b_model():
    _, state = nnx.split(nnx.eval_shape(lambda: MultiMood(MultiMoodConfig(), rngs=nnx.Rngs(0))))
    total = sum(v.size for _, v in nnx.to_flat_state(state["language_model"]))
    assert total == 7_615_616_512
