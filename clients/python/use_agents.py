"""Agents of the command line: each reads a file through its own tool and tells what is in it."""

import json
import os
import subprocess
from pathlib import Path

from cases import BASE, MODEL, V1, case, main

HOME, FOLDER = Path(os.environ["HOME"]), Path.cwd()
NOTE = FOLDER / "note.txt"
NOTE.write_text("hello from a file\n")
SAID = "The note says hello."
KIND = os.environ["AGENT"]
ASKED = MODEL
PATH = json.dumps(str(NOTE))


def script(call):
    return f"@call {call}\n@say {SAID}"


def told(command, text="", **env):
    """What a command prints; it must end well and give the last turn's words."""
    done = subprocess.run(
        command, cwd=FOLDER, env={**os.environ, **env}, input=text, text=True,
        capture_output=True, timeout=500,
    )
    print(done.stderr[-3000:])
    if MODEL != ASKED:
        return done.stdout + done.stderr
    ends = f"status {done.returncode}: {done.stdout[-300:]} {done.stderr[-300:]}"
    assert done.returncode == 0, ends
    assert SAID in done.stdout, ends
    return done.stdout


def used(output):
    """The tool has read the file, and its result has come back."""
    if MODEL != ASKED:
        # As the server has said it, so that somebody knows what to change; claude-code has words
        # of its own for it.
        known = (f"the model '{MODEL}' does not exist", f"selected model ({MODEL})")
        # Some break lines where the window ends.
        said = " ".join(output.split())
        assert any(one in said for one in known), said[-800:]
        return
    assert NOTE.read_text().strip() in output, output[-500:]


def claude():
    asked = script(f'Read {{"file_path":{PATH}}}')
    used(
        told(
            ["claude", "-p", "--output-format", "stream-json", "--verbose", "--allowedTools",
             "Read", "--max-turns", "4", asked],
            ANTHROPIC_BASE_URL=BASE, ANTHROPIC_AUTH_TOKEN="none", ANTHROPIC_MODEL=MODEL,
            ANTHROPIC_SMALL_FAST_MODEL=MODEL, ANTHROPIC_DEFAULT_HAIKU_MODEL=MODEL,
            CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1", DISABLE_TELEMETRY="1",
            DISABLE_AUTOUPDATER="1", DISABLE_ERROR_REPORTING="1",
        )
    )


def codex():
    settings = HOME / ".codex"
    settings.mkdir(exist_ok=True)
    (settings / "config.toml").write_text(
        f"""model = "{MODEL}"
model_provider = "halfbyte"
check_for_update_on_startup = false
[analytics]
enabled = false
[model_providers.halfbyte]
name = "halfbyte"
base_url = "{V1}"
wire_api = "responses"
"""
    )
    used(
        told(
            ["codex", "exec", "--skip-git-repo-check", "--json", "-s", "danger-full-access",
             script('exec_command {"cmd":"cat note.txt"}')]
        )
    )


def opencode():
    (FOLDER / "opencode.json").write_text(
        json.dumps(
            {
                "$schema": "https://opencode.ai/config.json",
                "autoupdate": False,
                "share": "disabled",
                "model": f"halfbyte/{MODEL}",
                "provider": {
                    "halfbyte": {
                        "npm": "@ai-sdk/openai-compatible",
                        "name": "halfbyte",
                        "options": {"baseURL": V1, "apiKey": "none"},
                        "models": {MODEL: {"name": MODEL, "reasoning": True, "tool_call": True}},
                    }
                },
            }
        )
    )
    used(
        told(
            ["opencode", "run", "--format", "json"],
            # A message on the command line would be put into quotation marks.
            script(f'read {{"filePath":{PATH}}}'),
            OPENCODE_DISABLE_AUTOUPDATE="1", OPENCODE_DISABLE_MODELS_FETCH="1",
            OPENCODE_DISABLE_LSP_DOWNLOAD="1",
        )
    )


def qwen():
    used(
        told(
            ["qwen", "--auth-type", "openai", "--openai-api-key", "none", "--openai-base-url", V1,
             "--model", MODEL, "--yolo", "--output-format", "stream-json", "-p",
             script(f'read_file {{"file_path":{PATH}}}')],
            QWEN_TELEMETRY_ENABLED="false",
        )
    )


def aider():
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com"]
    subprocess.run([*git, "init", "-q"], check=True, cwd=FOLDER)
    block = r"note.txt\n<<<<<<< SEARCH\nhello from a file\n=======\nhello again\n>>>>>>> REPLACE\n"
    done = subprocess.run(
        ["aider", "--model", f"openai/{MODEL}", "--openai-api-base", V1, "--openai-api-key",
         "none", "--edit-format", "diff", "--yes-always", "--no-analytics", "--no-check-update",
         "--no-show-model-warnings", "--no-show-release-notes", "--no-auto-commits",
         "--no-gitignore", "--message", "@say " + block, "note.txt"],
        cwd=FOLDER, env=os.environ, stdin=subprocess.DEVNULL, text=True, capture_output=True,
        timeout=500,
    )
    print(done.stderr[-3000:])
    if MODEL != ASKED:
        used(done.stdout + done.stderr)
        return
    assert NOTE.read_text() == "hello again\n", done.stdout[-800:] + done.stderr[-300:]


def vibe(style):
    settings = HOME / ".vibe"
    settings.mkdir(exist_ok=True)
    mistral = style == "mistral"
    api_style = {"mistral": "openai", "generic": "openai", "named": "openai"}.get(style, style)
    # A provider of that name is asked as Mistral's own API, whatever its style.
    name = "mistral" if style == "named" else "halfbyte"
    # Local models are offered efforts that this one does not know.
    thinking = "low" if style == "generic" else "high"
    base = BASE if api_style == "anthropic" else V1
    (settings / "config.toml").write_text(
        f"""active_model = "tiny"
enable_telemetry = false
enable_update_checks = false
enable_auto_update = false
[[providers]]
name = "{name}"
api_base = "{base}"
api_key_env_var = "HALFBYTE_KEY"
backend = "{'mistral' if mistral else 'generic'}"
api_style = "{api_style}"
[[models]]
name = "{MODEL}"
provider = "{name}"
alias = "tiny"
thinking = "{thinking}"
"""
    )
    asked = "@think I read it. ;; " + script(f'read_file {{"path":{PATH}}}')
    output = told(
        ["vibe", "--output", "json", "--max-turns", "4", "--agent", "auto-approve", "--trust",
         "-p", asked],
        HALFBYTE_KEY="none", MISTRAL_API_KEY="none",
    )
    used(output)
    # Once in what was asked, and once as the model's own thought.
    if MODEL != ASKED:
        return
    assert output.count("I read it.") >= 2 and "'thinking'" not in output, output[:3000]


def work():
    if KIND.startswith("vibe-"):
        vibe(KIND.removeprefix("vibe-"))
    else:
        {"claude": claude, "codex": codex, "opencode": opencode, "qwen": qwen, "aider": aider}[
            KIND
        ]()


@case("tools")
def tools():
    work()


@case("error")
def error():
    global MODEL
    MODEL = "other"
    work()


main()
