MAKEFLAGS += --no-print-directory
VENV := .venv

.DEFAULT_GOAL := help
.PHONY: help run test lint bench bench-peers loadtest lock image clean setup setup-test

help:
	@echo 'make run       set up and start everything on this machine: store, speech and language stand-ins, server'
	@echo 'make test      set up, lint, and run every test'
	@echo 'make lint      style, types and layers alone'
	@echo 'make bench     the benchmarks (ARGS="e2e --help" for one of them); make bench-peers: against other orchestrators'
	@echo 'make loadtest  locust against a server that it starts'
	@echo 'make lock      write requirements/*.txt anew (ARGS=--upgrade for the newest releases)'
	@echo 'make image     build the container image'
	@echo 'make clean     remove what the set-up and the runs left'

setup:
	@sh scripts/setup.sh run

setup-test:
	@sh scripts/setup.sh test

run: setup
	@exec $(VENV)/bin/orchestrator up $(ARGS)

test: setup-test
	@sh scripts/lint.sh
	@exec sh scripts/run_tests.sh $(ARGS)

lint: setup-test
	@exec sh scripts/lint.sh

bench: setup-test
	@exec $(VENV)/bin/python -m bench $(or $(ARGS),all)

bench-peers: setup-test
	@sh scripts/setup.sh peers
	@exec $(VENV)/bin/python -m bench peers $(ARGS)

loadtest: setup-test
	@exec $(VENV)/bin/python -m loadtests $(ARGS)

image:
	docker build -t leibniz-orchestrator:latest .

lock:
	@exec sh scripts/lock.sh $(ARGS)

clean:
	rm -rf $(VENV) .venv-peers .run build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
