"""A Pinecone index on loopback, for the real SDK: written from the SDK 10.2 and the documentation,
never compared with the service.

It holds to the limits (1,000 records and 2 MB a request, 40 KB of metadata, 4 MB a reply, dimension,
no zero vector), gives each write a place in the namespace's log, and lets reads lag behind it.
"""

import asyncio
import math
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


ITEMS_MAX, BODY_BYTES_MAX, METADATA_BYTES_MAX = 1000, 2 * 2**20, 40 * 2**10
REPLY_BYTES_MAX, URL_BYTES_MAX, TOP_K_MAX, PAGE_MAX = 4 * 10**6, 8192, 10_000, 100
ID_CHARS_MAX = 512
KEY = "pcsk_test"

Stored = dict[str, tuple[np.ndarray, dict[str, Any]]]
Change = Callable[[Stored], None]


class Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Fault:
    """What the next requests on a path are answered with."""

    status: int
    times: int
    path: str
    headers: dict[str, str]
    body: bytes
    after: bool


@dataclass
class View:
    """What one kind of read sees: a write is seen by the read that comes `left` reads later."""

    records: Stored = field(default_factory=dict)
    pending: list[tuple[int, int, Change]] = field(default_factory=list)
    reconciled: int = 0

    def write(self, lsn: int, lag: int, change: Change) -> None:
        self.pending.append((lsn, lag, change))
        self.apply()

    def apply(self) -> None:
        while self.pending and self.pending[0][1] <= 0:
            self.reconciled, _, change = self.pending.pop(0)
            change(self.records)

    def read(self) -> Stored:
        self.apply()
        seen = dict(self.records)
        self.pending = [(lsn, left - 1, change) for lsn, left, change in self.pending]
        return seen


@dataclass
class Space:
    committed: int = 0
    searched: View = field(default_factory=View)
    fetched: View = field(default_factory=View)


