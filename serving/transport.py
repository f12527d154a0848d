"""How the server's port behaves: TLS, the sizes of messages, keepalive, the age of connections."""

from __future__ import annotations

from serving import rpc
from serving.config import ServerConfig
from serving.errors import cannot_listen
from serving.security import Tls


def listen(server: rpc.Server, config: ServerConfig, tls: Tls | None) -> int:
    """Bind the port that the settings name, and return it.

    Raises:
        StartupError: the address cannot be listened on.
    """
    try:
        return server.add_port(config.host, config.port, tls.context if tls else None)
    except OSError as error:
        raise cannot_listen(config.address) from error


def options(config: ServerConfig, shared_port: bool) -> rpc.Options:
    """How connections behave."""
    return rpc.Options(
        # A message over our limit is refused by its service, which knows how to say it; this guards the memory.
        max_message_bytes=2 * config.max_message_bytes,
        max_answer_bytes=config.max_message_bytes,
        # No less than what clients may send ahead on many streams, and several of the largest messages.
        max_held_bytes=max(8 * config.max_message_bytes, 1 << 28),
        # Alone, a port in use is an error, not a second server on it; the supervisor sees to that for several.
        reuse_port=shared_port,
        keepalive_time_s=config.keepalive_time_s,
        keepalive_timeout_s=config.keepalive_timeout_s,
        min_ping_interval_s=config.min_ping_interval_s,
        max_connection_age_s=config.max_connection_age_s,
        max_connection_age_grace_s=config.max_connection_age_grace_s,
    )
