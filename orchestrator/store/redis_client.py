"""Redis clients for every kind of REDIS_URL, set up to fail fast: no retries, short timeouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import RedisClusterException, RedisError

from orchestrator.errors import SettingsError

REDIS_ERRORS = (RedisError, RedisClusterException, OSError)
"""What a Redis client raises when the store does not do what it should; TimeoutError is an OSError."""

CLUSTER_CONNECTIONS = 16
"""To each node of a cluster, where a command holds one session only and many are sent side by side."""

_SENTINEL_FORM = "redis+sentinel://[user:password@]host:port[,host:port…]/service[/database]"
_SENTINEL_PORT = 26379

RedisClient = Redis | RedisCluster


@dataclass(frozen=True, slots=True)
class SentinelAddress:
    """What a `redis+sentinel://` URL says. The credentials are the data nodes'; `options` come from the query."""

    nodes: tuple[tuple[str, int], ...]
    service: str
    database: int
    username: str | None
    password: str | None
    options: Mapping[str, str]


def check_redis_url(url: str) -> None:
    """Raises SettingsError with one line if no client can be made from `url`; connects to nothing."""
    scheme = urlsplit(url).scheme
    if scheme == "redis+sentinel":
        parse_sentinel_url(url)
        return
    try:
        options = parse_url(_plain(url))
    except ValueError as error:
        raise SettingsError(f"REDIS_URL is not accepted: {error}") from None
    if scheme == "redis+cluster" and options.get("db"):
        raise SettingsError(f"REDIS_URL is not accepted: a cluster has database 0 only, not {options['db']}")


def make_client(url: str, *, timeout: float, connections: int = 2, for_pubsub: bool = False) -> RedisClient:
    """A client that gives up after `timeout` seconds and never retries. Connects with its first command.

    `for_pubsub` waits for messages without a limit, and takes a plain client also where `url` names a cluster: any of
    its nodes passes on what is published anywhere. Raises SettingsError for a URL that is not understood.
    """
    check_redis_url(url)
    limits: dict[str, Any] = {
        "socket_timeout": None if for_pubsub else timeout,
        "socket_connect_timeout": timeout,
        "retry": Retry(NoBackoff(), 0),
        "max_connections": connections,
    }
    scheme = urlsplit(url).scheme
    if scheme == "redis+sentinel":
        return _sentinel_client(parse_sentinel_url(url), timeout, limits)
    if scheme == "redis+cluster" and not for_pubsub:
        return RedisCluster.from_url(_plain(url), **{**limits, "max_connections": CLUSTER_CONNECTIONS})
    return Redis.from_url(_plain(url), **limits)


def parse_sentinel_url(url: str) -> SentinelAddress:
    """The parts of a `redis+sentinel://` URL. Raises SettingsError."""
    parts = urlsplit(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    username, _, password = credentials.partition(":")
    path = [part for part in parts.path.split("/") if part]
    try:
        nodes = tuple(_host_and_port(host) for host in hosts.split(","))
        if not 1 <= len(path) <= 2:
            raise ValueError("no service name")
        database = int(path[1]) if len(path) == 2 else 0
    except ValueError as error:
        raise SettingsError(f"REDIS_URL is not accepted ({error}): expected {_SENTINEL_FORM}") from None
    return SentinelAddress(
        nodes=nodes,
        service=unquote(path[0]),
        database=database,
        username=unquote(username) or None,
        password=unquote(password) or None,
        options=dict(parse_qsl(parts.query)),
    )


def _sentinel_client(address: SentinelAddress, timeout: float, limits: dict[str, Any]) -> Redis:
    # Discovery must not wait without a limit, whatever holds for the data connection.
    seek = {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "retry": limits["retry"],
        "username": address.options.get("sentinel_username"),
        "password": address.options.get("sentinel_password"),
    }
    secure: dict[str, Any] = {"ssl": True} if address.options.get("ssl", "").lower() in ("1", "true", "yes") else {}
    make_sentinel: Any = Sentinel
    sentinel = make_sentinel(list(address.nodes), sentinel_kwargs={**seek, **secure})
    client: Redis = sentinel.master_for(
        address.service,
        db=address.database,
        username=address.username,
        password=address.password,
        **secure,
        **limits,
    )
    return client


def _host_and_port(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, str(_SENTINEL_PORT)
    host = host.strip("[]")
    if not host:
        raise ValueError(f"no host in {text!r}")
    number = int(port)
    if not 0 < number < 65_536:
        raise ValueError(f"port {number}")
    return host, number


def _plain(url: str) -> str:
    """The URL with the scheme that redis-py knows."""
    return "redis://" + url.removeprefix("redis+cluster://") if url.startswith("redis+cluster://") else url
