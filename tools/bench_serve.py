"""Speed of the server: tokens per second of several streams over loopback, and the time between their tokens.

\b
    python tools/bench_serve.py                     with a model of the default shape that is hardly trained
    python tools/bench_serve.py --run runs/tree10   with a trained model
    python tools/bench_serve.py --quick             a few tokens, for a test
    python tools/bench_serve.py --json out.json     write what was measured

The program starts `flashlm-numba serve` in a process of its own. First it compares texts that the server generates at
the same time with those that the model generates directly. A difference ends the program with status 1. In the closed
loop each client sends one request after another. In the open loop requests arrive at random times, at a share of the
rate of the closed loop, whether earlier ones are answered or not. `direct` is the same work without a server: one
thread per stream in this process, each text by itself, also where the server computes several at once. The server joins
the tokens that are ready at the same time into one event, so the time between events is at least that between tokens.
Clients and server share the cores. Use a quiet machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

if __package__ in (None, ""):  # run as a file, the checkout is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flashlm_numba as fl
from flashlm_numba.cli.doctor import cpu_name
from flashlm_numba.inference.generate import Continuation, generate_ids
from flashlm_numba.serving.application import seed_of
from flashlm_numba.serving.served import FixedModel, Served, load_served
from flashlm_numba.serving.server import choose_threads
from flashlm_numba.system.display import plural
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.process import PYTHON, environment
from flashlm_numba.system.threads import available_threads
from tools.bench import allocators, machine, output

STREAMS = (1, 4, 16, 64)
CHECKED = 8  # requests at the same time, whose texts are compared
SHARES = (0.5, 0.8)  # of the closed loop's requests per second, in the open loop


@dataclass(frozen=True)
class Work:
    """What every request asks for."""

    prompts: list[list[int]]
    tokens: int
    sampling: dict[str, Any]

    def values(self, number: int) -> dict[str, Any]:
        """The body of the request with a number, which is its seed."""
        prompt = self.prompts[number % CHECKED]
        return {"prompt": prompt, "seed": number, "max_tokens": self.tokens, **self.sampling}


@dataclass
class Measured:
    """What clients saw, in seconds."""

    tokens: int = 0
    requests: int = 0
    elapsed: float = 0.0
    first: list[float] = field(default_factory=list)  # from the request to the first event with text
    between: list[float] = field(default_factory=list)  # events with text
    whole: list[float] = field(default_factory=list)  # from the request to its end

    def row(self) -> dict[str, Any]:
        """Rates, and quantiles in milliseconds."""
        times = {"first_event_ms": self.first, "between_events_ms": self.between, "request_ms": self.whole}
        return {
            "tokens_per_s": self.tokens / self.elapsed,
            "requests_per_s": self.requests / self.elapsed,
            **{name: quantiles(values) for name, values in times.items()},
        }


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median and 99 % quantile in milliseconds; zeros without values."""
    median, p99 = np.quantile(seconds or [0.0], [0.5, 0.99]) * 1e3
    return {"median": float(median), "p99": float(p99)}


