"""Traces of a run, for a collector of OpenTelemetry over HTTP; needs the extra ``otlp``.

Spans are made of events, never on a step: the whole run; in it a decision (from the answer to grow
to the trial: recording, ranking, kernels), each kernel from the event before it, in that its
compilation, load and probe, a fetch that went on beside the run, a trial, a gate, and the watch
over what was taken over; and, now and then, how each seed is doing. What else happens is an event
of the run's span.
"""

from __future__ import annotations

import gzip
import logging
import random
import ssl
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Final

from esper.contracts.errors import EsperError
from esper.contracts.events import (
    Detected,
    Event,
    Fossilized,
    GateRead,
    KernelPrepared,
    Ranked,
    RolledBack,
    RunEnded,
    RunStarted,
    SeedMeasured,
    StageChanged,
    TakenOver,
    TrialRead,
    TrialStarted,
)
from esper.contracts.reference import without_password
from esper.observability.sentences import is_annotation, sentence_of
from esper.resilience.attempt import Failed, attempt
from esper.resilience.clock import MonotonicClock, wall_time_s

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from opentelemetry.sdk.trace import ReadableSpan, Span, Tracer

    from esper.contracts.ports import Clock

_LOG = logging.getLogger(__name__)

SERVICE: Final = "esper"
REST_S: Final = 30.0
"""Seconds for which a collector that failed is left alone."""
MOST_KEPT: Final = 2_048
"""Spans that are kept for a collector that does not answer; of more, the oldest go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collector:
    """Where traces go.

    Attributes:
        endpoint: Whole address, for example ``http://localhost:4318/v1/traces``.
        headers: Sent with each request.
        timeout_s: Seconds for each wait of a request, above 0.
        certificate: File with the authorities that are trusted; None for the usual ones.
        compresses: Whether requests are compressed with gzip.
    """

    endpoint: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    timeout_s: float = 10.0
    certificate: str | None = None
    compresses: bool = False

    def send(self, spans: Sequence[ReadableSpan]) -> None:
        """Send spans; none at all is a request too, which says whether somebody answers.

        The standard exporter would draw from Python's own random generator for each request, and
        a run that is watched would come out other than one that is not.

        Raises:
            EsperError: The collector refused them; the message has its status.
            OSError: The certificate cannot be read.
            httpx2.HTTPError: It did not answer.
        """
        import httpx2
        from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans

        body = encode_spans(spans).SerializeToString()
        headers = {**self.headers, "content-type": "application/x-protobuf"}
        if self.compresses:
            body, headers["content-encoding"] = gzip.compress(body), "gzip"
        verify = ssl.create_default_context(cafile=self.certificate) if self.certificate else True
        with (
            httpx2.Client(timeout=self.timeout_s, trust_env=False, verify=verify) as client,
            client.stream("POST", self.endpoint, content=body, headers=headers) as answer,
        ):
            if not answer.is_success:
                msg = f"it answered {answer.status_code}"
                raise EsperError(msg)


class OpenTelemetrySink:
    """Makes spans of a run's events and sends them, some at a time, beside the training.

    Nobody waits for the collector. One that fails is left alone for a while, and a warning says
    so, once; what it has not taken is kept for it, up to a number, and given up at the end.

    Args:
        collector: Where they go.
        clock: Tells how long the collector is left alone.

    Raises:
        EsperError: The extra is not installed.

    Attributes:
        num_sent: Spans that the collector took.
        num_dropped: Spans that were given up.
    """

    is_slow: ClassVar[bool] = True

    def __init__(self, collector: Collector, *, clock: Clock | None = None) -> None:
        self._ended: list[ReadableSpan] = []
        self._tracer = _tracer(self._ended)
        self.name = f"the collector at {without_password(collector.endpoint)}"
        self._collector = collector
        self._clock = clock or MonotonicClock()
        self._rests_until_s: float | None = None
        self._start_s: float | None = None
        self._open: dict[str, Span] = {}
        self._decided: Event | None = None
        self._latest: Event | None = None
        self.num_sent = self.num_dropped = 0
        self._has_failed = False

    def publish(self, event: Event) -> None:
        """Take one event."""
        if self._start_s is None:
            self._start_s = wall_time_s() - event.time_s
        self._follow(event)
        self._latest = event
        if isinstance(event, RunEnded):
            for name in reversed(list(self._open)):
                self._end(name, event)
        if self._ended:
            self._send()

    def _follow(self, event: Event) -> None:
        """Begin and end the spans that an event is about."""
        match event:
            case RunStarted():
                self._begin("run", event, run_id=event.run_id)
            case KernelPrepared():
                self._prepared(event)
            case StageChanged(before=""):
                if "kernel" not in self._open:
                    self._begin("kernel", self._latest or event)
                self._end("kernel", event, **_told(event))
            case Detected() | Ranked() | TrialStarted():
                self._decide(event)
            case TrialRead():
                self._end("trial", event, **_told(event))
            case TakenOver():
                self._begin("holding", event, **_told(event))
            case Fossilized() | RolledBack():
                self._end("holding", event, outcome=event.kind)
                self._note(event)
            case GateRead() | SeedMeasured():
                name = "gate" if isinstance(event, GateRead) else "seed"
                self._begin(name, event, **_told(event))
                self._end(name, event)
            case _:
                self._note(event)

    def _decide(self, event: Detected | Ranked | TrialStarted) -> None:
        """Follow a decision, which goes from the answer to grow to the trial."""
        if isinstance(event, Ranked):
            self._begin("decision", self._decided or event, num_candidates=len(event.rows))
            return
        self._end("decision", event)
        if isinstance(event, Detected):
            self._decided = event
        else:
            self._begin("trial", event, **_told(event))

    def _prepared(self, event: KernelPrepared) -> None:
        """Make the span of what was done to a kernel; one that it failed for ends there."""
        if event.took_s is not None:
            began = replace(event, time_s=event.time_s - event.took_s)
            self._begin(event.what, began, **_told(event))
            self._end(event.what, event)
            return
        began_at = self._latest or event
        if "kernel" not in self._open:
            self._begin("kernel", began_at)
        self._begin(event.what, began_at, parent="kernel", **_told(event))
        self._end(event.what, event)
        if not event.done:
            self._end("kernel", event, **_told(event))

    def _begin(self, name: str, event: Event, *, parent: str = "run", **attributes: Any) -> None:
        from opentelemetry.trace import set_span_in_context

        self._end(name, event)
        outer = self._open.get(parent)
        self._open[name] = self._tracer.start_span(  # type: ignore[assignment] # the SDK's own span
            f"esper.{name}",
            context=None if outer is None else set_span_in_context(outer),
            attributes={"esper.update": event.update, **_named(attributes)},
            start_time=self._time_ns(event),
        )

    def _end(self, name: str, event: Event, **attributes: Any) -> None:
        span = self._open.pop(name, None)
        if span is not None:
            span.set_attributes({"esper.update_end": event.update, **_named(attributes)})
            span.end(self._time_ns(event))

    def _note(self, event: Event) -> None:
        run = self._open.get("run")
        if run is not None and is_annotation(event):
            told: dict[str, Any] = {"esper.update": event.update, "esper.text": sentence_of(event)}
            run.add_event(f"esper.{event.kind}", told, timestamp=self._time_ns(event))

    def _time_ns(self, event: Event) -> int:
        assert self._start_s is not None, "the first event set it"
        return int((self._start_s + event.time_s) * 1e9)

    def _send(self) -> None:
        """Send what has ended, unless the collector is left alone."""
        now_s = self._clock.now()
        if self._rests_until_s is not None and now_s < self._rests_until_s:
            self._drop_oldest()
            return
        sent = attempt(lambda: self._collector.send(self._ended))
        if not isinstance(sent, Failed):
            self.num_sent += len(self._ended)
            self._ended.clear()
            self._rests_until_s = None
            return
        self._rests_until_s = self._clock.now() + REST_S
        self._drop_oldest()
        if not self._has_failed:
            self._has_failed = True
            msg = "%s does not take traces: %s; the run goes on, later failures are not told"
            _LOG.warning(msg, self.name, sent)

    def _drop_oldest(self) -> None:
        too_many = max(0, len(self._ended) - MOST_KEPT)
        del self._ended[:too_many]
        self.num_dropped += too_many


def _tracer(ended: list[ReadableSpan]) -> Tracer:
    """Return a tracer of its own, which leaves what the process traces besides alone.

    Raises:
        EsperError: The extra is not installed.
    """
    try:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
        from opentelemetry.sdk.trace.id_generator import IdGenerator
    except ModuleNotFoundError as error:
        msg = "traces need the extra: pip install 'esper-morph[otlp]'"
        raise EsperError(msg) from error

    class Kept(SpanProcessor):
        """Keeps spans that have ended until they are sent."""

        def on_end(self, span: ReadableSpan) -> None:
            ended.append(span)

    class Ids(IdGenerator):
        """Names spans without drawing from the generator that the training draws from."""

        def __init__(self) -> None:
            self._random = random.SystemRandom()

        def generate_span_id(self) -> int:
            return self._random.randrange(1, 2**64)

        def generate_trace_id(self) -> int:
            return self._random.randrange(1, 2**128)

    resource = Resource.create()
    if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: SERVICE}))
    provider = TracerProvider(resource=resource, id_generator=Ids(), shutdown_on_exit=False)
    provider.add_span_processor(Kept())
    return provider.get_tracer("esper")  # type: ignore[return-value] # the SDK's own tracer


_TOLD: Final = (
    "package",
    "graft",
    "site",
    "blueprint",
    "artifact_id",
    "done",
    "gate",
    "passed",
    "sites",
    "blueprints",
    "parameters",
    "verdict",
    "taken",
    "reason",
    "effect",
    "stderr",
    "z",
    "threshold",
    "capacity",
    "samples",
    "flops",
    "seed_idx",
    "state",
    "alpha",
    "calls",
    "faults",
    "fault_rate",
    "health",
    "latency_us",
    "size_bytes",
)


def _told(event: Event) -> dict[str, Any]:
    """Return the fields of an event that its span shows."""
    return {name: getattr(event, name) for name in _TOLD if hasattr(event, name)}


def _named(values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"esper.{name}": value for name, value in values.items() if value is not None}
