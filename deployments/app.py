"""The composition root: `config.yaml` names `build`, Ray turns its `args` into Settings."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.serve import Application, deployment

from deployments.actors import INGRESS_DEPLOYMENT, LEDGER, STORE, UPSERTER, start
from deployments.embedder import Embedder
from deployments.ingress import Ingress
from deployments.ledger import LedgerActor
from deployments.places import DATA_DIR
from deployments.scaling import replicas_of
from deployments.store import StoreActor
from deployments.stores import on_postgres
from deployments.upserter import UpserterActor
from deployments.vaults import open_vault
from deployments.worker import Worker
from serve import config
from serve.config import Pool, Settings


ROLLING: Mapping[str, Any] = {
    # As many as there are to be serve all the while: a successor is ready before an old one leaves.
    # Serve's own default lets the old one leave first, and with one replica there is nobody.
    "max_surge_percent": 100,
    # Not none: without a `user_config` in the file again, Serve would not say so to the replicas.
    "user_config": {},
}
"""How each deployment changes: its version, and its live settings (docs/adr/0033)."""


def build(args: Settings) -> Application:
    """The application, as the deploy file names it."""
    return compose(args, {})


def compose(args: Settings, embedders: Mapping[str, type]) -> Application:
    """Starts the named actors and binds the deployments.

    Durable folders become absolute here, because replicas have other working folders. `embedders`
    are by pool; a pool that is not named gets ours.
    """
    settings = args.under(Path(os.environ.get(DATA_DIR, args.data_dir)))
    open_vault(settings)  # a key that is missing must not be found out by a replica
    # Old ones leave in reverse: the Ledger last, because requests are served meanwhile.
    owner = {} if on_postgres(settings) else {STORE: StoreActor}
    start({LEDGER: LedgerActor, **owner, UPSERTER: UpserterActor}, settings)
    bound = {
        pool.name: _embedder(embedders.get(pool.name, Embedder), pool, settings)
        for pool in settings.pools
    }
    workers = [_worker(worker, settings, bound) for worker in settings.workers]
    ingress = deployment(
        name=INGRESS_DEPLOYMENT,
        **replicas_of(settings.ingress, INGRESS_DEPLOYMENT, settings),
        max_ongoing_requests=settings.ingress.requests_max,
        graceful_shutdown_timeout_s=settings.ingress.drain_s,
        **ROLLING,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress(Ingress).bind(settings, bound, workers)


def _worker(
    worker: config.Worker, settings: Settings, embedders: Mapping[str, Application]
) -> Application:
    name = f"worker-{worker.name}"
    deployed = deployment(
        name=name,
        **replicas_of(worker, name, settings),
        health_check_period_s=2,
        health_check_timeout_s=30,
        # Twice: what is given back at the end has to reach the Store.
        graceful_shutdown_timeout_s=2 * worker.drain_s,
        **ROLLING,
        ray_actor_options={"num_cpus": 0},
    )
    return deployed(Worker).bind(worker, settings, embedders)


def _embedder(embedder: type, pool: Pool, settings: Settings) -> Application:
    name = f"embedder-{pool.name}"
    deployed = deployment(
        name=name,
        **replicas_of(pool, name, settings),
        max_ongoing_requests=pool.calls_max,
        health_check_period_s=2,
        health_check_timeout_s=30,
        # Twice: Serve first waits for the handles' calls, then the conduits' have `drain_s` to end.
        graceful_shutdown_timeout_s=2 * pool.drain_s,
        **ROLLING,
        ray_actor_options={"num_cpus": pool.cpus, "num_gpus": pool.gpus},
    )
    return deployed(embedder).bind(pool, settings)
