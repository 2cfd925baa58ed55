"""A reward that a server gives: POST of the samples as JSON, the scores back.

    asked      {"samples": [{"sample_id", "prompt", "response", "ended", "columns"}, ...]}
    answered   {"scores": [number or null, ...]}, one for each sample, in order

Where a token is configured it goes as `Authorization: Bearer`, read from the environment, so that no file has it.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

import requests
import urllib3

from rlhf_cluster.scoring.samples import Answer, CallFailed, Sample

CONNECT_S = 5.0
LARGEST_ANSWER = 1 << 24  # bytes


class HttpCall:
    """One request for each call; connections are kept."""

    def __init__(self, url: str, token: str) -> None:
        self._url = url
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy, no .netrc: what is asked goes to the server that was named
        if token:
            self._session.headers["Authorization"] = f"Bearer {token}"

    def __call__(self, samples: Sequence[Sample], deadline_s: float) -> Sequence[Answer]:
        body = json.dumps({"samples": [dataclasses.asdict(sample) for sample in samples]}, default=str)
        try:
            answer = json.loads(self._post(body, deadline_s))
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise CallFailed(f"{self._url}: {type(error).__name__}") from error
        except (ValueError, RecursionError) as error:
            raise CallFailed(f"{self._url} answered what is not JSON") from error
        return _scores(answer, self._url)

    def _post(self, body: str, deadline_s: float) -> bytes:
        """The body of the answer. `requests` bounds each read; here the whole of them is."""
        end = time.monotonic() + deadline_s
        with self._session.post(
            self._url,
            data=body.encode(),
            headers={"Content-Type": "application/json"},
            timeout=(min(CONNECT_S, deadline_s), deadline_s),
            allow_redirects=False,
            stream=True,
        ) as response:
            if response.status_code != requests.codes.ok:
                raise CallFailed(f"{self._url} answered {response.status_code} {response.reason}")
            read = b""
            while chunk := response.raw.read1(1 << 16, decode_content=True):  # what is there, however little
                read += chunk
                if time.monotonic() > end:
                    raise CallFailed(f"{self._url} gave no whole answer within {deadline_s:g} s")
                if len(read) > LARGEST_ANSWER:
                    raise CallFailed(f"{self._url} answered more than {LARGEST_ANSWER} bytes")
            return read


def _scores(answer: Any, url: str) -> list[Answer]:
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list) or not all(s is None or isinstance(s, int | float) for s in scores):
        raise CallFailed(f'{url} answered without {{"scores": [numbers]}}')
    return scores
