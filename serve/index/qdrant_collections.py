"""Collections of Qdrant as ours are made: their vectors, copies, graph and payload indexes."""

import re
from typing import TYPE_CHECKING

from serve.config.index import Qdrant
from serve.index.errors import IndexOffline, IndexRetryable
from serve.index.qdrant_faults import RETRY_AFTER_S, is_missing, is_taken, vendor_errors
from serve.index.qdrant_points import GENERATION
from serve.index.qdrant_terms import PLACES, TERMS, WORDS


if TYPE_CHECKING:
    from qdrant_client import AsyncQdrantClient, models

SERVER_MIN = (1, 16)


async def check_version(client: "AsyncQdrantClient") -> None:
    """Raises IndexOffline unless the server knows `update_filter`."""
    said = (await client.info()).version
    found = re.match(r"(\d+)\.(\d+)", said)
    if found is None or (int(found[1]), int(found[2])) < SERVER_MIN:
        raise IndexOffline(f"Qdrant {said[:32]} cannot guard generations: 1.16 or newer can")


async def create(client: "AsyncQdrantClient", name: str, dimensions: int, own: Qdrant) -> None:
    """Make the collection; another process may have made it meanwhile."""
    from qdrant_client import models  # noqa: PLC0415

    try:
        await client.create_collection(
            name,
            vectors_config=models.VectorParams(
                size=dimensions, distance=models.Distance.DOT, on_disk=own.on_disk
            ),
            hnsw_config=models.HnswConfigDiff(m=own.hnsw_m, ef_construct=own.hnsw_ef_construct),
            shard_number=own.shards,
            replication_factor=own.replicas,
            # A write is sent to all copies in use and waits for all; those that fail are taken out
            # of use, if this many succeed. All of them would let the loss of one stop all writing.
            write_consistency_factor=own.replicas // 2 + 1,
        )
    except vendor_errors() as error:
        if not is_taken(error):  # by another process, meanwhile
            raise


async def create_indexes(client: "AsyncQdrantClient", name: str) -> None:
    """Without them strict mode refuses a filter; making one again changes nothing."""
    from qdrant_client import models  # noqa: PLC0415

    keyword, integer = models.KeywordIndexType.KEYWORD, models.IntegerIndexType.INTEGER
    # Edges of the graph for each value are worth their time for what is asked by equality only.
    plain = models.KeywordIndexParams(type=keyword, enable_hnsw=False)
    ranges = models.IntegerIndexParams(type=integer, lookup=False, range=True, enable_hnsw=False)
    indexes: dict[str, models.KeywordIndexParams | models.IntegerIndexParams] = {
        TERMS: models.KeywordIndexParams(type=keyword),
        PLACES: plain,
        WORDS: ranges,
        GENERATION: ranges,
    }
    for field, schema in indexes.items():
        check_applied(await client.create_payload_index(name, field, schema, wait=True))


async def dimensions_of(client: "AsyncQdrantClient", name: str) -> int | None:
    """Those of a collection; None when it is missing. Raises IndexOffline when it is not ours."""
    try:
        info = await client.get_collection(name)
    except vendor_errors() as error:
        if is_missing(error):
            return None
        raise
    size = getattr(info.config.params.vectors, "size", None)
    if size is None:
        raise IndexOffline(f"collection {name} is not one of ours")
    return int(size)


def check_applied(result: "models.UpdateResult") -> None:
    """Raises IndexRetryable when a write was taken but not applied."""
    from qdrant_client import models  # noqa: PLC0415

    if result.status != models.UpdateStatus.COMPLETED:
        raise IndexRetryable(f"taken, not applied: {result.status}", retry_after_s=RETRY_AFTER_S)
