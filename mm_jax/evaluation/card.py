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
from mm_jax.evaluation.scores import TASK_NAMES, Metrics, OwnMetrics
from mm_jax.run.folder import IMPORTED

NO_LIBRARY = ("multimood", "videollama2")  # no library reads these layouts


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


def model_card(
    config: Config, exported: Exported, prompter: Prompter, metrics: Metrics | None
) -> str:
    """Renders Markdown with the front matter that the Hugging Face hub reads, without any paths of
    this machine."""
    sources = {k: v for k, v in config.init_from.model_dump().items() if isinstance(v, str) and v}
    if config.stage[exported.stage].lora.init_from:
        sources["adapters"] = config.stage[exported.stage].lora.init_from
    # Local paths are absolute in a run's config.
    hub = [v for v in sources.values() if not pathlib.Path(v).is_absolute()]
    library = "peft" if exported.layout == "peft" else "transformers"
    finished = exported.finished
    shown = own_results(config, exported, metrics) if metrics else []
    data = ModelCardData(
        library_name=None if exported.layout in NO_LIBRARY else library,
        pipeline_tag="text-generation",
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
        prompt=example_prompt(prompter, exported.parts),
    )
    return f"---\n{data.to_yaml()}\n---\n{text}"


def licence(source: str) -> str:
    """Returns the licence that a local source names (its card, or its GGUF header), or ""."""
    path = pathlib.Path(source)
    if path.suffix == ".gguf" and path.is_file():
        field = gguf.GGUFReader(path).get_field("general.license")
        return str(field.contents()) if field else ""
    if (path / "README.md").is_file():
        return RepoCard.load(path / "README.md").data.to_dict().get("license") or ""
    return ""


def example_prompt(prompter: Prompter, parts: tuple[str, ...]) -> str:
    """Returns the prompt of a short turn for these parts, with runs of placeholders counted."""
    history = [{"speaker": "Client", "text": "I can't sleep."}]
    shown = history_of([*history, {"speaker": "Therapist", "text": "Since when?"}], "mesc")
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
        dataset_args={"modality": system.modality, "history_labels": system.history_labels},
    )
    found = []
    for task, scores in system.standard.tasks.items():
        named = dict(task_type="text-classification", task_name=TASK_NAMES[task], **common)
        for name, value in (("accuracy", scores.accuracy), ("weighted_f1", scores.weighted_f1)):
            if value is not None:
                found.append(EvalResult(metric_type=name, metric_value=round(value, 2), **named))
    if system.standard.response is not None:
        named = dict(task_type="text-generation", task_name="reply", **common)
        reply = system.standard.response
        for name, value in (("bleu-2", reply.bleu2), ("rouge-l", reply.rouge_l)):
            if value is not None:
                found.append(EvalResult(metric_type=name, metric_value=round(value, 2), **named))
    return found


def results(metrics: Metrics, shown: list[OwnMetrics]) -> list[list[str]]:
    """Tabulates the standard metrics of the shown systems and the trivial ones, with a header."""
    header = ["system", "n"]
    for task in metrics.tasks:
        header += [f"{short(task)} accuracy (95 %)", f"{short(task)} weighted F1"]
    rows = [[*header, "BLEU-2", "ROUGE-L"]]
    for name, system in ({s.name: s for s in shown} | metrics.baselines).items():
        row = [name, str(system.n)]
        for m in map(system.standard.tasks.get, metrics.tasks):
            row.append(f"{m.accuracy:.2f} ({spread(m.interval)})" if m else "–")
            row.append(number(m and m.weighted_f1))
        m = system.standard.response
        rows.append([*row, number(m and m.bleu2), number(m and m.rouge_l)])
    return rows
