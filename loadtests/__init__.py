"""Load tests with Locust: people who talk, interrupt, leave and lurk, over the client's WebSocket."""
