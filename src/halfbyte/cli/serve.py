"""`halfbyte serve`: a checkpoint behind an OpenAI-compatible API."""

import argparse
import contextlib
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.cli.config_file import add_config
from halfbyte.cli.engine_flags import add_engine_arguments, engine_config, refuse_ours
from halfbyte.errors import UsageError
from halfbyte.files import require_directory

if TYPE_CHECKING:  # imported when run, so that --help is quick
    from halfbyte.chat.tokens import ChatFormat
    from halfbyte.server.config import Limits
    from halfbyte.server.launch import Front
    from halfbyte.server.vllm.command import VllmPlan

EXAMPLE = """\
  halfbyte serve build/demo/mixed --port 8000 --served-model-name demo
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "demo", "messages": [{"role": "user", "content": "Hello"}]}'"""

_MAX_DRAIN_SECONDS = 86_400  # no answer takes a day

# Flags of other servers' commands that say what is found out here anyway: name, takes a value.
_UNNECESSARY = (
    ("--config-format", True),
    ("--load-format", True),
    ("--tokenizer-mode", True),
    ("--tool-call-parser", True),
    ("--reasoning-parser", True),
    ("--enable-auto-tool-choice", False),
    ("--trust-remote-code", False),
)


class _Dashboard(argparse.Action):
    """An action like `--help`: it needs no directory, and nothing else is done."""

    def __init__(self, option_strings: list[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print((resources.files("halfbyte.server") / "grafana.json").read_text("utf-8"), end="")
        parser.exit()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, help="checkpoint directory")
    add_config(parser)
    parser.add_argument(
        "--print-dashboard", action=_Dashboard, help="print a Grafana dashboard of /metrics and end"
    )
    _add_network(parser.add_argument_group("network"))
    _add_requests(parser.add_argument_group("requests"))
    _add_watching(parser.add_argument_group("watching"))
    add_engine_arguments(parser)
    _add_vllm(parser.add_argument_group("vLLM instead of our own engine"))
    ignored = parser.add_argument_group("accepted and not needed")
    for name, has_value in _UNNECESSARY:
        if has_value:
            ignored.add_argument(name, help=argparse.SUPPRESS)
        else:
            ignored.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    ignored.description = " ".join(name for name, _ in _UNNECESSARY)


def _add_network(network: argparse._ActionsContainer) -> None:
    network.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    network.add_argument("--port", type=int, default=8000, help="0 takes a free one (%(default)s)")
    network.add_argument(
        "--api-key", action="append", default=[], help="may be given several times"
    )
    network.add_argument(
        "--api-key-file", type=Path, help="one key a line; # begins a comment, also behind a key"
    )
    network.add_argument(
        "--served-model-name", nargs="+", help="names to answer to (the directory's name)"
    )
    network.add_argument(
        "--image-url-host",
        action="append",
        default=[],
        help="fetch http(s) images from this host; .example.com for all below; off without",
    )
    network.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name this server is reached by, beside addresses, localhost and names without a "
        "dot; .example.com for all below, * for any; may be given several times",
    )
    network.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web pages of this origin (https://chat.example.com, * for any) may use the API; "
        "may be given several times; none without",
    )
    network.add_argument("--drain-seconds", type=float, default=30.0, help="(%(default)s)")
    network.add_argument(
        "--limit",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change one of the limits that /health shows; may be given several times",
    )


def _add_requests(requests: argparse._ActionsContainer) -> None:
    requests.add_argument(
        "--generation-config",
        default="auto",
        choices=["auto", "none"],
        help="sample as the checkpoint's generation_config.json recommends where a request does "
        "not say, or (none) by OpenAI's defaults (%(default)s)",
    )
    requests.add_argument(
        "--unknown-fields",
        default="accept",
        choices=["accept", "refuse"],
        help="leave out fields that nobody knows and name them in a header, or answer 400 "
        "(%(default)s)",
    )
    requests.add_argument(
        "--strict-effort",
        action="store_true",
        help="refuse a reasoning_effort that the model does not know instead of taking the nearest",
    )
    requests.add_argument(
        "--dialect",
        default="auto",
        choices=["auto", "openai", "mistral"],
        help="form of chat answers; auto goes by the client (%(default)s)",
    )


def _add_watching(watching: argparse._ActionsContainer) -> None:
    watching.add_argument(
        "--admin-port",
        type=int,
        help="serve the admin routes here; 0 takes a free one; off without",
    )
    watching.add_argument("--admin-host", default="127.0.0.1", help="(%(default)s)")
    watching.add_argument(
        "--access-log", type=Path, metavar="FILE", help="a file for it (among the other log lines)"
    )
    watching.add_argument(
        "--vllm-metric-names", action="store_true", help="also write metrics as vLLM names them"
    )
    watching.add_argument(
        "--otlp-endpoint", metavar="URL", help="send OpenTelemetry traces, by OTLP over HTTP"
    )


def _add_vllm(vllm: argparse._ActionsContainer) -> None:
    vllm.add_argument(
        "--engine", default="halfbyte", choices=["halfbyte", "vllm"], help="(%(default)s)"
    )
    vllm.add_argument(
        "--print",
        nargs="?",
        const="command",
        choices=["command", "config"],
        help="show the command, or its flags as a file for `vllm serve --config`, and leave",
    )
    vllm.add_argument(
        "--pipeline-parallel-size", "-pp", type=int, default=1, help="machines, over Ray"
    )
    vllm.add_argument(
        "--ray", action="store_true", help="let Ray start the workers of one machine, too"
    )


