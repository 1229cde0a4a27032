"""Batches of a few lines by OpenAI's client, and what comes of them."""

import json


ENDS = {"failed", "completed", "expired", "cancelled"}


def line(name, text="", **changes):
    body = {"model": "plain", "input": text or f"text {name}", **changes.pop("body", {})}
    whole = {"custom_id": name, "method": "POST", "url": "/v1/embeddings", "body": body}
    return json.dumps(whole | changes)


async def upload(ai, *lines, **options):
    data = "\n".join(lines).encode()
    return await ai.files.create(file=("my lines.jsonl", data), purpose="batch", **options)


async def submit(ai, *lines, **options):
    file = await upload(ai, *lines)
    return await ai.batches.create(
        input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h", **options
    )


async def ended(whole, ai, batch):
    with whole.service.feed.watch(batch.id.replace("batch_", "job_")) as watch:
        seen = await ai.batches.retrieve(batch.id)
        if seen.status in ENDS:
            return seen
        assert await watch.ended(20)
    return await ai.batches.retrieve(batch.id)


async def lines_of(ai, file_id):
    content = await ai.files.content(file_id)
    return {one["custom_id"]: one for one in map(json.loads, content.text.splitlines())}


def counts(batch):
    return (
        batch.request_counts.total,
        batch.request_counts.completed,
        batch.request_counts.failed,
    )
