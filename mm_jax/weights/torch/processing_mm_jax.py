"""Turns a conversation with its video and sound into what an exported mm_jax model reads, and asks
it as it was trained: one label after the other, then the reply. Needs PyAV 18 or newer."""

import copy
import dataclasses
import functools
import pathlib

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from .answers_mm_jax import cut_at_fields, format_answer
from .batch_mm_jax import collate
from .conversation_mm_jax import history_of, own_sample
from .history_mm_jax import MemoryBudget
from .labels_mm_jax import RESPONSE_FIELD, parse_labels
from .media_mm_jax import MediaSpec
from .prompts_mm_jax import Prompter, SpanLengths
from .tokenizer_mm_jax import Chat, Tokenizer


class MmJaxProcessor(ProcessorMixin):
    """Makes inputs of client turns. `chat`, `media`, `spans` and `prompt` are the settings that
    the model was trained with."""

    def __init__(self, tokenizer, chat, media, spans, prompt, chat_template=None):
        super().__init__(tokenizer, chat_template=chat_template)
        self.chat, self.media, self.spans, self.prompt = chat, media, spans, prompt

    @functools.cached_property
    def prompter(self):
        chat = Chat(**{**self.chat, "stops": tuple(self.chat["stops"])})
        backend = copy.deepcopy(self.tokenizer.backend_tokenizer)
        backend.no_truncation()  # others may have asked it for both
        backend.no_padding()
        tok = Tokenizer(backend, chat)
        settings = {**self.prompt, "parts": tuple(self.prompt["parts"])}
        budget = MemoryBudget(**settings.pop("budget"))
        space = parse_labels(settings.pop("label_space"), "processor_config.json: label_space")
        return Prompter(tok, SpanLengths(**self.spans), space, budget=budget, **settings)

    def __call__(
        self,
        text=None,
        video=None,
        audio=None,
        history=None,
        problem=None,
        situation=None,
        answer=None,
        modality="av",
        sampling_rate=16_000,
        return_tensors="pt",
    ):
        """Makes the inputs of a client turn, or of several: then every argument is a list.

        text: what the client says. video: a file, whose sound is used too, or pictures
        uint8[n, h, w, 3]. audio: a file, or float[samples] in [-1, 1] at `sampling_rate` Hz.
        history: earlier utterances, {"speaker", "text"} each, and labels by task ("emotion" will do
        for the speaker's). answer, for training: any of the tasks and "response"; then there are
        `labels`, and rows are padded on the right instead of the left. modality: what the model
        sees of it, "av", "a", "v" or "text".
        """
        if not isinstance(sampling_rate, int) or sampling_rate < 1:
            raise ValueError(f"sampling_rate: expected whole Hz above 0, got {sampling_rate!r}")
        rows = dict(text=text, video=video, audio=audio, history=history, problem=problem)
        rows |= dict(situation=situation, answer=answer)
        if not any(isinstance(x, list | tuple) for x in (text, video, audio)):
            rows = {name: [value] for name, value in rows.items()}
        rows = {name: values for name, values in rows.items() if values is not None}
        for name, values in rows.items():
            if not isinstance(values, list | tuple):
                raise ValueError(
                    f"{name}: expected a list, as text, video or audio is one, got {values!r:.60}"
                )
        if len({len(values) for values in rows.values()}) != 1 or not all(rows.values()):
            lengths = {name: len(values) for name, values in rows.items()}
            raise ValueError(f"expected lists of one length above 0, got {lengths}")
        turns = [
            dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)
        ]
        examples = [self._example(turn, modality, sampling_rate) for turn in turns]
        batch = collate(examples, self.prompter.tokenizer.pad_id)
        found = {"input_ids": batch.tokens, "attention_mask": batch.mask}
        if any(turn.get("answer") is not None for turn in turns):
            found["labels"] = np.where(batch.loss_weights > 0, batch.tokens, -100)
        else:  # generation goes on at the end of every row
            order = np.argsort(batch.mask, axis=1, kind="stable")
            found = {name: np.take_along_axis(x, order, 1) for name, x in found.items()}
        if batch.frames.shape[1]:
            pixels = batch.frames.transpose(0, 1, 4, 2, 3).astype(np.float32)
            found["frames"] = (pixels / 255 - 0.5) / 0.5
        if batch.fbank.shape[1]:
            found |= {"fbank": batch.fbank, "fbank_frames": batch.fbank_frames}
        if batch.memory_index.shape[1]:
            found |= {"history_ids": batch.history_tokens, "memory_index": batch.memory_index}
        whole = {k: x if x.dtype == np.float32 else x.astype(np.int64) for k, x in found.items()}
        return BatchFeature(whole, tensor_type=return_tensors)

    def _example(self, turn, modality, sampling_rate):
        def media(value):
            named = value is None or isinstance(value, str | pathlib.Path)
            return value if named else np.asarray(value)

        space, answer = self.prompter.label_space, turn.get("answer")
        sample = own_sample(
            MediaSpec(**self.media),
            text=turn.get("text") or "",
            video=media(turn.get("video")),
            audio=media(turn.get("audio")),
            history=history_of(turn.get("history") or (), space),
            problem=turn.get("problem") or "",
            situation=turn.get("situation") or "",
            sampling_rate=sampling_rate,
        )
        if answer is not None:
            sample = dataclasses.replace(sample, **_targets(answer, space))
        labels = [u.labels for u in sample.history]
        return self.prompter.example(sample, modality, labels, with_answer=answer is not None)

    def answer(
        self,
        model,
        text=None,
        video=None,
        audio=None,
        history=None,
        problem=None,
        situation=None,
        modality="av",
        sampling_rate=16_000,
        generation_config=None,
    ):
        """Answers a client turn, given as in `__call__`: {"predicted": {task: label},
        "probabilities": {task: {label: p}}, "response", "text"}. A task's labels are compared given
        the likeliest labels of the tasks before it; the reply is generated given them all, by
        `generation_config` (the model's own; neither beams nor several replies)."""
        inputs = self(
            text=text,
            video=video,
            audio=audio,
            history=history,
            problem=problem,
            situation=situation,
            modality=modality,
            sampling_rate=sampling_rate,
        )
        config = generation_config or model.generation_config
        for name in ("num_beams", "num_return_sequences"):
            if (getattr(config, name, None) or 1) != 1:
                raise ValueError(f"answer: {name}: expected 1, got {getattr(config, name)}")
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                return self._answer(_Prefix(model, inputs), config)
        finally:
            model.train(training)

    def _answer(self, state, generation_config):
        prompter, space = self.prompter, self.prompter.label_space
        labels, probabilities = {}, {}
        for i, task in enumerate(space.tasks):
            state.add(prompter.lead_ids(task.field, first=i == 0))
            ids, ending = [prompter.label_ids(x) for x in task.labels], prompter.ending_ids(task)
            scores = state.scores([label + ending for label in ids])
            best = int(scores.argmax())
            labels[task.name] = task.labels[best]
            shares = zip(task.labels, scores.softmax(0).tolist(), strict=True)
            probabilities[task.name] = {label: round(p, 6) for label, p in shares}
            state.add(ids[best])
        response = ""
        if space.reply:
            state.add(prompter.lead_ids(RESPONSE_FIELD, first=False))
            response = prompter.tokenizer.decode(state.generate(generation_config)).strip()
            response = cut_at_fields(response, space)
        text = format_answer(labels, response, space)
        return {
            "predicted": labels,
            "probabilities": probabilities,
            "response": response,
            "text": text,
        }


