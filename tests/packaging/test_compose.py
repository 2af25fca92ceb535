"""deploy/compose.yaml: valid, with SEED's names, wired to what it starts."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlsplit

import compose_spec
import pytest

from orchestrator.local.stack import LocalPorts
from orchestrator.server.pool import DRAIN_MARGIN_S
from orchestrator.settings import load_settings
from tests.packaging.project import DEPLOY, load_compose, load_yaml

FILE = DEPLOY / "compose.yaml"
STAND_INS = {
    "stt-vad-service": "stt",
    "intent-service": "intent",
    "rag-service": "rag",
    "tts-service": "tts",
    "llm-service": "llm",
}
URLS = {
    "INTENT_SERVICE_URL": "intent-service",
    "RAG_SERVICE_URL": "rag-service",
    "STT_SERVICE_URL": "stt-vad-service",
    "TTS_SERVICE_URL": "tts-service",
    "LLM_BASE_URL": "llm-service",
    "REDIS_URL": "redis",
}


def parse(text: str) -> compose_spec.PyCompose:
    """Read as the Compose specification has it; unknown keys and wrong values are errors."""
    compose = compose_spec.PyCompose.from_json(json.dumps(load_compose(text)))
    compose.validate()
    return compose


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    parsed: dict[str, Any] = load_compose(FILE.read_text(encoding="utf-8"))["services"]
    return parsed


def test_it_follows_the_specification() -> None:
    names = set(parse(FILE.read_text(encoding="utf-8")).service_names())
    assert names == {"orchestrator", "redis", *STAND_INS}


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("stop_grace_period: 35s", "stop_grace_perod: 35s"),
        ("stop_grace_period: 35s", "stop_grace_period: soon"),
        ("condition: service_healthy", "condition: service_fine"),
        ("restart: unless-stopped", "restart: sometimes"),
    ],
)
def test_the_check_can_fail(right: str, wrong: str) -> None:
    text = FILE.read_text(encoding="utf-8")
    assert right in text
    with pytest.raises(ValueError, match=r".+"):
        parse(text.replace(right, wrong))


def test_it_starts_with_accepted_settings_that_lead_to_the_services(services: dict[str, Any]) -> None:
    environment = services["orchestrator"]["environment"]
    settings = load_settings(environment)
    assert settings.port == 8004
    for variable, service in URLS.items():
        assert urlsplit(environment[variable]).hostname == service


@pytest.mark.parametrize("service", sorted(STAND_INS))
def test_a_stand_in_listens_where_it_is_looked_for(services: dict[str, Any], service: str) -> None:
    part = STAND_INS[service]
    port = str(getattr(LocalPorts(), part))
    command = services[service]["command"]
    assert command == ["python", "-m", f"orchestrator.local.{part}", "--host", "0.0.0.0", "--port", port]
    assert f"127.0.0.1:{port}/health" in services[service]["healthcheck"]["test"][-1]
    environment = services["orchestrator"]["environment"]
    variable = next(name for name, target in URLS.items() if target == service)
    assert str(urlsplit(environment[variable]).port) == port


def test_everything_is_healthy_before_the_orchestrator_starts(services: dict[str, Any]) -> None:
    waits = services["orchestrator"]["depends_on"]
    assert set(waits) == {"redis", *STAND_INS}
    assert {wait["condition"] for wait in waits.values()} == {"service_healthy"}
    assert all("healthcheck" in services[name] for name in services)


def test_volumes_are_declared(services: dict[str, Any]) -> None:
    used = {volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])}
    assert used == set(load_compose(FILE.read_text(encoding="utf-8"))["volumes"])


def test_stopping_leaves_the_time_to_drain(services: dict[str, Any]) -> None:
    orchestrator = services["orchestrator"]
    drain = float(orchestrator["environment"]["DRAIN_TIMEOUT_SECONDS"])
    assert float(orchestrator["stop_grace_period"].removesuffix("s")) > drain + DRAIN_MARGIN_S


def test_the_images_are_the_dockerfiles_targets(services: dict[str, Any]) -> None:
    assert services["orchestrator"]["build"]["target"] == "server"
    assert {services[name]["build"]["target"] for name in STAND_INS} == {"local"}


def test_the_file_for_a_tree_of_services_includes_it() -> None:
    including = load_yaml(DEPLOY / "services.docker-compose.yml")
    assert [entry["path"] for entry in including["include"]] == ["orchestrator/deploy/compose.yaml"]
