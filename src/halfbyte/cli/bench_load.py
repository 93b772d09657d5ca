"""`halfbyte bench load CHECKPOINT|URL`."""

import argparse
import asyncio
import contextlib
import datetime
import os
import secrets
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.cli.outputs import add_served_checkpoint, output_file
from halfbyte.cli.plan import parse_count
from halfbyte.cli.targets import is_folder
from halfbyte.errors import UsageError

if TYPE_CHECKING:  # imported when run, so that --help is quick
    import httpx

    from halfbyte.bench.load.report import Asked, LoadRecord
    from halfbyte.bench.load.traffic import Trace, TrafficSizes
    from halfbyte.evals.running.endpoint import Endpoint

EXAMPLE = """\
  halfbyte bench load mixed/
  halfbyte bench load mixed/ --profile fixed --users 1 16 --prompt-tokens 2048
  halfbyte bench load http://127.0.0.1:8000 --record fast.json --against exact.json
  halfbyte bench load https://api.example.com --model m --api-key-env KEY --profile agents
  halfbyte bench load mixed/ --serve-flags='--kv-cache fp8 --max-sequences 32'
  halfbyte bench load fast.json --against exact.json"""
_NOTHING_FAILED, _SOME_FAILED, _INTERRUPTED = 0, 1, 130


# Sizes of the traffic, each a flag: name, several at once, what it is.
_SIZES = (
    ("users", True, "levels of fixed lengths (1 8 32 64)"),
    ("agents", True, "levels of agents (1 4 16)"),
    ("prompt_tokens", False, "of a fixed level's prompts (1024)"),
    ("answer_tokens", False, "of its answers (128)"),
    ("requests", False, "of each of its users, one after another (3)"),
    ("turns", False, "requests of an agent's session (12)"),
    ("long_tokens", False, "of the long prompt (32000)"),
    ("streams", False, "answers that run beside it (8)"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"examples:\n{EXAMPLE}"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "target",
        metavar="CHECKPOINT|URL|RECORD",
        help="a checkpoint folder, which is served for the run; the address of an "
        "OpenAI-compatible server; or a record of this command, whose page is made again",
    )
    _add_traffic(parser.add_argument_group("what is sent"))
    _add_server(parser.add_argument_group("the server"))
    results = parser.add_argument_group("what is written")
    results.add_argument(
        "--record",
        type=output_file,
        metavar="FILE",
        help="the record; its page lies beside it as .html (load-MODEL-TIME.json)",
    )
    results.add_argument(
        "--against", type=Path, metavar="RECORD", help="compare with this record of an earlier run"
    )


def _add_traffic(traffic: argparse._ActionsContainer) -> None:
    traffic.add_argument(
        "--profile",
        nargs="+",
        default=["fixed", "agents", "beside"],
        choices=["fixed", "agents", "beside"],
        help="prompts of one length, sessions as agents have them, a long prompt beside running "
        "answers (all three)",
    )
    for name, are_several, what in _SIZES:
        several: dict[str, Any] = {"nargs": "+"} if are_several else {}
        flag = "--" + name.replace("_", "-")
        traffic.add_argument(flag, type=parse_count, metavar="N", help=what, **several)
    traffic.add_argument(
        "--context",
        type=parse_count,
        metavar="N",
        help="tokens of prompt and answer, where the server does not say",
    )
    traffic.add_argument("--seed", type=int, default=1, help="of the traffic (%(default)s)")
    traffic.add_argument("--trace", type=Path, metavar="FILE", help="send the traffic of this file")
    traffic.add_argument(
        "--write-trace", type=output_file, metavar="FILE", help="write the traffic that is sent"
    )
    for flag, seconds, what in (
        ("--max-seconds", 300, "of a level; afterwards it begins nothing new (%(default)s)"),
        ("--stall-seconds", 600, "a silence that counts as a failure (%(default)s)"),
    ):
        traffic.add_argument(flag, type=parse_count, default=seconds, metavar="S", help=what)


def _add_server(server: argparse._ActionsContainer) -> None:
    server.add_argument(
        "--serve-flags",
        metavar="FLAGS",
        default="",
        help="flags of halfbyte serve, for a folder, behind a =: --serve-flags='--mode declared'",
    )
    add_served_checkpoint(server)
    server.add_argument(
        "--machine",
        metavar="TEXT",
        help="what a server elsewhere runs on, as '8x NVIDIA H200'; for one at 127.0.0.1 it is "
        "found out",
    )


def run(args: argparse.Namespace) -> int:
    from halfbyte.bench.load.report import read_load

    # Before a server is started or a token spent.
    if args.against is not None:
        read_load(args.against)
    if args.target.endswith(".json") and Path(args.target).is_file():
        if args.serve_flags:
            raise UsageError(f"{args.target} is a record; nothing is served for it")
        _show(Path(args.target), args.against)
        return _NOTHING_FAILED
    for path in (args.record, args.write_trace):
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"{path}: there is no folder {path.parent}; make it first")
    folder = Path(args.target)
    if args.serve_flags and not folder.is_dir():
        raise UsageError(
            f"--serve-flags {args.serve_flags}: flags of halfbyte serve are for a checkpoint folder"
        )
    is_folder(args.target)
    with _server(args, folder) as (endpoint, asked):
        return asyncio.run(_measure(args, endpoint, asked))


def _show(record: Path, against: Path | None) -> "LoadRecord":
    """Print a record, beside another if one is named, and write its page."""
    from halfbyte.bench.load.page import write_page
    from halfbyte.bench.load.report import format_load, format_load_comparison, read_load

    found = read_load(record)
    other = None if against is None else read_load(against)
    print(format_load(found))
    if other is not None:
        print(f"\n{format_load_comparison(found, other)}")
    page = record.with_suffix(".html")
    write_page(found, page, other)
    print(f"page: {page}")
    return found