class _Prefix:
    """One row's tokens so far, with the cache of all but the last ones."""

    def __init__(self, model, inputs):
        if len(inputs["input_ids"]) != 1:
            raise ValueError("answer: expected one turn; loop over several")
        dtype = model.get_input_embeddings().weight.dtype
        self.model, self.inputs = model, inputs.to(model.device)
        for name, x in self.inputs.items():
            if name == "frames":  # filter banks are normalised in float32
                self.inputs[name] = x.to(dtype)
        self.ids, self.cache = self.inputs["input_ids"], None

    def _read(self, ids, cache, media):
        length = cache.get_seq_length() if cache is not None else 0
        out = self.model(
            **{**media, "input_ids": ids},
            attention_mask=ids.new_ones(len(ids), length + ids.shape[1]),
            past_key_values=cache,
            use_cache=True,
        )
        return out.logits.float(), out.past_key_values

    def _catch_up(self):
        """Reads all tokens but the last one, which gives the next token's probabilities."""
        done = self.cache.get_seq_length() if self.cache is not None else 0
        media = {}
        if not done:
            skipped = ("input_ids", "attention_mask")
            media = {k: x for k, x in self.inputs.items() if k not in skipped}
        if self.ids.shape[1] - 1 > done:
            _, self.cache = self._read(self.ids[:, done:-1], self.cache, media)

    def add(self, ids):
        self.ids = torch.cat([self.ids, self.ids.new_tensor([ids])], dim=1)

    def scores(self, candidates):
        """Returns the log-probability float64[C] of each list of ids as what follows."""
        self._catch_up()
        width = max(map(len, candidates))
        rows = self.ids.new_zeros(len(candidates), width)
        for row, ids in zip(rows, candidates, strict=True):
            row[: len(ids)] = rows.new_tensor(ids)
        last = self.ids[:, -1:].expand(len(candidates), 1)
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(len(candidates))
        logits, _ = self._read(torch.cat([last, rows[:, :-1]], dim=1), cache, {})
        logp = logits.cpu().double().log_softmax(-1).gather(-1, rows.cpu()[..., None])[..., 0]
        lengths = torch.tensor([len(ids) for ids in candidates])
        return (logp * (torch.arange(width) < lengths[:, None])).sum(1)

    def generate(self, generation_config):
        self._catch_up()
        out = self.model.generate(
            input_ids=self.ids,
            attention_mask=torch.ones_like(self.ids),
            past_key_values=self.cache,
            generation_config=generation_config,
        )
        return out[0, self.ids.shape[1] :].tolist()


def _targets(answer, space):
    """Returns the fields of a sample from an answer. Raises ValueError for unknown ones."""
    known = (*space.names, *(("response",) if space.reply else ()))
    unknown = sorted(set(answer) - set(known))
    if unknown:
        raise ValueError(f"answer: expected any of {list(known)}, got {unknown}")
    labels = {}
    for task in space.tasks:
        given = answer.get(task.name) or ""
        label = task.normalise(given) if given else ""
        if given and not label:
            expected = list(task.labels)
            raise ValueError(f"answer: {task.name}: expected one of {expected}, got {given!r}")
        labels |= {task.name: label} if label else {}
    return {"labels": labels, "response": answer.get("response") or ""}
