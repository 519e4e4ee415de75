"""Whole GRPO steps: 8 prompts, `group` samples each of exactly `new` tokens, a reward that counts
distinct words, KL to the reference with weight 0.04, one AdamW step; float32.

Ours is the step of `train` (rollout, reward pool, scoring, update). The peer is TRL 1.16's
GRPOTrainer: `pip install --no-deps trl==1.16.0` (accelerate and datasets come with FlagEmbedding).
"""

from __future__ import annotations

import queue
import tempfile
import threading
import time
import types

from mm_jax.rl import reinforce
from tools.benchmarks.common import SIZE, our_model, text_batch, tokens, torch_model

PEER = "TRL GRPOTrainer, torch with 2 threads"
TRAINING = True
STEPS = 1
PROMPTS, BETA, RATE = 8, 0.04, 1e-5
SHAPE = dict(prompts=PROMPTS, beta=BETA)


def word_tokenizer():
    """The word "w17" is token 17."""
    import tokenizers
    import transformers

    vocabulary = {f"w{i}": i for i in range(SIZE["vocab_size"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="w0", pad_token="w1", eos_token="w2"
    )


def distinct(text: str) -> float:
    words = text.split()
    return len(set(words)) / max(len(words), 1)


def ours(prompt: int, new: int, group: int):
    import jax

    from configs.base import stage as make_stage
    from mm_jax.data.records import Sample
    from mm_jax.models.abstract import init_params
    from mm_jax.rewards.base import FunctionReward
    from mm_jax.rewards.pool import RewardPool
    from mm_jax.rl import policy
    from mm_jax.rl.rollout import Scoring

    abstract, create = our_model()
    stage = make_stage(
        objective="grpo", trainable=("language_model",), batch_size=PROMPTS, learning_rate=RATE
    )
    stage.rl.update(group=group, max_new_tokens=new, beta=BETA, chunks=1, truncated="keep")
    stage.rl.length_window = (0, 0)
    options = policy.PolicyOptions(
        group=group, max_new_tokens=new, stop_ids=(), pad_id=1, beta=BETA
    )
    reward = FunctionReward("distinct", lambda rows: [distinct(r.completion) for r in rows])
    vocabulary = [f"w{i}" for i in range(SIZE["vocab_size"])]
    scoring = Scoring(
        decode=lambda ids: " ".join(vocabulary[i] for i in ids),
        label_space="mesc",
        pool=RewardPool([reward]),
        weights={"distinct": 1.0},
        learned=None,
        reward=types.SimpleNamespace(safety_veto=False, combination="sum"),
        rl=stage.rl,
    )
    run_of = reinforce.PolicyRun(
        name="bench", stage=stage, plan=types.SimpleNamespace(steps=1000), loader=None, seed=0,
        log_every=1, keep_checkpoints=1, reader_threads=1, reader_processes=0, prefetch=1,
        frozen_dtype="float32", options=options, samples=None, val=(), val_loader=None,
        val_samples=None, scoring=scoring,
    )  # fmt: skip
    trainer = reinforce.Trainer(run_of, abstract, init_params(create, abstract, 0))
    batch = text_batch(tokens(PROMPTS, prompt), targets=False)
    samples = [Sample(id=str(i), dialogue_id="", client_text="", client_emotion="")
               for i in range(PROMPTS)]  # fmt: skip
    step = 0

    def run() -> dict:
        nonlocal step
        began = time.perf_counter()
        params = trainer.rollout_params()
        rolled = trainer.roll_out(params, step, batch, samples, 1)
        del params
        sampled = time.perf_counter()
        lesson, *_ = reinforce.lesson_of(trainer, rolled, BETA)
        jax.block_until_ready(lesson)
        scored = time.perf_counter()
        metrics = jax.device_get(trainer.update(lesson, 0))
        step += 1
        return {
            "seconds/generation": sampled - began,
            "seconds/scoring": scored - sampled,
            "seconds/update": time.perf_counter() - scored,
            "tokens": int(rolled.lengths.sum()),
            "kl": float(metrics["kl"]),
        }

    return run


def peer(prompt: int, new: int, group: int):
    import datasets
    import transformers
    import trl

    tokenizer = word_tokenizer()
    model = torch_model()
    model.generation_config.eos_token_id = None
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    rows = [" ".join(f"w{i}" for i in row) for row in tokens(PROMPTS, prompt)]
    config = trl.GRPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=PROMPTS * group, num_generations=group,
        max_completion_length=new, beta=BETA, learning_rate=RATE, max_steps=100_000,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        generation_kwargs=dict(min_new_tokens=new, eos_token_id=None),
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=folder,
        reward_funcs=lambda completions, **_: [distinct(c) for c in completions],
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": rows}),
        processing_class=tokenizer,
    )
    trainer.generation_config.eos_token_id = None
    seconds = {"generation": 0.0, "rollouts": 0.0}
    made = []

    def timed(name, key):
        original = getattr(trainer, name)

        def call(*args, **kwargs):
            began = time.perf_counter()
            out = original(*args, **kwargs)
            seconds[key] += time.perf_counter() - began
            if key == "rollouts":
                made.append(int(out["completion_mask"].sum()))
            return out

        setattr(trainer, name, call)

    timed("_generate", "generation")
    timed("_generate_and_score_completions", "rollouts")
    go, done = queue.Queue(), queue.Queue()

    class Handshake(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            go.get()
            seconds.update(generation=0.0, rollouts=0.0)
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            done.put(time.perf_counter() - self.began)

    trainer.add_callback(Handshake())
    threading.Thread(target=trainer.train, daemon=True).start()

    def run() -> dict:
        go.put(None)
        whole = done.get(timeout=600)
        return {
            "seconds/generation": seconds["generation"],
            "seconds/scoring": seconds["rollouts"] - seconds["generation"],
            "seconds/update": whole - seconds["rollouts"],
            "tokens": made[-1],
        }

    return run
