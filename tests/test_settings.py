"""Settings: each wrong value is one line that names the variable, the value and what is accepted."""

from __future__ import annotations

from dataclasses import fields

import pytest

from orchestrator.errors import SettingsError
from orchestrator.settings import Settings, describe_settings, load_settings

VARIABLES = [spec.metadata["env"] for spec in fields(Settings)]

WRONG = [
    ("PORT", "http", "a whole number from 0 to 65535"),
    ("PORT", "65536", "a whole number from 0 to 65535"),
    ("WEB_CONCURRENCY", "0", "a whole number from 1 to 64"),
    ("MAX_CONCURRENT_SESSIONS", "-1", "a whole number from 1"),
    ("SESSION_TTL_SECONDS", "1.5", "a whole number from 1"),
    ("E2E_BUDGET_MS", "nan", "a number from 1"),
    ("STALL_TIMEOUT_MS", "inf", "a number from 1"),
    ("BARGE_IN_CONFIDENCE", "1.1", "a number from 0 to 1"),
    ("TTS_SAMPLE_RATE", "44.1", "a whole number from 8000 to 192000"),
    ("TTS_PROTOCOL", "grpc", "one of auto, openai, stream"),
    ("SPECULATION", "maybe", "one of on, off, llm"),
    ("LOG_LEVEL", "LOUD", "one of DEBUG, INFO"),
    ("LOG_FORMAT", "xml", "one of json, console"),
    ("RAG_INCREMENTAL", "2", "true or false"),
    ("INTENT_SERVICE_URL", "intent:8002", "an http:// or https:// URL, or empty to switch the stage off"),
    ("LLM_BASE_URL", "http://", "an http:// or https:// URL"),
    ("TTS_SERVICE_URL", "http://tts:port", "an http:// or https:// URL"),
    ("REDIS_URL", "localhost:6379", "a URL with one of redis://"),
    ("REDIS_URL", "http://redis", "a URL with one of redis://"),
    ("ALLOWED_ORIGINS", "https://a.example, b.example", "a comma list of origins"),
]


@pytest.mark.parametrize(("variable", "value", "accepted"), WRONG)
def test_a_wrong_value_is_one_clear_line(variable: str, value: str, accepted: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings({variable: value})
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"{variable}={value!r} is not accepted: ")
    assert accepted in line


@pytest.mark.parametrize("variable", ["REDIS_URL", "INTENT_SERVICE_URL", "LLM_BASE_URL"])
@pytest.mark.parametrize(
    "url",
    ["ws://me:hunter2@redis/0", "me:hunter2@redis:6379", "ftp://:hunter2@h", "ftp://me:/@hunter2/@h", "@hunter2@"],
)
def test_a_wrong_url_does_not_show_its_password(variable: str, url: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings({variable: url})
    assert "hunter2" not in str(caught.value)
    assert "(hidden)@" in str(caught.value)


def test_something_must_be_able_to_answer() -> None:
    with pytest.raises(SettingsError, match="set at least one of them"):
        load_settings({"RAG_SERVICE_URL": "", "LLM_BASE_URL": ""})
    assert load_settings({"RAG_SERVICE_URL": "", "LLM_BASE_URL": "http://llm/v1"}).rag_service_url == ""


def test_two_kinds_of_keys_are_one_too_many() -> None:
    with pytest.raises(SettingsError, match=r"AUTH_JWKS_FILE='keys\.json' is not accepted beside AUTH_JWT_SECRET"):
        load_settings({"AUTH_JWT_SECRET": "x" * 32, "AUTH_JWKS_FILE": "keys.json"})


def test_the_defaults_are_those_of_the_documented_deployment() -> None:
    settings = load_settings({})
    assert settings.redis_url == "redis://redis:6379/0"
    assert settings.intent_service_url == "http://intent-service:8002"
    assert settings.rag_service_url == "http://rag-service:8003"
    assert settings.stt_service_url == "http://stt-vad-service:8001"
    assert settings.tts_service_url == "http://tts-service:8005"
    assert settings.session_ttl_seconds == 3600
    assert settings.max_concurrent_sessions == 1000
    assert settings.log_level == "INFO"
    assert settings.port == 8004


def test_foreign_variables_are_nobodys_business() -> None:
    assert load_settings({"PATH": "/bin", "PORT_": "x"}) == load_settings({})


def test_the_description_names_sources_and_shows_no_secret() -> None:
    secrets = {"LLM_API_KEY": "hunter2", "TTS_API_KEY": "hunter2", "AUTH_JWT_SECRET": "hunter2" * 5}
    secrets["RAG_SERVICE_URL"] = "https://me:hunter2@rag:8003"
    rows = describe_settings({**secrets, "REDIS_URL": "redis://me:hunter2@store:6379/1", "PORT": "9000"})
    assert [row.variable for row in rows] == VARIABLES
    by_name = {row.variable: row for row in rows}
    assert not any("hunter2" in row.value for row in rows)
    assert by_name["REDIS_URL"].value == "redis://(hidden)@store:6379/1"
    assert (by_name["PORT"].value, by_name["PORT"].source) == ("9000", "environment")
    assert by_name["HOST"].source == "default"
