"""HTTP client of a running service: the door of httpx for the command line.

It repeats what the service asks to repeat (429 and 503 with `Retry-After`) and nothing else.
"""

from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from typing import Any, Self, cast
from urllib.parse import quote, urlsplit

import httpx
import orjson

from serve.content.documents import Document


PATIENCE_S = 600.0
"""How long one call may wait in all for a full service or an empty quota."""

RESTART_S = 30.0
"""How long a service that has answered before may be out of reach."""

READ_TIMEOUT_S = 330.0
"""Above the 300 s that the service itself gives a request (`request_timeout_s`)."""

PAUSE_S_MIN, PAUSE_S_MAX = 0.1, 30.0
"""Bounds of a pause; what the service asks for is obeyed up to its own maximum of 120 s."""

READY_S_MAX = 5.0

REPEATED = frozenset({429, 502, 503})


class Problem(Exception):
    """The service refused. `again` says that waiting would have helped, but took too long."""

    def __init__(self, answer: httpx.Response) -> None:
        self.status = answer.status_code
        self.request_id = answer.headers.get("x-request-id", "unknown")
        self.code, self.message = _explained(answer)
        self.again = self.status in REPEATED and answer.headers.get("x-should-retry", "") != "false"
        self.wait_s = _retry_after_s(answer.headers)
        super().__init__(self.message)

    @property
    def away(self) -> bool:
        """Whether the service as a whole did not serve, for as long as we waited."""
        return self.again and self.status != httpx.codes.TOO_MANY_REQUESTS

    def __str__(self) -> str:
        """One line for a person."""
        return f"{self.message} ({self.status} {self.code}, request {self.request_id})"


class Unreachable(Exception):
    """Nothing that speaks HTTP answers there."""


class Client:
    """One tenant's calls. May be used from several threads."""

    def __init__(
        self,
        url: str,
        key: str,
        *,
        sleep: Callable[[float], object],
        patience_s: float = PATIENCE_S,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._url = url
        self._sleep = sleep
        self._patience_s = patience_s
        self._reached = False
        self._http = httpx.Client(
            base_url=url,
            headers={"authorization": f"Bearer {key}", "content-type": "application/json"},
            timeout=httpx.Timeout(10, read=READ_TIMEOUT_S, write=60),
            trust_env=urlsplit(url).hostname not in {"127.0.0.1", "localhost", "::1"},
            transport=transport,
        )

    def __enter__(self) -> Self:
        """The client itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections."""
        self._http.close()

    def ensure_collection(self, name: str, model: str | None) -> None:
        """Make the collection; one that exists is fine, in whatever model."""
        body = {"name": name} if model is None else {"name": name, "model": model}
        try:
            self._call("POST", "/v1/collections", body)
        except Problem as problem:
            if problem.status != httpx.codes.CONFLICT:
                raise

    def write(self, collection: str, documents: Sequence[Document], key: str) -> Mapping[str, Any]:
        """Write documents and wait for them: one entry of `data` per document, in order.

        The service may answer earlier, with a receipt whose level is `accepted`. A repeat with the
        same idempotency `key` waits on for the same write.
        """
        rows = [{"id": one.id, "text": one.text, "metadata": one.metadata} for one in documents]
        path = f"/v1/collections/{quote(collection, safe='')}/documents?wait=indexed"
        return self._call("POST", path, {"documents": rows}, {"idempotency-key": key})

    def search(
        self, collection: str, text: str, top_k: int, where: Mapping[str, Any] | None
    ) -> Mapping[str, Any]:
        """The nearest chunks, best first, as `data`."""
        body = {"text": text, "top_k": top_k, "filter": where}
        return self._call("POST", f"/v1/collections/{quote(collection, safe='')}/search", body)

    def pause(self, seconds: float) -> None:
        """Sleep as the client itself does between two tries."""
        self._sleep(seconds)

    def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any],
        headers: Mapping[str, str] | None = None,
    ) -> Mapping[str, Any]:
        """Call until it works. Raises Problem, Unreachable."""
        content = orjson.dumps(body)
        waited_s, backoff_s = 0.0, 0.5
        while True:
            try:
                return self._once(method, path, content, headers)
            except Unreachable:
                pause_s, patience_s = backoff_s, RESTART_S if self._reached else 0.0
                if waited_s + pause_s > min(patience_s, self._patience_s):
                    raise
            except Problem as problem:
                pause_s = backoff_s if problem.wait_s is None else problem.wait_s
                if not problem.again or waited_s + pause_s > self._patience_s:
                    raise
            self._sleep(pause_s)
            waited_s += pause_s
            backoff_s = min(2 * backoff_s, PAUSE_S_MAX)

    def _once(
        self, method: str, path: str, content: bytes, headers: Mapping[str, str] | None
    ) -> Mapping[str, Any]:
        try:
            answer = self._http.request(method, path, content=content, headers=headers)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise Unreachable(f"{self._url} cannot be reached: {reason}") from None
        self._reached = True
        if not answer.is_success:
            raise Problem(answer)
        try:
            return cast("Mapping[str, Any]", orjson.loads(answer.content))
        except orjson.JSONDecodeError:
            raise Unreachable(f"{self._url} is some other service: it answered no JSON") from None


def ready(url: str) -> bool:
    """Whether `/health/ready` says yes within 5 s. `url` is plain HTTP.

    Not by httpx: with its TLS context each question would take 40 ms of a core from what starts.
    """
    place = urlsplit(url)
    connection = HTTPConnection(place.hostname or "", place.port, timeout=READY_S_MAX)
    try:
        connection.request("GET", "/health/ready")
        return connection.getresponse().status == HTTPStatus.OK
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def _explained(answer: httpx.Response) -> tuple[str, str]:
    """Code and message of OpenAI's error object, of RFC 9457, or of a plain text."""
    try:
        body = orjson.loads(answer.content)
    except orjson.JSONDecodeError:
        body = None
    if not isinstance(body, dict):
        return "http_error", " ".join(answer.text.split())[:200] or answer.reason_phrase
    error = body["error"] if isinstance(body.get("error"), dict) else body
    message = error.get("message") or error.get("detail") or answer.reason_phrase
    return str(error.get("code") or "http_error"), " ".join(str(message).split())


def _retry_after_s(headers: httpx.Headers) -> float | None:
    """The exact twin in milliseconds first. A date, which our service never sends, is ignored."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name, "")
        if value.isdigit():
            return max(int(value) * scale, PAUSE_S_MIN)
    return None
