"""What a server answers: JSON in, JSON out, for any model; texts as they come for language models."""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import json
import queue
import threading
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import LatheError, ModelError
from ..feeds import check_feeds
from ..generation.causal_lm import EOS_KEY
from ..generation.tokenizer import TextStream, eos_beside, load_tokenizer, tokenizer_file
from ..session import Session
from .data_parallel import DataParallel

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

Array = np.ndarray[Any, Any]
_SAMPLING = {"temperature": (int, float), "top_k": int, "top_p": (int, float), "seed": int, "max_new_tokens": int}
_FIELDS = {"/predict": {"inputs"}, "/generate": {"prompt", "stream", *_SAMPLING}}
_ROUTES = {"/health": ("GET", "HEAD"), "/metrics": ("GET", "HEAD"), "/predict": ("POST",), "/generate": ("POST",)}


class _Refused(Exception):
    """A request that is answered with an error: status and reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server accepts.

    Attributes:
        max_bytes: of a request's body; more is answered with 413.
        token: what requests must carry as ``Authorization: Bearer TOKEN``, else 401; None: nothing.
        max_rows: rows of several requests that run together at most.
        max_new_tokens: the most tokens of a text.
    """

    max_bytes: int = 1_000_000
    token: str | None = None
    max_rows: int = 32
    max_new_tokens: int = 4096


