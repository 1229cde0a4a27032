"""Collections: a tenant's named sets of vectors, each of one model revision."""

import logging
import uuid
from collections.abc import Sequence

from serve.errors import BadInput, NotFound, QuotaExceeded
from serve.flows.context import Context, new_op
from serve.ports import Collections, Upserter
from serve.records import Caller, Collection, CollectionSpec


log = logging.getLogger("headrace.collections")


class CollectionFlow:
    """Makes, finds and removes collections; every act is scoped to the caller's tenant."""

    def __init__(self, context: Context, store: Collections, upserter: Upserter) -> None:
        self._settings = context.settings
        self._models = context.models
        self._wall = context.wall
        self._store = store
        self._upserter = upserter

    async def create(self, caller: Caller, name: str, model: str | None) -> Collection:
        """Make a collection for a model (the first served one unless named).

        Raises Conflict when the name is taken, NotFound for the model, QuotaExceeded past
        `collections_max`.
        """
        served = self._models.find(model) if model is not None else self._models.first()
        mine = await self._store.list_collections(caller.tenant)
        if len(mine) >= self._settings.limits.collections_max:
            raise QuotaExceeded(f"You have {len(mine)} collections already.", code="collections")
        collection = await self._store.create_collection(
            new_op(),
            Collection(
                uuid.uuid4().hex,
                caller.tenant,
                name,
                served.model.id,
                served.revision,
                served.model.dimensions,
                self._wall(),
            ),
        )
        await self._upserter.ensure(CollectionSpec(collection.uuid, collection.dimensions))
        return collection

    async def find(self, caller: Caller, name: str) -> Collection:
        """The caller's collection. Raises NotFound, also for another tenant's."""
        collection = await self._store.find_collection(caller.tenant, name)
        if collection is None:
            raise NotFound(f"You have no collection {name[:128]!r}.", code="collection_not_found")
        return collection

    async def list(self, caller: Caller) -> Sequence[Collection]:
        """The caller's collections, by name."""
        return await self._store.list_collections(caller.tenant)

    async def delete(self, caller: Caller, name: str) -> Collection:
        """Remove a collection with everything in it.

        Found by nobody as soon as the Store has marked it; if we die before its records are
        gone, the writer drops them when it starts.
        """
        gone = await self._store.delete_collection(new_op(), caller.tenant, name)
        if gone is None:
            raise NotFound(f"You have no collection {name[:128]!r}.", code="collection_not_found")
        await self._upserter.drop(gone.uuid)
        await self._store.purge_collection(gone.uuid)
        return gone

    def servable(self, collection: Collection) -> None:
        """Refuse a collection whose model revision is not the one served now.

        Vectors of two revisions must never meet. Raises BadInput.
        """
        served = self._models.find(collection.model, param="collection")
        if served.revision != collection.revision:
            raise BadInput(
                f"Collection {collection.name!r} holds vectors of {collection.model} revision "
                f"{collection.revision}; this service runs {served.revision}.",
                param="collection",
                code="model_revision_changed",
            )
