"""Writes what makes an exported folder load by transformers alone: torch code, and a processor.

The model is in `weights/torch/`. The processor reads a turn by our own files of `data/`, which are
copied next to it under the names `NAME_mm_jax.py`.
"""

from __future__ import annotations

import dataclasses
import inspect
import pathlib
import re

from mm_jax import __version__, weights
from mm_jax.config import errors, files
from mm_jax.config.files import read_json
from mm_jax.data import (
    answers,
    batch,
    conversation,
    fbank,
    history,
    labels,
    media,
    prompts,
    recording,
    records,
    sound,
    tokenizer,
)
from mm_jax.data.labels import LabelSpace, built_in, parse_labels
from mm_jax.data.media import MediaSpec
from mm_jax.run.build import Run
from mm_jax.run.folder import MEDIA_FILE

TORCH = pathlib.Path(weights.__file__).parent / "torch"
COPIED = (
    *(errors, files, answers, batch, conversation, fbank, history, labels, media),
    *(prompts, recording, records, sound, tokenizer),
)
_IMPORT = re.compile(r"^from mm_jax\.(?:config|data)\.(\w+) import", re.MULTILINE)


def code_files() -> dict[str, str]:
    """Returns the code of an exported folder: file name -> text."""
    found = {path.name: path.read_text(encoding="utf-8") for path in sorted(TORCH.glob("*.py"))}
    for module in COPIED:
        name = module.__name__.rpartition(".")[2]
        found[f"{name}_mm_jax.py"] = _IMPORT.sub(
            r"from .\1_mm_jax import", inspect.getsource(module)
        )
    return {name: f"# From mm_jax {__version__}.\n{text}" for name, text in found.items()}


def model_settings(run: Run) -> dict:
    """Returns the network's part of config.json."""
    m = run.model_config
    towers = {}
    if m.vision is not None:
        towers["vision_config"] = m.vision.to_hf_config()
    if m.audio is not None:
        towers["audio_config"] = m.audio.to_hf_config()
    if m.compressor is not None:
        towers["compressor_config"] = m.compressor.to_hf_config()
    own = ("configuration_mm_jax.MmJaxConfig", "modeling_mm_jax.MmJaxForCausalLM")
    return {
        "model_type": "mm_jax",
        "architectures": ["MmJaxForCausalLM"],
        "auto_map": {"AutoConfig": own[0], "AutoModel": own[1], "AutoModelForCausalLM": own[1]},
        "text_config": m.llm.to_hf_config(),
        **towers,
        "vision_select_layer": m.vision_select_layer,
        "connector_type": m.connector_type,
        "connector_depth": m.connector_depth,
        "audio_projector_type": m.audio_projector_type,
        "video_token_id": m.video_token_id,
        "audio_token_id": m.audio_token_id,
        "history_token_id": m.history_token_id,
        "vocab_padding": m.llm.vocab_padding,
        "tie_word_embeddings": m.llm.tie_word_embeddings,
    }


def read_processor(folder: pathlib.Path) -> tuple[dict, MediaSpec, LabelSpace] | None:
    """Returns the config's fields, the media and the labels that a folder's processor and
    generation config were made with, or None if it has no processor of ours."""
    file = folder / "processor_config.json"
    found = read_json(file) if file.is_file() else {}
    if found.get("processor_class") != "MmJaxProcessor":
        return None
    prompt = dict(found["prompt"])
    del prompt["parts"]
    space = prompt.pop("label_space")  # a name in folders exported before 2026-11-30
    space = built_in(space) if isinstance(space, str) else parse_labels(space, str(file))
    budget = {f"memory_{name}": value for name, value in prompt.pop("budget").items()}
    fields = {f"data.{name}": value for name, value in {**prompt, **budget}.items()}
    file = folder / "generation_config.json"
    length = read_json(file).get("max_new_tokens") if file.is_file() else None
    if length:
        fields["predict.max_new_tokens"] = length
    return fields, MediaSpec(**found["media"]), space


def processor_settings(run: Run) -> dict:
    """Returns processor_config.json: how the run's prompts are written and its media are read."""
    p, chat = run.prompter, dataclasses.asdict(run.tokenizer.chat)
    del chat["template"]
    prompt = {
        name: getattr(p, name)
        for name in ("template", "max_length", "parts", "previous_labels", "history")
        + ("history_tokens",)
    }
    return {
        "processor_class": "MmJaxProcessor",
        "auto_map": {"AutoProcessor": "processing_mm_jax.MmJaxProcessor"},
        "chat": chat,
        "media": read_json(run.workdir / MEDIA_FILE),
        "spans": dataclasses.asdict(p.plan),
        "prompt": {
            "label_space": p.label_space.dump(),
            **prompt,
            "budget": dataclasses.asdict(p.budget),
        },
    }
