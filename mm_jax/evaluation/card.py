"""The model card of an exported run, from what the run knows about itself."""

from __future__ import annotations

import pathlib

from mm_jax import __version__
from mm_jax.config.schema import Config
from mm_jax.evaluation.report import TASK_NAMES, number, system_name
from mm_jax.run.folder import IMPORTED

SAFETY = (
    "This is a research model. It is no therapist, no crisis service and no medical device, it was "
    "not tried on people in need, and it can be wrong about what somebody feels or give advice "
    "that harms. Do not let it talk to people at risk without a qualified person who watches and "
    "can step in; show them where human help is to be found. Video and sound of people are "
    "personal data: record and keep them with consent only. Emotions are read from what is seen "
    "and heard by the habits of the training data, which need not hold for other people."
)


def model_card(
    config: Config,
    title: str,
    layout: str,
    about: str,
    stage: str,
    step: int,
    finished: dict[str, int],
    metrics: dict | None,
) -> str:
    """Markdown with the front matter that the Hugging Face hub reads. Paths of the machine that it
    was made on do not appear in it."""
    sources = {k: v for k, v in config.init_from.model_dump().items() if isinstance(v, str) and v}
    if config.stage[stage].lora.init_from:
        sources["adapters"] = config.stage[stage].lora.init_from
    # Local paths are absolute in a run's config.
    hub = [v for v in sources.values() if not pathlib.Path(v).is_absolute()]
    lines = ["---", "tags: [mm_jax, emotional-support, multimodal]"]
    if layout in ("qwen2", "mamba"):
        lines.append("library_name: transformers")
    if layout == "peft":
        lines.append("library_name: peft")
    if hub:
        lines.append(f"base_model: [{', '.join(v.partition('@')[0] for v in hub)}]")
    lines += ["---", "", f"# {title}", "", about, "", "## How it was made", ""]
    if stage == IMPORTED:
        lines.append(f"Converted by mm_jax {__version__}; not trained by it.")
    else:
        lines.append(f"mm_jax {__version__}, stage `{stage}`, step {step}, seed {config.seed}.")
    if sources:
        shown = {k: v if v in hub else pathlib.Path(v).name for k, v in sources.items()}
        named = ", ".join(f"`{v}` ({k})" for k, v in shown.items())
        lines.append(f"Started from {named}.")
    if stage != IMPORTED:
        lines += training(config, finished)
    lines += ["", "## Results", ""]
    lines += results(metrics) if metrics else ["This checkpoint was not evaluated."]
    lines += [
        "",
        "## Limits",
        "",
        "Labels come from one data set's label space and one language. History labels that are "
        "given (gold) make the label tasks much easier than in use, where they are predicted or "
        "absent. The text metrics say little about how helpful a reply is.",
        "",
        "## Safety",
        "",
        SAFETY,
        "",
    ]
    return "\n".join(lines)


def training(config: Config, finished: dict[str, int]) -> list[str]:
    """The data, and a Markdown table of the stages."""
    data = pathlib.Path(config.data.folder).parts[-3:]
    lines = [
        "",
        f"Data `{'/'.join(data)}`, labels of `{config.data.label_space}`, history labels "
        f"{config.data.history_labels}, prompt template `{config.data.template}`.",
        "",
        "| stage | objective | trained | learning rate | batch | epochs or steps | best step |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in config.stages:
        if name not in finished:
            continue
        s = config.stage[name]
        length = f"{s.steps} steps" if s.steps else f"{s.epochs:g} epochs"
        lora = f" (LoRA r {s.lora.rank})" if s.lora.rank else ""
        lines.append(
            f"| {name} | {s.objective} | {', '.join(s.trainable)}{lora} | {s.learning_rate:g} "
            f"| {s.batch_size} | {length} | {finished[name]} |"
        )
    return lines


def results(metrics: dict) -> list[str]:
    """A Markdown table of the standard metrics of every system that was evaluated."""
    tasks = [t for t in TASK_NAMES if t in metrics["systems"][0]["standard"]]
    header = ["system", "n"]
    for task in tasks:
        short = TASK_NAMES[task].split()[0]
        header += [f"{short} accuracy (95 %)", f"{short} weighted F1"]
    header += ["BLEU-2", "ROUGE-L"]
    rows = [(system_name(e), e) for e in metrics["systems"]] + list(metrics["baselines"].items())
    lines = [f"Split `{metrics['split']}` of `{metrics['dataset']}`.", ""]
    lines += [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for name, entry in rows:
        own = entry["standard"]
        cells = [name, str(entry["n"])]
        for task in tasks:
            m = own.get(task)
            span = f" ({m['interval'][0]:.1f} to {m['interval'][1]:.1f})" if m else ""
            cells += [number(m and m["accuracy"]) + span, number(m and m["weighted_f1"])]
        m = own.get("response")
        cells += [number(m and m["bleu2"]), number(m and m["rouge_l"])]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
