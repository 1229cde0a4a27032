"""The composition root: `config.yaml` names `build`, Ray turns its `args` into Settings."""

import os
from collections.abc import Mapping
from pathlib import Path

from ray.serve import Application, deployment

from deployments.actors import INGRESS_DEPLOYMENT, LEDGER, STORE, UPSERTER, start
from deployments.embedder import Embedder
from deployments.ingress import Ingress
from deployments.ledger import LedgerActor
from deployments.places import DATA_DIR
from deployments.store import StoreActor
from deployments.upserter import UpserterActor
from serve.config import Pool, Settings


def build(args: Settings) -> Application:
    """The application, as the deploy file names it."""
    return compose(args, {})


def compose(args: Settings, embedders: Mapping[str, type]) -> Application:
    """Starts the named actors and binds the deployments.

    Durable folders become absolute here, because replicas have other working folders. `embedders`
    are by pool; a pool that is not named gets ours.
    """
    data_dir = Path(os.environ.get(DATA_DIR, args.data_dir)).resolve()
    settings = args.model_copy(update={"data_dir": str(data_dir)})
    # Old ones leave in reverse: the Ledger last, because requests are served meanwhile.
    start({LEDGER: LedgerActor, STORE: StoreActor, UPSERTER: UpserterActor}, settings)
    bound = {
        pool.name: _embedder(embedders.get(pool.name, Embedder), pool, settings)
        for pool in settings.pools
    }
    ingress = deployment(
        name=INGRESS_DEPLOYMENT,
        num_replicas=settings.ingress.replicas,
        max_ongoing_requests=settings.ingress.requests_max,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress(Ingress).bind(settings, bound)


def _embedder(embedder: type, pool: Pool, settings: Settings) -> Application:
    deployed = deployment(
        name=f"embedder-{pool.name}",
        num_replicas=pool.replicas,
        max_ongoing_requests=pool.calls_max,
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=settings.actors.drain_s,
        ray_actor_options={"num_cpus": pool.cpus, "num_gpus": pool.gpus},
    )
    return deployed(embedder).bind(pool, settings)
