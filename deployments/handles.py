"""The ports over Ray: actor and deployment handles on one side, `serve.ports` on the other.

Ray's errors become ours here and nowhere else. `str(error)` of a Ray task error is a traceback;
what the far side raised is its `cause`.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    RequestCancelledError,
)
from ray.serve.handle import DeploymentHandle

from deployments.actors import NAMESPACE, STORE, UPSERTER, living, name_of
from serve.config import Settings
from serve.errors import (
    DeadlineExceeded,
    IndexUnavailable,
    Internal,
    ModelUnavailable,
    Overloaded,
    ServiceError,
    StoreUnavailable,
)
from serve.ports import Collections, Documents, Embedder, Fence, Keys, Upserter
from serve.records import (
    Collection,
    CollectionSpec,
    DocumentVersion,
    DocumentWrite,
    EmbedCall,
    EmbedReply,
    Key,
    Outcome,
    Write,
)


T = TypeVar("T")

LOOK_AGAIN_S = 0.1
"""Between two look-ups of an actor that is restarting."""


def caused(error: RayTaskError) -> ServiceError:
    """What the far side raised; anything but our own errors is a fault of ours."""
    cause = error.cause
    if isinstance(cause, ServiceError):
        return cause
    return Internal(f"{type(cause).__name__} in a worker.")


class Named:
    """Calls to a named actor: looked up again after it died, repeated until the time is up.

    Every call is idempotent (reads, or changes with an operation id), so a repeat is safe.
    """

    def __init__(self, role: str, settings: Settings, unavailable: type[ServiceError]) -> None:
        self._role = role
        self._name = name_of(role, settings)
        self._unavailable = unavailable
        self._actor: Any = None

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Call a method. Raises what it raises, or `unavailable` after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._insist(method, args)
        except TimeoutError:
            raise self._unavailable(f"The {self._role} is away.", retry_after_s=2) from None

    async def _insist(self, method: str, args: Sequence[Any]) -> Any:
        while True:
            try:
                actor = self._actor or await asyncio.to_thread(self._find)
                self._actor = actor
                return await getattr(actor, method).remote(*args)
            except RayTaskError as error:
                raise caused(error) from None
            except (ActorDiedError, ActorUnavailableError, ValueError):
                self._actor = None
                await asyncio.sleep(LOOK_AGAIN_S)

    def _find(self) -> Any:
        """Our own deployment's actor, else its successor's. Raises ValueError when none lives."""
        names = living(self._role)
        if not names:
            raise ValueError(self._role)
        return ray.get_actor(self._name if self._name in names else names[-1], NAMESPACE)


class StorePort(Keys, Collections, Documents, Fence):
    """The Store's ports over its actor. Each call also raises StoreUnavailable."""

    def __init__(self, settings: Settings) -> None:
        self._named = Named(STORE, settings, StoreUnavailable)
        self._timeout_s = settings.actors.call_timeout_s

    async def _call(self, method: str, *args: Any) -> Any:
        return await self._named.call("call", method, *args, timeout_s=self._timeout_s)

    async def ready(self, timeout_s: float) -> bool:
        """Whether it answers."""
        return cast("bool", await self._named.call("ready", timeout_s=timeout_s))

    async def find_key(self, key_id: str) -> Key | None:
        """See Keys."""
        return cast("Key | None", await self._call("find_key", key_id))

    async def create_key(self, op: str, key: Key) -> None:
        """See Keys."""
        await self._call("create_key", op, key)

    async def list_keys(self) -> Sequence[Key]:
        """See Keys."""
        return cast("Sequence[Key]", await self._call("list_keys"))

    async def create_collection(self, op: str, collection: Collection) -> Collection:
        """See Collections."""
        return cast("Collection", await self._call("create_collection", op, collection))

    async def find_collection(self, tenant: str, name: str) -> Collection | None:
        """See Collections."""
        return cast("Collection | None", await self._call("find_collection", tenant, name))

    async def list_collections(self, tenant: str) -> Sequence[Collection]:
        """See Collections."""
        return cast("Sequence[Collection]", await self._call("list_collections", tenant))

    async def delete_collection(self, op: str, tenant: str, name: str) -> Collection | None:
        """See Collections."""
        return cast("Collection | None", await self._call("delete_collection", op, tenant, name))

    async def purge_collection(self, uuid: str) -> None:
        """See Collections."""
        await self._call("purge_collection", uuid)

    async def deleted_collections(self) -> Sequence[Collection]:
        """See Collections."""
        return cast("Sequence[Collection]", await self._call("deleted_collections"))

    async def begin_documents(
        self, op: str, collection: str, writes: Sequence[DocumentWrite]
    ) -> Sequence[DocumentVersion]:
        """See Documents."""
        versions = await self._call("begin_documents", op, collection, writes)
        return cast("Sequence[DocumentVersion]", versions)

    async def settle_documents(
        self, collection: str, versions: Sequence[tuple[str, int, int]]
    ) -> None:
        """See Documents."""
        await self._call("settle_documents", collection, versions)

    async def delete_documents(
        self, op: str, collection: str, documents: Sequence[str]
    ) -> Sequence[DocumentVersion]:
        """See Documents."""
        versions = await self._call("delete_documents", op, collection, documents)
        return cast("Sequence[DocumentVersion]", versions)

    async def take_epoch(self, name: str, deploy_seq: int) -> int:
        """See Fence."""
        return cast("int", await self._call("take_epoch", name, deploy_seq))

    async def superseded(
        self, name: str, epoch: int, ns: str, versions: Mapping[str, int]
    ) -> frozenset[str]:
        """See Fence."""
        return cast("frozenset[str]", await self._call("superseded", name, epoch, ns, versions))


