"""Benchmark harness: fake services, a load client and the measurements made with them.

Speaks only the wire; apart from `bench.micro` nothing here imports the orchestrator.
"""
