"""Writes the model card of an exported run from its config and metrics."""

from __future__ import annotations

import pathlib

from mm_jax import __version__
from mm_jax.config.schema import Config
from mm_jax.evaluation.report.page import TEMPLATES
from mm_jax.evaluation.report.sections import short
from mm_jax.evaluation.report.tables import number, spread
from mm_jax.evaluation.scores import Metrics
from mm_jax.run.folder import IMPORTED


def model_card(
    config: Config,
    title: str,
    layout: str,
    about: str,
    stage: str,
    step: int,
    finished: dict[str, int],
    metrics: Metrics | None,
) -> str:
    """Renders Markdown with the front matter that the Hugging Face hub reads, without any paths of
    this machine."""
    sources = {k: v for k, v in config.init_from.model_dump().items() if isinstance(v, str) and v}
    if config.stage[stage].lora.init_from:
        sources["adapters"] = config.stage[stage].lora.init_from
    # Local paths are absolute in a run's config.
    hub = [v for v in sources.values() if not pathlib.Path(v).is_absolute()]
    ours = ("multimood", "videollama2")  # no library reads these layouts
    library = "peft" if layout == "peft" else "transformers"
    return TEMPLATES.get_template("card.md").render(
        title=title,
        about=about,
        library=None if layout in ours else library,
        base_models=[v.partition("@")[0] for v in hub],
        sources={k: v if v in hub else pathlib.Path(v).name for k, v in sources.items()},
        version=__version__,
        stage=None if stage == IMPORTED else stage,
        step=step,
        config=config,
        data="/".join(pathlib.Path(config.data.folder).parts[-3:]),
        stages={
            name: (config.stage[name], finished[name]) for name in config.stages if name in finished
        },
        metrics=metrics,
        results=results(metrics) if metrics else [],
    )


def results(metrics: Metrics) -> list[list[str]]:
    """Tabulates the standard metrics of every evaluated system; the first row is the header."""
    header = ["system", "n"]
    for task in metrics.tasks:
        header += [f"{short(task)} accuracy (95 %)", f"{short(task)} weighted F1"]
    rows = [[*header, "BLEU-2", "ROUGE-L"]]
    for name, system in ({s.name: s for s in metrics.systems} | metrics.baselines).items():
        row = [name, str(system.n)]
        for m in map(system.standard.tasks.get, metrics.tasks):
            row.append(f"{m.accuracy:.2f} ({spread(m.interval)})" if m else "–")
            row.append(number(m and m.weighted_f1))
        m = system.standard.response
        rows.append([*row, number(m and m.bleu2), number(m and m.rouge_l)])
    return rows
