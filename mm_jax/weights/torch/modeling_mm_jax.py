"""An exported mm_jax model in torch: a language model that reads video, sound and memory vectors.

Decoder, SigLIP and Mamba are transformers' own; BEATs, the STC connector and the compressor's
projection are here. Needs torch and transformers alone.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_mm_jax import MmJaxConfig

FBANK_MEAN, FBANK_STD = 15.41663, 6.55582
CONNECTOR_PADDING = {"stc_connector_v35": 0, "stc_connector": 1}


# ---- BEATs (microsoft/unilm, iter3+) -----------------------------------------------------------


def relative_buckets(length, num_buckets, max_distance):
    """Returns int64[length, length]: T5's bidirectional bucket of (key - query)."""
    relative = torch.arange(length)[None] - torch.arange(length)[:, None]
    half = num_buckets // 2
    exact = half // 2
    distance = relative.abs()
    ratio = torch.log(distance.clamp(min=1).float() / exact)
    ratio = ratio / math.log(max_distance / exact) * (half - exact)
    far = (exact + ratio.long()).clamp(max=half - 1)
    return (relative > 0) * half + torch.where(distance < exact, distance, far)


class BeatsAttention(nn.Module):
    """Self-attention with a gated relative position bias (WavLM)."""

    def __init__(self, c, with_table):
        super().__init__()
        d, self.heads = c["encoder_embed_dim"], c["encoder_attention_heads"]
        self.q_proj = nn.Linear(d, d)
        self.k_proj = nn.Linear(d, d)
        self.v_proj = nn.Linear(d, d)
        self.out_proj = nn.Linear(d, d)
        self.grep_linear = nn.Linear(d // self.heads, 8)
        self.grep_a = nn.Parameter(torch.ones(1, self.heads, 1, 1))
        if with_table:  # all layers share it
            self.relative_attention_bias = nn.Embedding(c["num_buckets"], self.heads)

    def forward(self, x, buckets, bias, allowed):
        """Returns the output and the table's bias, which layer 0 computes for all layers."""
        batch, length, _ = x.shape
        split = (batch, length, self.heads, -1)
        q, k, v = (
            p(x).view(split).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        gates = self.grep_linear(q).view(*q.shape[:3], 2, 4).sum(-1).float().sigmoid()
        gate = gates[..., :1] * (gates[..., 1:] * self.grep_a.float() - 1.0) + 2.0
        if bias is None:
            bias = self.relative_attention_bias(buckets).float().permute(2, 0, 1)
        mask = (gate * bias.to(gate.device)).to(q.dtype)
        mask = mask.masked_fill(~allowed[:, None, None, :], torch.finfo(q.dtype).min)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(out.transpose(1, 2).reshape(batch, length, -1)), bias


class BeatsLayer(nn.Module):
    def __init__(self, c, with_table):
        super().__init__()
        d, f = c["encoder_embed_dim"], c["encoder_ffn_embed_dim"]
        self.alpha = (2 * c["encoder_layers"]) ** 0.25  # DeepNorm's
        self.self_attn = BeatsAttention(c, with_table)
        self.self_attn_layer_norm = nn.LayerNorm(d)
        self.fc1 = nn.Linear(d, f)
        self.fc2 = nn.Linear(f, d)
        self.final_layer_norm = nn.LayerNorm(d)

    def forward(self, x, buckets, bias, allowed):
        attended, bias = self.self_attn(x, buckets, bias, allowed)
        x = self.self_attn_layer_norm(x * self.alpha + attended)
        return self.final_layer_norm(x * self.alpha + self.fc2(F.gelu(self.fc1(x)))), bias


class PositionalConv(nn.Module):
    """A grouped convolution with weight normalisation over the kernel axis."""

    def __init__(self, width, kernel, groups):
        super().__init__()
        self.groups, self.padding = groups, kernel // 2
        self.weight_v = nn.Parameter(torch.empty(width, width // groups, kernel))
        self.weight_g = nn.Parameter(torch.ones(1, 1, kernel))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        v = self.weight_v.float()
        norm = (v.square().sum((0, 1), keepdim=True) + 1e-6).sqrt()
        weight = (self.weight_g.float() * v / norm).to(x.dtype)
        y = F.conv1d(x.transpose(1, 2), weight, padding=self.padding, groups=self.groups)
        y = y[..., : x.shape[1]] + self.bias[:, None]  # an even kernel gives one output too many
        return F.gelu(y).transpose(1, 2)


class BeatsEncoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        d = c["encoder_embed_dim"]
        self.pos_conv = nn.ModuleList([PositionalConv(d, c["conv_pos"], c["conv_pos_groups"])])
        self.layer_norm = nn.LayerNorm(d)
        self.layers = nn.ModuleList([BeatsLayer(c, i == 0) for i in range(c["encoder_layers"])])


class Beats(nn.Module):
    """Encodes filter banks float[B, A, 128] with int64[B] real frames as [B, A // 16 * 8, D]."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        p, d = c["input_patch_size"], c["encoder_embed_dim"]
        self.patch_embedding = nn.Conv2d(1, c["embed_dim"], p, stride=p, bias=False)
        self.layer_norm = nn.LayerNorm(c["embed_dim"])
        self.post_extract_proj = nn.Linear(c["embed_dim"], d)
        self.encoder = BeatsEncoder(c)
        if c["predictor_class"]:
            self.predictor = nn.Linear(d, c["predictor_class"])

    def forward(self, fbank, frames):
        c, dtype = self.config, self.patch_embedding.weight.dtype
        x = ((fbank.float() - FBANK_MEAN) / (2 * FBANK_STD)).to(dtype)
        x = self.patch_embedding(x[:, None])  # [B, E, time, mels]
        x = self.layer_norm(x.flatten(2).transpose(1, 2))
        x = self.post_extract_proj(x)
        share = fbank.shape[1] // x.shape[1]
        allowed = torch.arange(x.shape[1], device=x.device)[None] * share < frames[:, None]
        x = x * allowed[..., None]
        x = self.encoder.layer_norm(x + self.encoder.pos_conv[0](x))
        buckets = relative_buckets(x.shape[1], c["num_buckets"], c["max_distance"]).to(x.device)
        bias = None
        ratio = c["layer_wise_gradient_decay_ratio"]
        for layer in self.encoder.layers:
            if ratio != 1.0 and x.requires_grad:  # scales the gradient alone
                x = ratio * x + (1 - ratio) * x.detach()
            x, bias = layer(x, buckets, bias, allowed)
        return x


# ---- STC connector (VideoLLaMA2's mm_projector; blocks named as in timm's RegStage) ------------


class ConvNorm(nn.Module):
    """A convolution without bias, then LayerNorm over the channels."""

    def __init__(self, inputs, outputs, kernel=1, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False
        )
        self.bn = nn.LayerNorm(outputs)

    def forward(self, x):
        return self.bn(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    def __init__(self, width, squeezed):
        super().__init__()
        self.fc1 = nn.Conv2d(width, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, width, 1)

    def forward(self, x):
        s = x.mean((2, 3), keepdim=True)
        return x * self.fc2(F.silu(self.fc1(s))).sigmoid()


class Bottleneck(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1 = ConvNorm(inputs, outputs)
        self.conv2 = ConvNorm(outputs, outputs, 3, groups=outputs)
        self.se = SqueezeExcite(outputs, round(inputs * 0.25))
        self.conv3 = ConvNorm(outputs, outputs)
        self.downsample = ConvNorm(inputs, outputs) if inputs != outputs else None

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.se(F.silu(self.conv2(F.silu(self.conv1(x)))))
        return F.silu(self.conv3(x) + shortcut)


def reg_stage(depth, inputs, outputs):
    stage = nn.Sequential()
    for i in range(depth):
        stage.add_module(f"b{i + 1}", Bottleneck(inputs if i == 0 else outputs, outputs))
    return stage


class StcConnector(nn.Module):
    """Maps features [B, F, P, D_vision] of square frames to tokens [B, M, D]."""

    def __init__(self, kind, depth, inputs, width):
        super().__init__()
        self.s1 = reg_stage(depth, inputs, width)
        padding = CONNECTOR_PADDING[kind]
        self.sampler = nn.Sequential(
            nn.Conv3d(width, width, 2, stride=2, padding=padding), nn.SiLU()
        )
        self.s2 = reg_stage(depth, width, width)
        self.readout = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, features):
        batch, frames, patches, width = features.shape
        side = round(patches**0.5)
        x = features.reshape(batch * frames, side, side, width).permute(0, 3, 1, 2)
        x = self.s1(x).unflatten(0, (batch, frames)).transpose(1, 2)  # [B, D, F, h, w]
        x = self.sampler(x).transpose(1, 2)
        frames = x.shape[1]
        x = self.s2(x.flatten(0, 1)).flatten(2).transpose(1, 2)  # [B * F, h * w, D]
        return self.readout(x.reshape(batch, frames * x.shape[1], -1))


# ---- the whole ---------------------------------------------------------------------------------


class VisionTower(nn.Module):
    """SigLIP, up to the layer whose patches are read; named as in the released checkpoints."""

    def __init__(self, config, select_layer):
        super().__init__()
        self.layers = config.num_hidden_layers + 1 + select_layer
        self.vision_tower = nn.Module()
        self.vision_tower.vision_model = AutoModel.from_config(config)

    def forward(self, frames):
        """Encodes normalised frames [B, F, 3, S, S] as [B, F, P, D]."""
        model = self.vision_tower.vision_model
        pixels = frames.flatten(0, 1).to(model.embeddings.patch_embedding.weight.dtype)
        x = model.embeddings(pixels)
        for layer in model.encoder.layers[: self.layers]:
            x = layer(x, attention_mask=None)
            x = x[0] if isinstance(x, tuple) else x
        return x.unflatten(0, frames.shape[:2])


class Compressor(nn.Module):
    """Memory vectors [B, U, D]: Mamba's states at `positions` int64[B, U], projected."""

    def __init__(self, config, width):
        super().__init__()
        self.mamba = AutoModel.from_config(config, attn_implementation="eager")
        self.memory_projection = nn.Linear(config.hidden_size, width)

    def forward(self, tokens, positions):
        hidden = self.mamba(input_ids=tokens, use_cache=False).last_hidden_state
        index = positions.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1])
        picked = hidden.gather(1, index)
        return self.memory_projection(picked.to(self.memory_projection.weight.dtype))


def place(x, where, features):
    """Puts features [B, M, D], in order, where bool[B, T] is True into x [B, T, D]."""
    where, features = where.to(x.device), features.to(x.device)
    index = (where.cumsum(1) - 1).clamp(0, features.shape[1] - 1)
    picked = features.gather(1, index[..., None].expand(-1, -1, features.shape[-1]))
    return torch.where(where[..., None], picked.to(x.dtype), x)


class MmJaxForCausalLM(PreTrainedModel, GenerationMixin):
    """The model; `forward` and `generate` take what the processor gives.

    input_ids int64[B, T] hold placeholders, one for each token of video and sound and for each
    memory vector. frames [B, F, 3, S, S] in [-1, 1]; fbank float[B, A, 128] with fbank_frames
    int64[B] real ones; history_ids int64[B, H] with memory_index int64[B, U], the positions of the
    memory tokens in them. A row without a modality has no placeholders of it.
    """

    config_class = MmJaxConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _skip_keys_device_placement = ["past_key_values"]
    _no_split_modules = ["BeatsLayer", "Bottleneck", "SiglipEncoderLayer", "MambaBlock"]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        text = config.text_config
        width = text.hidden_size
        # The parts are children of the decoder, as in the released checkpoints.
        self.model = AutoModel.from_config(text)
        if config.vision_config is not None:
            self.model.vision_tower = VisionTower(config.vision_config, config.vision_select_layer)
            self.model.mm_projector = StcConnector(
                config.connector_type,
                config.connector_depth,
                config.vision_config.hidden_size,
                width,
            )
        if config.audio_config is not None:
            self.model.audio_tower = Beats(config.audio_config)
            first = nn.Linear(config.audio_config["encoder_embed_dim"], width)
            if config.audio_projector_type == "mlp2x_gelu":
                first = nn.Sequential(first, nn.GELU(), nn.Linear(width, width))
            self.model.mm_projector_a = first
        if config.compressor_config is not None:
            self.model.mamba_compressor = Compressor(config.compressor_config, width)
        self.lm_head = nn.Linear(width, text.vocab_size, bias=False)
        self.post_init()

    def embed(
        self,
        input_ids,
        frames=None,
        fbank=None,
        fbank_frames=None,
        history_ids=None,
        memory_index=None,
    ):
        """Embeds `input_ids` as [B, T, D], with features in place of their placeholders."""
        c, m = self.config, self.model
        where = {
            name: input_ids == getattr(c, f"{name}_token_id")
            for name in ("video", "audio", "history")
            if getattr(c, f"{name}_token_id") is not None
        }
        special = torch.zeros_like(input_ids, dtype=torch.bool)
        for mask in where.values():
            special |= mask
        x = m.embed_tokens(input_ids.masked_fill(special, 0))
        features = {}
        if frames is not None and frames.shape[1]:
            features["video"] = m.mm_projector(m.vision_tower(frames))
        if fbank is not None and fbank.shape[1]:
            features["audio"] = m.mm_projector_a(m.audio_tower(fbank, fbank_frames))
        if memory_index is not None and memory_index.shape[1]:
            features["history"] = m.mamba_compressor(history_ids, memory_index)
        for name, mask in where.items():
            if name in features:
                most = int(mask.sum(1).max())
                if most > features[name].shape[1]:
                    raise ValueError(
                        f"{name}: {most} placeholders in a row, {features[name].shape[1]} features"
                    )
                x = place(x, mask, features[name])
            elif mask.any():
                raise ValueError(f"{name}: input_ids have placeholders, but no {name} is given")
        return x

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        frames=None,
        fbank=None,
        fbank_frames=None,
        history_ids=None,
        memory_index=None,
        **kwargs,
    ):
        started = past_key_values is not None and past_key_values.get_seq_length() > 0
        if inputs_embeds is None and started:  # a placeholder that was generated is a token
            inputs_embeds = self.model.embed_tokens(input_ids)
        elif inputs_embeds is None:
            inputs_embeds = self.embed(
                input_ids, frames, fbank, fbank_frames, history_ids, memory_index
            )
        outputs = self.model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        if self.config.vocab_padding:
            logits[..., -self.config.vocab_padding :] = torch.finfo(logits.dtype).min
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.text_config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, **kwargs
        )
        if past_key_values is not None and past_key_values.get_seq_length():
            for name in ("frames", "fbank", "fbank_frames", "history_ids", "memory_index"):
                inputs.pop(name, None)  # they are in the cache already
        return inputs
