"""The errors that a client is told, in the form of the OpenAI protocol."""

from __future__ import annotations


class ApiError(Exception):
    """An error of a request: status, and what is wrong with which parameter."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def body(self) -> dict:
        if self.status >= 500:
            kind = "server_error"
        else:
            kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
                self.status, "invalid_request_error"
            )
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}
