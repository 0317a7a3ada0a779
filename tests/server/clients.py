"""What the tests of the server's life use to talk to it: many streams at once over plain HTTP."""

import asyncio
import json
from typing import Any

import httpx


def make_client(url: str) -> httpx.AsyncClient:
    # A pool of idle connections is searched at each request, which takes long with hundreds of them.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=url, timeout=120, limits=limits)


async def stream_completion(
    client: httpx.AsyncClient, prompt: list[int], max_tokens: int, begun: asyncio.Event | None = None, **fields: Any
) -> list[Any]:
    """The events of a greedy completion that ignores end tokens; the last is "[DONE]" or an error.

    begun: set with the first.
    """
    body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0, "stream": True} | fields
    events = []
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                data = line.removeprefix("data: ")
                events.append(data if data == "[DONE]" else json.loads(data))
                if begun is not None:
                    begun.set()
    return events


def token_ids(events: list[Any]) -> list[int]:
    """Of a stream that asked for return_token_ids."""
    return [token for event in events[:-1] for token in event["choices"][0]["token_ids"]]


async def gauge(client: httpx.AsyncClient, name: str) -> float:
    """A value of /metrics."""
    text = (await client.get("/metrics")).text
    return next(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"atom:{name}{{"))


async def eventually(condition: Any, seconds: float = 20) -> None:
    """Waits until the coroutine function gives something true."""
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.05)
