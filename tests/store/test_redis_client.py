"""What each kind of REDIS_URL becomes."""

from __future__ import annotations

from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster

from orchestrator.store.redis_client import SentinelAddress, make_client, parse_sentinel_url
from tests.loops import live


@live
async def test_clients_give_up_early_and_never_retry() -> None:
    for url in (
        "redis://:secret@redis:6380/2",
        "rediss://redis/0",
        "unix:///run/valkey.sock",
        "redis+sentinel://a:1,b:2/mymaster/3",
    ):
        client = make_client(url, timeout=0.05)
        assert isinstance(client, Redis)
        options = client.connection_pool.connection_kwargs
        assert (options["socket_timeout"], options["socket_connect_timeout"]) == (0.05, 0.05)
        assert client.connection_pool.max_connections == 2
        assert client.get_retry() is not None
        assert client.get_retry()._retries == 0  # type: ignore[union-attr]
        await client.aclose()


@live
async def test_a_cluster_url_makes_a_cluster_client_but_for_pubsub() -> None:
    cluster = make_client("redis+cluster://u:p@node:7000", timeout=0.05)
    assert isinstance(cluster, RedisCluster)
    await cluster.aclose()
    plain = make_client("redis+cluster://u:p@node:7000", timeout=0.05, for_pubsub=True)
    assert isinstance(plain, Redis)
    options = plain.connection_pool.connection_kwargs
    assert (options["host"], options["port"], options["username"]) == ("node", 7000, "u")
    assert options["socket_timeout"] is None
    await plain.aclose()


def test_a_sentinel_url_in_full() -> None:
    url = "redis+sentinel://us%40er:p%3Aw@a,b:2,[::1]:3/my%20master/4?ssl=true&sentinel_password=s"
    assert parse_sentinel_url(url) == SentinelAddress(
        nodes=(("a", 26379), ("b", 2), ("::1", 3)),
        service="my master",
        database=4,
        username="us@er",
        password="p:w",
        options={"ssl": "true", "sentinel_password": "s"},
    )


def test_a_sentinel_url_in_short() -> None:
    assert parse_sentinel_url("redis+sentinel://a/m") == SentinelAddress((("a", 26379),), "m", 0, None, None, {})
