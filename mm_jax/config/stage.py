"""The fields of a training stage (see schema.py)."""

from __future__ import annotations

from typing import Literal, get_args

from mm_jax.config.errors import prefixed, require
from mm_jax.config.section import Section, field

Module = Literal["language_model", "vision_tower", "mm_projector", "audio_tower",
                 "mm_projector_a", "mamba_compressor"]  # fmt: skip
Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Reduction = Literal["grpo", "dr_grpo", "dapo", "bnpo"]
NF4_BLOCK = 64  # weights that share a scale in `lora.base=nf4`


class Lora(Section):
    """LoRA adapters on the language model."""

    rank: int = field(0, "Rank of the adapters; 0: none.", ge=0)
    alpha: float = field(128.0, "The update is scaled by alpha / rank.", gt=0)
    dropout: float = field(0.0, "Dropout on the adapters' inputs.", ge=0, lt=1)
    targets: tuple[Target, ...] = field(
        get_args(Target), "Dense layers that get adapters.", min_length=1
    )
    base: Literal["none", "int8", "nf4"] = field(
        "none", "Storage of the frozen kernels: unchanged, or quantised (QLoRA)."
    )
    init_from: str = field("", "PEFT folder whose adapters training continues.")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Reinforcement(Section):
    """Settings of a grpo or ppo stage, and of sampling in a preference stage."""

    group: int = field(8, "Responses per prompt.", ge=1)
    max_new_tokens: int = field(128, "Longest response in tokens.", ge=1)
    temperature: float = field(1.0, "Sampling temperature.", ge=0.01)
    chunks: int = field(
        2, "Parts of a batch whose prompts are read one after the other, when slots are free.", ge=1
    )
    rollout_weights: Literal["gathered", "training"] = field(
        "gathered", "Weights gathered over fsdp for sampling, or sharded as in training."
    )
    inner_epochs: int = field(1, "Passes over a batch of rollouts.", ge=1)
    minibatches: int = field(1, "Optimiser steps per pass.", ge=1)
    beta: float = field(
        0.04, "Weight of the KL to the policy before the stage; 0: no reference.", ge=0
    )
    clip_low: float = field(0.2, "Ratios are clipped to at least 1 - clip_low.", ge=0)
    clip_high: float = field(0.2, "Ratios are clipped to at most 1 + clip_high.", ge=0)
    clip_max: float = field(0.0, "Bound of the ratio for negative advantages; 0: none.", ge=0)
    level: Literal["token", "sequence"] = field(
        "token", "Importance ratio per token or per response (GSPO)."
    )
    reduction: Reduction = field("grpo", "How token losses are averaged (rl/losses.py).")
    advantage_scale: Literal["group", "batch", "none"] = field(
        "group", "GRPO: deviation that advantages are divided by."
    )
    std_ddof: int = field(1, "Degrees of freedom of that deviation.", ge=0)
    std_eps: float = field(1e-4, "Added to that deviation.", ge=0)
    truncated: Literal["mask", "keep", "zero"] = field(
        "mask",
        "A response that reaches max_new_tokens is masked out, kept, or gets the lowest reward.",
    )
    length_window: tuple[int, int] = field(
        (1, 0), "Least and most words of a reply, else the lowest reward; most 0: no limit."
    )
    shared_prefix: bool = field(True, "Compute a prompt once for its responses; False: for each.")
    critic: Literal["shared", "own"] = field(
        "shared", "PPO: value head on the policy's states, or a trunk of its own."
    )
    gamma: float = field(1.0, "PPO: discount.", ge=0, le=1)
    gae_lambda: float = field(0.95, "PPO: lambda of GAE.", ge=0, le=1)
    value_clip: float = field(0.2, "PPO: clipping range of values.", ge=0)
    value_coef: float = field(0.1, "PPO: weight of the value loss.", ge=0)
    kl_in: Literal["reward", "loss"] = field("reward", "PPO: where the KL penalty is added.")
    kl_target: float = field(
        0.0, "PPO: beta adapts towards this KL in nats per token; 0: fixed.", ge=0
    )
    kl_horizon: float = field(10000.0, "PPO: samples over which beta adapts.", gt=0)

    def check_used(self) -> None:
        """Raises ConfigError where the rules contradict each other."""
        require(
            self.clip_max == 0 or self.clip_max > 1 + self.clip_high,
            f"clip_max: expected 0 or more than 1 + clip_high, got {self.clip_max}",
        )
        least, most = self.length_window
        require(
            not most or least <= most,
            f"length_window: expected (least, most) words, got {self.length_window}",
        )


