"""Sends a workload at its arrival times, within a concurrency, and collects the records."""

import asyncio
from collections.abc import Sequence
from typing import Any

from atom.entrypoints.bench_serve.client import Client
from atom.entrypoints.bench_serve.records import Prompt, Record


def request_body(
    prompt: Prompt, *, chat: bool, model: str, ignore_eos: bool, options: dict[str, Any]
) -> dict[str, Any]:
    """The JSON of a streamed completion or chat. options: more of its fields, such as temperature."""
    body: dict[str, Any] = {"model": model, "max_tokens": prompt.output_len, "stream": True}
    body["stream_options"] = {"include_usage": True}
    if chat:
        body["messages"] = [{"role": "user", "content": prompt.prompt}]
    else:
        body["prompt"] = prompt.prompt
    if ignore_eos:  # OpenAI's own servers refuse it, so it is sent only when asked for
        body["ignore_eos"] = True
    return body | options


async def run_load(
    client: Client,
    requests: Sequence[bytes],
    records: Sequence[Record],
    arrivals: Sequence[float],
    max_concurrency: int | None,
) -> None:
    """One record is written for each request. Cancelled, it leaves `ended` of the unfinished ones at 0."""
    loop = asyncio.get_running_loop()
    places = asyncio.Semaphore(max_concurrency or len(requests))
    open_requests: set[asyncio.Task[None]] = set()

    def finished(task: asyncio.Task[None]) -> None:
        open_requests.discard(task)
        places.release()

    begin = loop.time()
    try:
        for request, record, arrival in zip(requests, records, arrivals, strict=True):
            delay = begin + arrival - loop.time()
            if delay > 0:
                await asyncio.sleep(delay)
            await places.acquire()
            task = loop.create_task(client.stream(request, record))
            open_requests.add(task)
            task.add_done_callback(finished)
        await asyncio.gather(*open_requests)
    finally:
        for task in open_requests:
            task.cancel()
        await asyncio.gather(*open_requests, return_exceptions=True)
