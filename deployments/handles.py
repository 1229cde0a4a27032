"""The ports over Ray: actor and deployment handles on one side, `serve.ports` on the other.

The Store's, which are many, stand in `deployments.store_port`. Ray's errors become ours here, in
`deployments.named`, and nowhere else.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    RequestCancelledError,
)
from ray.serve.handle import DeploymentHandle

from deployments.actors import LEDGER, UPSERTER
from deployments.conduit import ConduitLost, Conduits, ReplicaLeaves
from deployments.frames import carries
from deployments.named import Named, caused
from deployments.outlet import Address
from serve.canary import CanaryReport, CanaryReports, Trials
from serve.config import Settings
from serve.errors import (
    DeadlineExceeded,
    IndexUnavailable,
    LedgerUnavailable,
    ModelUnavailable,
    Overloaded,
    ServiceError,
)
from serve.freshness import Lag
from serve.grants import Draw, Grant, Return
from serve.ports import Decisions, Embedder, Ledger, Queues, Upserter
from serve.pressure import Pressure, Sender
from serve.records import CollectionSpec, EmbedCall, EmbedReply, Outcome, QueueReport, Write
from serve.scaling import Decision


ADDRESSES_S_MAX = 5.0
PRESSURE_S_MAX = 2.0
PRESSURE_KEPT_S = 0.25
"""Each item of a claim asks: so long an answer counts for all of them."""

LAG_S_MAX = 2.0
"""Who asks for figures can do without this one."""


class UpserterPort(Upserter):
    """The single writer over its actor. Each call also raises IndexUnavailable."""

    def __init__(self, settings: Settings) -> None:
        self._named = Named(UPSERTER, settings, IndexUnavailable)
        self._timeout_s = settings.actors.call_timeout_s
        self._asking = asyncio.Lock()
        self._asked_until = 0.0
        self._pressure: Pressure | None = None

    async def ready(self, timeout_s: float) -> bool:
        """Whether it takes offers."""
        return cast("bool", await self._named.call("ready", timeout_s=timeout_s))

    async def offer(
        self, sender: Sender, ns: str, writes: Sequence[Write], deadline_s: float
    ) -> Sequence[Outcome]:
        """See Upserter. A repeat after a kill overwrites itself: record ids are deterministic."""
        timeout_s = deadline_s + self._timeout_s
        args = (sender, ns, writes, deadline_s)
        outcomes = await self._named.call("offer", *args, timeout_s=timeout_s)
        return cast("Sequence[Outcome]", outcomes)

    async def pressure(self) -> Pressure:
        """See Upserter. Asked at most every `PRESSURE_KEPT_S`; an actor that restarts is away at once."""
        async with self._asking:
            if time.monotonic() >= self._asked_until:
                try:
                    self._pressure = await self._named.ask("pressure", timeout_s=PRESSURE_S_MAX)
                except IndexUnavailable:
                    self._pressure = None
                self._asked_until = time.monotonic() + PRESSURE_KEPT_S
        if self._pressure is None:
            raise IndexUnavailable("The upserter is away.", retry_after_s=1)
        return self._pressure

    async def ensure(self, spec: CollectionSpec) -> None:
        """See Upserter. Waits for a restart: 20 s more than a short call."""
        await self._named.call("ensure", spec, timeout_s=self._timeout_s + 20)

    async def drop(self, ns: str) -> None:
        """See Upserter. Waits for a restart: 20 s more than a short call."""
        await self._named.call("drop", ns, timeout_s=self._timeout_s + 20)

    async def lag(self, namespaces: Sequence[str]) -> Lag:
        """See Upserter. Does not wait for a restart."""
        return cast("Lag", await self._named.ask("lag", namespaces, timeout_s=LAG_S_MAX))


class LedgerPort(Ledger, Queues, Decisions, Trials):
    """The Ledger over its actor: quick to say that it is away, since its callers can go on."""

    def __init__(self, settings: Settings) -> None:
        self._named = Named(LEDGER, settings, LedgerUnavailable)
        self._timeout_s = settings.ledger.timeout_s

    async def _ask(self, method: str, *args: Any) -> Any:
        return await self._named.ask(method, *args, timeout_s=self._timeout_s)

    async def exchange(
        self, op: str, replica: str, returns: Sequence[Return], draws: Sequence[Draw]
    ) -> Sequence[Grant]:
        """See Ledger."""
        return cast("Sequence[Grant]", await self._ask("exchange", op, replica, returns, draws))

    async def report_queue(self, report: QueueReport) -> None:
        """What waits in one embedder replica now. Raises LedgerUnavailable."""
        await self._ask("report_queue", report)

    async def queue_reports(self, tenant: str) -> Sequence[QueueReport]:
        """See Queues."""
        return cast("Sequence[QueueReport]", await self._ask("queue_reports", tenant))

    async def decisions(self) -> Sequence[Decision]:
        """See Decisions."""
        return cast("Sequence[Decision]", await self._ask("decisions"))

    async def report_canaries(
        self, replica: str, reports: Sequence[CanaryReport]
    ) -> Mapping[str, str]:
        """See Trials."""
        return cast("Mapping[str, str]", await self._ask("report_canaries", replica, reports))

    async def canary_reports(self) -> CanaryReports:
        """See Trials."""
        return cast("CanaryReports", await self._ask("canary_reports"))


class EmbedderPort(Embedder):
    """One pool's embedder deployment. A call whose replica dies is repeated once; one that a leaving
    replica has not begun goes to another.

    `run` opens conduits to its replicas; without them, calls take the deployment's handle.
    """

    def __init__(self, handle: DeploymentHandle[Any], *, tokens_per_s_min: float) -> None:
        self._handle = handle
        self._tokens_per_s_min = tokens_per_s_min
        self._conduits = Conduits(self._addresses, ray.get_runtime_context().get_node_id())
        self._asleep = False
        """No replica runs, as far as was seen."""

    async def run(self) -> None:
        """Follow the replicas until cancelled."""
        await self._conduits.run()

    async def embed(self, call: EmbedCall) -> EmbedReply:
        """See Embedder. Bounded by the call's deadline and its work at the slowest pace.

        A call for which no replica came has not been tried: that is Overloaded.
        """
        expires = time.monotonic() + call.deadline_s + sum(call.tokens) / self._tokens_per_s_min
        for last in (False, True):
            try:
                async with asyncio.timeout(expires - time.monotonic()):
                    return await self._once(call)
            except TimeoutError:
                raise self._late() from None
            except (ConduitLost, RayActorError):
                if last:
                    break
        raise ModelUnavailable("The model's replica died twice.", retry_after_s=5)

    def _late(self) -> ServiceError:
        if self._asleep:
            return Overloaded("No replica of the model's pool has started yet.", retry_after_s=5)
        return DeadlineExceeded("The model did not answer before the deadline.", retry_after_s=2)

    async def _once(self, call: EmbedCall) -> EmbedReply:
        while carries(call) and (conduit := self._conduits.best()):
            try:
                return await conduit.embed(call)
            except ReplicaLeaves:  # several may leave at once: each is asked once
                self._conduits.lose(conduit)
            except ConduitLost:
                self._conduits.lose(conduit)
                raise
        return await self._by_handle(call)

    async def _by_handle(self, call: EmbedCall) -> EmbedReply:
        response = self._handle.embed.remote(call)
        try:
            return cast("EmbedReply", await response)
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

    async def _addresses(self) -> list[Address | None]:
        """Of every replica that runs; one that cannot say is on its way out, or in."""
        try:
            told = await self._handle.broadcast("address").results_async(
                timeout_s=ADDRESSES_S_MAX, return_exceptions=True
            )
        except (RayError, RequestCancelledError, DeploymentUnavailableError) as error:
            self._asleep = isinstance(error, DeploymentUnavailableError)
            raise ModelUnavailable(f"The replicas cannot be asked: {error}") from None
        self._asleep = not told
        return [one for one in told if not isinstance(one, BaseException)]

    async def ready(self) -> bool:
        """See Embedder."""
        try:
            return cast("bool", await self._handle.ready.remote())
        except (RayError, RequestCancelledError, DeploymentUnavailableError):
            return False


def embedder_ports(
    handles: Mapping[str, DeploymentHandle[Any]], settings: Settings
) -> dict[str, EmbedderPort]:
    """One for each pool, by its name; whoever makes them runs them."""
    pace = settings.ingress.tokens_per_s_min
    return {name: EmbedderPort(one, tokens_per_s_min=pace) for name, one in handles.items()}
