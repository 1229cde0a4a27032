"""Which calls an embedder replica takes in: what cannot be served in time is refused at once. Pure."""

from serve.admission.fairness import FairQueue
from serve.config import Batch
from serve.errors import BadInput, Internal, Overloaded, QuotaExceeded
from serve.flows.costs import Costs
from serve.flows.parking import Parked
from serve.flows.pending import Slice
from serve.records import EmbedCall


def admit(
    call: EmbedCall,
    queue: FairQueue[Slice],
    parked: Parked,
    *,
    batch: Batch,
    costs: Costs,
    busy_s: float,
) -> float:
    """Seconds of the call's own work, at its tenant's share.

    `busy_s` is how long no slot takes what waits. Raises BadInput (it exceeds a cap by
    itself), QuotaExceeded (its tenant's cap), Overloaded (the whole queue's, or its deadline), Internal.
    """
    inputs = len(call.inputs)
    if len(call.tokens) != inputs:
        raise Internal(f"{len(call.tokens)} token counts for {inputs} inputs.")
    cost = costs.cost(call.model, sum(call.tokens), inputs)
    tokens_max = min(batch.tenant_tokens_max, batch.queue_tokens_max)
    items_max = min(batch.tenant_items_max, batch.queue_items_max)
    if cost > tokens_max or inputs > items_max:
        raise BadInput(
            f"This is {cost:.0f} tokens of work in {inputs} inputs; at most {tokens_max} in "
            f"{items_max} may wait.",
            param="input",
            code="tokens_exceed_queue",
        )
    ahead = queue.ahead(call.klass, call.tenant, weight=call.weight)
    wait_s = busy_s + costs.rate.seconds(ahead)
    retry_s = max(wait_s, 1)
    parked_cost, parked_items = parked.backlog(call.tenant)
    own = queue.backlog(call.tenant) + parked_cost
    own_items = queue.backlog_items(call.tenant) + parked_items
    if own + cost > batch.tenant_tokens_max or own_items + inputs > batch.tenant_items_max:
        raise QuotaExceeded(
            f"{own:.0f} tokens of your work in {own_items} inputs wait already; this is "
            f"{cost:.0f} more in {inputs}, and {batch.tenant_tokens_max} in "
            f"{batch.tenant_items_max} may wait.",
            code="queue_full",
            retry_after_s=retry_s,
        )
    full = queue.cost + parked.cost + cost > batch.queue_tokens_max
    if full or queue.items + parked.items + inputs > batch.queue_items_max:
        raise Overloaded("The queue is full.", retry_after_s=retry_s)
    deadline_s = call.deadline_s if call.limit_s is None else min(call.deadline_s, call.limit_s)
    if wait_s > max(deadline_s, 0):
        raise Overloaded(
            f"The predicted wait of {wait_s:.1f} s exceeds the deadline of {deadline_s:g} s.",
            retry_after_s=retry_s,
        )
    return costs.rate.seconds(cost) / queue.share(call.klass, call.tenant, call.weight)
