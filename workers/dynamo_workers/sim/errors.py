"""Refusals of a request, with the body that vLLM (and so every OpenAI client) uses."""

from typing import Any


class RequestError(Exception):
    """A request that is not served. `param` names the field, `value` what stood there."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, value: Any = None
    ) -> None:
        if param is not None and status == 400:
            shown = f", value={value}" if value is not None else ""
            message = f"{message} (parameter={param}{shown})"
        super().__init__(message)
        self.status = status
        self.param = param

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        kind = {400: "BadRequestError", 404: "NotFoundError"}.get(self.status, "InternalError")
        return {
            "error": {
                "message": str(self),
                "type": kind,
                "param": self.param,
                "code": self.status,
            }
        }
