"""Writes the model card of an exported run from its config and metrics."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib

import gguf
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard import RepoCard

from mm_jax import __version__
from mm_jax.config.schema import Config
from mm_jax.data.conversation import history_of, own_sample
from mm_jax.data.media import MediaSpec
from mm_jax.data.prompts import Prompter
from mm_jax.evaluation.report.page import TEMPLATES
from mm_jax.evaluation.report.sections import short
from mm_jax.evaluation.report.tables import number, spread
from mm_jax.evaluation.scores import Metrics, OwnMetrics
from mm_jax.run.folder import IMPORTED

NO_LIBRARY = ("multimood", "videollama2", "gguf")  # nothing called library_name reads these
READS = {"vision": "video", "audio": "sound", "compressor": "the history as memory vectors"}


@dataclasses.dataclass(frozen=True)
class Exported:
    """What a card is about: the folder's title and layout, and the checkpoint that it holds
    (`finished`: the best steps of the run's stages)."""

    title: str
    layout: str
    about: str
    stage: str
    step: int
    finished: dict[str, int]
    parts: tuple[str, ...]  # of the network, in this layout
    modules: tuple[str, ...]  # whose weights it holds


def model_card(
    config: Config, exported: Exported, prompter: Prompter, metrics: Metrics | None
) -> str:
    """Renders Markdown with the front matter that the Hugging Face hub reads, without any paths of
    this machine."""
    named, own = config.init_from.model_dump(), ["model", *exported.modules]
    sources = {k: named[k] for k in own if named.get(k)}
    if "language_model" in own:
        adapters = named["adapter"] or config.stage[exported.stage].lora.init_from
        sources |= {"adapters": adapters} if adapters else {}
    # Local paths are absolute in a run's config.
    hub = [v for v in sources.values() if not pathlib.Path(v).is_absolute()]
    library = "peft" if exported.layout == "peft" else "transformers"
    finished = exported.finished
    shown = own_results(config, exported, metrics) if metrics else []
    data = ModelCardData(
        library_name=None if exported.layout in NO_LIBRARY else library,
        pipeline_tag=None if exported.layout == "mamba" else "text-generation",
        base_model=[v.partition("@")[0] for v in hub] or None,
        tags=["mm_jax", "emotional-support", "multimodal"],
        model_name=exported.title,
        eval_results=[r for system in shown for r in eval_results(metrics, system)] or None,
    )
    text = TEMPLATES.get_template("card.md").render(
        exported=exported,
        sources={
            name: (v if v in hub else pathlib.Path(v).name, licence(v))
            for name, v in sources.items()
        },
        version=__version__,
        stage=None if exported.stage == IMPORTED else exported.stage,
        config=config,
        data="/".join(pathlib.Path(config.data.folder).parts[-3:]),
        stages={
            name: (config.stage[name], finished[name]) for name in config.stages if name in finished
        },
        metrics=metrics,
        results=results(metrics, shown) if shown else [],
        reads=[READS[part] for part in exported.parts],
        # Text that others normalise differently: a GGUF file cannot say it.
        composed="NFC" in str(prompter.tokenizer.backend.normalizer),
        prompt=example_prompt(prompter, exported.parts) if answers(config, exported) else "",
    )
    return f"---\n{data.to_yaml()}\n---\n{text}"


def answers(config: Config, exported: Exported) -> bool:
    """Tells whether this layout holds a model that was trained here to answer prompts."""
    objective = config.stage[exported.stage].objective
    trained = exported.stage != IMPORTED and objective in ("sft", "grpo", "ppo")
    return trained and "language_model" in exported.modules


def licence(source: str) -> str:
    """Returns the licence that a local source names (its card, or its GGUF header), or ""."""
    path = pathlib.Path(source)
    if path.suffix == ".gguf" and path.is_file():
        field = gguf.GGUFReader(path).get_field("general.license")
        return str(field.contents()) if field else ""
    try:
        found = RepoCard.load(path / "README.md").data.to_dict().get("license")
    except Exception:  # none, or no front matter that can be read
        return ""
    return found if isinstance(found, str) else ""


def example_prompt(prompter: Prompter, parts: tuple[str, ...]) -> str:
    """Returns the prompt of a short turn for these parts, with runs of placeholders counted."""
    history = [{"speaker": "Client", "text": "I can't sleep."}]
    history += [{"speaker": "Therapist", "text": "Since when?"}]
    shown = history_of(history, prompter.label_space)
    sample = own_sample(MediaSpec(), "I lost my job.", history=shown)
    prompter = dataclasses.replace(prompter, max_length=0, parts=parts)
    if "compressor" not in parts and prompter.history == "both":
        prompter = dataclasses.replace(prompter, history="text")
    ids = prompter.example(sample, "text", [None] * len(shown), with_answer=False).tokens
    backend, pieces = prompter.tokenizer.backend, []
    for placeholder, run in itertools.groupby(ids, lambda i: i == prompter.tokenizer.history_id):
        run = list(run)
        text = backend.decode([int(i) for i in run], skip_special_tokens=False)
        pieces.append(f"<history> x {len(run)}" if placeholder else text)
    return "".join(pieces)


def own_results(config: Config, exported: Exported, metrics: Metrics) -> list[OwnMetrics]:
    """Lists the evaluated systems whose input this layout can read."""
    missing = set(config.model.parts) - set(exported.parts)
    if "language_model" not in exported.modules:
        return []
    if "compressor" in missing and config.data.history != "text":
        return []
    letters = {"vision": "v", "audio": "a"}
    unread = {letters[part] for part in missing & set(letters)}
    return [s for s in metrics.systems if s.modality == "text" or not unread & set(s.modality)]


def eval_results(metrics: Metrics, system: OwnMetrics) -> list[EvalResult]:
    """Returns a system's scores as the hub's model-index holds them."""
    common = dict(
        dataset_type=metrics.dataset or "unknown",
        dataset_name=metrics.dataset or "unknown",
        dataset_split=metrics.split,
        dataset_config=f"{system.modality}, history labels {system.history_labels}",
    )
    found = []

    def add(kind: str, name: str, metric: str, value: float | None) -> None:
        # The hub joins results of one kind and dataset, so that the metric's name says the task.
        if value is not None:
            found.append(
                EvalResult(
                    task_type=kind,
                    metric_type=metric,
                    metric_name=f"{name}: {metric}",
                    metric_value=round(value, 2),
                    **common,
                )
            )

    for task, scores in system.standard.tasks.items():
        add("text-classification", metrics.titles[task], "accuracy", scores.accuracy)
        add("text-classification", metrics.titles[task], "weighted_f1", scores.weighted_f1)
    if system.standard.response is not None:
        add("text-generation", "reply", "bleu-2", system.standard.response.bleu2)
        add("text-generation", "reply", "rouge-l", system.standard.response.rouge_l)
    return found


def results(metrics: Metrics, shown: list[OwnMetrics]) -> list[list[str]]:
    """Tabulates the standard metrics of the shown systems and the trivial ones, with a header."""
    header = ["system", "n"]
    for task in metrics.tasks:
        header += [f"{short(metrics, task)} accuracy (95 %)", f"{short(metrics, task)} weighted F1"]
    rows = [[*header, "BLEU-2", "ROUGE-L"]]
    for name, system in ({s.name: s for s in shown} | metrics.baselines).items():
        row = [name, str(system.n)]
        for m in map(system.standard.tasks.get, metrics.tasks):
            row.append(f"{m.accuracy:.2f} ({spread(m.interval)})" if m else "–")
            row.append(number(m and m.weighted_f1))
        m = system.standard.response
        rows.append([*row, number(m and m.bleu2), number(m and m.rouge_l)])
    return rows
