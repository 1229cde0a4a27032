"""Every seam with two real implementations. Flows are written against these; adapters implement
them; `deployments/handles.py` implements those that stand behind a Ray handle or actor.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from serve.capabilities import Capabilities
from serve.freshness import Lag
from serve.grants import Draw, Grant, Return
from serve.pressure import Pressure, Sender
from serve.records import (
    AuditEntry,
    Collection,
    CollectionSpec,
    EmbedCall,
    EmbedReply,
    Filter,
    Hit,
    Input,
    InputKind,
    Key,
    Outcome,
    QueueReport,
    Record,
    Tenant,
    Tombstone,
    UsageRow,
    Vector,
    Write,
)
from serve.scaling import Decision


class Engine(Protocol):
    """Runs one model. Never called from the event loop, and from as many threads at once as its pool
    has slots: one unless all its models run as graphs.
    """

    accepts: frozenset[InputKind]
    dimensions: int
    row_tokens: int
    """How long rows get that short inputs share; 0: each is padded to the longest of its batch."""

    def forward(self, batch: Sequence[Input]) -> Vector:
        """Embed a batch: float32, shape (len(batch), dimensions), rows of unit length.

        An engine of one dimension scores pairs instead: each row is a score from 0 to 1.

        Raises whatever the runtime raises; the batcher splits and retries.
        """
        ...

    def close(self) -> None:
        """Free memory; the engine is not used afterwards."""
        ...


class Embedder(Protocol):
    """Turns inputs into vectors, fairly between tenants."""

    async def embed(self, call: EmbedCall) -> EmbedReply:
        """Embed one call.

        Raises QuotaExceeded (the tenant's own queue cap), Overloaded, DeadlineExceeded,
        ModelUnavailable, NotFound (model). A single bad input is a row of `failures`.
        """
        ...

    async def ready(self) -> bool:
        """True when a forward pass of every pinned model has run, the batcher lives and a model works."""
        ...


@dataclass(frozen=True, slots=True)
class Landed:
    """What a bulk write did: `rejected` pairs record ids with reasons; the rest landed.

    `token` is the backend's freshness token, where it has one: a decimal number, the higher the later
    the write among those of the namespace.
    """

    rejected: tuple[tuple[str, str], ...] = ()
    token: str | None = None


@dataclass(frozen=True, slots=True)
class IndexStats:
    """Size of one namespace."""

    records: int


class VectorIndex(Protocol):
    """The data path of an index. A namespace is a collection's uuid (32 hex).

    Errors are those of `serve.index.errors`; the buffer decides on them.
    """

    caps: Capabilities

    async def upsert(self, ns: str, records: Sequence[Record]) -> Landed:
        """Insert or replace by id; a record never replaces one of a higher generation."""
        ...

    async def delete(self, ns: str, tombstones: Sequence[Tombstone]) -> Landed:
        """Remove by id what has at most the tombstone's generation; absent ids are no error."""
        ...

    async def query(
        self, ns: str, vector: Vector, top_k: int, where: Filter | None = None
    ) -> Sequence[Hit]:
        """The `top_k` nearest by cosine that satisfy `where`, best first; ties by id."""
        ...

    async def fetch(self, ns: str, ids: Sequence[str]) -> Sequence[Record]:
        """The records that exist among `ids`, in no order."""
        ...

    def scan(self, ns: str, where: Filter | None = None) -> AsyncIterator[Sequence[Record]]:
        """All records that satisfy `where`, in parts of bounded size and in no order.

        What is written or removed meanwhile may or may not be seen; the rest is seen exactly once.
        """
        ...

    async def reached(self, ns: str, token: str, /) -> bool | None:
        """Whether searches see the write that returned this token; None: the backend did not say."""
        ...


class TextIndex(Protocol):
    """The words of an index, where `caps.full_text` says that it has them."""

    async def match(
        self, ns: str, text: str, top_k: int, where: Filter | None = None, /
    ) -> Sequence[Hit]:
        """The `top_k` whose text holds a word of `text` and that satisfy `where`, by BM25; ties by id.

        `text` is nothing but words (`serve.index.full_text`); without any, no hits. Raises BadInput
        (mode) without full text, IndexUnavailable.
        """
        ...


class IndexAdmin(Protocol):
    """The other callers' side of the same object."""

    async def open(self) -> None:
        """Import and connect now instead of on first use. Raises IndexUnavailable, ImportError."""
        ...

    async def ensure(self, spec: CollectionSpec) -> None:
        """Make the namespace; a no-op when it exists."""
        ...

    async def drop(self, ns: str) -> None:
        """Remove the namespace; a no-op when it does not exist."""
        ...

    async def stats(self, ns: str) -> IndexStats:
        """Count what is there."""
        ...

    async def maintain(self) -> None:
        """Compaction and cleanup; called from the writer's tick only."""
        ...

    async def aclose(self) -> None:
        """Release files and connections."""
        ...


class Index(VectorIndex, TextIndex, IndexAdmin, Protocol):
    """All sides, as an adapter implements them."""


class Upserter(Protocol):
    """The single writer of the index."""

    async def offer(
        self, sender: Sender, ns: str, writes: Sequence[Write], deadline_s: float
    ) -> Sequence[Outcome]:
        """Land writes in bulk; one outcome per write, in order. A namespace has one tenant.

        Raises Overloaded (a bound is reached; nothing was taken), IndexUnavailable.
        """
        ...

    async def pressure(self) -> Pressure:
        """Whether to bring more, to be asked before work is done on what shall land.

        Raises IndexUnavailable when there is no writer to ask.
        """
        ...

    async def ensure(self, spec: CollectionSpec) -> None:
        """Make a namespace."""
        ...

    async def drop(self, ns: str) -> None:
        """Forget a namespace: its waiting writes are released, its records removed."""
        ...

    async def lag(self, namespaces: Sequence[str]) -> Lag:
        """How long the last landings in these namespaces took, all together."""
        ...


class Keys(Protocol):
    """Keys in the Store. `by` is who changes something, for the audit log."""

    async def find_key(self, key_id: str) -> Key | None:
        """The live key of that id (neither revoked nor expired), with its tenant's tier."""
        ...

    async def create_key(self, op: str, key: Key, by: str = "") -> None:
        """Keep a key; makes the tenant when it is new, else sets its tier.

        An empty tier leaves the tenant's as it is. Raises Conflict (id taken), NotFound (an empty
        tier and no such tenant).
        """
        ...

    async def list_keys(
        self, tenant: str | None = None, after: str = "", limit: int = 100
    ) -> Sequence[Key]:
        """Up to `limit` live keys, of one tenant or of all, by id: those after `after`."""
        ...

    async def rotate_key(
        self, op: str, key_id: str, successor: Key, overlap_s: float, by: str
    ) -> Key:
        """Keep `successor` (id, secret, creation; the rest is the old key's) and let the old one
        expire after `overlap_s`; returns the successor as kept.

        Raises NotFound, Conflict when another key of its family is live: two at most.
        """
        ...

    async def change_key(
        self, op: str, key_id: str, name: str | None, limits: Mapping[str, Any] | None, by: str
    ) -> Key:
        """Set a key's name and limits, where not None; of its whole family. Raises NotFound."""
        ...

    async def revoke_key(self, op: str, key_id: str, by: str) -> None:
        """End a key at once.

        Raises NotFound when there is no live key of that id, Conflict for the last live admin key
        unless `by` is the command line (`cli:...`).
        """
        ...


class Tenants(Protocol):
    """Tenants, their audit log and their usage in the Store."""

    async def find_tenant(self, tenant: str) -> Tenant | None:
        """One tenant."""
        ...

    async def list_tenants(self, after: str, limit: int) -> Sequence[Tenant]:
        """Tenants by name, those after `after`."""
        ...

    async def set_tenant(
        self, op: str, tenant: str, tier: str | None, limits: Mapping[str, Any] | None, by: str
    ) -> Tenant:
        """Make a tenant, or set its tier and limits where not None.

        Raises NotFound when it is new and has no tier.
        """
        ...

    async def list_audit(
        self, tenant: str | None, before: int | None, limit: int
    ) -> Sequence[AuditEntry]:
        """Entries, newest first; those with a number below `before`."""
        ...


class Usage(Protocol):
    """What was used, in the Store."""

    async def report_usage(self, session: str, rows: Sequence[UsageRow]) -> None:
        """Keep what one replica counted since its session began: cumulative, so a repeat is safe."""
        ...

    async def month_usage(self, tenant: str, month: str) -> Sequence[UsageRow]:
        """A tenant's usage of a month over all replicas, one row per key family and class."""
        ...


class Ledger(Protocol):
    """Shares every limit out to the ingress replicas."""

    async def exchange(
        self, op: str, replica: str, returns: Sequence[Return], draws: Sequence[Draw]
    ) -> Sequence[Grant]:
        """Take returns, then answer the draws, in order. A repeat of `op` acts once.

        Raises LedgerUnavailable.
        """
        ...


class Queues(Protocol):
    """What waits in the embedders, as they last reported."""

    async def queue_reports(self, tenant: str) -> Sequence[QueueReport]:
        """Every replica's report of the last seconds, with the places of this tenant only.

        Raises LedgerUnavailable.
        """
        ...


class Decisions(Protocol):
    """What was decided last for each deployment that is scaled."""

    async def decisions(self) -> Sequence[Decision]:
        """Those since the Ledger started. Raises LedgerUnavailable."""
        ...


class Collections(Protocol):
    """Collections in the Store; every call is scoped to one tenant."""

    async def create_collection(self, op: str, collection: Collection) -> Collection:
        """Keep a collection. Raises Conflict when the name is taken."""
        ...

    async def find_collection(self, tenant: str, name: str) -> Collection | None:
        """The live collection of that name."""
        ...

    async def list_collections(self, tenant: str) -> Sequence[Collection]:
        """All live collections of a tenant, by name."""
        ...

    async def delete_collection(self, op: str, tenant: str, name: str) -> Collection | None:
        """Mark it deleted: from now on it is found by nobody; returns what it was."""
        ...

    async def purge_collection(self, uuid: str) -> int:
        """Forget a deleted collection and its documents, after the index dropped it.

        Returns how many documents there were.
        """
        ...

    async def deleted_collections(self) -> Sequence[Collection]:
        """Deleted but not yet purged: what a restarted writer must still drop."""
        ...


class Vectors(Protocol):
    """Raw vectors in the Store: their generations only."""

    async def grant_vectors(
        self, collection: str, names: Sequence[str], sent: Sequence[float | None]
    ) -> Sequence[int | None]:
        """A generation for a write of each raw vector, in order; 0 where the name is a document's, None
        where a write that was sent later has been accepted.

        `sent` has for each name when it was sent, in epoch seconds; None: now. A repeat grants higher
        ones, which does no harm: it has no operation id. Raises NotFound (the collection is gone),
        BadInput (a name that is there twice).
        """
        ...


class Fence(Protocol):
    """What a writer asks the Store."""

    async def take_epoch(self, name: str, deploy_seq: int) -> int:
        """Become the writer `name`. Raises Fenced when a later deployment already took it."""
        ...

    async def superseded(
        self, name: str, epoch: int, ns: str, versions: Mapping[str, int]
    ) -> frozenset[str]:
        """Documents whose generation in the Store is above the one given.

        Also those of a collection that is gone. Raises Fenced when `epoch` is not the latest.
        """
        ...
