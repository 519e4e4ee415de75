"""Declares every field of a run: its type, default, range, choices and meaning.

`configs/*.py` build ConfigDicts from these defaults; code reads the frozen `Config`. Validators
next to the fields refuse impossible combinations; each message begins with the field, and the path
of its section is put before it. `make docs` writes docs/config.md from this file and its neighbours
for the model, stages and rewards.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import model_validator

from mm_jax.config.errors import one_of, prefixed, require
from mm_jax.config.model import MODULES, Model
from mm_jax.config.reward import Reward
from mm_jax.config.section import Section, field
from mm_jax.config.stage import NF4_BLOCK, Stage


class Data(Section):
    """The data set, the prompt, and how batches are made."""

    folder: str = field("data/mesc/f8_s384/1.0.0", "The folder that `prepare` printed.")
    label_space: str = field(
        "", "mesc, dfew, or a labels.json, for models without a data set; empty: that of folder."
    )
    template: Literal["ecot", "short"] = field("ecot", "Prompt template; short is for tiny models.")
    history_labels: Literal["gold", "predicted", "none"] = field(
        "gold", "Labels of past turns that the input shows."
    )
    history_predictions: str = field(
        "", "predictions.jsonl of train and val, for history_labels=predicted."
    )
    previous_labels: int = field(0, "Recent labels per task that the prompt also names.", ge=0)
    memory_vectors: int = field(1, "Memory vectors after every memory_utterances utterances.", ge=1)
    memory_utterances: int = field(1, "Utterances per group of memory vectors.", ge=1)
    history: Literal["memory", "text", "both"] = field(
        "memory",
        "The history in the prompt: memory vectors of a compressor, text (its newest utterances; a "
        "model without compressor), or the newest as text and memory vectors of the older ones.",
    )
    history_tokens: int = field(
        0, "text, both: the newest utterances that fit in so many tokens, whole; 0: all.", ge=0
    )
    max_length: int = field(
        0, "Tokens; longer examples are refused and counted, never cut; 0: no limit.", ge=0
    )
    tokenizer: str = field(
        "", "Hugging Face tokenizer folder; empty: a BPE trained on the train split."
    )
    vocab_size: int = field(4096, "Tokens of that BPE.", ge=1)
    shapes: int = field(
        4, "Padded shapes of a stage's batches, chosen from its lengths; each is compiled.", ge=1
    )
    group_by_length: bool = field(
        True, "Rows of a training batch share one of the shapes: less padding."
    )
    reader_threads: int = field(4, "Threads that load batches.", ge=1)
    reader_processes: int = field(
        0, "Processes that load batches instead (about 0.4 GB each); 0: threads.", ge=0
    )
    prefetch: int = field(8, "Batches loaded ahead.", ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            self.history_labels != "predicted" or bool(self.history_predictions),
            "history_labels=predicted needs data.history_predictions, a predictions.jsonl with "
            "the train and val splits",
        )
        return self


class InitFrom(Section):
    """Released weights that the first stage starts from instead of random ones.

    Each is a local folder, a file, or a Hugging Face hub id (docs/checkpoints.md). Sizes under
    `model` and, where it is empty, `data.tokenizer` then come from them.
    """

    model: str = field("", "For all its parts: VideoLLaMA2, MultiMood, or a folder of `export`.")
    language_model: str = field("", "Takes precedence over model.")
    vision_tower: str = field("", "Takes precedence over model.")
    audio_tower: str = field("", "Takes precedence over model.")
    mamba_compressor: str = field("", "Takes precedence over model.")
    adapter: str = field("", "PEFT LoRA folder, merged into the language model.")
    new_row_noise: float = field(
        0.0,
        "Noise of new vocabulary rows (the mean row), as a share of the rows' deviation.",
        ge=0,
    )


class Mesh(Section):
    """Devices per mesh axis; one may be -1 and takes the rest."""

    data: int = field(1, "Replicas of the weights.", ge=-1)
    fsdp: int = field(-1, "Shards of weights, optimiser state and batch.", ge=-1)
    tensor: int = field(1, "Shards of heads and MLP widths.", ge=-1)


class Predict(Section):
    """Prediction by `predict` and by evaluation on val."""

    labels: Literal["scored", "generated"] = field(
        "scored", "Probability of every allowed label, or generated and parsed."
    )
    batch_size: int = field(16, "Rows at a time.", ge=1)
    max_new_tokens: int = field(128, "Longest reply in tokens.", ge=1)
    temperature: float = field(0.0, "0: greedy.", ge=0)
    top_k: int = field(64, "0: all tokens.", ge=0)
    top_p: float = field(1.0, "Nucleus; 1: all tokens.", gt=0, le=1)


class Config(Section):
    """All fields of a run."""

    seed: int = field(0, "Seed of everything that is drawn at random.")
    data: Data = Data()
    init_from: InitFrom = InitFrom()
    model: Model = Model()
    precision: Literal["auto", "float32", "bfloat16"] = field(
        "auto",
        "Compute type; auto: bfloat16 on GPU, float32 elsewhere. On a CPU with bfloat16 units "
        "(AMX) bfloat16 is faster.",
    )
    mesh: Mesh = Mesh()
    log_every: int = field(
        10, "Steps between records in metrics.jsonl; 0: at evaluations and checkpoints only.", ge=0
    )
    profile_steps: tuple[int, int] = field(
        (0, 0), "Profiler trace of a stage's steps [first, last) into profile/."
    )
    keep_checkpoints: int = field(1, "Newest checkpoints of a stage kept next to the best.", ge=0)
    stages: tuple[str, ...] = field(
        ("sft",), "Stages in their order, by their names in `stage`.", min_length=1
    )
    stage: dict[str, Stage] = field({"sft": Stage()}, "Name -> stage.")
    reward: Reward = Reward()
    predict: Predict = Predict()

    def replace(self, **values: Any) -> Config:
        """Returns the config with fields replaced (`a__b` for a.b), validated again."""
        whole = self.model_dump()
        for key, value in values.items():
            *parents, last = key.split("__")
            node = whole
            for parent in parents:
                node = node[parent]
            node[last] = value
        return Config(**whole)

    def policies_before(self, name: str) -> list[str]:
        """Lists the stages before `name` that train the model itself, not a reward model."""
        earlier = self.stages[: self.stages.index(name)]
        return [stage for stage in earlier if self.stage[stage].objective != "preference"]

    def stage_before(self, name: str) -> str:
        """Names the stage that `name` starts from; "": random or released weights."""
        return self.stage[name].init_from or (self.policies_before(name) or [""])[-1]

    def reward_model_stage(self, name: str) -> str:
        """Names the preference stage whose reward model scores stage `name`, or ""."""
        earlier = self.stages[: self.stages.index(name)]
        return next((s for s in reversed(earlier) if self.stage[s].objective == "preference"), "")

    @model_validator(mode="after")
    def _check(self) -> Self:
        data, parts = self.data, self.model.parts
        require(
            data.previous_labels == 0 or "compressor" in parts or data.history == "text",
            f"data.previous_labels={data.previous_labels} needs 'compressor' in model.parts: a "
            "model without it reads no history",
        )
        require(
            data.history == "memory" or ("compressor" in parts) == (data.history == "both"),
            f"data.history={data.history}: expected model.parts "
            + ("with" if data.history == "both" else "without")
            + f" 'compressor', got {parts}",
        )
        require(
            (data.history_tokens > 0) >= (data.history == "both"),
            "data.history=both: the newest utterances are text up to data.history_tokens; expected "
            "at least 1, got 0",
        )
        require(
            data.history_tokens == 0 or data.history != "memory",
            f"data.history_tokens={data.history_tokens} needs data.history=text or both",
        )
        for name in self.stages:
            one_of("stages", name, sorted(self.stage))
            with prefixed(f"stage.{name}"):
                self.stage[name].check_used()
            self._check_stage(name, self.stage[name])
        return self

    def _check_stage(self, name: str, stage: Stage) -> None:
        key, parts, llm = f"stage.{name}", self.model.parts, self.model.llm
        require(
            any(MODULES[m] in (None, *parts) for m in stage.trainable),
            f"{key}.trainable: none of {stage.trainable} exists in a model with parts {parts}",
        )
        require(
            stage.objective != "compressor" or "compressor" in parts,
            f"{key}.objective=compressor needs 'compressor' in model.parts",
        )
        widths = (llm.hidden_size, llm.intermediate_size)
        nf4 = stage.lora.rank > 0 and stage.lora.base == "nf4"
        require(
            not nf4 or not any(n % NF4_BLOCK for n in widths),
            f"{key}.lora.base=nf4: expected model.llm.hidden_size and intermediate_size to be "
            f"multiples of {NF4_BLOCK}, got {widths[0]} and {widths[1]}",
        )
        if stage.init_from:
            one_of(f"{key}.init_from", stage.init_from, self.policies_before(name))
        if stage.reinforces:
            self.reward.check_used()
            require(
                self.reward.combination == "sum" or stage.rl.group > 1,
                f"reward.combination={self.reward.combination} compares the responses of a group: "
                f"expected {key}.rl.group above 1, got {stage.rl.group}",
            )
            require(
                self.reward.reward_model == 0 or bool(self.reward_model_stage(name)),
                f"reward.reward_model={self.reward.reward_model} needs a stage with "
                f"objective=preference before {name}",
            )
