"""A reward that a server gives: POST of the samples as JSON, the scores back.

    asked      {"samples": [{"sample_id", "prompt", "response", "ended", "columns"}, ...]}
    answered   {"scores": [number or null, ...]}, one for each sample, in order

Where a token is configured it goes as `Authorization: Bearer`, read from the environment, so that no file has it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import aiohttp

from rlhf_cluster.scoring.samples import Answer, CallFailed, Sample

CONNECT_S = 5.0
LARGEST_ANSWER = 1 << 24  # bytes
TOLD = ("sample_id", "prompt", "response", "ended", "columns")  # of each sample


class HttpCall:
    """One request for each call. No proxy, no .netrc, no redirect: what is asked goes to the server that was named."""

    def __init__(self, url: str, token: str) -> None:
        self._url = url
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def __call__(self, samples: Sequence[Sample], deadline_s: float) -> Sequence[Answer]:
        asked = {"samples": [{name: getattr(sample, name) for name in TOLD} for sample in samples]}
        try:
            body = asyncio.run(self._post(json.dumps(asked, default=str), deadline_s))
        except aiohttp.ConnectionTimeoutError as error:
            raise CallFailed(f"{self._url}: no connection within {min(CONNECT_S, deadline_s):g} s") from error
        except TimeoutError as error:
            raise CallFailed(f"{self._url} gave no whole answer within {deadline_s:g} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise CallFailed(f"{self._url}: {type(error).__name__}") from error
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise CallFailed(f"{self._url} answered what is not JSON") from error
        return _scores(answer, self._url)

    async def _post(self, body: str, deadline_s: float) -> bytes:
        """The body of the answer. The deadline is of connection, header and body, however slow each; the
        system looks the server's name up in its own time."""
        timeout = aiohttp.ClientTimeout(total=deadline_s, sock_connect=CONNECT_S)
        headers = self._headers | {"Content-Type": "application/json"}
        async with (
            aiohttp.ClientSession(timeout=timeout, trust_env=False) as session,
            session.post(self._url, data=body.encode(), headers=headers, allow_redirects=False) as response,
        ):
            if response.status != 200:
                raise CallFailed(f"{self._url} answered {response.status} {response.reason}")
            read = bytearray()
            async for chunk in response.content.iter_any():
                read += chunk
                if len(read) > LARGEST_ANSWER:
                    raise CallFailed(f"{self._url} answered more than {LARGEST_ANSWER} bytes")
            return bytes(read)


def _scores(answer: Any, url: str) -> list[Answer]:
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list) or not all(s is None or isinstance(s, int | float) for s in scores):
        raise CallFailed(f'{url} answered without {{"scores": [numbers]}}')
    return scores