class UpserterPort(Upserter):
    """The single writer over its actor. Each call also raises IndexUnavailable."""

    def __init__(self, settings: Settings) -> None:
        self._named = Named(UPSERTER, settings, IndexUnavailable)
        self._timeout_s = settings.actors.call_timeout_s

    async def ready(self, timeout_s: float) -> bool:
        """Whether it takes offers."""
        return cast("bool", await self._named.call("ready", timeout_s=timeout_s))

    async def offer(self, ns: str, writes: Sequence[Write], deadline_s: float) -> Sequence[Outcome]:
        """See Upserter. A repeat after a kill overwrites itself: record ids are deterministic."""
        timeout_s = deadline_s + self._timeout_s
        outcomes = await self._named.call("offer", ns, writes, deadline_s, timeout_s=timeout_s)
        return cast("Sequence[Outcome]", outcomes)

    async def ensure(self, spec: CollectionSpec) -> None:
        """See Upserter. Waits for a restart: 20 s more than a short call."""
        await self._named.call("ensure", spec, timeout_s=self._timeout_s + 20)

    async def drop(self, ns: str) -> None:
        """See Upserter. Waits for a restart: 20 s more than a short call."""
        await self._named.call("drop", ns, timeout_s=self._timeout_s + 20)


class EmbedderPort(Embedder):
    """One pool's embedder deployment. A call whose replica dies is repeated once."""

    def __init__(self, handle: DeploymentHandle[Any], *, tokens_per_s_min: float) -> None:
        self._handle = handle
        self._tokens_per_s_min = tokens_per_s_min

    async def embed(self, call: EmbedCall) -> EmbedReply:
        """See Embedder. Bounded by the call's deadline and its work at the slowest pace."""
        expires = time.monotonic() + call.deadline_s + sum(call.tokens) / self._tokens_per_s_min
        for last in (False, True):
            try:
                async with asyncio.timeout(expires - time.monotonic()):
                    return cast("EmbedReply", await self._once(call))
            except TimeoutError:
                message = "The model did not answer before the deadline."
                raise DeadlineExceeded(message, retry_after_s=2) from None
            except RayActorError:
                if last:
                    break
        raise ModelUnavailable("The model's replica died twice.", retry_after_s=5)

    async def _once(self, call: EmbedCall) -> Any:
        response = self._handle.embed.remote(call)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()  # type: ignore[no-untyped-call]  # the caller left: the replica drops what still waits
            raise
        except RayTaskError as error:
            raise caused(error) from None
        except BackPressureError:
            raise Overloaded("The embedder takes no more calls.", retry_after_s=1) from None
        except (DeploymentUnavailableError, ReplicaUnavailableError):
            raise ModelUnavailable("The model is not deployed.", retry_after_s=5) from None
        except RequestCancelledError:
            raise ModelUnavailable("The call was cancelled.", retry_after_s=1) from None

    async def ready(self) -> bool:
        """See Embedder."""
        try:
            return cast("bool", await self._handle.ready.remote())
        except (RayError, RequestCancelledError, DeploymentUnavailableError):
            return False
