"""Our server over random weights of the full geometry, for load clients on one GPU.

What `halfbyte serve` does, but for reading a checkpoint: the weights are those of
`halfbyte bench engine`, the tokenizer is the one that mistral-common carries.

    PYTHONPATH=src python benchmarks/serve_synthetic.py --port 8000 --products exact
    halfbyte bench load http://127.0.0.1:8000 --profile fixed --users 16 64
"""

import argparse
import dataclasses
import shutil
import signal
import tempfile
from importlib.resources import files
from pathlib import Path

import torch

from halfbyte.bench.engine_bench import make_weights
from halfbyte.chat.mask_plan import MaskMaker
from halfbyte.chat.tokens import load_chat
from halfbyte.cli.engine_flags import add_engine_arguments, engine_config
from halfbyte.engine.core import Engine
from halfbyte.engine.host import in_thread
from halfbyte.engine.load import HopperPart, resolve_alone
from halfbyte.engine.runner import Runner
from halfbyte.engine.service import EngineService
from halfbyte.kernels.cuda.library import KernelLibrary
from halfbyte.server.config import ServerConfig
from halfbyte.server.http.app import create_app
from halfbyte.server.launch import Front
from halfbyte.server.ops.supervise import Supervisor
from halfbyte.server.run import listen, serve

FLAGS = (
    "products",
    "target_gap_ms",
    "max_model_len",
    "max_sequences",
    "max_batch_tokens",
    "gpu_memory_utilization",
)


def make_engine(arguments: argparse.Namespace) -> Engine:
    """An engine over random weights, its steps measured as when a checkpoint is loaded."""
    config = engine_config(arguments, device="cuda", mode="fp8_declared", kv_cache="fp8")
    torch.manual_seed(0)
    library = KernelLibrary(torch.device("cuda", 0))
    with torch.inference_mode():
        weights = make_weights(library, arguments.layers, arguments.products)
    device, resolved = HopperPart(config, library, weights).build(resolve_alone(config))
    engine = Engine(Runner(device, resolved), resolved)
    engine.measure_steps()
    return engine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--layers", type=int, default=88)
    add_engine_arguments(parser, only=FLAGS)
    parser.set_defaults(max_model_len=40960, max_sequences=64, max_batch_tokens=2048)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        carried = files("mistral_common") / "data" / "tekken_240911.json"
        shutil.copyfile(str(carried), Path(directory) / "tekken.json")
        # Processes that read long requests load it, too.
        return run(arguments, Path(directory))


def run(arguments: argparse.Namespace, directory: Path) -> int:
    """Serve until a signal."""
    chat = load_chat(directory)
    engine = make_engine(arguments)
    facts = {**dataclasses.asdict(engine.config), **engine.facts()}
    print(facts, flush=True)
    front = Front(names=("big",), access_log=None)
    masks = MaskMaker(chat.vocabulary, chat.control)

    def service() -> EngineService:
        return in_thread(engine, masks, max_requests=front.limits.queued_requests * 2)

    config = ServerConfig(
        model_names=front.names,
        max_model_len=engine.max_model_len,
        vocab_size=engine.vocab_size,
        facts=tuple((f"engine_{name}", value) for name, value in facts.items()),
    )
    app = create_app(Supervisor(service(), service), chat, config, access_log=None)
    front.announce(app, [])
    # The server gives its signal back once it has ended, and then something is left to be said.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    serve(app, listen("127.0.0.1", arguments.port), app.state.announce, None)
    # What the pacer has learnt while serving.
    print({"learnt_ms": engine.facts().get("step_ms")}, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
