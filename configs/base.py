"""Every field of a run with its default. The other configs only override these.

The model defaults are the 7B network of the paper (spec section 3). `configs/base.py:grpo` and
`configs/base.py:ppo` go on with reinforcement after SFT.
"""

from ml_collections import ConfigDict

from mm_jax.config.errors import one_of


def stage(**overrides) -> ConfigDict:
    """One training stage."""
    c = ConfigDict()
    # "sft" (answer given the prompt), "compressor" (history from its memory), "preference" (a
    # learned reward, see rl/preference.py), "grpo" or "ppo".
    c.objective = "sft"
    # Stage whose best checkpoint this one starts from; "": the one before (not a preference stage).
    c.init_from = ""
    c.unit_utterances = 0  # compressor only: utterances in a row that are a unit; 0: conversations
    # Parts that are trained; the others are frozen. Any of language_model, vision_tower,
    # mm_projector, audio_tower, mm_projector_a, mamba_compressor.
    c.trainable = ("language_model", "mm_projector", "mm_projector_a", "mamba_compressor")
    c.modality_probs = (0.0, 0.0, 1.0)  # [p_a, p_v, p_av]: sound only, video only, both
    c.text_only_prob = 0.0  # probability of showing neither
    # Loss weight of the labels' own tokens; compressor: of every line's role and labels.
    c.label_weight = 1.0
    # Tasks whose labels weigh 1 / sqrt(their share in train) beside it, on average 1.
    c.balanced_tasks = ()
    # False: labels alone, without the response or, in a compressor stage, the utterances' text (a
    # first stage that is soon learnt).
    c.with_response = True
    c.token_dropout = 0.0  # share of a prompt's embeddings that are blanked in training
    c.history_label_dropout = 0.0  # probability that a row's history shows no labels
    c.epochs = 1.0
    c.steps = 0  # overrides epochs where > 0
    c.batch_size = 16  # examples of an optimiser step, over all devices
    c.accumulation = 1  # micro-batches of an optimiser step
    c.learning_rate = 2e-5
    c.compressor_learning_rate = 0.0  # of the compressor, at its peak; 0: learning_rate
    c.warmup = 0.03  # share of the steps
    c.final_learning_rate = 0.0  # the cosine's end, as a share of learning_rate
    c.weight_decay = 0.0
    c.clip_norm = 1.0  # global gradient norm
    c.optimizer = "adamw"  # or "adafactor": factored second moments, no first
    c.b2 = 0.999  # AdamW's second decay
    c.momentum_dtype = "float32"  # of AdamW's first moments; or "bfloat16"
    # Where rank > 0 the language model trains by LoRA: adapters on `targets`, scaled by
    # alpha / rank. Its frozen kernels are kept as they are ("none"), or as "int8" or "nf4" (QLoRA).
    c.lora = ConfigDict(
        dict(
            rank=0,
            alpha=128.0,
            dropout=0.0,
            targets=(
                "q_proj",
                "k_proj",
                "v_proj",
                "o_proj",
                "gate_proj",
                "up_proj",
                "down_proj",
            ),
            base="none",
            init_from="",  # PEFT folder whose adapters training goes on with
        )
    )
    # Where > 0, val, prediction and the next stage see this moving average of the weights.
    c.ema_decay = 0.0
    # Steps between checkpoints besides those at evaluations; 0: none. SIGTERM also saves.
    c.checkpoint_every = 0
    c.eval_every = 0  # steps between evaluations on the val split; 0: only at the end
    c.eval_examples = 0  # val examples of an evaluation; 0: all
    # compressor only: val units whose history is written out greedily at an evaluation; 0: none.
    c.eval_reconstructions = 16
    # What the kept best checkpoint is chosen by, on the val split: "loss", or "labels" (mean
    # accuracy of the label tasks; sft only).
    c.select_by = "loss"
    c.rl = ConfigDict(
        dict(
            group=8,  # responses a prompt
            max_new_tokens=128,
            temperature=1.0,
            chunks=2,  # of a batch's rollouts: one is scored while the next is sampled
            rollout_weights="gathered",  # over fsdp for sampling; or "training": as trained
            inner_epochs=1,  # passes over a batch of rollouts
            minibatches=1,  # optimiser steps a pass
            beta=0.04,  # weight of the KL to the policy before the stage; 0: no reference is kept
            clip_low=0.2,
            clip_high=0.2,
            clip_max=0.0,  # bound of the ratio for negative advantages; 0: none
            level="token",  # of the ratio; or "sequence"
            reduction="grpo",  # grpo, dr_grpo, dapo or bnpo (see rl/losses.py)
            advantage_scale="group",  # grpo: by the deviation of the group, the batch, or none
            std_ddof=1,
            std_eps=1e-4,
            # A response that reaches max_new_tokens: "mask" (teaches nothing), "keep", or "zero"
            # (gets the lowest reward).
            truncated="mask",
            length_window=(1, 0),  # words of a reply; outside it gets the lowest reward; 0: no end
            shared_prefix=True,  # False: every response with a copy of its prompt
            # PPO alone.
            critic="shared",  # value head on the policy's states; or "own": a trunk of its own
            gamma=1.0,
            gae_lambda=0.95,
            value_clip=0.2,
            value_coef=0.1,
            kl_in="reward",  # or "loss"
            kl_target=0.0,  # beta adapts towards this KL (nats a token); 0: beta is fixed
            kl_horizon=10000.0,  # samples
        )
    )
    c.update(overrides)
    return c