@contextlib.contextmanager
def server(run: Path, threads: int | None) -> Iterator[int]:
    """A server in a process of its own; yields its port."""
    arguments = [*PYTHON, "-m", "flashlm_numba", "serve", str(run), "--port", "0"]
    arguments += [] if threads is None else ["--threads", str(threads)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        try:
            assert process.stdout is not None
            found = re.search(r":(\d+)/v1$", process.stdout.readline().strip())
            if found is None:
                raise click.ClickException("The server did not start.")
            yield int(found[1])
        finally:
            process.terminate()


async def request(port: int, values: dict[str, Any], seen: Measured) -> str:
    """Send a request for a stream, and return its text. Raises ClickException for another answer."""
    body = json.dumps({**values, "stream": True, "stream_options": {"include_usage": True}}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        began = last = time.perf_counter()
        writer.write(head.encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise click.ClickException(f"The server answered {status.decode().strip()}.")
        await reader.readuntil(b"\r\n\r\n")
        text: list[str] = []
        while True:
            event = (await reader.readuntil(b"\n\n")).partition(b"data: ")[2]
            now = time.perf_counter()
            if event.startswith(b"[DONE]"):
                break
            found = json.loads(event)
            if "error" in found:
                raise click.ClickException(found["error"]["message"])
            if found["usage"]:
                seen.tokens += found["usage"]["completion_tokens"]
            elif found["choices"][0]["text"]:
                (seen.between if text else seen.first).append(now - last)
                last = now
                text.append(found["choices"][0]["text"])
        seen.requests += 1
        seen.whole.append(now - began)
        return "".join(text)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def closed_loop(clients: int, seconds: float, ask: Callable[[int, Measured], Awaitable[object]]) -> Measured:
    """Clients that each send a request after another. ask : sends the request with a number"""
    seen, numbers, began = Measured(), itertools.count(), time.perf_counter()

    async def client() -> None:
        while time.perf_counter() - began < seconds:
            await ask(next(numbers), seen)

    await asyncio.gather(*(client() for _ in range(clients)))
    seen.elapsed = time.perf_counter() - began
    return seen


async def open_loop(rate: float, seconds: float, ask: Callable[[int, Measured], Awaitable[object]]) -> Measured:
    """Requests at random times, `rate` of them per second on average."""
    seen, rng, began = Measured(), np.random.default_rng(0), time.perf_counter()
    sent: list[asyncio.Future[object]] = []
    due = 0.0
    while (due := due + rng.exponential(1 / rate)) < seconds or not sent:
        await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
        sent.append(asyncio.ensure_future(ask(len(sent), seen)))
    await asyncio.gather(*sent)
    seen.elapsed = time.perf_counter() - began
    return seen


def direct(served: Served, work: Work, streams: int, seconds: float) -> float:
    """Tokens per second of the same requests in this process, a thread for each stream."""
    began, numbers = time.perf_counter(), itertools.count()

    def stream(_: int) -> int:
        count = 0
        while time.perf_counter() - began < seconds:
            count += direct_text(served, work, next(numbers))[1]
        return count

    with ThreadPoolExecutor(streams) as pool:
        done = sum(pool.map(stream, range(streams)))
    return done / (time.perf_counter() - began)


class Alone(FixedModel):
    """A model that computes the tokens of each text by themselves."""

    def announce(self, state: object, token: int) -> None:
        """Do nothing."""


def direct_text(served: Served, work: Work, number: int) -> tuple[str, int]:
    """The text that the server must give for a request, and its tokens."""
    values = {"rng": np.random.default_rng(seed_of(number, 0)), **work.sampling}
    continuation = Continuation(Alone(served.model), served.vocabulary, work.prompts[number % CHECKED], **values)
    text, count = "", 0
    for sampled in itertools.islice(continuation, work.tokens):
        text += sampled.text
        count += 1
        if sampled.token == served.vocabulary.eot:
            break
    return text + continuation.end(), count


def own_prompts(served: Served, count: int, length: int) -> list[list[int]]:
    """Prompts (count, length) of token ids that the model wrote."""
    start = [served.vocabulary.start]
    texts = (generate_ids(served.model, start, rng=np.random.default_rng(i)) for i in range(count))
    return [[*itertools.islice(text, length)] for text in texts]


@click.command(help=__doc__)
@click.option("--run", "trained", type=click.Path(path_type=Path), help="A run or an exported file.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the server. Default: every core.")
@click.option("--streams", type=click.IntRange(min=1), multiple=True, help=f"Default: {', '.join(map(str, STREAMS))}.")
@click.option("--tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Per request.")
@click.option("--prompt", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens of a prompt.")
@click.option("--temperature", type=click.FloatRange(0, 2), default=1.0, show_default=True, help="Of all requests.")
@click.option("--top-k", type=click.IntRange(min=1), help="Of all requests. Default: all tokens.")
@click.option("--seconds", type=click.FloatRange(min=0), default=5.0, show_default=True, help="Of each loop.")
@click.option("--quick", is_flag=True, help="Two numbers of streams, a moment of each loop.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the results to this file.")
def main(
    trained: Path | None,
    threads: int | None,
    streams: tuple[int, ...],
    tokens: int,
    prompt: int,
    temperature: float,
    top_k: int | None,
    seconds: float,
    quick: bool,
    json_path: Path | None,
) -> None:
    """See the module's docstring."""
    if json_path is not None:
        output.check_writable(json_path)
    if quick:
        streams, tokens, prompt, seconds = streams or (1, 4), min(tokens, 8), min(prompt, 8), min(seconds, 0.3)
    with tempfile.TemporaryDirectory() as folder:
        try:
            if trained is None:
                settings = {"embedding_init": "random"}
                trained = fl.train(steps=1, out=Path(folder) / "run", settings=settings, progress=fl.TERMINAL).folder
            served = load_served(trained)
            choose_threads(served, threads)
        except (UserError, ValueError) as error:
            raise click.ClickException(str(error)) from None
        sampling = {"temperature": temperature, **({} if top_k is None else {"top_k": top_k})}
        work = Work(own_prompts(served, CHECKED, prompt), tokens, sampling)
        with server(trained, threads) as port:
            check(served, work, port)
            stamp = {
                **machine.stamp(threads or available_threads()),
                "model": served.name,
                "prompt": prompt,
                "seconds": seconds,
            }
            rows = measure(served, work, port, streams or STREAMS, seconds)
    if json_path is not None:
        output.write_json(
            json_path,
            {**stamp, "prompt": prompt, "seconds": seconds, "tokens": tokens, "sampling": sampling, "rows": rows},
        )


def check(served: Served, work: Work, port: int) -> None:
    """End the program with status 1 if the server's texts are not those that the model generates."""

    async def some() -> list[str]:
        return await asyncio.gather(*(request(port, work.values(i), Measured()) for i in range(CHECKED)))

    for number, text in enumerate(asyncio.run(some())):
        if text != direct_text(served, work, number)[0]:
            click.echo(f"Wrong result: the server's text {number} is not the one that the model generates.", err=True)
            sys.exit(1)


def measure(served: Served, work: Work, port: int, streams: tuple[int, ...], seconds: float) -> list[dict[str, Any]]:
    """The rows of all loops, which it prints."""

    async def ask(number: int, seen: Measured) -> str:
        return await request(port, work.values(number), seen)

    lengths = f"prompts of {len(work.prompts[0])} tokens, texts of {work.tokens}"
    click.echo(f"{cpu_name()}; {lengths}, {work.sampling}")
    click.echo(HEADER)
    rows: list[dict[str, Any]] = []
    for count in streams:
        found = asyncio.run(closed_loop(count, seconds, ask)).row()
        found["direct_tokens_per_s"] = direct(served, work, count, seconds)
        rows.append({"loop": "closed", "streams": count, **found})
        click.echo(line(rows[-1]))
    fastest = max(row["requests_per_s"] for row in rows)
    for share in SHARES:
        found = asyncio.run(open_loop(share * fastest, seconds, ask)).row()
        rows.append({"loop": "open", "share": share, "rate": share * fastest, **found})
        click.echo(line(rows[-1]))
    return rows


HEADER = """\
| loop | tokens/s | direct | requests/s | first event, median | 99 % | between events, median | 99 % |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    streams = row.get("streams")
    cells = [
        f"{row['rate']:.1f} requests/s" if streams is None else plural(streams, "stream"),
        f"{row['tokens_per_s']:,.0f}",
        f"{row['direct_tokens_per_s']:,.0f}" if "direct_tokens_per_s" in row else "-",
        f"{row['requests_per_s']:.1f}",
    ]
    for name in ("first_event_ms", "between_events_ms"):
        cells += [f"{row[name]['median']:.2f} ms", f"{row[name]['p99']:.2f} ms"]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    allocators.restart()
    main()
