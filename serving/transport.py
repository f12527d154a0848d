"""How the server's port behaves: TLS, the sizes of messages, keepalive, the age of connections."""

from __future__ import annotations

from serving import rpc
from serving.config import ServerConfig
from serving.errors import cannot_listen
from serving.security import Tls

_INT_MAX = 2**31 - 1


def listen(server: rpc.Server, config: ServerConfig, tls: Tls | None) -> int:
    """Bind the port that the settings name, and return it.

    Raises:
        StartupError: the address cannot be listened on.
    """
    try:
        if tls:
            return server.add_secure_port(config.address, tls.credentials)
        return server.add_insecure_port(config.address)
    except RuntimeError as error:
        raise cannot_listen(config.address) from error


def options(config: ServerConfig, shared_port: bool) -> list[tuple[str, int]]:
    """gRPC's settings: https://grpc.github.io/grpc/core/group__grpc__arg__keys.html."""
    options = {
        # A message over our limit is refused by us, in words that help; gRPC only guards the memory.
        "grpc.max_receive_message_length": min(2 * config.max_message_bytes, _INT_MAX),
        "grpc.max_send_message_length": config.max_message_bytes,
        # Alone, a port in use is an error, not a second server on it; the supervisor sees to that for several.
        "grpc.so_reuseport": int(shared_port),
        # Calls that arrived and were not handed over yet: what the core refuses costs next to nothing.
        "grpc.server.max_pending_requests": config.max_queue,
        "grpc.server.max_pending_requests_hard_limit": config.max_queue,
        "grpc.keepalive_time_ms": _ms(config.keepalive_time_s),
        "grpc.keepalive_timeout_ms": _ms(config.keepalive_timeout_s),
        "grpc.keepalive_permit_without_calls": 1,  # pings find dead connections that have no calls too
        "grpc.http2.max_pings_without_data": 0,  # our own pings are not limited
        "grpc.http2.min_ping_interval_without_data_ms": _ms(config.min_ping_interval_s),
    }
    if config.max_connection_age_s:
        options["grpc.max_connection_age_ms"] = _ms(config.max_connection_age_s)
        options["grpc.max_connection_age_grace_ms"] = _ms(config.max_connection_age_grace_s)
    return list(options.items())


def _ms(seconds: float) -> int:
    return min(round(1000 * seconds), _INT_MAX)