def run(args: argparse.Namespace) -> int:
    if args.engine != "vllm" and (args.pipeline_parallel_size != 1 or args.ray):
        raise UsageError("--pipeline-parallel-size and --ray need --engine vllm")
    require_directory(args.directory)
    if not 0 <= args.drain_seconds <= _MAX_DRAIN_SECONDS:
        raise UsageError(
            f"--drain-seconds {args.drain_seconds}: a number from 0 to {_MAX_DRAIN_SECONDS:,}"
        )
    for name, port in (("--port", args.port), ("--admin-port", args.admin_port)):
        if port is not None and not 0 <= port < 65536:
            raise UsageError(f"{name} {port} is not a port")
    from halfbyte.child import free_port
    from halfbyte.server.config import Limits, read_limits
    from halfbyte.server.http.admin import create_admin
    from halfbyte.server.launch import launch
    from halfbyte.server.run import address, listen, serve

    for name, _ in _UNNECESSARY:
        if getattr(args, name[2:].replace("-", "_")):
            print(f"{name} is not needed; the checkpoint says it", flush=True)
    limits = read_limits(args.limit, Limits(drain_s=args.drain_seconds))
    names = tuple(args.served_model_name or (args.directory.resolve().name,))
    if args.print is not None:
        return _print_vllm(args, names[0], limits.images)
    front = _front(args, names, limits)
    with contextlib.ExitStack() as stack:
        # Listening first: a port in use is said before minutes of loading.
        listener = stack.enter_context(listen(args.host, args.port))
        admin_listener = None
        if args.admin_port is not None:
            admin_listener = stack.enter_context(listen(args.admin_host, args.admin_port))
        if args.engine == "vllm":
            from halfbyte.server.launch_vllm import launch_vllm

            _complete_for_vllm(args, stack)
            plan, chat = _plan_vllm(args, names[0], limits.images, free_port())
            app = launch_vllm(plan, chat, front)
        else:
            app = launch(args.directory, engine_config(args), front)
        admin = None
        if admin_listener is not None:
            admin = (
                create_admin(app.state.backend, access_log=front.access_log),
                admin_listener,
            )
            print(f"admin routes at {address(admin_listener)}", flush=True)
        return 0 if serve(app, listener, app.state.announce, admin) else 1


def _front(args: argparse.Namespace, names: tuple[str, ...], limits: "Limits") -> "Front":
    from halfbyte.server.defaults import SamplingDefaults, read_sampling
    from halfbyte.server.http.gate import file_log, log_access
    from halfbyte.server.http.origins import read_hosts, read_origins
    from halfbyte.server.launch import Front, read_keys
    from halfbyte.server.ops.tracing import open_tracing

    recommends = args.generation_config == "auto"
    return Front(
        names=names,
        keys=read_keys(args.api_key, args.api_key_file),
        image_hosts=tuple(args.image_url_host),
        allowed_hosts=(*read_hosts(args.allowed_host), *_own_name(args.host)),
        allowed_origins=read_origins(args.allow_origin),
        limits=limits,
        vllm_metric_names=args.vllm_metric_names,
        sampling=read_sampling(args.directory) if recommends else SamplingDefaults(),
        unknown_fields=args.unknown_fields,
        strict_effort=args.strict_effort,
        dialect=args.dialect,
        access_log=log_access if args.access_log is None else file_log(args.access_log),
        tracing=None if args.otlp_endpoint is None else open_tracing(args.otlp_endpoint),
    )


def _own_name(host: str) -> tuple[str, ...]:
    """The name given to --host: whoever listens on a name is asked for by it."""
    return () if not host.strip("0123456789.:abcdefABCDEF") else (host.lower(),)


def _complete_for_vllm(args: argparse.Namespace, stack: contextlib.ExitStack) -> None:
    """Let vLLM see a folder of links to the checkpoint where it needs files that are not there."""
    from halfbyte.checkpoint.metadata import read_config
    from halfbyte.log import logger
    from halfbyte.server.vllm.command import completed, lacks_hub_tokenizer

    config, _, _ = read_config(args.directory)
    if config.vision is None or not lacks_hub_tokenizer(args.directory):
        return
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="halfbyte-vllm-")))
    args.directory = completed(args.directory, folder)
    logger.info("vLLM reads %s: links, and a tokenizer.json made of tekken.json", folder)


def _plan_vllm(
    args: argparse.Namespace, name: str, max_images: int, port: int
) -> "tuple[VllmPlan, ChatFormat]":
    from halfbyte.chat.tokens import load_chat
    from halfbyte.server.vllm.command import VllmOptions, plan_vllm

    refuse_ours(args)
    chat = load_chat(args.directory)
    options = VllmOptions(
        name=name,
        port=port,
        tensor_parallel=args.tensor_parallel_size,
        pipeline_parallel=args.pipeline_parallel_size,
        uses_ray=args.ray,
        max_model_len=args.max_model_len,
        max_sequences=args.max_sequences,
        gpu_memory_utilization=args.gpu_memory_utilization,
        max_images=max_images,
    )
    plan = plan_vllm(args.directory, chat, options)
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    return plan, chat


def _print_vllm(args: argparse.Namespace, name: str, max_images: int) -> int:
    if args.engine != "vllm":
        raise UsageError("--print shows the command of --engine vllm")
    plan, _ = _plan_vllm(args, name, max_images, (args.port or 8000) + 1)
    if args.print == "config":
        print(plan.config(), end="")
        return 0
    if plan.flags.get("distributed-executor-backend") == "ray":
        print("# First, here:                    ray start --head --port 6379")
        print("# Then, on every other machine:   ray start --address THIS_MACHINE:6379")
        print(f"# The checkpoint must be at {args.directory} on all of them.")
    print(plan.shell())
    return 0


def kept(args: argparse.Namespace) -> str:
    """A sentence for a Ctrl-C before there is a server; later the server ends its answers."""
    return f"{args.directory} was still being loaded; give the same command again to serve it"
