"""Runs whole GRPO steps: 8 prompts, `group` samples each, of exactly `new` tokens, in float32.

The reward is the share of distinct words, the KL to the reference weighs 0.04, and AdamW takes one
step. Ours is the step of `train` (rollout, reward pool, scoring, update). The peer is TRL 1.16's
GRPOTrainer: `pip install --no-deps trl==1.16.0` (accelerate and datasets come with FlagEmbedding).
"""

from __future__ import annotations

import queue
import tempfile
import threading
import time
import types

from tools.benchmarks.common import SIZE, our_model, text_batch, tokens, torch_model

PEER = "TRL GRPOTrainer, torch with 2 threads"
TRAINING = True
STEPS = 1
PROMPTS, BETA, RATE = 8, 0.04, 1e-5
SHAPE = dict(prompts=PROMPTS, beta=BETA)


def word_tokenizer():
    """Builds a tokenizer in which the word "w17" is token 17."""
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


def ours(prompt: int, new: int, group: int, stops: int = 0):
    """stops: how many of the 8,192 tokens end a response; 409 end it after about 20."""
    import jax

    from mm_jax.config.reward import Reward
    from mm_jax.config.stage import Reinforcement, Stage
    from mm_jax.data.labels import built_in
    from mm_jax.data.records import Sample
    from mm_jax.models.abstract import init_params
    from mm_jax.rewards.base import FunctionReward
    from mm_jax.rewards.pool import RewardPool
    from mm_jax.rl import reinforce
    from mm_jax.rl.policy import Policy
    from mm_jax.rl.rollout import Collector

    abstract, create = our_model()
    rl = Reinforcement(
        group=group, max_new_tokens=new, beta=BETA, chunks=1, truncated="keep",
        length_window=(0, 0),
    )  # fmt: skip
    stage = Stage(
        objective="grpo", trainable=("language_model",), batch_size=PROMPTS, learning_rate=RATE,
        rl=rl,
    )  # fmt: skip
    ends = types.SimpleNamespace(stop_ids=tuple(range(10, 10 + stops)), pad_id=1)
    policy = Policy(abstract, stage, ends, "float32", 0, 1000)
    count = FunctionReward("count", lambda rows: [distinct(r.completion) for r in rows])
    reward = Reward(trust=0.0, similarity=0.0, function="count", safety_veto=False)
    vocabulary = [f"w{i}" for i in range(SIZE["vocab_size"])]
    decode = lambda ids: " ".join(vocabulary[i] for i in ids)  # noqa: E731
    collector = Collector(policy, RewardPool([count]), reward, decode, built_in("mesc"))
    state = policy.model.start(init_params(create, abstract, 0), 0)
    reference = policy.reference(state)
    batch = text_batch(tokens(PROMPTS, prompt), targets=False)
    samples = [Sample(id=str(i), dialogue_id="", client_text="")
               for i in range(PROMPTS)]  # fmt: skip
    step = 0

    def run() -> dict:
        nonlocal step, state
        began = time.perf_counter()
        rollout = collector.collect(policy.rollout_params(state), step, batch, samples)
        sampled = time.perf_counter()
        known = reinforce.score(policy, state, reference, rollout)
        experience, _, counted, _ = reinforce.make_experience(policy, rollout, *known, BETA)
        jax.block_until_ready(experience)
        scored = time.perf_counter()
        state, (metrics,) = reinforce.update(policy, state, experience, counted)
        step += 1
        return {
            "seconds/generation": sampled - began,
            "seconds/scoring": scored - sampled,
            "seconds/update": time.perf_counter() - scored,
            "tokens": int(rollout.lengths.sum()),
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
