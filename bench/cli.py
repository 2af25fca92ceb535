"""`python -m bench`: the command line of the benchmark harness."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import click
import uvloop

from bench.delays import Delay
from bench.fakes import FakeConfig, serve
from bench.runs import FASTAPI_TARGET, ORCHESTRATOR_TARGET, PIPECAT_TARGET, Target
from bench.sut import StartError, apply_priority


def _delay(ctx: click.Context, param: click.Parameter, value: str) -> Delay:
    try:
        return Delay.parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


TARGETS = {target.name: target for target in (ORCHESTRATOR_TARGET, FASTAPI_TARGET, PIPECAT_TARGET)}


def delay_options(command: Callable[..., None]) -> Callable[..., None]:
    """Delays of the fakes: MS, fixed:MS or lognormal:P50,P99."""
    for name, default in (("tts", "75"), ("llm", "100"), ("rag", "80"), ("intent", "50")):
        command = click.option(
            f"--{name}", callback=_delay, default=default, show_default=True, help=f"{name} delay, ms"
        )(command)
    return click.option("--gap", default=5.0, show_default=True, help="ms between two LLM tokens")(command)


def target_options(command: Callable[..., None]) -> Callable[..., None]:
    command = click.option("--command", help="start this instead; gets PORT, service URLs and REDIS_URL")(command)
    command = click.option(
        "--tts-protocol", type=click.Choice(["openai", "stream"]), default="openai", show_default=True
    )(command)
    return click.option("--target", type=click.Choice(sorted(TARGETS)), default="orchestrator", show_default=True)(
        command
    )


def chosen(target: str, command: str | None, tts_protocol: str) -> Target:
    picked = TARGETS[target]
    if command:
        picked = Target("custom", tuple(shlex.split(command)), picked.env, has_store=True)
    return picked.with_env(TTS_PROTOCOL=tts_protocol)


def fake_config(
    intent: Delay, rag: Delay, llm: Delay, tts: Delay, gap: float, *, log_timings: bool | None = None
) -> FakeConfig:
    varying = any(delay.p99_ms is not None for delay in (intent, rag, llm, tts))
    return FakeConfig(
        intent=intent,
        rag=rag,
        llm_first=llm,
        tts_first=tts,
        llm_gap_ms=gap,
        log_timings=varying if log_timings is None else log_timings,
    )


class Group(click.Group):
    """Turns a part that does not start into one clear error."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except StartError as error:
            raise click.ClickException(str(error)) from None


@click.group(cls=Group)
def main() -> None:
    """Measures the orchestrator against fake services: how little time it adds, how much one core carries."""
    apply_priority()


@main.command()
@delay_options
@click.option("--port", "base", type=click.IntRange(0, 65531), default=0, help="first of five ports; 0: any free")
def fakes(intent: Delay, rag: Delay, llm: Delay, tts: Delay, gap: float, base: int) -> None:
    """Serves the fake services until interrupted; prints their URLs as one line of JSON."""
    config = fake_config(intent, rag, llm, tts, gap)
    if base:
        ports = {name: base + i for i, name in enumerate(("intent", "rag", "llm", "tts", "stt"))}
        config = FakeConfig(**{**_fields(config), "ports": ports})
    try:
        uvloop.run(serve(config))
    except OSError as error:
        raise click.ClickException(f"--port {base}: {error.strerror}") from None


