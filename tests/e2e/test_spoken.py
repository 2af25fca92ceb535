"""The main job on real parts: a spoken question in, a true spoken answer out."""

from __future__ import annotations

import asyncio
import io
import json
import re
import subprocess
import sys
import urllib.request
import wave

import pytest

from orchestrator.local.stack import LocalStack
from tests.e2e.client import Client
from tests.server.pools import ROOT, RunningPool

pytestmark = [pytest.mark.local_stack, pytest.mark.server]

SEED_SNIPPET = """
import asyncio
import websockets
import json

async def test():
    async with websockets.connect("ws://localhost:8004/orchestrate?session_id=test_001") as ws:
        # Receive connection message
        msg = await ws.recv()
        print("Connected:", json.loads(msg))
        
        # Send STT fragment
        await ws.send(json.dumps({
            "type": "stt_fragment",
            "session_id": "test_001",
            "text": "What are admission requirements?",
            "is_final": True,
            "timestamp": 1234567890.0
        }))
        
        # Send VAD end
        await ws.send(json.dumps({
            "type": "vad_end",
            "session_id": "test_001",
            "confidence": 0.95
        }))
        
        # Receive response
        response = await ws.recv()
        print("Response:", json.loads(response))

asyncio.run(test())
"""  # noqa: W293


def post(url: str, body: bytes, content_type: str) -> bytes:
    request = urllib.request.Request(url, body, {"Content-Type": content_type})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()  # type: ignore[no-any-return]


def words(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def test_the_snippet_as_printed(real_pool: RunningPool) -> None:
    snippet = SEED_SNIPPET.replace(":8004/", f":{real_pool.port}/")
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, timeout=60, check=True)
    connected, response = done.stdout.splitlines()
    assert connected.startswith("Connected: {'type': 'connected'")
    assert response.startswith("Response: {'type': 'response_ready'")
    assert "'intent': 'admission_requirements'" in response
    assert "diploma" in response or "admission requirements" in response


def test_a_spoken_question_gets_a_true_spoken_answer(real_pool: RunningPool, local_stack: LocalStack) -> None:
    tts, stt = local_stack.urls["TTS_SERVICE_URL"], local_stack.urls["STT_SERVICE_URL"]
    asked = {"model": "tts-1", "voice": "alloy", "input": "What are the admission requirements?"}
    wav = post(f"{tts}/v1/audio/speech", json.dumps({**asked, "response_format": "wav"}).encode(), "application/json")
    with wave.open(io.BytesIO(wav)) as file:
        rate, pcm = file.getframerate(), file.readframes(file.getnframes())
    from array import array

    from orchestrator.cli.recording import _resampled

    microphone = _resampled(array("h", pcm), rate).tobytes() + bytes(32_000 * 2)

    async def run() -> Client:
        async with Client(real_pool.url, "spoken-1", "&events=state") as client:
            for at in range(0, len(microphone), 640):
                await client.connection.send(microphone[at : at + 640])
                await asyncio.sleep(0.02)
            await client.until("turn_complete", seconds=60)
            return client

    client = asyncio.run(run())
    updates = [frame.message for frame in client.frames if frame.kind == "state_update"]
    assert len(updates) > 1, "no partial transcripts"
    assert words(" ".join(updates[-1]["text_buffer"])) == "what are the admission requirements"
    ready = (next(frame for frame in client.frames if frame.kind == "response_ready")).message
    assert ready["intent"] == "admission_requirements"
    done = client.frames[-1].message
    assert done["degraded"] == []
    assert "high school diploma" in words(done["text"])
    spoken_rate = ready["audio_format"]["sample_rate"]
    said = json.loads(post(f"{stt}/api/v1/transcribe", client.audio, f"application/octet-stream;rate={spoken_rate}"))[
        "text"
    ]
    assert "high school diploma" in words(said)


def test_talk_and_doctor_as_a_user_runs_them(real_pool: RunningPool, local_stack: LocalStack, tmp_path) -> None:  # type: ignore[no-untyped-def]
    command = [sys.executable, "-m", "orchestrator.cli.main"]
    url = f"ws://127.0.0.1:{real_pool.port}"
    out = tmp_path / "answer.wav"
    sample = ROOT / "orchestrator/local/samples/question.wav"
    spoken = subprocess.run(
        [*command, "talk", str(sample), "--url", url, "--out", str(out)],
        capture_output=True, text=True, timeout=90, cwd=tmp_path,
    )  # fmt: skip
    assert spoken.returncode == 0, spoken.stderr
    assert "What are the admission requirements?" in spoken.stdout
    assert "end of speech to audio" in spoken.stdout
    with wave.open(str(out)) as file:
        assert file.getnframes() > file.getframerate()
    interrupted = subprocess.run(
        [*command, "talk", "--text", "How much is the tuition?", "--url", url, "--barge-in", "500", "--out", str(out)],
        capture_output=True, text=True, timeout=90, cwd=tmp_path,
    )  # fmt: skip
    assert interrupted.returncode == 0, interrupted.stderr
    assert "barge-in" in interrupted.stdout
    import os

    environ = {**os.environ, **local_stack.urls, "REDIS_URL": "redis://127.0.0.1:1/0"}
    checked = subprocess.run([*command, "doctor"], capture_output=True, text=True, timeout=90, env=environ)
    assert checked.returncode == 1
    assert "FAILED store" in checked.stdout
    assert "5 of 6 answer" in checked.stdout, checked.stdout


def test_wrong_input_is_one_line(tmp_path) -> None:  # type: ignore[no-untyped-def]
    command = [sys.executable, "-m", "orchestrator.cli.main"]
    noise = tmp_path / "noise.wav"
    noise.write_bytes(b"no wav at all")
    for arguments in (["talk", str(noise)], ["talk", "--text", "hi", "--url", "ws://127.0.0.1:1"]):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=30)
        assert done.returncode == 1
        assert done.stderr.startswith("orchestrator: ")
        assert len(done.stderr.splitlines()) == 1
