"""`halfbyte chat`: talk to a checkpoint, or to a server, in the terminal."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from halfbyte.cli.engine_flags import add_engine_arguments, engine_config
from halfbyte.errors import UsageError

EXAMPLE = """\
  halfbyte chat build/demo/mixed
  halfbyte chat http://127.0.0.1:8000 --once "What is the capital of France?" """


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", help="checkpoint directory, or URL of a server")
    parser.add_argument(
        "--once", metavar="PROMPT", help="print one answer and leave; - reads stdin"
    )
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--model", help="model name (the server's first)")
    key = parser.add_mutually_exclusive_group()
    key.add_argument("--api-key", help="for servers that ask for one; other users here may see it")
    key.add_argument(
        "--api-key-env", metavar="NAME", help="environment variable that holds the API key"
    )
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--reasoning-effort", help="none, high: what the model knows")
    parser.add_argument("--seed", type=int)
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from halfbyte.client.client import ChatClient
    from halfbyte.client.terminal import Terminal

    names = ("temperature", "max_tokens", "reasoning_effort", "seed")
    settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    with contextlib.ExitStack() as stack:
        url = args.target
        if not url.startswith(("http://", "https://")):
            url = stack.enter_context(_local_server(args))
        client = ChatClient(url, _key(args))
        stack.callback(client.close)
        model = args.model or client.first_model()
        terminal = Terminal(client, model, settings, args.system)
        if args.once is None:
            terminal.loop()
            return 0
        prompt = sys.stdin.read() if args.once == "-" else args.once
        answer = terminal.ask(prompt, with_speed=False)
        return 0 if answer.finish_reason is not None else 130


def _key(args: argparse.Namespace) -> str | None:
    if args.api_key_env is None:
        return str(args.api_key) if args.api_key else None
    from halfbyte.evals.running.endpoint import read_key

    return read_key(args.api_key_env)


@contextlib.contextmanager
def _local_server(args: argparse.Namespace) -> Iterator[str]:
    """A server of this process over the directory; gives its URL."""
    directory = Path(args.target)
    if not directory.is_dir():
        raise UsageError(f"{directory} is neither a directory nor an http:// or https:// URL")
    from halfbyte.log import logger
    from halfbyte.server.defaults import read_sampling
    from halfbyte.server.launch import Front, launch
    from halfbyte.server.run import serving

    if args.once is not None:
        logger.setLevel("WARNING")
    # As `serve` does: a small model at temperature 1 talks noise, which its makers know.
    sampling = read_sampling(directory)
    front = Front((directory.resolve().name,), sampling=sampling, access_log=None)
    with serving(launch(directory, engine_config(args), front)) as url:
        yield url