def _fields(config: FakeConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


@main.command()
@target_options
@delay_options
@click.option("--windows", default=3, show_default=True, type=click.IntRange(1), help="measured windows per point")
@click.option("--seconds", default=5.0, show_default=True, help="length of a window")
@click.option("--point", "points", multiple=True, metavar="SESSIONS,RATE", help="instead of the usual points")
@click.option("--speculation/--no-speculation", default=True, show_default=True, help="also measure with partials")
def e2e(
    target: str,
    command: str | None,
    tts_protocol: str,
    intent: Delay,
    rag: Delay,
    llm: Delay,
    tts: Delay,
    gap: float,
    windows: int,
    seconds: float,
    points: tuple[str, ...],
    speculation: bool,
) -> None:
    """End of speech to first audio, over concurrency, without and with speculation."""
    from bench import e2e as module

    module.run(
        chosen(target, command, tts_protocol),
        fake_config(intent, rag, llm, tts, gap),
        points=[parse_point(point) for point in points] or module.POINTS,
        speculation=speculation and target == "orchestrator",
        windows=windows,
        window_s=seconds,
    )


def parse_point(text: str) -> tuple[int, float]:
    sessions, _, rate = text.partition(",")
    try:
        return int(sessions), float(rate)
    except ValueError:
        raise click.BadParameter(f"{text!r}: accepted is SESSIONS,RATE, for example 1000,100") from None


@main.command("barge-in")
@target_options
@click.option("--sessions", default=500, show_default=True, type=click.IntRange(1))
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="measured rounds")
@click.option("--both/--one", default=True, show_default=True, help="both TTS protocols, or --tts-protocol alone")
def barge_in(target: str, command: str | None, tts_protocol: str, sessions: int, rounds: int, both: bool) -> None:
    """Everybody speaks, everybody is interrupted: stop latency, tail bytes, connections lost."""
    from bench import barge_in as module

    picked = chosen(target, command, tts_protocol)
    protocols = ("openai", "stream") if both and target == "orchestrator" else (tts_protocol,)
    module.run(picked, FakeConfig(), protocols=protocols, sessions=sessions, rounds=rounds + 1)


@main.command()
@target_options
def capacity(target: str, command: str | None, tts_protocol: str) -> None:
    """Ramps to the knee: turns/s per core, CPU per turn, memory per session."""
    from bench import capacity as module

    module.run(chosen(target, command, tts_protocol), FakeConfig())


@main.command()
@target_options
@click.option("--workers", default=4, show_default=True, type=click.IntRange(2))
def handoff(target: str, command: str | None, tts_protocol: str, workers: int) -> None:
    """What the socket's hand-over to its owner adds to a connection."""
    from bench import handoff as module

    module.run(chosen(target, command, tts_protocol), FakeConfig(), workers=workers)


@main.command()
@target_options
@click.option("--minutes", default=10.0, show_default=True, type=click.FloatRange(0.1, 120))
def pauses(target: str, command: str | None, tts_protocol: str, minutes: float) -> None:
    """Garbage collection over minutes at 50 turns/s: how often and how long it holds the event loop."""
    from bench import pauses as module

    module.run(chosen(target, command, tts_protocol), FakeConfig(), minutes=minutes)


@main.command()
@click.option("--only", "names", multiple=True, type=click.Choice(sorted(TARGETS)), help="leave the others out")
def peers(names: tuple[str, ...]) -> None:
    """The same services and client against FastAPI by hand and Pipecat; prints ratios."""
    from bench import compare as module

    targets = [target for name, target in TARGETS.items() if not names or name in names]
    module.run(targets, FakeConfig())


@main.command()
@click.option("--repeats", default=60, show_default=True, type=click.IntRange(3))
def micro(repeats: int) -> None:
    """CPU time of the single steps: FSM, decode, encode, ring, ledger, clauses."""
    from bench import micro as module

    module.run(repeats)


@main.command()
@click.option("--base", default="", help="compare with the merge base with this; default: the main branch")
@click.option("--turns/--no-turns", default=True, show_default=True, help="also whole turns, about three minutes")
@click.option("--prove", is_flag=True, help="prove the rule instead: equal builds pass, a slowdown is caught")
@click.option("--rounds", default=20, show_default=True, type=click.IntRange(1), help="equal builds for --prove")
def gate(base: str, turns: bool, prove: bool, rounds: int) -> None:
    """Fails (exit code 1) if this tree is clearly slower than where it branched off."""
    from bench import gate as module

    if prove:
        good = module.prove(ORCHESTRATOR_TARGET, rounds=rounds, turns=turns)
    else:
        good = module.run(ORCHESTRATOR_TARGET, base, turns=turns)
    if not good:
        raise SystemExit(1)


@main.command("all")
def everything() -> None:
    """Everything but the gate, in less than ten minutes; exit code 1 if a bar was missed."""
    from bench import suite

    raise SystemExit(0 if suite.run(ORCHESTRATOR_TARGET, list(TARGETS.values())) else 1)
