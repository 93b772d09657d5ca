"""Installs clients that others wrote, runs each against a server, and writes docs/clients.md.

    make clients                                 everything
    .venv/bin/python clients/run.py openai codex     some of them, with the server that both share

Python clients get environments of their own under build/clients, npm ones build/clients/node_modules;
nothing goes into .venv. A script prints a line of JSON for each case. A client that cannot be
installed, or takes too long, is reported and the next one runs. Agents run in an empty folder with a
home of their own, so that they find no settings and leave none, and are pointed at the local server
only.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "clients"
BUILD = ROOT / "build" / "clients"
DOCS = ROOT / "docs" / "clients.md"
COLUMNS = ("tools", "stream", "structured", "image", "error")

sys.path.insert(0, str(HERE / "python"))

from cases import PNG_BASE64  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Client:
    """One row of the table.

    venv       environment it runs in, or "npm"
    pins       what is shown as its version, and installed
    needs      further packages of that environment
    python     the oldest Python it asks for, where that is newer than ours may be
    """

    name: str
    venv: str
    pins: tuple[str, ...]
    script: str
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    needs: tuple[str, ...] = ()
    timeout_s: float = 300.0
    python: tuple[int, int] = (3, 11)


def _python(
    name: str, venv: str, pins: str, script: str, env: Mapping[str, str] | None = None,
    needs: str = "", timeout_s: float = 300.0,
) -> Client:
    return Client(
        name, venv, tuple(pins.split()), f"python/{script}.py", env or {}, tuple(needs.split()),
        timeout_s,
    )


def _npm(
    name: str, pins: str, script: str, env: Mapping[str, str] | None = None, needs: str = ""
) -> Client:
    return Client(
        name, "npm", tuple(pins.split()), f"js/{script}.mjs", env or {}, tuple(needs.split())
    )


def _agent(name: str, pins: str, kind: str, venv: str = "npm") -> Client:
    return Client(
        name, venv, tuple(pins.split()), "python/use_agents.py", {"AGENT": kind}, (), 600.0,
    )


_LANGCHAIN = "langchain-openai==1.7.4 langchain==1.5.2"
_PYDANTIC = "pydantic-ai-slim[openai,mistral,anthropic]==2.68.0"
_AI = "zod@4.6.7"
_LC_JS = "@langchain/core@1.4.0 zod@4.6.7"

# No client: with it the tests of the page look for faults of accessibility (tests/flows).
_AXE = "axe-core@4.14.1"

CLIENTS = (
    _python("openai", "sdk", "openai==3.57.0", "use_openai"),
    _python("mistralai", "sdk", "mistralai==3.7.0", "use_mistralai"),
    _python("anthropic", "sdk", "anthropic==2.14.0", "use_anthropic"),
    _npm("openai (JS)", "openai@6.49.0", "use_openai", needs=f"{_AI} {_AXE}"),
    _npm("mistralai (JS)", "@mistralai/mistralai@2.7.0", "use_mistralai", needs=_AI),
    _npm("anthropic (JS)", "@anthropic-ai/sdk@1.14.0", "use_anthropic"),
    _python("langchain-openai", "langchain", _LANGCHAIN, "use_langchain",
            {"LANGCHAIN_KIND": "openai"}),
    _python("langchain-openai, Responses", "langchain", _LANGCHAIN, "use_langchain",
            {"LANGCHAIN_KIND": "responses"}),
    _python("langchain-mistralai", "langchain", "langchain-mistralai==1.1.6", "use_langchain",
            {"LANGCHAIN_KIND": "mistralai"}),
    _npm("langchain-openai (JS)", "@langchain/openai@1.5.8", "use_langchain",
         {"LANGCHAIN_KIND": "openai"}, _LC_JS),
    _npm("langchain-mistralai (JS)", "@langchain/mistralai@1.2.0", "use_langchain",
         {"LANGCHAIN_KIND": "mistralai"}, _LC_JS),
    *(
        _python(f"litellm {prefix}/", "litellm", "litellm==1.110.2", "use_litellm",
                {"LITELLM_PREFIX": prefix})
        for prefix in ("openai", "hosted_vllm", "mistral")
    ),
    *(
        _npm(f"AI SDK {kind}", f"ai@6.0.326 {pin}", "use_ai_sdk", {"AI_SDK_KIND": kind}, _AI)
        for kind, pin in (
            ("openai-compatible", "@ai-sdk/openai-compatible@2.0.92"),
            ("openai", "@ai-sdk/openai@3.0.141"),
            ("mistral", "@ai-sdk/mistral@3.0.69"),
        )
    ),
    *(
        _python(f"pydantic-ai {kind}", "pydantic", _PYDANTIC, "use_pydantic_ai",
                {"PYDANTIC_AI_KIND": kind})
        for kind in ("chat", "responses", "mistral", "anthropic")
    ),
    _python("instructor", "instructor", "instructor==1.17.0", "use_instructor",
            needs="mistralai==1.12.4 anthropic==2.14.0"),
    _agent("claude-code", "@anthropic-ai/claude-code@2.1.197", "claude"),
    _agent("codex", "@openai/codex@0.171.0", "codex"),
    _agent("opencode", "opencode-ai@1.18.33", "opencode"),
    _agent("qwen-code", "@qwen-code/qwen-code@0.15.10", "qwen"),
    _python("openai-agents", "agents", "openai-agents==0.24.0", "use_openai_agents"),
    _python("smolagents", "smolagents", "smolagents[openai]==1.26.0", "use_smolagents"),
    _python("llama-index", "llamaindex", "llama-index-llms-openai-like==0.8.1",
            "use_llama_index"),
    _python("dspy", "dspy", "dspy==3.4.1", "use_dspy"),
    _python("llm", "llm", "llm==0.36", "use_llm"),
    Client("lm-eval", "lmeval", ("lm-eval[api]==0.4.13",), "lm_eval_check.py", timeout_s=900.0),
    _python("guidellm", "guidellm", "guidellm==0.8.1", "use_guidellm"),
    _agent("aider", "aider-chat==0.86.2", "aider", "aider"),
    *(
        dataclasses.replace(
            _agent(f"mistral-vibe {kind}", "mistral-vibe==3.0.2", f"vibe-{kind}", "vibe"),
            python=(3, 12),
        )
        for kind in ("mistral", "generic", "named", "reasoning", "anthropic")
    ),
)


# --- installing -----------------------------------------------------------------------------


def install(clients: Sequence[Client], log: Path) -> dict[str, str]:
    """One environment after the other; gives what went wrong by environment."""
    faults = {}
    for venv in dict.fromkeys(client.venv for client in clients):
        inside = [client for client in CLIENTS if client.venv == venv]
        pins = list(dict.fromkeys(pin for one in inside for pin in (*one.pins, *one.needs)))
        stamp = BUILD / (venv if venv != "npm" else "node_modules") / "halfbyte-pins"
        if stamp.exists() and stamp.read_text() == "\n".join(pins):
            continue
        print(f"installing {venv}: {' '.join(pins)}", flush=True)
        commands = _npm_commands(pins) if venv == "npm" else _venv_commands(venv, pins, inside)
        for command in commands:
            status, output = ended(command, BUILD, os.environ, 1800, log)
            if status != 0:
                faults[venv] = _last_line(output)
                break
        else:
            stamp.write_text("\n".join(pins))
    return faults


def _npm_commands(pins: Sequence[str]) -> list[list[str]]:
    (BUILD / "package.json").write_text('{"private": true}\n')
    return [["npm", "install", "--no-save", "--no-audit", "--no-fund", *pins]]


def _venv_commands(venv: str, pins: Sequence[str], inside: Sequence[Client]) -> list[list[str]]:
    python = str(BUILD / venv / "bin" / "python")
    interpreter = _interpreter(max(one.python for one in inside))
    # mistral-vibe asks for Python 3.12 and also runs with 3.11.
    options = [] if interpreter else ["--ignore-requires-python"]
    commands = [[python, "-m", "pip", "install", "-q", *options, *pins]]
    if not Path(python).exists():
        made = interpreter or sys.executable
        commands.insert(0, [made, "-m", "venv", str(BUILD / venv)])
    return commands


def _interpreter(oldest: tuple[int, int]) -> str | None:
    """A Python of this machine that is new enough: ours, one on the path, or one of pyenv's."""
    if sys.version_info >= oldest:
        return sys.executable
    names = [f"python3.{minor}" for minor in range(oldest[1], oldest[1] + 4)]
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [str(path) for name in names for path in sorted(versions.glob(f"*/bin/{name}"))]
    for python in [*names, *found]:
        # A shim of pyenv's is there for each version that is installed, and works for one.
        if shutil.which(python) and subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
            return python
    return None


