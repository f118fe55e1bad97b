"""Numbers about a server, in Prometheus' text format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from flashlm_numba.serving.engine import Engine
from flashlm_numba.system.display import peak_rss_mb

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "flashlm_numba_"


class Metrics:
    """Counts since the server started. All methods are called in the thread of the event loop."""

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, int]] = Counter()  # by path and status; paths without a page are "other"
        self.prompt_tokens = 0
        self.sampled_tokens = 0
        self.refused = 0  # for lack of a place in the queue
        self.cancelled = 0  # since the client went away
        self.completions = 0
        self.completion_seconds = 0.0

    def mean_seconds(self) -> float:
        """Mean duration of the answered requests for completions; 0 before the first one."""
        return self.completion_seconds / self.completions if self.completions else 0.0

    def text(self, engine: Engine, connections: int) -> str:
        """The page."""
        lines: list[str] = []

        def add(name: str, kind: str, meaning: str, values: Mapping[str, float] | float) -> None:
            lines.append(f"# HELP {_PREFIX}{name} {meaning}")
            lines.append(f"# TYPE {_PREFIX}{name} {kind}")
            pairs: Iterable[tuple[str, float]] = values.items() if isinstance(values, Mapping) else [("", values)]
            lines.extend(f"{_PREFIX}{name}{labels} {value:.12g}" for labels, value in pairs)

        by_label = {f'{{path="{path}",status="{status}"}}': n for (path, status), n in sorted(self.responses.items())}
        add("responses_total", "counter", "HTTP responses by path and status.", by_label)
        add("prompt_tokens_total", "counter", "Tokens of prompts.", self.prompt_tokens)
        add("sampled_tokens_total", "counter", "Sampled tokens.", self.sampled_tokens)
        add("refused_total", "counter", "Requests refused because the queue was full.", self.refused)
        add("cancelled_total", "counter", "Requests whose client went away.", self.cancelled)
        add(
            "completion_seconds",
            "summary",
            "Durations of answered requests for completions.",
            {},
        )
        lines.append(f"{_PREFIX}completion_seconds_sum {self.completion_seconds:.12g}")
        lines.append(f"{_PREFIX}completion_seconds_count {self.completions}")
        add("streams", "gauge", "Texts that are being generated or scored.", engine.running)
        add("queue", "gauge", "Texts that wait.", engine.waiting)
        add("connections", "gauge", "Open connections.", connections)
        if (peak := peak_rss_mb()) is not None:
            add("peak_memory_bytes", "gauge", "Peak resident memory of the process.", peak * 1e6)
        return "\n".join(lines) + "\n"
