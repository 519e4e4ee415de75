"""Computes the similarity of a response to the reference reply (paper eq. 5).

`BgeSimilarity` asks the service of `tools/serve_reward.py` (BGE-M3: dense, sparse, ColBERT).
`LexicalSimilarity` needs no weights; the demo and the tests use it, and reports call it "lexical".
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections import Counter
from collections.abc import Sequence

import httpx2
from nltk.tokenize import NLTKWordTokenizer
from rouge_score import rouge_scorer
from sklearn.feature_extraction.text import TfidfVectorizer

from mm_jax.config.errors import check_url
from mm_jax.config.reward import Limits
from mm_jax.rewards.base import Request, Score, failure, is_blank
from mm_jax.rewards.calls import Cache, CallError, Calls, cache_key, gather_all

# Paper eq. 5: sim_colbert + 0.3 sim_sparse + sim_dense.
WEIGHTS = {"dense": 1.0, "sparse": 0.3, "colbert": 1.0}
MAX_CHARACTERS = 8000  # longest text that tools/serve_reward.py accepts


def words(text: str) -> list[str]:
    return [w for w in NLTKWordTokenizer().tokenize(text.casefold()) if any(map(str.isalnum, w))]


class LexicalSimilarity:
    """Averages the tf-idf cosine and the F1 of shared words; idf from the training replies."""

    name = "lexical"

    def __init__(self, replies: Sequence[str]):
        self._tfidf = TfidfVectorizer(tokenizer=words, token_pattern=None, lowercase=False)
        self._tfidf.fit(replies)

    def value(self, response: str, reference: str) -> tuple[float, float]:
        """Returns (cosine, F1), each in [0, 1]."""
        rows = self._tfidf.transform([response, reference])
        cosine = float((rows[0] @ rows[1].T).sum())
        a, b = Counter(words(response)), Counter(words(reference))
        shared = sum((a & b).values())
        f1 = 2 * shared / max(sum(a.values()) + sum(b.values()), 1)
        return min(cosine, 1.0), f1

    async def score(self, requests: Sequence[Request]) -> list[Score]:
        out = []
        for request in requests:
            cosine, f1 = self.value(request.response, request.sample.response)
            value = (cosine + f1) / 2
            out.append(Score(value, raw=value, detail={"tfidf_cosine": cosine, "word_f1": f1}))
        return out

    def counts(self) -> dict[str, int]:
        return {}

    async def close(self) -> None:
        pass


class BgeSimilarity:
    """Asks for BGE-M3 similarity over HTTP and divides it by the reference's self-similarity.

    both_directions: divides by the response's self-similarity where that is larger, so that a
    response that contains the reference among much else does not score as a copy.
    """

    name = "similarity"

    def __init__(
        self,
        url: str,
        limits: Limits = Limits(),
        cache: Cache | None = None,
        both_directions: bool = False,
        batch: int = 64,
        token_variable: str = "MM_JAX_REWARD_TOKEN",
    ):
        check_url("reward.similarity_url", url)
        self.url, self.both, self.batch = url.rstrip("/"), both_directions, batch
        self.cache = cache if cache is not None else Cache(None)
        self._token = os.environ.get(token_variable, "")
        self.calls = Calls(limits)

    def counts(self) -> dict[str, int]:
        return dict(self.calls.failed)

    async def close(self) -> None:
        pass

    async def score(self, requests: Sequence[Request]) -> list[Score]:
        began = time.perf_counter()
        pairs: dict[tuple[str, str], None] = {}
        for request in requests:
            response, reference = request.response.strip(), request.sample.response
            short = len(response) <= MAX_CHARACTERS and len(reference) <= MAX_CHARACTERS
            if short and not is_blank(response):
                pairs[response, reference] = pairs[reference, reference] = None
                if self.both:
                    pairs[response, response] = None
        found, asked = await self._similarities(list(pairs))
        seconds = time.perf_counter() - began
        return [self._score(request, found, asked, seconds) for request in requests]

    def _score(self, request: Request, found: dict, asked: set, seconds: float) -> Score:
        response, reference = request.response.strip(), request.sample.response
        if is_blank(response):
            return Score(0.0, reason="empty")
        if len(response) > MAX_CHARACTERS:
            return Score(0.0, reason="too long")
        if len(reference) > MAX_CHARACTERS:
            return failure("reference too long")
        wanted = [(response, reference), (reference, reference)]
        wanted += [(response, response)] if self.both else []
        for pair in wanted:
            if isinstance(found[pair], CallError):
                return failure(found[pair].reason, message=str(found[pair])[:300])
        parts = found[response, reference]
        raw, own = combined(parts), combined(found[reference, reference])
        if self.both:
            own = max(own, combined(found[response, response]))
        if not own > 0:
            return failure("self-similarity is not positive")
        scaled, cached = min(max(raw / own, 0.0), 1.0), asked.isdisjoint(wanted)
        return Score(scaled, raw=raw, detail=parts, seconds=seconds, cached=cached)

    async def _similarities(self, pairs: list[tuple[str, str]]) -> tuple[dict, set]:
        """Returns pair -> its three similarities, or the CallError that prevented them, and the
        pairs that were not in the cache."""
        keys = {p: cache_key(service=self.url, version=1, pair=p) for p in pairs}
        found = {p: self.cache.get(key) for p, key in keys.items()}
        missing = [p for p, value in found.items() if value is None]

        if not missing:
            return found, set()

        async def ask(part: list[tuple[str, str]]) -> None:
            try:
                answer = await self.calls.run(lambda: self._post(client, part))
            except CallError as error:
                found.update(dict.fromkeys(part, error))
                return
            for pair, value in zip(part, answer, strict=True):
                found[pair] = value
                self.cache.put(keys[pair], value)

        chunks = [missing[i : i + self.batch] for i in range(0, len(missing), self.batch)]
        # `Calls` ends what takes too long; the service is the user's own, never behind the proxy or
        # the certificates that the environment may name for the internet.
        async with httpx2.AsyncClient(timeout=None, trust_env=False) as client:
            await gather_all(map(ask, chunks))
        return found, set(missing)

    async def _post(
        self, client: httpx2.AsyncClient, pairs: list[tuple[str, str]]
    ) -> list[dict[str, float]]:
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        body = json.dumps({"pairs": pairs})  # in ASCII: a text may hold a lone surrogate
        try:
            answer = await client.post(f"{self.url}/similarity", content=body, headers=headers)
            scores = answer.raise_for_status().json()["scores"]
            if len(scores) != len(pairs) or not all(
                set(s) == set(WEIGHTS) and all(map(is_similarity, s.values())) for s in scores
            ):
                raise ValueError("expected dense, sparse and colbert of every pair")
            return scores
        except httpx2.HTTPStatusError as error:
            code = error.response.status_code
            raise CallError(f"HTTP {code}", "", code in (408, 429) or code >= 500) from error
        except (httpx2.HTTPError, OSError) as error:
            raise CallError("connection") from error
        except (
            *(ValueError, KeyError, TypeError, AttributeError, RecursionError),
            httpx2.InvalidURL,
        ) as error:
            raise CallError("malformed answer", str(error)[:200]) from error


def is_similarity(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and -1e6 <= value <= 1e6  # sparse ones may exceed 1; NaN fails


def combined(parts: dict[str, float]) -> float:
    """Computes the weighted mean of the three similarities."""
    return sum(WEIGHTS[k] * parts[k] for k in WEIGHTS) / sum(WEIGHTS.values())


@functools.cache
def _rouge() -> rouge_scorer.RougeScorer:
    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


@functools.lru_cache(maxsize=1 << 16)
def rouge_l(gold: str, predicted: str) -> float:
    """Computes ROUGE-L F1 in [0, 1], stemmed."""
    return _rouge().score(gold, predicted)["rougeL"].fmeasure