class PineconeServer:
    """The index. Attributes that tests set: `lag` (reads), `nin_on_lists`, `lsn` (headers or none),
    `poison` (an upsert that contains it is refused), `hold` (cleared: no answers).
    """

    def __init__(self, dimension: int | None, *, lag: int = 0, metric: str = "cosine") -> None:
        self.dimension = dimension
        self.metric = metric
        self.lag = lag
        self.lsn = True
        self.nin_on_lists = "none"
        self.poison: bytes | None = None
        self.key = KEY
        self.calls: list[str] = []
        self.bodies: list[bytes] = []
        self.hold = asyncio.Event()
        self.hold.set()
        self.spaces: dict[str, Space] = {}
        self._faults: list[Fault] = []
        self.app = Starlette(
            routes=[
                self._route("POST", "/vectors/upsert", self._upsert),
                self._route("POST", "/vectors/delete", self._delete),
                self._route("GET", "/vectors/fetch", self._fetch),
                self._route("GET", "/vectors/list", self._list),
                self._route("POST", "/query", self._query),
                self._route("POST", "/describe_index_stats", self._stats),
                self._route("GET", "/namespaces/{name}", self._describe),
                self._route("DELETE", "/namespaces/{name}", self._drop),
            ]
        )

    def fail(
        self,
        status: int,
        times: int = 1,
        *,
        path: str = "/",
        headers: Mapping[str, str] | None = None,
        body: bytes = b'{"code":0,"message":"injected","details":[]}',
        after: bool = False,
    ) -> None:
        """Answer the next requests whose path starts so with an error; `after` it was done."""
        self._faults.append(Fault(status, times, path, dict(headers or {}), body, after))

    def settle(self) -> None:
        """All writes are seen from now on."""
        for space in self.spaces.values():
            for view in (space.searched, space.fetched):
                view.pending = [(lsn, 0, change) for lsn, _, change in view.pending]
                view.apply()

    def count(self, path: str) -> int:
        return sum(call.split("?")[0] == path for call in self.calls)

    def _route(self, method: str, path: str, act: Callable[..., Any]) -> Route:
        async def answer(request: Request) -> Response:
            body = await request.body()
            self.calls.append(request.url.path)
            self.bodies.append(body)
            await self.hold.wait()
            try:
                fault = self._fault(request.url.path)
                if fault is not None and not fault.after:
                    return Response(fault.body, fault.status, fault.headers)
                self._admit(request, body)
                reply = act(request, orjson.loads(body) if body else {})
                if fault is not None:
                    return Response(fault.body, fault.status, fault.headers)
            except Refused as error:
                said = {"code": 3, "message": str(error), "details": []}
                return Response(orjson.dumps(said), error.status)
            return reply

        return Route(path, answer, methods=[method])

    def _fault(self, path: str) -> Fault | None:
        for fault in self._faults:
            if path.startswith(fault.path):
                fault.times -= 1
                if fault.times == 0:
                    self._faults.remove(fault)
                return fault
        return None

    def _admit(self, request: Request, body: bytes) -> None:
        if request.headers.get("api-key") != self.key:
            raise Refused(401, "Invalid API Key")
        if "x-pinecone-api-version" not in request.headers:
            raise Refused(400, "no API version")
        if len(body) > BODY_BYTES_MAX:
            raise Refused(413, f"{len(body)} bytes exceed {BODY_BYTES_MAX}")
        if len(str(request.url)) > URL_BYTES_MAX:
            raise Refused(414, "URI too long")

    def _reply(self, body: Any, headers: Mapping[str, str] | None = None) -> Response:
        written = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        if len(written) > REPLY_BYTES_MAX:
            raise Refused(400, f"a reply of {len(written)} bytes")
        return Response(written, headers=dict(headers or {}), media_type="application/json")

    def _committed(self, name: str, change: Change) -> dict[str, str]:
        space = self.spaces[name]
        space.committed += 1
        for view in (space.searched, space.fetched):
            view.write(space.committed, self.lag, change)
        return {"x-pinecone-lsn-committed": str(space.committed)} if self.lsn else {}

    def _upsert(self, _: Request, body: dict[str, Any]) -> Response:
        vectors = body["vectors"]
        if self.poison is not None and self.poison in self.bodies[-1]:
            raise Refused(400, "poison")
        if not 1 <= len(vectors) <= ITEMS_MAX:
            raise Refused(400, f"{len(vectors)} vectors, not 1 to {ITEMS_MAX}")
        rows = {vector["id"]: self._row(vector) for vector in vectors}
        name = body.get("namespace", "")
        self.spaces.setdefault(name, Space())
        headers = self._committed(name, lambda stored: stored.update(rows))
        return self._reply({"upsertedCount": len(vectors)}, headers)

    def _row(self, vector: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        record_id, values = vector["id"], vector["values"]
        if not (isinstance(record_id, str) and 1 <= len(record_id) <= ID_CHARS_MAX):
            raise Refused(400, "an id has 1 to 512 characters")
        row = self._vector(values)
        metadata = {
            key: _kept(key, value)
            for key, value in vector.get("metadata", {}).items()
            if value is not None
        }
        size = len(orjson.dumps(metadata))
        if size > METADATA_BYTES_MAX:
            raise Refused(400, f"Metadata size is {size} bytes, which exceeds the limit of 40960")
        return row, metadata

    def _vector(self, values: list[Any]) -> np.ndarray:
        if any(not isinstance(value, int | float) for value in values):
            raise Refused(400, "a value is not a number")
        if len(values) != self.dimension:
            raise Refused(400, f"Vector dimension {len(values)} does not match {self.dimension}")
        row = np.asarray(values, np.float32)
        if not row.any():
            raise Refused(400, "Dense vectors must contain at least one non-zero value")
        return row

    def _delete(self, _: Request, body: dict[str, Any]) -> Response:
        ids, name = body.get("ids"), body["namespace"]
        if ids is None or not 1 <= len(ids) <= ITEMS_MAX:
            raise Refused(400, "1 to 1000 ids")
        self._exists(name)

        def change(stored: Stored) -> None:
            for record_id in ids:
                stored.pop(record_id, None)

        return self._reply({}, self._committed(name, change))

    def _exists(self, name: str) -> Space:
        if name not in self.spaces:
            raise Refused(404, "Namespace not found")
        return self.spaces[name]

    def _fetch(self, request: Request, _: dict[str, Any]) -> Response:
        ids = request.query_params.getlist("ids")
        if not 1 <= len(ids) <= ITEMS_MAX:
            raise Refused(400, "1 to 1000 ids")
        name = request.query_params.get("namespace", "")
        stored = self.spaces[name].fetched.read() if name in self.spaces else {}
        found = {
            record_id: {"id": record_id, "values": row, "metadata": metadata}
            for record_id, (row, metadata) in stored.items()
            if record_id in set(ids)
        }
        return self._reply({"vectors": found, "namespace": name, "usage": {"readUnits": 1}})

    def _list(self, request: Request, _: dict[str, Any]) -> Response:
        name = request.query_params.get("namespace", "")
        limit = int(request.query_params.get("limit", PAGE_MAX))
        if not 1 <= limit <= PAGE_MAX:
            raise Refused(400, "limit is 1 to 100")
        after = request.query_params.get("paginationToken", "")
        stored = self.spaces[name].searched.read() if name in self.spaces else {}
        ids = sorted(record_id for record_id in stored if record_id > after)
        page = ids[:limit]
        body: dict[str, Any] = {"vectors": [{"id": one} for one in page], "namespace": name}
        if len(ids) > limit:
            body["pagination"] = {"next": page[-1]}
        return self._reply(body | {"usage": {"readUnits": 1}})

    def _query(self, _: Request, body: dict[str, Any]) -> Response:
        name, top_k = body.get("namespace", ""), body["topK"]
        if not 1 <= top_k <= TOP_K_MAX:
            raise Refused(400, "topK is 1 to 10000")
        wanted = self._vector(body["vector"]).astype(np.float64)
        where = body.get("filter")
        if where is not None:
            check_filter(where)
        headers, stored = {}, Stored()
        if name in self.spaces:
            view = self.spaces[name].searched
            stored = view.read()
            headers = {"x-pinecone-lsn-reconciled": str(view.reconciled)} if self.lsn else {}
        scored = [
            (_cosine(row, wanted), record_id)
            for record_id, (row, metadata) in stored.items()
            if where is None or self.holds(where, metadata)
        ]
        # Of equals, the service says nothing: here the higher id comes first.
        scored.sort(reverse=True)
        matches = []
        for score, record_id in scored[:top_k]:
            match: dict[str, Any] = {"id": record_id, "score": score}
            if body["includeValues"]:
                match["values"] = stored[record_id][0]
            if body["includeMetadata"]:
                match["metadata"] = stored[record_id][1]
            matches.append(match)
        reply = {"matches": matches, "namespace": name, "usage": {"readUnits": 1}}
        return self._reply(reply, headers)

    def _stats(self, _: Request, body: dict[str, Any]) -> Response:
        counts = {
            name: {"vectorCount": len(space.searched.records)}
            for name, space in self.spaces.items()
        }
        return self._reply(
            {
                "namespaces": counts,
                "dimension": self.dimension,
                "metric": self.metric,
                "vectorType": "dense",
                "indexFullness": 0,
                "totalVectorCount": sum(count["vectorCount"] for count in counts.values()),
            }
        )

    def _describe(self, request: Request, _: dict[str, Any]) -> Response:
        name = request.path_params["name"]
        count = len(self._exists(name).searched.read())
        return self._reply({"name": name, "record_count": str(count)})

    def _drop(self, request: Request, _: dict[str, Any]) -> Response:
        self._exists(request.path_params["name"])
        del self.spaces[request.path_params["name"]]
        return self._reply({})

    def holds(self, where: dict[str, Any], metadata: dict[str, Any]) -> bool:
        """A filter that was checked, on metadata as it is stored."""
        for key, asked in where.items():
            if key == "$and":
                held = all(self.holds(part, metadata) for part in asked)
            elif key == "$or":
                held = any(self.holds(part, metadata) for part in asked)
            else:
                held = all(
                    self._compares(op, metadata.get(key), value) for op, value in asked.items()
                )
            if not held:
                return False
        return True

    def _compares(self, op: str, held: Any, value: Any) -> bool:
        if op == "$exists":
            return (held is not None) is value
        if held is None:  # a report of 2024 says that $ne and $nin need the field, too
            return False
        many = held if isinstance(held, list) else [held]
        wanted = value if op in ("$in", "$nin") else [value]
        equal = [any(_same(one, other) for other in wanted) for one in many]
        if op in ("$eq", "$in"):
            return any(equal)
        if op in ("$ne", "$nin"):
            return not any(equal) if self.nin_on_lists == "none" else not all(equal)
        if isinstance(held, bool) or not isinstance(held, float):
            return False
        return {
            "$gt": held > value,
            "$gte": held >= value,
            "$lt": held < value,
            "$lte": held <= value,
        }[op]


def check_filter(where: Any) -> None:
    """Raises Refused for what the documentation does not allow."""
    if not isinstance(where, dict) or not where:
        raise Refused(400, "a filter is an object with conditions")
    for key, asked in where.items():
        if key in ("$and", "$or"):
            if not isinstance(asked, list) or not asked:
                raise Refused(400, f"{key} takes a list")
            for part in asked:
                check_filter(part)
        elif key.startswith("$") or not isinstance(asked, dict) or not asked:
            raise Refused(400, f"not a condition: {key}")
        else:
            for op, value in asked.items():
                _check_condition(op, value)


def _check_condition(op: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if op in ("$in", "$nin"):
        good = isinstance(value, list) and 1 <= len(value) <= 10_000
        good = good and all(isinstance(one, str | int | float) for one in value)
    elif op in ("$gt", "$gte", "$lt", "$lte"):
        good = is_number
    elif op == "$exists":
        good = isinstance(value, bool)
    else:
        good = op in ("$eq", "$ne") and (is_number or isinstance(value, str | bool))
    if not good:
        raise Refused(400, f"{op} does not take this")


def _kept(key: str, value: Any) -> Any:
    if key.startswith("$"):
        raise Refused(400, "keys do not start with $")
    if isinstance(value, list):
        if not all(isinstance(item, str) for item in value):
            raise Refused(400, f"a list of strings, for field '{key}'")
        return value
    if isinstance(value, str | bool):
        return value
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    raise Refused(400, f"Metadata value must be a string, number, boolean or list, for '{key}'")


def _same(one: Any, other: Any) -> bool:
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _cosine(row: np.ndarray, wanted: np.ndarray) -> float:
    wide = row.astype(np.float64)
    return float(wide @ wanted / np.linalg.norm(wide) / np.linalg.norm(wanted))


@asynccontextmanager
async def serving(server: PineconeServer) -> AsyncIterator[str]:
    """Its address while it listens on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(server.app, log_config=None, lifespan="off")
        runner = uvicorn.Server(config)
        task = asyncio.create_task(runner.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.hold.set()
            runner.should_exit = True
            await task
