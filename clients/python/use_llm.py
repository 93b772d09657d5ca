"""The llm command, with a model described in its own settings."""

import json
import os
import subprocess
from pathlib import Path

from cases import MODEL, PNG, SAID, STREAM_SCRIPT, TOOLS_SCRIPT, V1, case, equal, main

HOME = Path(os.environ["HOME"]) / "llm"
HOME.mkdir(exist_ok=True)
ENV = {**os.environ, "LLM_USER_PATH": str(HOME), "OPENAI_API_KEY": "none"}
(HOME / "extra-openai-models.yaml").write_text(
    f"""- model_id: {MODEL}
  model_name: {MODEL}
  api_base: {V1}
  vision: true
  supports_schema: true
  supports_tools: true
  reasoning: true
- model_id: wrong
  model_name: other
  api_base: {V1}
"""
)


def llm(*arguments, status=0):
    done = subprocess.run(
        ["llm", *arguments], env=ENV, stdin=subprocess.DEVNULL, text=True, capture_output=True,
        timeout=120,
    )
    equal((done.returncode, done.stderr[-300:] if done.returncode != status else ""), (status, ""))
    return done.stdout.strip() or done.stderr


@case("tools")
def tools():
    code = "def get_weather(city: str) -> str:\n    assert city == 'Rome'\n    return 'sunny'"
    equal(llm("-m", MODEL, "--functions", code, TOOLS_SCRIPT), SAID)


@case("stream")
def stream():
    equal(llm("-m", MODEL, STREAM_SCRIPT), STREAM_SCRIPT[5:])


@case("structured")
def structured():
    made = llm("-m", MODEL, "--schema", "name, age int", '@say {"name":"Ada","age":36}')
    equal(json.loads(made), {"name": "Ada", "age": 36})


@case("image")
def image():
    Path("red.png").write_bytes(PNG)
    equal(llm("-m", MODEL, "-a", "red.png", "@say Red."), "Red.")


@case("error")
def error():
    assert "other" in llm("-m", "wrong", "x", status=1)


@case("continued, with effort")
def continued():
    llm("-m", MODEL, "-o", "reasoning_effort", "high", "@think Hm. ;; @say One.")
    equal(llm("-c", "@say Two."), "Two.")


main()
