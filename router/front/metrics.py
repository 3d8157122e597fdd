"""What /metrics shows. Names are vLLM's where the meaning is the same, so that dashboards work; the rest are tandem_*.

Label values come from closed sets only. Counts of workers, blocks and drops are read from the controller when scraped.
"""

import re
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from protocol.stages import Stage
from router.control.controller import Controller
from router.control.events import Outcome
from router.control.membership import Group, Member

_LATENCY_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_INTER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 10)
_TOKENS = tuple(1 << power for power in range(0, 21, 2))


class RequestMetrics:
    """Counters and histograms that the HTTP half feeds, one call per event."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, ("model_name", *labels), registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, ("model_name",), registry=registry, buckets=buckets).labels(model_name)

        self._model_name = model_name
        self._outcomes = counter("tandem_requests", "Requests that ended, by outcome.", "outcome")
        self._success = counter("vllm:request_success", "Requests that finished, by reason.", "finished_reason")
        self._rejected = counter("tandem_rejected", "HTTP calls refused before they became requests.", "status")
        self._prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of requests.").labels(model_name)
        self._cached_tokens = counter("vllm:prompt_tokens_cached", "Prompt tokens found in caches.").labels(model_name)
        self._tokens = counter("vllm:generation_tokens", "Tokens generated.").labels(model_name)
        self._first = histogram("vllm:time_to_first_token_seconds", "From submission to the first token.", _LATENCY_S)
        self._between = histogram("vllm:inter_token_latency_seconds", "Between two tokens.", _INTER_TOKEN_S)
        self._whole = histogram("vllm:e2e_request_latency_seconds", "From submission to the end.", _LATENCY_S)
        self._prompt_sizes = histogram("vllm:request_prompt_tokens", "Prompt tokens per request.", _TOKENS)
        self._output_sizes = histogram("vllm:request_generation_tokens", "Tokens per request.", _TOKENS)

    def started(self, num_prompt_tokens: int) -> None:
        self._prompt_tokens.inc(num_prompt_tokens)
        self._prompt_sizes.observe(num_prompt_tokens)

    def first_token(self, seconds: float, num_cached_tokens: int) -> None:
        self._first.observe(seconds)
        self._tokens.inc()
        self._cached_tokens.inc(num_cached_tokens)

    def next_token(self, seconds: float) -> None:
        self._between.observe(seconds)
        self._tokens.inc()

    def ended(self, outcome: Outcome, seconds: float, num_tokens: int) -> None:
        self._outcomes.labels(self._model_name, outcome.code).inc()
        self._whole.observe(seconds)
        self._output_sizes.observe(num_tokens)
        if outcome.stage is Stage.FINISHED:
            self._success.labels(self._model_name, outcome.code).inc()

    def rejected(self, status: int) -> None:
        self._rejected.labels(self._model_name, str(status)).inc()


class ClusterMetrics:
    """A prometheus_client collector over the controller's present state."""

    def __init__(self, controller: Controller, model_name: str) -> None:
        self._controller = controller
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        yield self._drops()
        yield from self._requests()
        yield from self._continuations()
        yield self._workers()
        yield from self._blocks()
        yield from self._worker_counters()

    def _drops(self) -> Metric:
        drops = CounterMetricFamily("tandem_dropped_messages", "Control messages not acted on.", labels=("reason",))
        for reason, count in sorted(self._controller.drops.items()):
            drops.add_metric((reason,), count)
        return drops

    def _continuations(self) -> Iterator[Metric]:
        attempts = self._controller.attempts
        text = "Attempts that followed one that had failed, by its failure."
        continued = CounterMetricFamily("tandem_requests_continued", text, labels=("reason",))
        for reason, count in sorted(attempts.continued.items()):
            continued.add_metric((reason,), count)
        yield continued
        yield GaugeMetricFamily("tandem_prompts_quarantined", "Prompts refused now.", value=attempts.num_quarantined)

    def _requests(self) -> Iterator[Metric]:
        stages = self._controller.attempts.stages()
        by_stage = GaugeMetricFamily("tandem_requests_in_stage", "Live requests, by stage.", labels=("stage",))
        for stage in Stage:
            if not stage.is_end:
                by_stage.add_metric((stage.name.lower(),), stages.count(stage))
        yield by_stage
        for name, wanted in (("running", Stage.DECODING), ("waiting", Stage.PREFILLING)):
            gauge = GaugeMetricFamily(f"vllm:num_requests_{name}", f"Requests {name}.", labels=("model_name",))
            gauge.add_metric((self._model_name,), stages.count(wanted))
            yield gauge

    def _workers(self) -> Metric:
        gauge = GaugeMetricFamily("tandem_workers", "Ranks, by role and state.", labels=("role", "state"))
        ranks = [(rank.info.role, rank.state) for _, rank in self._ranks()]
        for role, state in sorted(set(ranks)):
            gauge.add_metric((role, state), ranks.count((role, state)))
        return gauge

    def _blocks(self) -> Iterator[Metric]:
        labels = ("role", "group")
        blocks = GaugeMetricFamily("tandem_kv_blocks", "KV blocks of a group, by use.", labels=(*labels, "use"))
        usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of KV blocks held (1: all).", labels=labels)
        for group, rank in self._leaders():
            counts, where = rank.load.blocks, (group.spec.role, str(group.spec.group))
            for use in ("free", "cached", "held"):
                blocks.add_metric((*where, use), getattr(counts, use))
            usage.add_metric(where, counts.held / counts.total if counts.total else 0.0)
        yield blocks
        yield usage

    def _worker_counters(self) -> Iterator[Metric]:
        """Workers choose their counters' names; what is not a plain word never becomes a metric."""
        counters = CounterMetricFamily("tandem_worker", "Workers' own counters.", labels=("role", "group", "counter"))
        steps = CounterMetricFamily("tandem_worker_steps", "Forward passes of a group.", labels=("role", "group"))
        for group, rank in self._leaders():
            where = (group.spec.role, str(group.spec.group))
            steps.add_metric(where, rank.load.steps)
            for name, value in rank.load.counters.items():
                if re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name):
                    counters.add_metric((*where, name), value)
        yield counters
        yield steps

    def _ranks(self) -> Iterator[tuple[Group, Member]]:
        for _, group in sorted(self._controller.membership.groups.items()):
            for _, rank in sorted(group.ranks.items()):
                yield group, rank

    def _leaders(self) -> Iterator[tuple[Group, Member]]:
        return ((group, rank) for group, rank in self._ranks() if rank is group.leader)
