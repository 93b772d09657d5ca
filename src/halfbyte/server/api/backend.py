"""One server's parts, put together once; each route takes from here what it needs."""

import dataclasses
from dataclasses import dataclass

from halfbyte.chat.tokens import ChatFormat
from halfbyte.server.api.admission import Admission
from halfbyte.server.api.answers import Answers, EngineAnswers
from halfbyte.server.api.completion import Job
from halfbyte.server.api.preparer import Preparer
from halfbyte.server.call import Call
from halfbyte.server.config import ServerConfig
from halfbyte.server.ops import process_figures as process
from halfbyte.server.ops.metrics import Metrics
from halfbyte.server.ops.supervise import Answerer, Supervised, Supervisor


@dataclass(frozen=True, slots=True)
class Running:
    """A job in work: whose it is, and since when (monotonic)."""

    call: Call
    started_s: float
    job: Job


class Backend:
    """The parts of one server, each of which does one thing.

    preparer   makes jobs of requests
    admission  says which requests are let in
    answers    makes the pieces of their answers
    service    keeps what `answers` asks running
    running    jobs in work by the ids of their answers
    """

    def __init__(
        self,
        service: Supervisor[Supervised],
        answers: Answers,
        preparer: Preparer,
        admission: Admission,
        metrics: Metrics,
    ) -> None:
        self.service = service
        self.answers = answers
        self.preparer = preparer
        self.admission = admission
        self.metrics = metrics
        self.running: dict[str, Running] = {}
        self.chat = preparer.chat
        self.config = preparer.config
        self.body_room = preparer.body_room

    @property
    def is_ready(self) -> bool:
        """Whether new requests are taken: the engine runs and the server is not ending."""
        return self.service.is_ready and not self.admission.is_draining

    def metrics_text(self) -> str:
        """The page of /metrics in Prometheus text: server, process and engine."""
        engine = {**self.engine_figures(), "alive": int(self.service.is_ready)}
        stats = self.service.stats()
        return self.metrics.text(
            engine,
            process.figures(),
            self.config.model_names[0],
            vllm_names=self.config.vllm_metric_names,
            saturation=() if stats is None else stats.saturation,
        )

    def engine_figures(self) -> dict[str, float]:
        """The engine's figures by name; empty while there is no engine of ours."""
        stats = self.service.stats()
        if stats is None:
            return {}
        return {k: v for k, v in dataclasses.asdict(stats).items() if k != "saturation"}


def engine_backend(
    service: Supervisor[Answerer], chat: ChatFormat, config: ServerConfig
) -> Backend:
    """The parts of a server in front of its own engine."""
    metrics = Metrics()
    admission = Admission(config.limits, metrics)
    answers = EngineAnswers(service, metrics, admission)
    return Backend(service, answers, Preparer(chat, config), admission, metrics)
