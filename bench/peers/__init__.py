"""Other ways to build the same orchestrator, speaking the same wire, to be measured beside it."""
