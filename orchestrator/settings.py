"""Settings from the environment, read once at start into one frozen record.

Nothing else in the package reads `os.environ`. A wrong value raises SettingsError with one line that names the
variable, the value and what is accepted.
"""

from __future__ import annotations

import math
import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal
from urllib.parse import urlsplit

from orchestrator.errors import SettingsError

DEFAULT_SYSTEM_PROMPT = (
    "You are a friendly voice assistant on a phone call. Answer in one to three short spoken sentences, without lists, "
    "markup or web addresses. Answer from the passages where there are any; if they do not hold the answer, say so."
)
DEFAULT_FALLBACK_TEXT = "I'm sorry, I can't answer that right now. Could you ask me again in a moment?"
REDIS_SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "redis+cluster")


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(raw: str) -> int:
        try:
            value = int(raw)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return value

    return parse


def _number(low: float, high: float) -> Callable[[str], float]:
    def parse(raw: str) -> float:
        try:
            value = float(raw)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise ValueError(f"a number from {low:g} to {high:g}")
        return value

    return parse


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(raw: str) -> str:
        value = raw.strip().lower()
        if value not in allowed:
            raise ValueError("one of " + ", ".join(allowed))
        return value

    return parse


def _log_level(raw: str) -> str:
    value = raw.strip().upper()
    if value not in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
        raise ValueError("one of DEBUG, INFO, WARNING, ERROR, CRITICAL")
    return value


def _speculation(raw: str) -> str:
    value = {"true": "on", "1": "on", "false": "off", "0": "off"}.get(raw.strip().lower(), raw.strip().lower())
    if value not in ("on", "off", "llm"):
        raise ValueError("one of on, off, llm")
    return value


def _flag(raw: str) -> bool:
    value = raw.strip().lower()
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("0", "false", "no", "off"):
        return False
    raise ValueError("true or false")


def _text(raw: str) -> str:
    return raw


def _service_url(raw: str) -> str:
    value = raw.strip().rstrip("/")
    if not value:
        return ""
    parts = _split_url(value, "an http:// or https:// URL, or empty to switch the stage off")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("an http:// or https:// URL, or empty to switch the stage off")
    return value


def _redis_url(raw: str) -> str:
    accepted = "a URL with one of " + ", ".join(f"{scheme}://" for scheme in REDIS_SCHEMES)
    parts = _split_url(raw.strip(), accepted)
    if parts.scheme not in REDIS_SCHEMES or not (parts.netloc or (parts.scheme == "unix" and parts.path)):
        raise ValueError(accepted)
    return raw.strip()


def _split_url(value: str, accepted: str) -> Any:
    try:
        parts = urlsplit(value)
        if parts.scheme != "redis+sentinel":
            _ = parts.port
    except ValueError:
        raise ValueError(accepted) from None
    return parts


def _origins(raw: str) -> tuple[str, ...]:
    origins = tuple(part.strip().rstrip("/") for part in raw.split(",") if part.strip())
    for origin in origins:
        if not re.fullmatch(r"https?://[^/\s]+", origin):
            raise ValueError("a comma list of origins such as https://app.example.org")
    return origins


