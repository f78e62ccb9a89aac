"""The API's error object."""

from typing import Any

from halimede.errors import RequestError


class ApiError(RequestError):
    """A call of the API that cannot be served.

    param: the field at fault. code: a word for programs, one of OpenAI's where it has one. status: of HTTP.
    """

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


def as_api_error(error: RequestError) -> ApiError:
    """A request that the engine refused is the client's fault: status 400."""
    return error if isinstance(error, ApiError) else ApiError(str(error))


def error_body(error: ApiError) -> dict[str, Any]:
    """The body of the response: {"error": {message, type, param, code}}."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}
