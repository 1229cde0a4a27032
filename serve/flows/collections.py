"""Collections: a tenant's named sets of vectors, each of one model revision."""

import logging
import uuid
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager

from serve.admission.quotas import Permit
from serve.errors import BadInput, Conflict, NotFound, QuotaExceeded, ServiceError
from serve.flows.context import Context, new_op
from serve.flows.kept import Kept
from serve.freshness import Lag
from serve.ports import Collections, Upserter
from serve.records import Caller, Collection, CollectionSpec


log = logging.getLogger("headrace.collections")


class CollectionFlow:
    """Makes, finds and removes collections; every act is scoped to the caller's tenant.

    `create`, `list`, `show` and `delete` count as a request each; `find` is free, for the flows
    that charge on their own.
    """

    def __init__(self, context: Context, store: Collections, upserter: Upserter) -> None:
        self._settings = context.settings
        self._models = context.models
        self._quotas = context.quotas
        self._wall = context.wall
        self._store = store
        self._upserter = upserter
        self._lags = Kept[Lag](context.clock, context.settings.jobs.stats_s)

    async def create(self, caller: Caller, name: str, model: str | None) -> Collection:
        """Make a collection for a model (the first served one unless named).

        Its namespace comes first: one that nobody knows of is empty and harmless, a collection
        without one could not be written to. Raises Conflict when the name is taken, NotFound for
        the model, QuotaExceeded past `collections_max`, IndexUnavailable.
        """
        served = self._models.find(model) if model is not None else self._models.first()
        async with self._charged(caller):
            mine = await self._store.list_collections(caller.tenant)
            if any(one.name == name for one in mine):
                raise Conflict(f"You have a collection {name!r} already.", param="name")
            if len(mine) >= self._settings.limits.collections_max:
                raise QuotaExceeded(
                    f"You have {len(mine)} collections already.", code="collections"
                )
            collection = Collection(
                uuid.uuid4().hex,
                caller.tenant,
                name,
                served.model.id,
                served.revision,
                served.model.dimensions,
                self._wall(),
            )
            await self._upserter.ensure(CollectionSpec(collection.uuid, collection.dimensions))
            return await self._kept(collection)

    async def _kept(self, collection: Collection) -> Collection:
        try:
            return await self._store.create_collection(new_op(), collection)
        except (Conflict, QuotaExceeded):  # another request took the name, or the last place
            await self._upserter.drop(collection.uuid)
            raise

    async def show(self, caller: Caller, name: str) -> Collection:
        """The caller's collection. Raises NotFound, also for another tenant's."""
        async with self._charged(caller):
            return await self.find(caller, name)

    async def find(self, caller: Caller, name: str) -> Collection:
        """The caller's collection. Raises NotFound, also for another tenant's."""
        collection = await self._store.find_collection(caller.tenant, name)
        if collection is None:
            raise _unknown(name)
        return collection

    async def name_of(self, caller: Caller, uuid: str) -> str | None:
        """What the caller's collection with this uuid is called."""
        mine = await self._store.list_collections(caller.tenant)
        return next((one.name for one in mine if one.uuid == uuid), None)

    async def list(self, caller: Caller) -> Sequence[Collection]:
        """The caller's collections, by name."""
        async with self._charged(caller):
            return await self._store.list_collections(caller.tenant)

    async def delete(self, caller: Caller, name: str) -> Collection:
        """Remove a collection with everything in it.

        Found by nobody as soon as the Store has marked it: that is the deletion. When its records
        cannot be dropped now, the writer drops them when it starts.
        """
        async with self._charged(caller):
            gone = await self._store.delete_collection(new_op(), caller.tenant, name)
            if gone is None:
                raise _unknown(name)
        try:
            await self._upserter.drop(gone.uuid)
            await self._store.purge_collection(gone.uuid)
        except ServiceError as error:
            log.warning("collection %s is deleted but not yet dropped: %s", gone.uuid, error)
        return gone

    async def lag(self, caller: Caller) -> Lag | None:
        """Of the last landings in the caller's collections, up to `jobs.stats_s` old; free.

        None: the writer does not answer.
        """
        tenant = caller.tenant
        try:
            return await self._lags.get((tenant,), lambda: self._lag(tenant))
        except ServiceError as error:
            log.warning("the lag of landings is not known here: %s", error)
            return None

    async def _lag(self, tenant: str) -> Lag:
        mine = await self._store.list_collections(tenant)
        return await self._upserter.lag([one.uuid for one in mine])

    def _charged(self, caller: Caller) -> AbstractAsyncContextManager[Permit]:
        return self._quotas.admitted(caller, "interactive", tokens=0)

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

    def served_revision(self, collection: Collection) -> str | None:
        """The revision of its model that runs now; None where the model is not served."""
        try:
            return self._models.find(collection.model).revision
        except NotFound:
            return None


def _unknown(name: str) -> NotFound:
    return NotFound(f"You have no collection {name[:128]!r}.", code="collection_not_found")
