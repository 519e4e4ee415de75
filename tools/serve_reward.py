"""Serves BGE-M3 similarity over HTTP, for `rewards.similarity.BgeSimilarity`.

    python tools/serve_reward.py --model FOLDER [--device cuda:0] [--port 8100]

It is a separate process, so that torch and the trainer never share a device or an interpreter. It
listens on the loopback address; with another --host, requests need the header
`Authorization: Bearer TOKEN` with the token from the environment variable MM_JAX_REWARD_TOKEN.
GET /health; POST /similarity {"pairs": [[response, reference], ...]} -> {"scores": [{"dense",
"sparse", "colbert"}, ...]}.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import os
import pathlib
import re
import secrets
import sys

import fastapi
import pydantic
import uvicorn

MAX_PAIRS = 512
MAX_CHARACTERS = 8000
TOKEN_VARIABLE = "MM_JAX_REWARD_TOKEN"


class Pairs(pydantic.BaseModel):
    pairs: list[tuple[str, str]] = pydantic.Field(min_length=1, max_length=MAX_PAIRS)

    @pydantic.field_validator("pairs")
    @classmethod
    def short(cls, pairs):
        longest = max(len(text) for pair in pairs for text in pair)
        if longest > MAX_CHARACTERS:
            raise ValueError(f"expected texts of at most {MAX_CHARACTERS} characters")
        if any("\ud800" <= c <= "\udfff" for pair in pairs for text in pair for c in text):
            raise ValueError("expected no lone surrogates")
        return pairs


def load_model(folder: str, device: str, batch_size: int):
    """Loads a BGE-M3 folder and returns a function pairs -> scores."""
    from FlagEmbedding import BGEM3FlagModel

    model = BGEM3FlagModel(
        folder, use_fp16=device != "cpu", devices=[device], batch_size=batch_size
    )

    def score(pairs: list[tuple[str, str]]) -> list[dict[str, float]]:
        found = model.compute_score(pairs, max_passage_length=512)
        names = ("dense", "sparse", "colbert")
        return [
            dict(zip(names, map(float, values), strict=True))
            for values in zip(*(found[name] for name in names), strict=True)
        ]

    return score


def create_app(score, token: str = "") -> fastapi.FastAPI:
    """Builds the service around `score`; if a token is given, every request needs it."""
    app = fastapi.FastAPI(title="mm_jax similarity", docs_url=None, redoc_url=None)
    one_at_a_time = asyncio.Lock()  # there is one device

    @app.middleware("http")
    async def limits(request: fastapi.Request, call_next):
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and not secrets.compare_digest(given.encode(), token.encode()):
            return fastapi.responses.JSONResponse({"detail": "no or wrong token"}, 401)
        size = request.headers.get("content-length", "0" if request.method == "GET" else "")
        if not size:  # a chunked body, whose size is unknown until it has arrived
            return fastapi.responses.JSONResponse({"detail": "Content-Length is required"}, 411)
        if not size.isdigit() or int(size) > 2 * MAX_PAIRS * MAX_CHARACTERS:
            return fastapi.responses.JSONResponse({"detail": "request too large"}, 413)
        return await call_next(request)

    @app.exception_handler(fastapi.exceptions.RequestValidationError)
    async def refused(request: fastapi.Request, error):
        # Leaves out the input that was sent: JSON may not be able to represent it.
        told = [{"where": list(map(str, e["loc"])), "what": e["msg"]} for e in error.errors()]
        return fastapi.responses.JSONResponse({"detail": told}, 422)

    @app.get("/health")
    async def health():
        return {"status": "ok"}

    @app.post("/similarity")
    async def similarity(body: Pairs):
        async with one_at_a_time:
            scores = await asyncio.to_thread(score, body.pairs)
        return {"scores": scores}

    return app


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of BGE-M3")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N (default cpu)")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8100)
    args = parser.parse_args()
    token = os.environ.get(TOKEN_VARIABLE, "")
    local = args.host == "localhost" or _is_loopback(args.host)
    for wrong, said in (
        (
            not pathlib.Path(args.model, "config.json").is_file(),
            f"--model: {args.model} holds no config.json",
        ),
        (args.batch_size < 1, f"--batch_size: expected at least 1, got {args.batch_size}"),
        (not 0 < args.port < 65536, f"--port: expected 1 to 65535, got {args.port}"),
        (
            not re.fullmatch(r"cpu|cuda:\d+", args.device),
            f"--device: expected cpu or cuda:N, got {args.device}",
        ),
        (
            not local and not token,
            f"--host {args.host} can be reached from outside: set {TOKEN_VARIABLE}",
        ),
    ):
        if wrong:
            print(f"error: {said}", file=sys.stderr)
            return 2
    try:
        score = load_model(args.model, args.device, args.batch_size)
        score([("ready", "ready")])
    except Exception as error:  # from any library that reads the folder or uses the device
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"error: --model {args.model} on {args.device}: {said}", file=sys.stderr)
        return 1
    app = create_app(score, token)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")
    return 0


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":
    sys.exit(main())
