"""One table between our parameter paths and checkpoint keys, used in both directions.

A table maps a path prefix to a key prefix; what follows is the same on both sides, because module
attributes carry the reference's names. `{layer}` marks a stacked parameter (one key a layer),
`{every_layer}` one parameter that the checkpoint stores once per layer (BEATs' shared table).
Leaves `kernel`, `scale` and `embedding` are all called `weight` there; kernels are transposed from
channels-last [..., in, out] to torch's [out, in, ...], adapters too.
"""

from __future__ import annotations

import dataclasses

import numpy as np

QWEN2 = {
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
    **_nested(QWEN2, "language_model", ""),
    **_nested(SIGLIP, "vision_tower", "model.vision_tower.vision_tower."),
    **_nested(STC, "mm_projector", "model.mm_projector."),
    **_nested(BEATS, "audio_tower", "model.audio_tower."),
    "mm_projector_a": "model.mm_projector_a",
    "mm_projector_a/linear_0": "model.mm_projector_a.0",
    "mm_projector_a/linear_2": "model.mm_projector_a.2",
    **_nested(COMPRESSOR, "mamba_compressor", "model.mamba_compressor."),
}
PEFT = _nested(QWEN2, "language_model", "base_model.model.")

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
    """One of our parameters and its checkpoint keys.

    `keys` has one key, or one a layer; `stacked`: axis 0 is the layers; `kernel`: the channel axes
    are transposed.
    """

    path: tuple[str, ...]
    keys: tuple[str, ...]
    stacked: bool
    kernel: bool

    @property
    def shared(self) -> bool:
        """One parameter that the checkpoint may store once a layer; any of the keys will do."""
        return not self.stacked and len(self.keys) > 1

    @property
    def row_axis(self) -> int:
        """The axis of the parameter that the rows (first axis) of a checkpoint tensor run along."""
        return -1 if self.kernel else int(self.stacked)

    def first(self, available) -> str:
        """The first of the keys that is available."""
        return next(key for key in self.keys if key in available)

    def from_torch(self, array: np.ndarray) -> np.ndarray:
        """One layer's array (or rows of it) in our layout, as a view."""
        if not self.kernel:
            return array
        return array.transpose(*range(2, array.ndim), 1, 0)

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The checkpoint shape of one key, from our (stacked) shape."""
        one = shape[1:] if self.stacked else shape
        return (one[-1], one[-2], *one[:-2]) if self.kernel else one


def entry(path: tuple[str, ...], table: dict[str, str], layers: dict[str, int]) -> Entry:
    """The entry of one parameter path.

    `layers` gives the number of layers of the stacks and shared tables: path prefix -> count.
    Raises KeyError for a path no rule covers.
    """
    joined = "/".join(path)
    rules = [p for p in table if joined == p or joined.startswith(p + "/")]
    if not rules:
        raise KeyError(f"keymap: no rule for parameter {joined}")
    rule = max(rules, key=len)
    rest = joined[len(rule) :].strip("/").split("/") if joined != rule else []
    if rest:
        rest[-1] = LEAF_NAMES.get(rest[-1], rest[-1])
    template = ".".join([table[rule], *rest])
    repeated = "{layer}" in template or "{every_layer}" in template
    if repeated:
        count = layers[rule]
        keys = tuple(template.format(layer=i, every_layer=i) for i in range(count))
    else:
        keys = (template,)
    return Entry(path, keys, "{layer}" in template, path[-1] in KERNELS)


def entries(shapes: dict[tuple[str, ...], tuple[int, ...]], table: dict[str, str]) -> list[Entry]:
    """Entries of all parameters of a model: path -> shape."""
    layers: dict[str, int] = {}
    for path, shape in shapes.items():
        joined = "/".join(path)
        for prefix, key in table.items():
            if "{layer}" in key and joined.startswith(prefix + "/"):
                layers[prefix] = shape[0]
    for prefix, key in table.items():
        if "{every_layer}" in key:
            stack = prefix.rpartition("/")[0]
            stack = f"{stack}/layers" if stack else "layers"
            if stack in layers:
                layers[prefix] = layers[stack]
    return [entry(path, table, layers) for path in shapes]