# --- running --------------------------------------------------------------------------------


def ended(
    command: Sequence[str], cwd: Path, env: Mapping[str, str], timeout_s: float, log: Path
) -> tuple[int | None, str]:
    """Status and standard output of a command; None if it was killed for taking too long."""
    with log.open("a") as errors:
        errors.write(f"\n$ {' '.join(command)}\n")
        errors.flush()
        process = subprocess.Popen(
            command, cwd=cwd, env=dict(env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=errors, text=True, start_new_session=True,
        )
        status: int | None = None
        try:
            output, _ = process.communicate(timeout=timeout_s)
            status = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        finally:
            # What it may have left behind.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        errors.write(output)
    return status, output


@contextlib.contextmanager
def server(log: Path) -> Iterator[str]:
    """The scripted server on a free port; gives its address."""
    from halfbyte.server.run import free_port

    port = free_port()
    command = [
        sys.executable, str(HERE / "server.py"), "--port", str(port),
        "--model", str(BUILD / "model"), "--record", str(BUILD / "requests.jsonl"),
    ]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=output, text=True, start_new_session=True
        )
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            if not first.startswith("ready at "):
                raise SystemExit(f"the server did not start; see {log}")
            yield first.removeprefix("ready at ").strip()
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run(client: Client, url: str, log: Path) -> list[dict[str, object]]:
    """The cases of one client, each with `case`, `ok` and `note`."""
    work = BUILD / "work" / re.sub(r"\W+", "-", client.name)
    shutil.rmtree(work, ignore_errors=True)
    (work / "home").mkdir(parents=True)
    (work / "folder").mkdir()
    script = HERE / client.script
    binaries = BUILD / "node_modules" / ".bin"
    if client.venv != "npm":
        binaries = BUILD / client.venv / "bin"
    if script.suffix == ".mjs":
        # Modules are looked for beside the script.
        shutil.copytree(HERE / "js", BUILD / "js", dirs_exist_ok=True)
        command = ["node", str(BUILD / "js" / script.name)]
    elif client.venv == "npm" or script.parent == HERE:
        command = [sys.executable, str(script)]
    else:
        command = [str(binaries / "python"), str(script)]
    env = {
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "HOME": str(work / "home"),
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "NO_COLOR": "1",
        "DO_NOT_TRACK": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": f"{HERE / 'python'}:{ROOT / 'src'}",
        "HALFBYTE_URL": url,
        "PNG_BASE64": PNG_BASE64,
        **client.env,
    }
    status, output = ended(command, work / "folder", env, client.timeout_s, log)
    cases = [json.loads(line) for line in output.splitlines() if line.startswith('{"case"')]
    if status != 0:
        why = f"over {client.timeout_s:.0f} s" if status is None else f"exit status {status}"
        cases.append({"case": "to the end", "ok": False, "note": why})
    return cases