def get_config(arg: str = "") -> ConfigDict:
    one_of("configs/base.py:ARGUMENT", arg, ("", "grpo", "ppo"))
    c = ConfigDict()
    c.seed = 0

    c.data = ConfigDict()
    c.data.folder = "data/mesc/f8_s384/1.0.0"  # what `prepare` printed
    c.data.label_space = "mesc"  # "mesc" (four tasks) or "dfew" (client emotion only)
    c.data.template = "ecot"  # "ecot", or "short" for tiny models
    c.data.history_labels = "gold"  # labels of past turns in the input: gold, predicted or none
    c.data.history_predictions = ""  # predictions.jsonl for history_labels=predicted in training
    # How many last labels of every task the prompt also names, as history_labels shows them.
    c.data.previous_labels = 0
    # The compressor's memory vectors: this many after every so many utterances of the history.
    c.data.memory_vectors = 1
    c.data.memory_utterances = 1
    # True: the prompt holds the history's words themselves; model.parts then has no compressor.
    c.data.history_text = False
    c.data.max_length = 0  # longer examples are refused and counted, never cut; 0: no limit
    c.data.tokenizer = ""  # Hugging Face tokenizer folder; "": a BPE trained on the train split
    c.data.vocab_size = 4096  # of that BPE
    c.data.token_bucket = 128  # sequence lengths are rounded up to bucket * 2**k
    c.data.fbank_bucket = 256
    c.data.history_bucket = 128
    c.data.memory_bucket = 16
    c.data.group_by_length = True  # rows of a training batch have about one length: less padding
    c.data.reader_threads = 4  # that load batches, or:
    c.data.reader_processes = 0  # where > 0, processes that do (about 0.4 GB each)
    c.data.prefetch = 8  # batches

    # Released weights that the first stage starts from instead of random ones: a local folder, a
    # file, or a Hugging Face hub id (docs/checkpoints.md). Sizes under `model` and, where it is "",
    # data.tokenizer then come from them.
    c.init_from = ConfigDict(
        dict(
            model="",  # every part it has: a VideoLLaMA2, a MultiMood, or a folder of `export`
            language_model="",  # these go before `model`
            vision_tower="",
            audio_tower="",
            mamba_compressor="",
            adapter="",  # PEFT LoRA folder, added to the language model's weights
            # Vocabulary rows that a table lacks are the mean of its rows, plus normal noise of this
            # share of their deviation.
            new_row_noise=0.0,
        )
    )

    c.model = ConfigDict()
    # Existing parts, besides the language model.
    c.model.parts = ("vision", "audio", "compressor")
    c.model.llm = ConfigDict(
        dict(
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            max_position_embeddings=32768,
            tie_word_embeddings=False,
            hidden_act="silu",
            residual_dropout=0.0,  # in sft and compressor stages
            vocab_size=0,  # rows of the vocabulary's tables; 0: the tokenizer's tokens, padded
            vocab_multiple=256,  # up to a multiple of this
        )
    )
    c.model.vision = ConfigDict(
        dict(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=27,
            num_attention_heads=16,
            image_size=384,
            patch_size=14,
            num_channels=3,
            hidden_act="gelu_pytorch_tanh",
            layer_norm_eps=1e-6,
        )
    )
    c.model.audio = ConfigDict(
        dict(
            input_patch_size=16,
            embed_dim=512,
            encoder_layers=12,
            encoder_embed_dim=768,
            encoder_ffn_embed_dim=3072,
            encoder_attention_heads=12,
            conv_pos=128,
            conv_pos_groups=16,
            num_buckets=320,
            max_distance=800,
            layer_wise_gradient_decay_ratio=1.0,  # released: 0.6
            predictor_class=0,  # classes of BEATs' own classifier, which is kept but not used
        )
    )
    c.model.compressor = ConfigDict(
        dict(
            hidden_size=1024,
            state_size=16,
            num_hidden_layers=48,
            conv_kernel=4,
            expand=2,
            time_step_rank=0,  # 0: hidden_size / 16
            layer_norm_epsilon=1e-5,
            use_bias=False,
            use_conv_bias=True,
            vocab_size=0,  # 0: the tokenizer's tokens
        )
    )
    c.model.connector_type = "stc_connector_v35"  # or "stc_connector"
    c.model.vision_select_layer = -2
    c.model.audio_projector_type = "linear"  # or "mlp2x_gelu"
    # What the backward pass recomputes: "none", "dots" (all but the matrix products), "outputs"
    # (all but the outputs of attention and MLP), or "full" (whole layers).
    c.model.remat = "full"
    c.model.attention = "auto"  # "xla", "cudnn", or "auto" (cuDNN where it can run)

    c.precision = "auto"  # compute: "float32", "bfloat16", or "auto" (bfloat16 on GPU)
    c.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1))  # devices an axis; one may be -1
    c.log_every = 10  # steps
    c.profile_steps = (0, 0)  # profiler trace of a stage's steps [first, last) into profile/
    c.keep_checkpoints = 1  # newest checkpoints of a stage kept beside the best

    # Stages run in this order; a later one starts from the best checkpoint of the one before.
    c.stages = ("utterances", "conversations", "sft")
    c.stage = ConfigDict()
    c.stage.utterances = stage(
        objective="compressor",
        unit_utterances=1,
        trainable=("mamba_compressor",),
        learning_rate=2.5e-5,
        batch_size=8,
        epochs=3.0,
    )
    c.stage.conversations = stage(
        objective="compressor",
        trainable=("mamba_compressor",),
        learning_rate=1e-4,
        batch_size=8,
        epochs=2.0,
    )
    c.stage.sft = stage()
    for objective in ("grpo", "ppo"):
        c.stage[objective] = stage(objective=objective, learning_rate=1e-5)
    if arg:
        c.stages = (*c.stages, arg)

    # Rewards of the reinforcement stages: weights of the components, each in [0, 1] (paper eq. 7).
    c.reward = ConfigDict(
        dict(
            trust=1.0,  # the judge's ratings
            similarity=1.0,  # to the reference reply
            labels=0.0,  # share of the labels that are right (not in the paper)
            learned=0.0,  # of the last preference stage before the reinforcement
            function="",  # of your own, "module:function"; see rewards/base.py
            function_weight=1.0,
            function_timeout=600.0,  # seconds of a call, then its scores have failed
            combination="sum",  # weighted mean; or "normalise_then_sum": each by its group first
            safety_veto=True,  # what rewards/combine.py's screen finds gets the lowest reward
            failure_limit=0.5,  # share of the last 100 scores at whose failure the run stops
            similarity_kind="bge",  # tools/serve_reward.py; or "lexical": needs no weights
            similarity_url="http://127.0.0.1:8100",
            similarity_both=False,  # also scaled by the response's own similarity
            judge=dict(
                model="gpt-4o-2024-08-06",
                base_url="",  # of an OpenAI-compatible endpoint; "": OpenAI's
                key_variable="OPENAI_API_KEY",  # environment variable
                unit="sentence",  # rated at a time, then averaged; or "response"
                context=True,  # False: the judge sees the response only (as released)
                parsing="schema",  # "released": the published parser, for comparison
            ),
            second_judge=dict(  # model "": none
                model="",
                base_url="",
                key_variable="OPENAI_API_KEY",
                unit="sentence",
                context=True,
                parsing="schema",
            ),
            limits=dict(
                attempts=5,
                timeout=60.0,  # seconds
                backoff=0.5,  # seconds, doubling, with jitter
                backoff_max=30.0,
                concurrency=16,
                requests_per_minute=0.0,  # 0: no limit
                tokens_per_minute=0.0,
                price_in=0.0,  # a million tokens
                price_out=0.0,
                spend_cap=0.0,  # the run stops there, resumed or not; 0: no cap
                breaker_failures=20,  # failed calls in a row, then calls fail at once
                breaker_seconds=30.0,
            ),
        )
    )

    c.predict = ConfigDict()
    c.predict.labels = "scored"  # "scored": probability of every allowed label; "generated": parsed
    c.predict.batch_size = 16
    c.predict.max_new_tokens = 128
    c.predict.temperature = 0.0  # 0: greedy
    c.predict.top_k = 64
    c.predict.top_p = 1.0
    return c
