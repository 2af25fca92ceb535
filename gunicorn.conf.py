"""`gunicorn -c gunicorn.conf.py`: everything comes from the environment, see `orchestrator.server.pool`."""

import os

from orchestrator.server.pool import gunicorn_config

globals().update(gunicorn_config(os.environ))
