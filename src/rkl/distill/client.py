"""A server, asked over HTTP with time limits and attempts."""

import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from time import monotonic, sleep
from typing import Any, TypeAlias

from rkl.checks import warn
from rkl.distill.limits import is_address
from rkl.runs.progress import say

KEY = "RKL_TEACHER_API_KEY"  # environment variable; the one place that a key is read from
BUSY = 408, 425, 429, 500, 502, 503, 504  # answers after which the same request may succeed
NEVER_TAKEN = "validation error", "not supported"  # said with 500 of requests that are wrong
MAX_PAUSE = 30.0  # seconds between two attempts
ATTEMPTS = 15  # of a request: a server that is restarted may be away for five minutes
FIRST_ATTEMPTS = 5  # of the first request, as an address may be wrong
SILENT_ATTEMPTS = 3  # after which the wait is announced
_CHUNK = 2**16  # bytes read between two looks at the clock


class ServerError(ConnectionError):
    """A server gave no usable answer; the message says which, and what to do."""


class RefusedError(ServerError):
    """A server refused a request as wrong."""

    def __init__(self, words: str, message: str):
        super().__init__(words)
        self.message = message


Ask: TypeAlias = Callable[[str, Mapping[str, Any]], Any]


class Server:
    """An address, asked with time limits and attempts; its key is in no message.

    Args:
        url: The address.
        timeout: Seconds that an answer may take.
        attempts: How often a request is sent, at most.
        name: What messages call the server.
        key: The environment variable that holds the key.
    """

    def __init__(
        self, url: str, timeout: float, attempts: int, name: str = "teacher", key: str = KEY
    ):
        self.name, self.variable = name, key
        parts = urllib.parse.urlsplit(url)
        if not is_address(url) or not parts.hostname:
            raise ValueError(f"url must be an address such as http://host:8000/v1; got {url!r}.")
        if parts.username or parts.password or parts.query:
            raise ValueError(
                f"url must hold no key, no password and no ?; a key is read from {key}. "
                f"Expected {parts.scheme}://{parts.hostname}:{parts.port or 8000}/v1."
            )
        self.url, self.timeout, self.attempts = url.rstrip("/"), timeout, attempts
        self._opener = urllib.request.build_opener(_NoRedirect)
        alone = parts.hostname in ("localhost", "127.0.0.1", "::1")
        if self._key() and parts.scheme == "http" and not alone:
            warn(f"{name}: the key in {key} is sent to {url} unencrypted; use https.")

    def __str__(self) -> str:
        return f"{self.name}: {self.url}"

    def _key(self) -> str:
        return os.environ.get(self.variable, "")

    def ask(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        attempts: int | None = None,
        prepare: Callable[[Ask], None] | None = None,
    ) -> Any:
        """The answer to a request, sent again while the server is busy or not reached.

        Args:
            path: Behind the address; from the root of the server on where it begins with "/".
            body: Of a POST; None sends a GET.
            attempts: In place of the server's own.
            prepare: Called before the request is sent again, as the server may have been
                restarted, with what sends one request once.
        """
        pause, reason, attempts = 1.0, "", attempts or self.attempts
        for attempt in range(attempts):
            if attempt == SILENT_ATTEMPTS:
                say(f"{self} {reason}; it is asked up to {attempts - attempt} times more.")
            if attempt:
                sleep(pause)
                pause = min(2 * pause, MAX_PAUSE)
            try:
                if attempt and prepare is not None:
                    prepare(self._once)
                return self._once(path, body)
            except _BusyError as error:
                reason = str(error)
        raise ServerError(
            f"{self} {reason}, {attempts} times in a row. Is the server up, and is the "
            "address right?"
        )

    def _once(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        base = self.url.removesuffix("/v1") if path.startswith("/") else f"{self.url}/"
        url = base + path
        headers = {"Content-Type": "application/json", "User-Agent": "rkl"}
        if self._key():
            headers["Authorization"] = f"Bearer {self._key()}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, headers)
        try:
            with self._opener.open(request, timeout=self.timeout) as answer:
                text = self._all_of(answer)
        except urllib.error.HTTPError as error:
            raise self._refusal(error, url) from None
        except TimeoutError:
            raise _BusyError(f"gave no answer within {self.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise _BusyError(f"gave no answer within {self.timeout:g} s") from None
            raise _BusyError(f"cannot be reached ({self._scrubbed(str(reason))})") from None
        try:
            return json.loads(text)
        except ValueError:
            start = self._scrubbed(text[:60].decode(errors="replace"))
            raise ServerError(f"{self} gave no JSON at {url}, but {start!r}.") from None

    def _all_of(self, answer: Any) -> bytes:
        """The body, however slowly it comes, within the time limit."""
        end, parts = monotonic() + self.timeout, []
        while part := answer.read1(_CHUNK):
            parts.append(part)
            if monotonic() > end:
                raise TimeoutError
        if answer.length:  # bytes that were announced and did not come
            raise ConnectionError("its answer ended early")
        return b"".join(parts)

    def _refusal(self, error: urllib.error.HTTPError, url: str) -> Exception:
        try:
            text = error.read(4096).decode(errors="replace")
        except OSError:
            text = ""
        message = self._scrubbed(_message(text))
        status, told = error.code, f": {message}" if message else ""
        wrong = status == 500 and any(it in message.lower() for it in NEVER_TAKEN)
        if status in BUSY and not wrong:
            return _BusyError(f"answered {status} {error.reason}{told}")
        if status in (401, 403):
            have = "the key in it is refused" if self._key() else "it is not set"
            return ServerError(
                f"{self} wants a key ({status}). It is read from the environment variable "
                f"{self.variable}; "
                f"{have}."
            )
        if status == 404:
            return ServerError(
                f"{self} has nothing at {url} (404{told}). Expected the address of an "
                "OpenAI-compatible API, such as http://host:8000/v1."
            )
        return RefusedError(f"{self} refused the request ({status}{told}).", message)

    def _scrubbed(self, text: str) -> str:
        return text.replace(self._key(), "***") if self._key() else text

    def served(self, model: str | None) -> tuple[str, str]:
        """The name of a model that is served, the only one if None is named, and who serves it."""
        answer = self.ask("models", attempts=min(self.attempts, FIRST_ATTEMPTS))
        listed = answer.get("data") if isinstance(answer, Mapping) else None
        entries = [it for it in listed or () if isinstance(it, Mapping) and "id" in it]
        if not entries:
            raise ServerError(f"{self} lists no models at {self.url}/models.")
        names = [str(it["id"]) for it in entries]
        if model is None and len(names) > 1:
            raise ValueError(
                f"model must be one of {', '.join(names)}, which {self} has; got None."
            )
        if model is not None and model not in names:
            raise ValueError(
                f"model must be one that {self} has, {', '.join(names)}; got {model!r}."
            )
        entry = entries[0 if model is None else names.index(model)]
        return str(entry["id"]), str(entry.get("owned_by", ""))


class _BusyError(Exception):
    """A request failed in a way that may pass."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would hand the key to another address."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        return None


def _message(text: str) -> str:
    """The message in a server's error, from whichever field has it."""
    try:
        told = json.loads(text)
    except ValueError:
        return text.strip()[:300]
    for name in ("error", "message", "detail"):
        if isinstance(told, Mapping) and name in told:
            told = told[name]
    return str(told)[:300]
