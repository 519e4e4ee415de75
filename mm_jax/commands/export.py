"""Exports a run's model as a Hugging Face folder (command `export`, docs/checkpoints.md)."""

from __future__ import annotations

import argparse
import json
import logging
import os
import pathlib
import re
import shutil

import jax.numpy as jnp
import numpy as np

from mm_jax.config.errors import ConfigError, require
from mm_jax.config.files import parse_json, read_json
from mm_jax.config.load import read_config
from mm_jax.config.model import MODULES, PARTS
from mm_jax.data.fbank import SAMPLE_RATE
from mm_jax.data.tokenizer import llama_cpp_name
from mm_jax.evaluation.card import Exported, model_card
from mm_jax.evaluation.scores import read_metrics
from mm_jax.generation import exported
from mm_jax.models.beats import FBANK_MEAN, FBANK_STD, MEL_BINS
from mm_jax.models.decoder_config import FAMILIES
from mm_jax.models.siglip import SiglipConfig
from mm_jax.run import hub
from mm_jax.run.build import Run
from mm_jax.run.folder import MEDIA_FILE, finished_stage, read_stages
from mm_jax.run.remote_code import code_files, model_settings, processor_settings
from mm_jax.training.checkpoint import Checkpoints, load_stage
from mm_jax.weights import keymap
from mm_jax.weights.check import check_source, read_vectors, report
from mm_jax.weights.save import tensors_of, write_safetensors
from mm_jax.weights.save_gguf import KINDS, Words, stored_bytes, write_gguf
from mm_jax.weights.sources import MAMBA, MEMORY, VIDEOLLAMA2, group_of, open_source
from mm_jax.weights.tensors import Tensor

log = logging.getLogger(__name__)

# Layout -> what it is, in a sentence of the model card.
LAYOUTS = {
    "transformers": "An emotional-support model, with the code that loads it in transformers.",
    "multimood": "An emotional-support model in the key layout of the released MultiMood.",
    "videollama2": "The language model, towers and projectors of a multimodal emotional-support "
    "model, in the key layout of VideoLLaMA2.1-AV. The conversation compressor is left out.",
    **dict.fromkeys(
        FAMILIES,
        "The language model of a multimodal emotional-support model, alone: it reads text.",
    ),
    "gguf": "The language model of a multimodal emotional-support model, alone, for llama.cpp and "
    "Ollama: it reads text. Towers and conversation compressor are left out.",
    "peft": "The LoRA adapters of a multimodal emotional-support model's language model.",
    "mamba": "The conversation compressor of a multimodal emotional-support model: a Mamba, and "
    "in memory_projection.safetensors the projection to the language model's width.",
}
SO400M = "google/siglip-so400m-patch14-384"  # the tower of SiglipConfig's defaults


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--from", dest="workdir", required=True, type=pathlib.Path, help="run folder of train")
    add("--layout", required=True, choices=list(LAYOUTS), help="whose layout to write")
    add("--out", required=True, type=pathlib.Path, help="new folder")
    add("--stage", help="stage whose best checkpoint is used (default: the last finished)")
    add("--step", type=int, help="its step (default: the best on val)")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "q8_0"),
        help="of the weights (default: as they are in the checkpoint; gguf: float16, and q8_0 is "
        "8-bit blocks)",
    )
    add("--base", default="", help="peft: name or folder of the model the adapters belong to")
    add(
        "--check",
        nargs="?",
        const="transformers",
        metavar="VECTORS",
        help="afterwards compare with transformers, or with the logits stored in an npz file",
    )
    add(
        "--push",
        metavar="NAME",
        help="then upload the folder to this hub repository, in place of what it held (HF_TOKEN)",
    )
    add("--public", action="store_true", help="--push: a new repository is public, not private")
    add("--dry_run", action="store_true", help="--push: only list what would be uploaded")


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    require(bool(args.push) or not (args.public or args.dry_run), "--public, --dry_run need --push")
    if args.push:
        hub.check_target(args.push, args.dry_run)
    export(args)
    if args.push:
        hub.push(args.out, args.push, args.public, args.dry_run)