class Service:
    """Answers requests with a model.

    ``GET /health``; ``GET /metrics`` (Prometheus text); ``POST /predict`` with ``{"inputs": {name: nested lists}}``;
    ``POST /generate`` with ``{"prompt": text or token ids, "max_new_tokens": 64, "temperature": 0, "top_k", "top_p",
    "seed", "stream": false}``, which streams a JSON object a line. Rows of requests that come together run together.
    """

    def __init__(self, path: str, device: str, threads: int, limits: Limits) -> None:
        self._limits = limits
        self._parallel = DataParallel(path, 1, device, threads, engine="threads")
        self._session: Session = self._parallel.session
        self._tokenizer: Any = load_tokenizer(path) if tokenizer_file(path) is not None else None
        self._eos = None if EOS_KEY in self._session.metadata else eos_beside(Path(path))
        self._counts: Counter[str] = Counter()
        self._running: set[threading.Event] = set()  # texts that are generated
        self._tokens = 0

    async def answer(self, request: Request) -> Response:
        """The response to ``request``; never raises."""
        from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse

        try:
            found = await self._route(request)
        except _Refused as refused:
            self._counts[str(refused.status)] += 1
            return JSONResponse({"error": str(refused)}, refused.status)
        except LatheError as error:
            self._counts["400"] += 1
            return JSONResponse({"error": str(error)}, 400)
        except Exception as error:
            self._counts["500"] += 1
            return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 500)
        self._counts["200"] += 1
        if isinstance(found, str):
            return PlainTextResponse(found)
        if isinstance(found, Mapping):
            return JSONResponse(found)
        return StreamingResponse(found, media_type="application/x-ndjson")

    async def _route(self, request: Request) -> Mapping[str, Any] | str | AsyncIterator[str]:
        path = request.url.path.rstrip("/")
        if path not in _ROUTES:
            raise _Refused(404, "There are /predict, /generate, /health and /metrics.")
        if request.method not in _ROUTES[path]:
            raise _Refused(405, f"Use {_ROUTES[path][0]}.")
        if path == "/health":
            return {"status": "ok"}
        self._check_token(request)
        if path == "/metrics":
            return self._metrics()
        body = await self._body(request)
        if unknown := sorted(body.keys() - _FIELDS[path]):
            raise _Refused(400, f"{path} knows no {unknown}. It takes: {', '.join(sorted(_FIELDS[path]))}.")
        if path == "/predict":
            return await self._predict(body)
        stream = body.get("stream", False)
        if not isinstance(stream, bool):
            raise _Refused(400, f'"stream" cannot be {stream!r}.')
        tokens = self._generate(self._prompt(body), self._options(body))
        first = await anext(tokens)  # what is wrong with the request shows here
        if "error" in first:
            await tokens.aclose()
            raise _Refused(400, first["error"])
        if stream:
            return _lines(first, tokens)
        items = [first, *[item async for item in tokens]]
        if "error" in items[-1]:
            raise _Refused(500, items[-1]["error"])
        return {
            "tokens": [item["token"] for item in items if "token" in item],
            "text": "".join(i["text"] for i in items),
        }

    def _metrics(self) -> str:
        """Prometheus' text."""
        counts = [f'onnxlathe_requests_total{{status="{code}"}} {n}' for code, n in sorted(self._counts.items())]
        return "\n".join(
            [
                "# HELP onnxlathe_requests_total Requests answered, by status.",
                "# TYPE onnxlathe_requests_total counter",
                *counts,
                "# HELP onnxlathe_texts_running Texts that are generated now.",
                "# TYPE onnxlathe_texts_running gauge",
                f"onnxlathe_texts_running {len(self._running)}",
                "# HELP onnxlathe_tokens_total Tokens generated.",
                "# TYPE onnxlathe_tokens_total counter",
                f"onnxlathe_tokens_total {self._tokens}",
                "",
            ]
        )

    def _check_token(self, request: Request) -> None:
        if self._limits.token is None:
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self._limits.token}".encode()):
            raise _Refused(401, "Send the header Authorization: Bearer TOKEN.")

    async def _body(self, request: Request) -> dict[str, Any]:
        content = bytearray()
        async for piece in request.stream():
            content += piece
            if len(content) > self._limits.max_bytes:
                raise _Refused(413, f"A request may have {self._limits.max_bytes} bytes.")
        try:
            body = json.loads(bytes(content))
        except (ValueError, RecursionError) as error:
            raise _Refused(400, f"The body is not JSON: {error}.") from error
        if not isinstance(body, dict):
            raise _Refused(400, "The body is no JSON object.")
        return body

    async def _predict(self, body: Mapping[str, Any]) -> dict[str, Any]:
        inputs = body.get("inputs")
        if not isinstance(inputs, dict):
            raise _Refused(400, 'The body has no object "inputs".')
        feeds: dict[str, Array] = {}
        types = {value.name: value.dtype for value in self._session.inputs}
        for name, nested in inputs.items():
            kind = types.get(name)
            try:
                feeds[name] = np.asarray(nested, None if kind is None else kind.numpy())
            except (ValueError, TypeError, OverflowError) as error:
                raise _Refused(400, f"Input {name!r} is no array of {kind}: {error}.") from error
        check_feeds(self._session.inputs, feeds, "the request")
        done = self._parallel.submit(feeds, largest=self._limits.max_rows)
        results = await asyncio.wrap_future(done)
        return {"outputs": {name: array.tolist() for name, array in results.items()}}

    async def _generate(self, prompt: list[int], options: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """One ``{"token", "text"}`` a token, then the rest of the text; or ``{"error"}``."""
        stream = TextStream(self._tokenizer) if self._tokenizer is not None else None
        items: queue.SimpleQueue[int | Exception | None] = queue.SimpleQueue()
        gone = threading.Event()

        def on_token(row: int, token: int) -> None:
            if gone.is_set():  # nobody reads any more
                raise ModelError("The client has gone.")
            items.put(token)

        def work() -> None:
            try:
                self._session.generate(prompt, on_token=on_token, eos=self._eos, **options)
                items.put(None)
            except Exception as error:
                items.put(error)
            finally:
                self._running.discard(gone)

        self._running.add(gone)
        threading.Thread(target=work, daemon=True).start()
        try:
            while (item := await asyncio.to_thread(items.get)) is not None:
                if isinstance(item, Exception):
                    yield {"error": str(item), "text": ""}
                    return
                self._tokens += 1
                yield {"token": item, "text": stream.push(item) if stream is not None else ""}
            yield {"done": True, "text": stream.finish() if stream is not None else ""}
        finally:
            gone.set()

    def _prompt(self, body: Mapping[str, Any]) -> list[int]:
        prompt = body.get("prompt")
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise _Refused(400, "There is no tokenizer.json beside the model: send token ids.")
            return list(self._tokenizer.encode(prompt).ids)
        if isinstance(prompt, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in prompt):
            return prompt
        raise _Refused(400, '"prompt" must be a text or a list of token ids.')

    def _options(self, body: Mapping[str, Any]) -> dict[str, Any]:
        options: dict[str, Any] = {"max_new_tokens": 64}
        for name, kinds in _SAMPLING.items():
            if (value := body.get(name)) is None:
                continue
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise _Refused(400, f'"{name}" cannot be {value!r}.')
            options[name] = value
        if options["max_new_tokens"] > self._limits.max_new_tokens:
            raise _Refused(400, f'"max_new_tokens" may be {self._limits.max_new_tokens} at most.')
        return options


async def _lines(first: dict[str, Any], rest: AsyncGenerator[dict[str, Any]]) -> AsyncIterator[str]:
    """A JSON object a line; whoever stops reading stops ``rest``."""
    try:
        yield json.dumps(first) + "\n"
        async for item in rest:
            yield json.dumps(item) + "\n"
    finally:
        await rest.aclose()
