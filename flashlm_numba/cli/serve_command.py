"""The command `serve`: its options, and the server that they make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from flashlm_numba.cli import options
from flashlm_numba.cli.options import Number, Text
from flashlm_numba.serving.limits import Limits
from flashlm_numba.system.errors import UserError

PACKAGES = ("starlette", "uvicorn", "h11")  # of the extra `serve`


def _limit(name: str, kind: click.ParamType, text: str) -> Callable[[Any], Any]:
    """The option of a field of Limits."""
    option, default = f"--{name.replace('_', '-')}", getattr(Limits, name)
    return click.option(option, type=kind, default=default, show_default=True, help=text)


@click.command()
@click.argument("run", required=False, type=options.PathOrSource(path_type=Path))
@click.option(
    "--runs",
    metavar="FOLDER",
    type=options.PathOrSource(path_type=Path),
    help="Folder of runs whose curves the page draws, while they train too.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is all of them.")
@click.option(
    "--port", type=click.IntRange(0, 65_535), default=8000, show_default=True, help="Port; 0 takes a free one."
)
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="Further name that requests may use for this server, without the port; may be repeated. * allows any. "
    "localhost, 127.0.0.1, [::1] and --host are allowed.",
)
@click.option(
    "--api-key",
    envvar="FLASHLM_NUMBA_API_KEY",
    show_envvar=True,
    metavar="KEY",
    help="Key that requests must have. Default: any key, or none.",
)
@click.option("--name", type=Text(), help="Name of the model in requests. Default: that of RUN.")
@options.activations
@options.ema
@options.checkpoint
@options.threads
@_limit("streams", click.IntRange(min=1), "Texts generated at the same time.")
@_limit("queue", click.IntRange(min=0), "Texts that wait until others have ended; a request for more gets status 429.")
@_limit("max_tokens", click.IntRange(min=1), "Tokens that a text may have.")
@_limit("prompt_tokens", click.IntRange(min=1), "Tokens of a prompt.")
@_limit("request_tokens", click.IntRange(min=1), "Tokens of all texts of a request, their prompts included.")
@_limit("body_bytes", click.IntRange(min=1), "Bytes of a request's body.")
@_limit("connections", click.IntRange(min=1), "Open connections.")
@_limit("seconds", Number(min=0, min_open=True), "Duration of a request, the time in the queue included.")
@_limit("read_seconds", Number(min=0, min_open=True), "Time for a client to send a request or to take what is sent.")
@_limit("drain_seconds", Number(min=0), "Time for requests to finish after Ctrl-C or SIGTERM.")
def serve(
    run: Path | None,
    runs: Path | None,
    host: str,
    port: int,
    allowed_hosts: tuple[str, ...],
    api_key: str | None,
    name: str | None,
    activations: str | None,
    ema: bool,
    checkpoint: str | None,
    threads: int | None,
    **limits: Any,
) -> None:
    """Serve the model in RUN to a browser, and to programs that use OpenAI's completions interface.

    RUN may also be a file or a folder written by `export`, hf:USER/NAME on the Hugging Face hub, or a folder of runs to
    watch, as with --runs. The page docs/serving.md shows requests and the page. Ctrl-C and SIGTERM let the requests in
    flight finish. The command needs the packages of `pip install 'flashlm-numba[serve]'`.
    """
    if api_key == "":
        raise click.BadParameter("it is empty.", param_hint="'--api-key'")
    if run is not None and runs is None and holds_runs(run):
        run, runs = None, run
    if runs is not None and not runs.is_dir():
        raise click.BadParameter(f"there is no folder {runs}.", param_hint="'--runs'")
    if run is None and runs is None:
        raise click.UsageError("Give a RUN to serve, a folder of runs to watch with --runs, or both.")
    if run is None and (name or activations or ema or checkpoint):
        raise click.UsageError("--name, --activations, --ema and --checkpoint need a RUN to serve.")
    check_packages()
    from flashlm_numba.serving.runs import Runs
    from flashlm_numba.serving.served import load_served
    from flashlm_numba.serving.server import allowed_by_default, bind, choose_threads, serve, url_of

    served = None
    if run is not None:
        served = load_served(run, checkpoint, ema=ema, activations=activations, name=name)
    try:
        workers = choose_threads(served, threads)
    except ValueError as error:
        raise click.BadParameter(f"{error}.", param_hint="'--threads'") from None
    with bind(host, port) as listening:
        serve(
            served,
            listening,
            Limits(**limits),
            allowed_hosts=(*allowed_by_default(host), *allowed_hosts),
            api_key=api_key,
            workers=workers,
            runs=None if runs is None else Runs(runs),
            on_start=lambda: tell(None if served is None else served.name, runs, url_of(listening)),
        )


def holds_runs(folder: Path) -> bool:
    """Whether a folder is no run, and has folders that are runs."""
    return not (folder / "config.json").exists() and any(folder.glob("*/metrics.jsonl"))


def tell(name: str | None, runs: Path | None, url: str) -> None:
    """Print where the model and the page are.

    >>> tell("mine", Path("runs"), "http://127.0.0.1:8000")
    mine at http://127.0.0.1:8000/v1
    page with the runs in runs at http://127.0.0.1:8000
    """
    if name is not None:
        options.echo(f"{name} at {url}/v1")
    options.echo(f"page with the runs in {runs} at {url}" if runs else f"page at {url}")


def check_packages() -> None:
    """Raise UserError if a package of the extra is missing."""
    import importlib.util

    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"`serve` needs {' and '.join(missing)}; install what is missing with `pip install 'flashlm-numba[serve]'`."
        )