def export(args: argparse.Namespace) -> None:
    """Writes the folder, and checks it if asked to."""
    out = args.out
    require(not os.path.lexists(out), f"--out: {out} exists; remove it or name another folder")
    require(not args.base or args.layout == "peft", "--base belongs to --layout peft")
    require(
        not (args.check and args.layout == "peft"),
        "--check: adapters alone compute nothing; check the merged model (--layout "
        "of its language model)",
    )
    require(args.layout == "gguf" or args.dtype != "q8_0", "--dtype q8_0 belongs to --layout gguf")
    config = read_config(args.workdir / "config.json")
    config = config.replace(mesh={"data": 1, "fsdp": -1, "tensor": 1})  # the devices here
    vectors = None
    if args.check and args.check != "transformers":
        vectors = read_vectors(pathlib.Path(args.check))
    stage = finished_stage(config, args.workdir, args.stage, "--from")
    family = config.model.llm.family
    for layout, parts in (("videollama2", {"vision", "audio"}), ("multimood", set(PARTS))):
        require(
            args.layout != layout or bool(parts & set(config.model.parts)),
            f"--layout {layout}: this model has none of {sorted(parts)}; use --layout {family}",
        )
    require(
        args.layout not in FAMILIES or args.layout == family,
        f"--layout {args.layout}: the language model of this run is of family {family}; use "
        f"--layout {family}",
    )
    run = Run.open(config, args.workdir)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    dtype = jnp.dtype(args.dtype) if args.dtype and args.layout != "gguf" else None
    if args.layout == "peft":
        tensors, step = adapter_tensors(run, stage, args.step, dtype)
        configs = {"adapter_config.json": adapter_config(config.stage[stage], args.base)}
    elif args.layout == "gguf":
        words, configs = words_of(run), {}
        params, step = load_stage(run, stage, args.step, as_stored=True)
        tensors = choose(tensors_of(params, keymap.MULTIMOOD), args.layout)
    else:
        params, step = load_stage(run, stage, args.step, as_stored=True)
        tensors = choose(tensors_of(params, keymap.MULTIMOOD, dtype), args.layout)
        configs = configs_of(run, args.layout, tensors)
    needed = sum(t.nbytes for t in tensors.values())
    if args.layout == "gguf":
        needed = sum(stored_bytes(t.shape, args.dtype or "float16") for t in tensors.values())
    about = card(args, run, stage, step)
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    require(
        needed < free,
        f"--out: {out.parent} has {free / 1e6:,.1f} MB left, the weights need {needed / 1e6:,.1f}",
    )
    partial.mkdir()
    try:
        if args.layout == "gguf":
            file = partial / f"{out.name}-{KINDS[args.dtype or 'float16']}.gguf"
            kind = args.dtype or "float16"
            write_gguf(file, out.name, run.model_config.llm, tensors, words, kind)
        else:
            write_weights(partial, args.layout, tensors)
        for name, values in configs.items():
            (partial / name).write_text(json.dumps(values, indent=2) + "\n")
        if args.layout == "transformers":
            for name, text in code_files().items():
                (partial / name).write_text(text, encoding="utf-8")
        if args.layout not in ("mamba", "gguf"):
            run.tokenizer.save(partial)
        (partial / "README.md").write_text(about, encoding="utf-8")
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    log.info(
        "%s: %d tensors, %.2f GB, stage %s step %d", out, len(tensors), needed / 1e9, stage, step
    )
    if args.check and args.layout == "transformers" and vectors is None:
        exported.report(exported.compare_export(run, out))
        return
    if not args.check:
        return
    source = next(out.glob("*.gguf")) if args.layout == "gguf" else out
    if args.layout in (*FAMILIES, "gguf"):
        exported.check_tokenizer(run.tokenizer, source)
    report(check_source(open_source(str(source)), vectors))


def card(args: argparse.Namespace, run: Run, stage: str, step: int) -> str:
    """Renders the model card, with the run's metrics if they are those of this checkpoint."""
    config, finished = run.config, read_stages(args.workdir)
    file = args.workdir / "metrics.json"
    evaluated = stage == finished_stage(config, args.workdir, None, "--from")
    evaluated = evaluated and finished.get(stage) == step and file.is_file()
    metrics = read_metrics(file) if evaluated else None
    kept = {"transformers": PARTS, "multimood": PARTS, "videollama2": ("vision", "audio")}
    parts = tuple(p for p in kept.get(args.layout, ()) if p in config.model.parts)
    modules = tuple(m for m, part in MODULES.items() if part is None or part in parts)
    if args.layout == "mamba":
        modules = ("mamba_compressor",)
    about = LAYOUTS[args.layout]
    exported = Exported(args.out.name, args.layout, about, stage, step, finished, parts, modules)
    return model_card(config, exported, run.prompter, metrics)


