"""`headrace ingest` and `headrace search`: an ordinary client of a running service."""

import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from deployments.cli_options import AS_JSON, json_object
from deployments.client import Client, Problem, Unreachable
from deployments.loader import Loader, Summary, batches
from deployments.sources import Format, documents


SNIPPET_CHARS_MAX = 160

SEARCH_PATIENCE_S = 30.0
"""A person waits for a search."""

EXIT_FAILED, EXIT_UNREACHABLE = 1, 3


@dataclass(frozen=True, slots=True)
class Target:
    """A collection of a service, and who asks."""

    url: str
    key: str
    collection: str


def _targeted(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say where and who, given to the command as one Target."""

    @click.option("--collection", required=True, help="Name of the collection.")
    @click.option(
        "--url", envvar="HEADRACE_URL", default="http://127.0.0.1:8000", show_default=True
    )
    @click.option("--key", envvar="HEADRACE_KEY", required=True, help="Key; or in HEADRACE_KEY.")
    @functools.wraps(command)
    def run(*, collection: str, url: str, key: str, **options: Any) -> None:
        command(Target(url, key, collection), **options)

    return run


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@_targeted
@click.option("--model", help="Model of a new collection; default: the service's.")
@click.option(
    "--batch",
    default=64,
    show_default=True,
    type=click.IntRange(1, 1000),
    help="Documents of one request, which the service takes as one job.",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(get_args(Format)),
    default="auto",
    show_default=True,
    help="What the files are; `auto` goes by their suffix.",
)
@AS_JSON
def ingest(
    target: Target,
    *,
    paths: tuple[str, ...],
    model: str | None,
    batch: int,
    kind: Format,
    as_json: bool,
) -> None:
    """Write documents into a collection, which is made when it is missing.

    PATH is a text file, a .jsonl file of {id, text, metadata}, the .index of a dict.org
    dictionary, a folder of .txt, .md and .rst files, or python:topics.
    """
    total = sum(1 for _ in documents(paths, kind))  # finds every fault before anything is sent
    began = time.monotonic()
    with Client(target.url, target.key, sleep=time.sleep) as client:
        client.ensure_collection(target.collection, model)
        with _progress(total) as advance:
            work = batches(documents(paths, kind), batch)
            summary = Loader(client, target.collection).load(work, advance)
    _report(summary, total, time.monotonic() - began, as_json=as_json)
    if code := _exit_code(summary, total):
        raise click.exceptions.Exit(code)


@click.command()
@click.argument("query")
@_targeted
@click.option("--top-k", default=5, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--filter", "where", type=json_object, help='JSON, for example \'{"source": "python"}\'.'
)
@AS_JSON
def search(
    target: Target, *, query: str, top_k: int, where: Mapping[str, Any] | None, as_json: bool
) -> None:
    """Show the passages of a collection that are nearest to QUERY."""
    with Client(target.url, target.key, sleep=time.sleep, patience_s=SEARCH_PATIENCE_S) as client:
        answer = client.search(target.collection, query, top_k, where)
    if as_json:
        click.echo(json.dumps(answer, ensure_ascii=False))
        return
    table = Table("score", "document", "text")
    for hit in answer["data"]:
        snippet = " ".join(hit["text"].split())
        if len(snippet) > SNIPPET_CHARS_MAX:
            snippet = snippet[: SNIPPET_CHARS_MAX - 1] + "…"
        table.add_row(f"{hit['score']:.3f}", Text(hit["document"]), Text(snippet))
    Console().print(table if answer["data"] else "Nothing found.")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal's stderr, else nothing."""
    console = Console(stderr=True)
    columns = (
        TextColumn("ingest"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"),
        TimeRemainingColumn(),
    )
    began = time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("ingest", total=total, pace="")
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            pace = done / max(time.monotonic() - began, 1e-3)
            progress.update(task, completed=done, pace=f"{pace:.1f} documents/s")

        yield advance


def _report(summary: Summary, total: int, seconds: float, *, as_json: bool) -> None:
    """Every document that was not written is on stderr, by id or, unsent, as a count."""
    for document, reason in summary.failed:
        click.echo(f"failed: {document}: {reason}", err=True)
    if summary.stopped is not None:
        reason = str(summary.stopped) or "interrupted"
        click.echo(f"stopped: {total - summary.seen} documents have no outcome: {reason}", err=True)
    counts = {
        "documents": total,
        "indexed": summary.indexed,
        "unchanged": summary.unchanged,
        "failed": total - summary.indexed,
        "chunks": summary.chunks,
        "tokens": summary.tokens,
        "seconds": round(seconds, 3),
    }
    if as_json:
        click.echo(json.dumps(counts))
        return
    before = f" ({summary.unchanged:,} unchanged)" if summary.unchanged else ""
    click.echo(
        f"{summary.indexed:,} of {total:,} documents indexed{before}: {summary.chunks:,} chunks, "
        f"{summary.tokens:,} tokens, {seconds:.1f} s ({summary.indexed / seconds:.1f} documents/s)"
    )


def _exit_code(summary: Summary, total: int) -> int:
    stopped = summary.stopped
    if isinstance(stopped, Unreachable) or (isinstance(stopped, Problem) and stopped.away):
        return EXIT_UNREACHABLE
    return EXIT_FAILED if summary.indexed < total else 0
