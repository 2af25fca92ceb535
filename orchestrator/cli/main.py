"""The command line: up, serve, talk, doctor. Errors of ours end here, as one line and an exit code."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import click

from orchestrator import __version__
from orchestrator.errors import OrchestratorError
from orchestrator.process import end_with_parent
from orchestrator.settings import load_settings

EXIT_USAGE = 2
EXIT_FAILED = 1


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except OrchestratorError as error:
            click.echo(f"orchestrator: {error}", err=True)
            ctx.exit(EXIT_FAILED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="orchestrator")
def main() -> None:
    """A voice-agent orchestrator: runs spoken conversations between speech-to-text and text-to-speech."""


@main.command()
@click.option("--run-dir", type=click.Path(file_okay=False, path_type=Path), default=Path(".run"), show_default=True,
              help="Where logs, the store's files and the sample's answer go.")  # fmt: skip
@click.option("--sample/--no-sample", default=True, show_default=True,
              help="Play a spoken question through it once everything is healthy.")  # fmt: skip
@click.option("--exit-after-sample", is_flag=True, help="Stop after the sample; exit code 1 if it got no answer.")
def up(run_dir: Path, sample: bool, exit_after_sample: bool) -> None:
    """Start the embedded store, the local stand-in services and the worker pool, and say where to connect."""
    from orchestrator.cli.up import run_everything

    sys.exit(asyncio.run(run_everything(run_dir, sample or exit_after_sample, exit_after_sample)))


@main.command()
@click.option("--parent", type=int, hidden=True, help="End when this process ends.")
def serve(parent: int | None) -> None:
    """Start the worker pool alone, with the settings of the environment."""
    from orchestrator.server.pool import run

    if parent is not None and not end_with_parent(parent):
        sys.exit(EXIT_FAILED)
    run(os.environ)


@main.command()
@click.argument("wav", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--text", help="Type this question instead of speaking a file.")
@click.option("--url", help="The running server.  [default: ws://localhost:$PORT]")
@click.option("--session-id", default="", help="Go on with this session.  [default: a new one]")
@click.option("--token", envvar="ORCHESTRATOR_TOKEN", default="", help="Where the server asks for one.")
@click.option("--barge-in", "barge_in_ms", type=click.FloatRange(0), metavar="MS",
              help="Interrupt the answer this long after its first audio.")  # fmt: skip
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("answer.wav"), show_default=True,
              help="Where the spoken answer is written.")  # fmt: skip
def talk(
    wav: Path | None,
    text: str | None,
    url: str | None,
    session_id: str,
    token: str,
    barge_in_ms: float | None,
    out: Path,
) -> None:
    """Speak WAV to a running server in real time, print the conversation, write the spoken answer."""
    from orchestrator.cli.talk import hold_conversation

    if (wav is None) == (text is None):
        raise click.UsageError("give either a WAV file or --text")
    target = url or f"ws://localhost:{load_settings(os.environ).port}"
    exchange = asyncio.run(hold_conversation(target, session_id, token, wav, text, barge_in_ms, out))
    if not exchange.answer:
        sys.exit(EXIT_FAILED)


@main.command()
def doctor() -> None:
    """Print every setting with its source, and check that each service answers."""
    from orchestrator.cli.doctor import examine

    sys.exit(asyncio.run(examine(os.environ)))


if __name__ == "__main__":
    main()