@contextlib.contextmanager
def _server(args: argparse.Namespace, folder: Path) -> "Iterator[tuple[Endpoint, Asked]]":
    """The server to be asked, started if a folder was named."""
    from halfbyte.bench.load.report import Asked
    from halfbyte.bench.record import machine
    from halfbyte.checkpoint.identity import checkpoint_identity
    from halfbyte.evals.running.endpoint import connect, describe_served, is_here, read_key, serve

    key = read_key(args.api_key_env)
    with contextlib.ExitStack() as stack:
        if folder.is_dir():
            scratch = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="halfbyte-load-"))
            )
            flags = ("--access-log", os.devnull, *shlex.split(args.serve_flags))
            print(f"serving {folder}", file=sys.stderr, flush=True)
            url = stack.enter_context(serve(folder, scratch / "server.log", flags))
            endpoint = connect(url, args.model, key, take_first=True)
            identity: str | None = checkpoint_identity(folder)
        else:
            endpoint = connect(args.target, args.model, key)
            identity = describe_served(endpoint, args.checkpoint).get("identity")
        health = endpoint.server.get("health")
        where: dict[str, Any] | None = None
        if args.machine is not None:
            where = {"processor": args.machine}
        elif is_here(endpoint.url):
            where = machine()
        context = args.context or endpoint.context_tokens
        told = health if isinstance(health, dict) else {}
        name = folder.resolve().name if folder.is_dir() else endpoint.model
        yield endpoint, Asked(name, identity, context, told, where)


async def _measure(args: argparse.Namespace, endpoint: "Endpoint", asked: "Asked") -> int:
    from halfbyte.bench.load.client import Client, greet
    from halfbyte.bench.load.report import write_load
    from halfbyte.bench.load.run import Measured, noting_tools, run_trace
    from halfbyte.bench.load.traffic import write_trace
    from halfbyte.bench.record import own_command
    from halfbyte.evals.running.endpoint import read_key

    salt = secrets.token_hex(8)
    record = args.record or _default_record(asked.model)
    trace = _trace(args, asked.context)
    measured: list[Measured] = []
    connect = _connections(read_key(args.api_key_env))

    def keep(level: Measured) -> None:
        """After every level: what was measured lies on the disk, whatever comes."""
        measured.append(level)
        write_load(record, measured, trace, asked, manner, command=own_command())

    manner = noting_tools(await greet(connect, endpoint.url, endpoint.model, salt), trace)
    if args.write_trace is not None:
        write_trace(trace, args.write_trace)
    for line in (*manner.notes, *(f"made smaller: {words}" for words in trace.cut)):
        print(line, file=sys.stderr)
    client = Client(
        connect, endpoint.url, endpoint.model, manner=manner, stall_s=args.stall_seconds
    )
    try:
        is_whole = await run_trace(
            client,
            trace,
            salt=salt,
            context_tokens=asked.context,
            most_s=args.max_seconds,
            keep=keep,
        )
    finally:
        await client.aclose()
    print(f"record: {record}")
    return _conclude(_show(record, args.against), record, asked, is_whole=is_whole)


def _conclude(found: "LoadRecord", record: Path, asked: "Asked", *, is_whole: bool) -> int:
    """Say what the record lacks; returns the status of the command."""
    for is_missing, what in (
        (
            asked.checkpoint is None,
            "names no checkpoint, so no card takes it: name the folder that is served with "
            "--checkpoint DIR",
        ),
        (
            asked.machine is None,
            "does not say what the server runs on: give it with --machine TEXT",
        ),
    ):
        if is_missing:
            print(f"The record {what}.", file=sys.stderr)
    if not is_whole:
        whole = sum(one.is_sound for one in found.levels)
        print(
            f"interrupted: {whole} of {found.planned_levels} levels are whole and kept, with what "
            f"was measured of the others, in {record}; the same command starts over",
            file=sys.stderr,
        )
        return _INTERRUPTED
    is_sound = all(one.is_sound and not one.failed for one in found.levels)
    is_complete = len(found.levels) == found.planned_levels
    return _NOTHING_FAILED if is_sound and is_complete else _SOME_FAILED


def _connections(key: str) -> "Callable[[], httpx.AsyncClient]":
    """Makes clients of a server, one for each user of a level."""
    import httpx

    certificates = httpx.create_ssl_context()

    def connect() -> httpx.AsyncClient:
        return httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(None, connect=30.0),
            # Servers close connections that idle for 5 s; a request at that moment would fail.
            limits=httpx.Limits(keepalive_expiry=4.0),
            verify=certificates,
        )

    return connect


def _trace(args: argparse.Namespace, context: int | None) -> "Trace":
    from halfbyte.bench.load.traffic import fitted, make_trace, read_trace

    if args.trace is not None:
        return fitted(read_trace(args.trace), context)
    return make_trace(args.seed, _sizes(args), context)


def _sizes(args: argparse.Namespace) -> "TrafficSizes":
    from dataclasses import replace

    from halfbyte.bench.load.traffic import TrafficSizes

    named = {name: getattr(args, name) for name, *_ in _SIZES}
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in named.items()
        if value is not None
    }
    return replace(TrafficSizes(), profiles=tuple(dict.fromkeys(args.profile)), **given)


def _default_record(model: str) -> Path:
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in model)[:60]
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path(f"load-{name}-{now}.json")