def choose(tensors: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Selects a layout's tensors, by its keys. Raises ConfigError where the model has none."""
    if layout == "multimood":
        return tensors
    if layout == "transformers":  # its code has one table of BEATs' positions, not one per layer
        copy = re.compile(r"\.layers\.[1-9]\d*\.self_attn\.relative_attention_bias\.")
        return {k: t for k, t in tensors.items() if not copy.search(k)}
    if layout == "mamba":
        chosen = {
            f"backbone.{k.removeprefix(MAMBA)}" if k.startswith(MAMBA) else k: t
            for k, t in tensors.items()
            if group_of(k)[0] == "mamba_compressor"
        }
        require(bool(chosen), "--layout mamba: this model has no compressor")
        return chosen
    modules = {"language_model"}
    if layout == "videollama2":
        modules |= {"vision_tower", "mm_projector", "audio_tower", "mm_projector_a"}
    return {k: t for k, t in tensors.items() if group_of(k)[0] in modules}


def write_weights(folder: pathlib.Path, layout: str, tensors: dict[str, Tensor]) -> None:
    if layout == "peft":
        write_safetensors(folder, tensors, "adapter_model")
        return
    projection = {k: t for k, t in tensors.items() if layout == "mamba" and k.startswith(MEMORY)}
    if projection:
        name = "memory_projection"
        named = {f"{name}.{k.removeprefix(MEMORY)}": t for k, t in projection.items()}
        write_safetensors(folder, named, name)
    write_safetensors(folder, {k: t for k, t in tensors.items() if k not in projection})


def adapter_tensors(run: Run, stage: str, step: int | None, dtype):
    checkpoints = Checkpoints(run.workdir / "checkpoints" / stage)
    try:
        step = checkpoints.best_step() if step is None else step
        state = checkpoints.restore_adapters(step)
    finally:
        checkpoints.close()
    return tensors_of(state, keymap.PEFT, dtype), step


def adapter_config(stage, base: str) -> dict:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": stage.lora.rank,
        "lora_alpha": stage.lora.alpha,
        "lora_dropout": stage.lora.dropout,
        "target_modules": sorted(stage.lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }


def words_of(run: Run) -> Words:
    """Returns what a GGUF file says of the run's tokenizer. Raises ConfigError."""
    tok = run.tokenizer
    spec = parse_json(tok.backend.to_str())
    try:
        cut = llama_cpp_name(spec, "--layout gguf")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    bos = tok.backend.token_to_id(tok.chat.bos) if tok.chat.bos else None
    return Words(spec, cut, tok.chat.template, tok.end_id, tok.pad_id, bos)


def configs_of(run: Run, layout: str, tensors: dict[str, Tensor]) -> dict[str, dict]:
    """Returns a layout's config files: file name -> JSON."""
    model, tok = run.model_config, run.tokenizer
    if layout == "mamba":
        embedding = tensors["backbone.embeddings.weight"].dtype
        return {"config.json": {**model.compressor.to_hf_config(), "torch_dtype": str(embedding)}}
    bos = tok.backend.token_to_id(tok.chat.bos)
    ids = {"eos_token_id": tok.end_id, "pad_token_id": tok.pad_id, "bos_token_id": bos}
    dtype = str(np.dtype(tensors["model.embed_tokens.weight"].dtype))
    settings = model_settings(run) if layout == "transformers" else model.llm.to_hf_config()
    config = {**settings, **ids, "torch_dtype": dtype}
    p = run.config.predict
    sampling = {"do_sample": p.temperature > 0}
    if p.temperature > 0:
        sampling.update(temperature=p.temperature, top_k=p.top_k, top_p=p.top_p)
    files = {
        "config.json": config,
        "generation_config.json": {
            **ids,
            "eos_token_id": list(tok.stop_ids),
            **sampling,
            "max_new_tokens": p.max_new_tokens,
        },
    }
    if layout in FAMILIES:
        return files
    if layout == "transformers":
        return files | {"processor_config.json": processor_settings(run)}
    name = f"Videollama2{FAMILIES[model.llm.family].architecture}"
    config.update(model_type=f"{VIDEOLLAMA2}{model.llm.family}", architectures=[name])
    spec = read_json(run.workdir / MEDIA_FILE)
    if model.vision is not None:
        config.update(
            use_mm_proj=True,
            # The reference code builds its tower from this name.
            mm_vision_tower=SO400M if model.vision == SiglipConfig() else "siglip",
            mm_vision_select_layer=model.vision_select_layer,
            mm_vision_select_feature="patch",
            mm_projector_type=model.connector_type,
            mm_projector_depth=model.connector_depth,
            mm_hidden_size=model.vision.hidden_size,
            num_frames=spec["num_frames"],
            vision_config=model.vision.to_hf_config(),
        )
        side = model.vision.image_size
        files["preprocessor_config.json"] = {
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": side, "width": side},
            "resample": 3,
            "do_resize": True,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        }
    if model.audio is not None:
        config.update(
            mm_audio_tower="audio_tower.bin",
            mm_projector_a_type=model.audio_projector_type,
            mm_hidden_size_a=model.audio.encoder_embed_dim,
            hidden_size_a=model.llm.hidden_size,
            audio_config=model.audio.to_hf_config(),
        )
        files["audio_preprocessor_config.json"] = {
            "feature": "Kaldi fbank of 16-bit values, povey window, no dither",
            "sampling_rate": SAMPLE_RATE,
            "num_mel_bins": MEL_BINS,
            "frame_length_ms": 25,
            "frame_shift_ms": 10,
            "mean": FBANK_MEAN,
            "std": 2 * FBANK_STD,
            "max_seconds": spec["max_audio_seconds"],
            "audio_mode": spec["audio_mode"],
        }
    if model.compressor is not None and layout == "multimood":
        config.update(compressor_config=model.compressor.to_hf_config())
    return files
