"""The composition root: `config.yaml` names `build`, Ray turns its `args` into Settings."""

import os
from pathlib import Path

from ray.serve import Application, deployment

from deployments.actors import INGRESS_DEPLOYMENT, STORE, UPSERTER, start
from deployments.embedder import Embedder
from deployments.ingress import Ingress
from deployments.places import DATA_DIR
from deployments.store import StoreActor
from deployments.upserter import UpserterActor
from serve.config import Pool, Settings


def build(args: Settings) -> Application:
    """The application: starts the named actors and binds the deployments.

    Durable folders become absolute here, because replicas have other working folders.
    """
    data_dir = Path(os.environ.get(DATA_DIR, args.data_dir)).resolve()
    settings = args.model_copy(update={"data_dir": str(data_dir)})
    start({STORE: StoreActor, UPSERTER: UpserterActor}, settings)
    embedders = {pool.name: _embedder(pool, settings) for pool in settings.pools}
    ingress = deployment(
        name=INGRESS_DEPLOYMENT,
        num_replicas=settings.ingress.replicas,
        max_ongoing_requests=settings.ingress.requests_max,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress(Ingress).bind(settings, embedders)


def _embedder(pool: Pool, settings: Settings) -> Application:
    embedder = deployment(
        name=f"embedder-{pool.name}",
        num_replicas=pool.replicas,
        max_ongoing_requests=pool.calls_max,
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=settings.actors.drain_s,
        ray_actor_options={"num_cpus": pool.cpus, "num_gpus": pool.gpus},
    )
    return embedder(Embedder).bind(pool, settings.admission)