class Stage(Section):
    """One training stage."""

    objective: Literal["sft", "compressor", "preference", "grpo", "ppo"] = field(
        "sft",
        "sft: answer given the prompt; compressor: history from its memory vectors; "
        "preference: a reward model (rl/reward_model.py); grpo, ppo: reinforcement.",
    )
    init_from: str = field(
        "", "Stage whose best checkpoint this one starts from; empty: the one before."
    )
    unit_utterances: int = field(
        0, "compressor: consecutive utterances per example; 0: whole conversations.", ge=0
    )
    trainable: tuple[Module, ...] = field(
        ("language_model", "mm_projector", "mm_projector_a", "mamba_compressor"),
        "Trained modules; the others are frozen.",
        min_length=1,
    )
    modality_probs: tuple[float, float, float] = field(
        (0.0, 0.0, 1.0), "Probabilities [p_a, p_v, p_av] of sound, video, or both."
    )
    text_only_prob: float = field(0.0, "Probability of showing neither.", ge=0, le=1)
    label_weight: float = field(
        1.0, "Loss weight of the labels' own tokens; compressor: of a line's role and labels.", gt=0
    )
    balanced_tasks: tuple[str, ...] = field(
        (), "Tasks whose labels also weigh 1 / sqrt(their share in train)."
    )
    with_response: bool = field(
        True, "False: labels alone, without the reply or the utterances' text."
    )
    token_dropout: float = field(
        0.0, "Share of a prompt's embeddings blanked in training.", ge=0, lt=1
    )
    history_label_dropout: float = field(
        0.0, "Probability that a row's history shows no labels.", ge=0, lt=1
    )
    epochs: float = field(1.0, "Passes over the train split.", ge=0)
    steps: int = field(0, "Optimiser steps; above 0 they override epochs.", ge=0)
    batch_size: int = field(16, "Examples per optimiser step, over all devices.", ge=1)
    accumulation: int = field(1, "Micro-batches per optimiser step.", ge=1)
    learning_rate: float = field(2e-5, "Peak learning rate.", gt=0)
    compressor_learning_rate: float = field(0.0, "Peak for the compressor; 0: learning_rate.", ge=0)
    warmup: float = field(0.03, "Share of the steps in which the learning rate rises.", ge=0, le=1)
    final_learning_rate: float = field(
        0.0, "End of the cosine as a share of learning_rate.", ge=0, le=1
    )
    weight_decay: float = field(0.0, "Decoupled weight decay, on matrices only.", ge=0)
    clip_norm: float = field(1.0, "Largest global norm of the gradient.", gt=0)
    optimizer: Literal["adamw", "adafactor"] = field(
        "adamw", "adafactor: factored second moments, no first ones."
    )
    b2: float = field(0.999, "AdamW's second decay.", ge=0, lt=1)
    momentum_dtype: Literal["float32", "bfloat16"] = field(
        "float32", "Type of AdamW's first moments."
    )
    lora: Lora = Lora()
    ema_decay: float = field(
        0.0,
        "Above 0, evaluation and later stages see this moving average of the weights.",
        ge=0,
        lt=1,
    )
    checkpoint_every: int = field(
        0, "Steps between checkpoints, added to those at evaluations; 0: none.", ge=0
    )
    eval_every: int = field(0, "Steps between evaluations; 0: only at the end.", ge=0)
    eval_examples: int = field(0, "Val examples per evaluation; 0: all.", ge=0)
    eval_reconstructions: int = field(
        16, "compressor: val histories written out greedily per evaluation.", ge=0
    )
    select_by: Literal["loss", "labels"] = field(
        "loss", "Best checkpoint by val loss, or by the mean accuracy of the labels (sft)."
    )
    rl: Reinforcement = Reinforcement()

    @property
    def reinforces(self) -> bool:
        return self.objective in ("grpo", "ppo")

    @property
    def samples(self) -> bool:
        """Tells whether the stage samples answers."""
        return self.reinforces or self.objective == "preference"

    @property
    def critic(self) -> str:
        """Returns the kind of critic: "none" (GRPO), "shared" or "own"."""
        return self.rl.critic if self.objective == "ppo" else "none"

    @property
    def loss_beta(self) -> float:
        """Returns the weight of the KL term in the policy's loss."""
        in_loss = self.objective == "grpo" or self.rl.kl_in == "loss"
        return self.rl.beta if in_loss else 0.0

    @property
    def rescores(self) -> bool:
        """Tells whether the trainer recomputes the rollout's log-probabilities before the updates.

        It does so for the critic's values, or if the policy changes before the last update.
        """
        return self.critic != "none" or self.rl.inner_epochs * self.rl.minibatches > 1

    @property
    def eval_modality(self) -> str:
        """Returns the modalities that validation examples show."""
        return "text" if self.text_only_prob == 1.0 else "av"

    def check_used(self) -> None:
        """Raises ConfigError where a run that trains the stage could not; others may be as they are
        (a config declares stages that its runs do not list)."""
        p = self.modality_probs
        require(
            min(p) >= 0 and abs(sum(p) - 1) <= 1e-6,
            f"modality_probs: expected [p_a, p_v, p_av] that sum to 1, got {p}",
        )
        require(
            self.batch_size % self.accumulation == 0,
            f"batch_size: {self.batch_size} is not a multiple of accumulation {self.accumulation}",
        )
        require(self.steps > 0 or self.epochs > 0, "epochs: expected steps or epochs above 0")
        require(
            self.compressor_learning_rate == 0 or "mamba_compressor" in self.trainable,
            "compressor_learning_rate needs 'mamba_compressor' in trainable",
        )
        require(
            self.lora.rank == 0 or "language_model" in self.trainable,
            f"lora.rank={self.lora.rank} needs 'language_model' in the trainable modules",
        )
        require(not self.lora.init_from or self.lora.rank > 0, "lora.init_from needs lora.rank > 0")
        require(
            self.select_by == "loss" or self.objective == "sft",
            "select_by=labels needs objective=sft: the others predict no labels",
        )
        if self.samples:
            self._check_sampling()

    def _check_sampling(self) -> None:
        with prefixed("rl"):
            self.rl.check_used()
        only = {"token_dropout": 0.0}
        if self.reinforces:
            only |= dict(ema_decay=0.0, label_weight=1.0, with_response=True, balanced_tasks=())
        for name, value in only.items():
            got = getattr(self, name)
            require(got == value, f"{name}: expected {value} for {self.objective}, got {got}")
        require(
            self.lora.dropout == 0 or self.lora.rank == 0,
            f"lora.dropout: expected 0 for {self.objective}, got {self.lora.dropout}",
        )
        rl = self.rl
        require(
            rl.group > 1 or self.objective == "ppo",
            f"rl.group: expected at least 2, got {rl.group}: one response has nothing to be "
            "compared with",
        )
        if self.reinforces:
            require(
                rl.std_ddof < max(rl.group, 2) or self.objective == "ppo",
                f"rl.std_ddof: expected less than group={rl.group}, got {rl.std_ddof}",
            )
            adapts = self.objective == "ppo" and rl.kl_in == "reward" and rl.beta > 0
            require(
                rl.kl_target == 0 or adapts,
                f"rl.kl_target={rl.kl_target} adapts the KL in ppo's reward: it needs "
                "objective=ppo, kl_in=reward and beta > 0",
            )
