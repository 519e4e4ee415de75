"""Maps our parameter paths to checkpoint keys by one table, used in both directions.

A table maps a path prefix to a key prefix; the rest is the same on both sides, because module
attributes carry the reference's names. `{layer}` marks a stacked parameter (one key per layer),
`{every_layer}` a single parameter that the checkpoint stores once per layer (BEATs' shared table).
Checkpoints call the leaves `kernel`, `scale` and `embedding` all `weight`. Kernels, those of
adapters too, are transposed from channels-last [..., in, out] to torch's [out, in, ...].
"""

from __future__ import annotations

import dataclasses

import numpy as np

DECODER = {
    "embed_tokens": "model.embed_tokens",
    "layers": "model.layers.{layer}",
    "norm": "model.norm",
    "lm_head": "lm_head",
}
SIGLIP = {
    "patch_embedding": "vision_model.embeddings.patch_embedding",
    "position_embedding": "vision_model.embeddings.position_embedding",
    "layers": "vision_model.encoder.layers.{layer}",
    "post_layernorm": "vision_model.post_layernorm",
    "head": "vision_model.head",
    "head/in_proj/kernel": "vision_model.head.attention.in_proj_weight",
    "head/in_proj/bias": "vision_model.head.attention.in_proj_bias",
    "head/out_proj": "vision_model.head.attention.out_proj",
}
BEATS = {
    "patch_embedding": "patch_embedding",
    "layer_norm": "layer_norm",
    "post_extract_proj": "post_extract_proj",
    "predictor": "predictor",
    "pos_conv": "encoder.pos_conv.0",
    "encoder_layer_norm": "encoder.layer_norm",
    "layers": "encoder.layers.{layer}",
    "relative_attention_bias": "encoder.layers.{every_layer}.self_attn.relative_attention_bias",
}
STC = {
    "s1": "s1",
    "s2": "s2",
    "sampler": "sampler.0",
    "readout_0": "readout.0",
    "readout_2": "readout.2",
}
MAMBA = {
    "embeddings": "embeddings",
    "layers": "layers.{layer}",
    "norm_f": "norm_f",
}


def _nested(table: dict[str, str], path: str, key: str) -> dict[str, str]:
    return {f"{path}/{p}": f"{key}{k}" for p, k in table.items()}


COMPRESSOR = {
    **_nested(MAMBA, "mamba", "mamba."),
    "memory_projection": "memory_projection",
}
MULTIMOOD = {
    **_nested(DECODER, "language_model", ""),
    **_nested(SIGLIP, "vision_tower", "model.vision_tower.vision_tower."),
    **_nested(STC, "mm_projector", "model.mm_projector."),
    **_nested(BEATS, "audio_tower", "model.audio_tower."),
    "mm_projector_a": "model.mm_projector_a",
    "mm_projector_a/linear_0": "model.mm_projector_a.0",
    "mm_projector_a/linear_2": "model.mm_projector_a.2",
    **_nested(COMPRESSOR, "mamba_compressor", "model.mamba_compressor."),
}
PEFT = _nested(DECODER, "language_model", "base_model.model.")

LEAF_NAMES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "lora_a": "lora_A.weight",
    "lora_b": "lora_B.weight",
}
KERNELS = ("kernel", "lora_a", "lora_b")


@dataclasses.dataclass(frozen=True)
class Entry:
    """Pairs one of our parameters with its checkpoint keys: one key, or one per layer.

    `stacked`: axis 0 is the layers; `kernel`: the channel axes are transposed.
    """

    path: tuple[str, ...]
    keys: tuple[str, ...]
    stacked: bool
    kernel: bool

    @property
    def shared(self) -> bool:
        """Tells whether the checkpoint may store this parameter once per layer; any key will do."""
        return not self.stacked and len(self.keys) > 1

    @property
    def row_axis(self) -> int:
        """Returns the axis of the parameter that matches a checkpoint tensor's first axis."""
        return -1 if self.kernel else int(self.stacked)

    def from_torch(self, array: np.ndarray) -> np.ndarray:
        """Views one layer's array (or rows of it) in our layout."""
        return array.transpose(*range(2, array.ndim), 1, 0) if self.kernel else array

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the checkpoint shape of one key, from our (stacked) shape."""
        one = shape[1:] if self.stacked else shape
        return (one[-1], one[-2], *one[:-2]) if self.kernel else one


def entries(shapes: dict[tuple[str, ...], tuple[int, ...]], table: dict[str, str]) -> list[Entry]:
    """Lists the entries of all parameters of a model, given as path -> shape.

    Raises KeyError for a path that no rule covers.
    """
    found = []
    for path, shape in shapes.items():
        joined = "/".join(path)
        rules = [prefix for prefix in table if f"{joined}/".startswith(f"{prefix}/")]
        if not rules:
            raise KeyError(f"keymap: no rule for parameter {joined}")
        rule = max(rules, key=len)
        rest = [name for name in joined[len(rule) :].split("/") if name]
        if rest:
            rest[-1] = LEAF_NAMES.get(rest[-1], rest[-1])
        template = ".".join([table[rule], *rest])
        stacked, count = "{layer}" in template, 1
        if stacked:
            count = shape[0]
        elif "{every_layer}" in template:  # one per layer of the stack next to it
            stack = (*rule.split("/")[:-1], "layers")
            count = next(s[0] for p, s in shapes.items() if p[: len(stack)] == stack)
        keys = tuple(template.format(layer=i, every_layer=i) for i in range(count))
        found.append(Entry(path, keys, stacked, path[-1] in KERNELS))
    return found
