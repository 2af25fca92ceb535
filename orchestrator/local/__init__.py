"""Real stand-ins for the services around the orchestrator, for running a whole conversation on one machine.

Speech recognition, intent, retrieval, language model and speech synthesis, each a process of its own that
speaks the same protocol as the production service it stands in for. Needs the `local` extra; only the command
line imports this package.
"""