# --- telling --------------------------------------------------------------------------------


def table(results: Mapping[str, object]) -> str:
    """The page: a row a client, and what went wrong below."""
    rows, remarks = [], []
    for client in CLIENTS:
        found = results.get(client.name)
        version = ", ".join(client.pins)
        if isinstance(found, str) or found is None:
            rows.append([client.name, version, *["not tried"] * len(COLUMNS), ""])
            remarks.append(f"- **{client.name}** was not tried: {found or 'not asked for'}")
            continue
        cases = {one["case"]: one for one in found}
        cells = [
            "—" if name not in cases else "works" if cases[name]["ok"] else "**fails**"
            for name in COLUMNS
        ]
        others = [one for name, one in cases.items() if name not in COLUMNS]
        said = [f"{one['case']}{'' if one['ok'] else ' **(fails)**'}" for one in others]
        rows.append([client.name, version, *cells, "; ".join(said)])
        remarks += [
            f"- **{client.name}**, {one['case']}: `{' '.join(str(one['note']).split())}`"
            for one in found
            if not one["ok"]
        ]
    head = ["client", "version", "tool loop", "stream", "structured", "image", "error", "also"]
    lines = [
        f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"
        for row in [head, ["---"] * len(head), *rows]
    ]
    ends = "\n".join(remarks) or "Nothing failed."
    return _PAGE.format(table="\n".join(lines), remarks=ends)


_PAGE = """# Clients that others wrote

<!-- Written by clients/run.py; do not edit. -->

`make clients` installs the clients below at these versions into `build/clients` and runs each
against a server on a small random model with the full Tekken vocabulary. A hook forces the model's
tokens (`clients/server.py`); chat format, masks, streams and wire are as users get them. A tool
loop is a call, its result and the answer to it; "—" means that the client has no such thing or that
it comes with the tool loop (agents stream).

{table}

## What fails

{remarks}
"""


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "see build/clients/install.log"


def main() -> None:
    """Install, run, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only clients whose name begins so")
    parser.add_argument("--no-install", action="store_true", help="take what is there")
    args = parser.parse_args()
    chosen = [
        client
        for client in CLIENTS
        if not args.names or any(client.name.startswith(name) for name in args.names)
    ]
    BUILD.mkdir(parents=True, exist_ok=True)
    store = BUILD / "results.json"
    results = json.loads(store.read_text()) if store.exists() else {}
    faults = {} if args.no_install else install(chosen, BUILD / "install.log")
    failed = 0
    with server(BUILD / "server.log") as url:
        for client in chosen:
            home = BUILD / ("node_modules" if client.venv == "npm" else client.venv)
            if client.venv not in faults and not home.exists():
                results[client.name] = "it is not installed"
            elif client.venv in faults:
                results[client.name] = f"it cannot be installed: {faults[client.venv]}"
            else:
                results[client.name] = run(client, url, BUILD / "clients.log")
            found = results[client.name]
            wrong = [found] if isinstance(found, str) else [c for c in found if not c["ok"]]
            failed += bool(wrong)
            print(f"{client.name}: {wrong or 'works'}", flush=True)
            store.write_text(json.dumps(results, indent=1) + "\n")
    DOCS.write_text(table(results), encoding="utf-8")
    print(f"{len(chosen) - failed} of {len(chosen)} work; see {DOCS.relative_to(ROOT)}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
