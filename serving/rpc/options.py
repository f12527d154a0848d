"""How the server's connections behave."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Options:
    """Of a server."""

    max_message_bytes: int = 1 << 22  # of what is taken in, unpacked
    max_answer_bytes: int = (1 << 31) - 1
    max_held_bytes: int = 1 << 28  # of a connection's requests that are not finished, or that nobody has taken yet
    reuse_port: bool = False  # whether others may listen on the same port
    keepalive_time_s: float = 60.0  # after which a silent client is asked for a sign of life
    keepalive_timeout_s: float = 20.0  # and without one is given up
    min_ping_interval_s: float = 10.0  # a client that asks the server more often is cut off
    max_connection_age_s: float = 0.0  # after which a client is sent away; 0: never
    max_connection_age_grace_s: float = 30.0  # and after that, its calls are ended
