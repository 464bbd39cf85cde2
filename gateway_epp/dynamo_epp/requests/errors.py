"""What a client is told when its request cannot be served, in OpenAI's shape.

Every client library for OpenAI's API reads `{"error": {"message", "type", "param", "code"}}`, so a
refusal by the picker must look like one by the engine.
"""

from __future__ import annotations

import msgspec

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


class BadRequest(Exception):
    """The request cannot be served as it is: the client has to change it.

    ``param`` is the field at fault (as `messages[2].content`), ``code`` a stable word for programs.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> bytes:
        """The answer's body."""
        return error_body(self.status, self.message, param=self.param, code=self.code)


def error_body(
    status: int,
    message: str,
    type: str | None = None,
    param: str | None = None,
    code: str | None = None,
) -> bytes:
    """An error as OpenAI's API words it; ``type`` follows from ``status`` unless given."""
    if type is None:
        type = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    error = {"message": message, "type": type, "param": param, "code": code}
    return msgspec.json.encode({"error": error})
