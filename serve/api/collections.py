"""`/v1/collections`: make, list, show, measure, remove."""

from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import Field

from serve.api.service import Asked
from serve.api.shapes import (
    CollectionDeleted,
    CollectionList,
    CollectionShown,
)
from serve.api.vector_shapes import CollectionStats
from serve.api.wire import Body, Id, documented, read, reply
from serve.content.vectors import FLOAT_BYTES
from serve.records import Collection


router = APIRouter()


class CollectionBody(Body):
    """A new collection."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    model: Id | None = None


@router.post(
    "/v1/collections",
    status_code=201,
    openapi_extra=documented(CollectionBody),
    responses={201: {"model": CollectionShown}},
)
async def create_collection(ask: Asked) -> Response:
    """Make a collection; it keeps one model revision for life."""
    body = await read(ask.request, CollectionBody)
    made = await ask.service.collections.create(ask.who, body.name, body.model)
    return reply(shown(made), 201, {"location": f"/v1/collections/{made.name}"})


@router.get("/v1/collections", responses={200: {"model": CollectionList}})
async def list_collections(ask: Asked) -> Response:
    """The caller's collections, by name."""
    mine = await ask.service.collections.list(ask.who)
    return reply({"object": "list", "data": [shown(collection) for collection in mine]})


@router.get("/v1/collections/{name}", responses={200: {"model": CollectionShown}})
async def one_collection(name: str, ask: Asked) -> Response:
    """One collection, with the number of records in it."""
    collection = await ask.service.collections.show(ask.who, name)
    records = await ask.service.search.count(collection)
    return reply({**shown(collection), "records": records})


@router.get("/v1/collections/{name}/stats", responses={200: {"model": CollectionStats}})
async def collection_stats(name: str, ask: Asked) -> Response:
    """What a collection holds, and whether it can still be written to and searched by text."""
    collection = await ask.service.collections.show(ask.who, name)
    records = await ask.service.search.count(collection)
    stats = {
        "object": "collection.stats",
        "name": collection.name,
        "model": collection.model,
        "revision": collection.revision,
        "served_revision": ask.service.collections.served_revision(collection),
        "dimensions": collection.dimensions,
        "records": records,
        "vector_bytes": records * collection.dimensions * FLOAT_BYTES,
    }
    return reply(stats)


@router.delete("/v1/collections/{name}", responses={200: {"model": CollectionDeleted}})
async def delete_collection(name: str, ask: Asked) -> Response:
    """Remove a collection with everything in it."""
    gone = await ask.service.collections.delete(ask.who, name)
    return reply({"object": "collection", "name": gone.name, "deleted": True})


def shown(collection: Collection) -> dict[str, Any]:
    """A collection on the wire."""
    return {
        "object": "collection",
        "id": collection.uuid,
        "name": collection.name,
        "model": collection.model,
        "revision": collection.revision,
        "dimensions": collection.dimensions,
        "created": int(collection.created_at),
    }
