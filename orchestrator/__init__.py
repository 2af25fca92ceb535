"""Voice-agent orchestrator: runs spoken conversations between STT, intent, RAG, LLM and TTS services."""

__version__ = "0.1.0"