def _variable(env: str, parse: Callable[[str], Any], default: Any, *, secret: bool = False) -> Any:
    metadata = {"env": env, "parse": parse, "secret": secret}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting, one field a variable. Times are in the unit the name ends with."""

    redis_url: str = _variable("REDIS_URL", _redis_url, "redis://redis:6379/0", secret=True)
    intent_service_url: str = _variable("INTENT_SERVICE_URL", _service_url, "http://intent-service:8002")
    rag_service_url: str = _variable("RAG_SERVICE_URL", _service_url, "http://rag-service:8003")
    stt_service_url: str = _variable("STT_SERVICE_URL", _service_url, "http://stt-vad-service:8001")
    tts_service_url: str = _variable("TTS_SERVICE_URL", _service_url, "http://tts-service:8005")
    session_ttl_seconds: int = _variable("SESSION_TTL_SECONDS", _integer(1, 31_536_000), 3600)
    max_concurrent_sessions: int = _variable("MAX_CONCURRENT_SESSIONS", _integer(1, 10_000_000), 1000)
    log_level: str = _variable("LOG_LEVEL", _log_level, "INFO")
    log_format: str = _variable("LOG_FORMAT", _choice("json", "console"), "console")
    host: str = _variable("HOST", _text, "0.0.0.0")
    port: int = _variable("PORT", _integer(0, 65535), 8004)
    web_concurrency: int = _variable("WEB_CONCURRENCY", _integer(1, 64), _cores)
    node_name: str = _variable("NODE_NAME", _text, socket.gethostname)

    e2e_budget_ms: float = _variable("E2E_BUDGET_MS", _number(1, 600_000), 445.0)
    intent_timeout_ms: float = _variable("INTENT_TIMEOUT_MS", _number(1, 600_000), 100.0)
    rag_timeout_ms: float = _variable("RAG_TIMEOUT_MS", _number(1, 600_000), 150.0)
    llm_timeout_ms: float = _variable("LLM_TIMEOUT_MS", _number(1, 600_000), 300.0)
    tts_timeout_ms: float = _variable("TTS_TIMEOUT_MS", _number(1, 600_000), 200.0)
    stall_timeout_ms: float = _variable("STALL_TIMEOUT_MS", _number(1, 600_000), 1000.0)

    llm_base_url: str = _variable("LLM_BASE_URL", _service_url, "")
    llm_api_key: str = _variable("LLM_API_KEY", _text, "", secret=True)
    llm_model: str = _variable("LLM_MODEL", _text, "default")
    llm_system_prompt: str = _variable("LLM_SYSTEM_PROMPT", _text, DEFAULT_SYSTEM_PROMPT)
    llm_max_tokens: int = _variable("LLM_MAX_TOKENS", _integer(1, 100_000), 300)
    llm_fallback_base_url: str = _variable("LLM_FALLBACK_BASE_URL", _service_url, "")
    llm_fallback_api_key: str = _variable("LLM_FALLBACK_API_KEY", _text, "", secret=True)
    llm_fallback_model: str = _variable("LLM_FALLBACK_MODEL", _text, "default")
    fallback_text: str = _variable("FALLBACK_TEXT", _text, DEFAULT_FALLBACK_TEXT)
    history_turns: int = _variable("HISTORY_TURNS", _integer(0, 1000), 10)
    rag_incremental: bool = _variable("RAG_INCREMENTAL", _flag, False)

    tts_protocol: Literal["auto", "openai", "stream"] = _variable(
        "TTS_PROTOCOL", _choice("auto", "openai", "stream"), "auto"
    )
    tts_sample_rate: int = _variable("TTS_SAMPLE_RATE", _integer(8000, 192_000), 24_000)
    tts_model: str = _variable("TTS_MODEL", _text, "tts-1")
    tts_voice: str = _variable("TTS_VOICE", _text, "alloy")
    tts_api_key: str = _variable("TTS_API_KEY", _text, "", secret=True)
    tts_emotion: str = _variable("TTS_EMOTION", _text, "neutral")
    audio_lead_ms: float = _variable("AUDIO_LEAD_MS", _number(20, 10_000), 400.0)

    barge_in_confidence: float = _variable("BARGE_IN_CONFIDENCE", _number(0, 1), 0.7)
    barge_in_min_words: int = _variable("BARGE_IN_MIN_WORDS", _integer(1, 100), 1)
    speculation: Literal["on", "off", "llm"] = _variable("SPECULATION", _speculation, "on")

    max_message_bytes: int = _variable("MAX_MESSAGE_BYTES", _integer(1024, 16_777_216), 65_536)
    drain_timeout_seconds: float = _variable("DRAIN_TIMEOUT_SECONDS", _number(0, 3600), 20.0)
    loop_lag_limit_ms: float = _variable("LOOP_LAG_LIMIT_MS", _number(1, 60_000), 200.0)
    stt_events_channel: str = _variable("STT_EVENTS_CHANNEL", _text, "")
    allowed_origins: tuple[str, ...] = _variable("ALLOWED_ORIGINS", _origins, ())
    auth_jwt_secret: str = _variable("AUTH_JWT_SECRET", _text, "", secret=True)
    auth_jwks_file: str = _variable("AUTH_JWKS_FILE", _text, "")
    auth_audience: str = _variable("AUTH_AUDIENCE", _text, "")
    otel_endpoint: str = _variable("OTEL_EXPORTER_OTLP_ENDPOINT", _text, "")


def without_password(url: str) -> str:
    """`url` fit to be shown: all between its scheme and its last @ is hidden."""
    return re.sub(r"^([^@]*?//)?.*@", r"\1(hidden)@", url, flags=re.DOTALL)


@dataclass(frozen=True, slots=True)
class SettingSource:
    """One line of `orchestrator doctor`: the variable, the value in force (secrets masked) and where it came from."""

    variable: str
    value: str
    source: Literal["environment", "default"]


def load_settings(environ: Mapping[str, str]) -> Settings:
    """The settings that `environ` and the defaults give.

    Raises SettingsError for the first wrong value, or when nothing is configured that could answer.
    """
    values: dict[str, Any] = {}
    for spec in fields(Settings):
        variable = spec.metadata["env"]
        if variable not in environ:
            continue
        raw = environ[variable]
        try:
            values[spec.name] = spec.metadata["parse"](raw)
        except ValueError as error:
            secret = spec.metadata["secret"] and spec.name != "redis_url"
            shown = "(hidden)" if secret else repr(without_password(raw) if spec.name.endswith("_url") else raw)
            raise SettingsError(f"{variable}={shown} is not accepted: {error}") from None
    settings = Settings(**values)
    if not settings.rag_service_url and not settings.llm_base_url:
        raise SettingsError(
            "RAG_SERVICE_URL='' and LLM_BASE_URL='' leave nothing that could answer: set at least one of them to a URL"
        )
    if settings.auth_jwt_secret and settings.auth_jwks_file:
        raise SettingsError(
            f"AUTH_JWKS_FILE={settings.auth_jwks_file!r} is not accepted beside AUTH_JWT_SECRET: set only one of them"
        )
    return settings


def describe_settings(environ: Mapping[str, str]) -> list[SettingSource]:
    """Every setting with its value and its source, for `doctor`. Raises SettingsError like `load_settings`."""
    settings = load_settings(environ)
    rows = []
    for spec in fields(Settings):
        value = getattr(settings, spec.name)
        shown = "(set)" if spec.metadata["secret"] and value and spec.name != "redis_url" else str(value)
        if spec.name.endswith("_url"):
            shown = without_password(shown)
        if isinstance(value, tuple):
            shown = ",".join(value)
        rows.append(
            SettingSource(spec.metadata["env"], shown, "environment" if spec.metadata["env"] in environ else "default")
        )
    return rows
