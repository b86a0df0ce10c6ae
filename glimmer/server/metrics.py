"""Prometheus metrics. Where vLLM has a metric of the same meaning, its name is used, so that dashboards fit.

Numbers of the moment are those of the engine's last sign of life (client.py), at most a second old. Counters and
histograms are kept here. Not here: when something happens (service.py).
"""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector

from glimmer.engine_load import EngineLoad

FIRST_TOKEN = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
)
BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
WHOLE_REQUEST = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
TOKENS = tuple(float(n * 10**e) for e in range(6) for n in (1, 2, 5))

Now = Callable[[], EngineLoad | None]


class AcceptedByPlace(Collector):
    """Drafts that were accepted, by their place among those of a step; as many places as there have been."""

    def __init__(self, model: str, alive: Now):
        self._model, self._alive = model, alive

    def collect(self) -> Iterator[GaugeMetricFamily]:
        name, sign = "vllm:spec_decode_num_accepted_tokens_per_pos", self._alive()
        family = GaugeMetricFamily(name, "Drafts that were accepted, by place.", labels=["model_name", "position"])
        for place, count in enumerate(() if sign is None else sign.accepted_by_place):
            family.add_metric([self._model, str(place)], count)
        yield family


class Metrics:
    """All metrics of one server. alive: the engine's last sign of life; deaths: how often it has died."""

    def __init__(self, model: str, alive: Now, deaths: Callable[[], int], waiting: Callable[[], int]):
        self._registry = CollectorRegistry()
        self._model = model

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(name, what, ["model_name", *labels], registry=self._registry)

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(name, what, ["model_name"], registry=self._registry, buckets=buckets)
            return made.labels(model)

        def gauge(name: str, what: str, value: Callable[[EngineLoad], float]) -> None:
            made = Gauge(name, what, ["model_name"], registry=self._registry).labels(model)

            def current() -> float:
                sign = alive()
                return 0.0 if sign is None else float(value(sign))

            made.set_function(current)

        gauge("vllm:num_requests_running", "Answers that are being computed.", lambda sign: sign.running)
        gauge("vllm:num_requests_waiting", "Answers that wait for the engine.", lambda sign: sign.waiting)
        used = lambda sign: 1 - sign.free_blocks / max(sign.num_blocks, 1)
        gauge("vllm:kv_cache_usage_perc", "The share of the cache's blocks that answers hold; 1 is all.", used)
        gauge("glimmer:free_blocks", "Blocks of the cache that no answer holds.", lambda sign: sign.free_blocks)
        gauge("glimmer:blocks", "Blocks of the cache.", lambda sign: sign.num_blocks)
        gauge(
            "glimmer:preemptions",
            "Answers that gave their blocks back, since the engine began.",
            lambda sign: sign.preemptions,
        )
        gauge("vllm:spec_decode_num_drafts", "Checks of an answer's drafts.", lambda sign: sign.drafts)
        gauge("vllm:spec_decode_num_draft_tokens", "Drafts that were checked.", lambda sign: sign.draft_tokens)
        gauge("vllm:spec_decode_num_accepted_tokens", "Drafts that were accepted.", lambda sign: sign.accepted_tokens)
        gauge("glimmer:tokens_per_step", "Tokens that a step brings to an answer.", lambda sign: sign.tokens_per_step)
        gauge("glimmer:draft_gain", "How much faster drafts make the engine just now.", lambda sign: sign.draft_gain)
        self._registry.register(AcceptedByPlace(model, alive))
        disk: dict[str, tuple[str, Callable[[EngineLoad], float]]] = {
            "hit_tokens": ("Tokens read from disk, and not computed.", lambda sign: sign.disk_hit_tokens),
            "read_bytes": ("Bytes of KV blocks read from disk.", lambda sign: sign.disk_read_bytes),
            "written_bytes": ("Bytes of KV blocks written to disk.", lambda sign: sign.disk_written_bytes),
            "stored_bytes": ("Bytes of all KV blocks on disk.", lambda sign: sign.disk_stored_bytes),
            "damaged_files": ("Damaged files of KV blocks, ignored.", lambda sign: sign.disk_damaged_files),
            "dropped_pages": ("Pages of KV blocks not written in time.", lambda sign: sign.disk_dropped_pages),
        }
        for name, (what, value) in disk.items():
            gauge(f"glimmer:kv_disk_{name}", what, value)
        up = Gauge("glimmer:engine_up", "1 if the engine answers.", ["model_name"], registry=self._registry)
        up.labels(model).set_function(lambda: float(alive() is not None))
        died = Gauge("glimmer:engine_deaths", "How often the engine has died.", ["model_name"], registry=self._registry)
        died.labels(model).set_function(lambda: float(deaths()))
        queue = Gauge(
            "glimmer:requests_without_token",
            "Requests whose first token has not come.",
            ["model_name"],
            registry=self._registry,
        )
        queue.labels(model).set_function(lambda: float(waiting()))
        self.prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts.").labels(model)
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens of answers.").labels(model)
        self.cache_queries = counter("vllm:prefix_cache_queries", "Tokens looked for in the cache.").labels(model)
        self.cache_hits = counter("vllm:prefix_cache_hits", "Tokens found in the cache.").labels(model)
        self._success = counter("vllm:request_success", "Answers that have ended, by their reason.", "finished_reason")
        self._refused = counter("glimmer:requests_refused", "Requests that were not answered, by status.", "status")
        self.first_token = histogram(
            "vllm:time_to_first_token_seconds", "From a request to its first token.", FIRST_TOKEN
        )
        self.between_tokens = histogram(
            "vllm:inter_token_latency_seconds", "From one token of an answer to the next.", BETWEEN_TOKENS
        )
        self.whole_request = histogram(
            "vllm:e2e_request_latency_seconds", "From a request to its last token.", WHOLE_REQUEST
        )
        self.prompt_length = histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self.answer_length = histogram("vllm:request_generation_tokens", "Tokens of an answer.", TOKENS)

    def ended(self, reason: str) -> None:
        """An answer has ended; reason: a finish_reason, or "abort"."""
        self._success.labels(self._model, reason).inc()

    def refused(self, status: int) -> None:
        """A request has got an error."""
        self._refused.labels(self._model, str(status)).inc()

    def text(self) -> tuple[bytes, str]:
        """All of them in Prometheus' text format, and its media type."""
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4
