"""Who may call the server: TLS, client certificates, bearer tokens. Their files are read again when they change."""

from __future__ import annotations

import hmac
import logging
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from serving import rpc
from serving.config import ServerConfig
from serving.credentials import read_tokens
from serving.errors import StartupError, Unauthenticated
from serving.services.gate import refusal

logger = logging.getLogger(__name__)

CHECK_S = 1.0  # a changed file is noticed by whoever asks this much later
OPEN = "/grpc.health.v1.Health/"  # without a token: probes have none, and it tells only whether models are ready

_HOW = "send the metadata 'authorization: Bearer <token>'"

Value = TypeVar("Value")


class Reloaded(Generic[Value]):
    """What is made from files, and made again when they change. While they are wrong, the last good one stays."""

    def __init__(self, what: str, paths: list[Path], make: Callable[[], Value]) -> None:
        """Make it for the first time.

        Raises:
            StartupError: as `make` does.
        """
        self._what, self._paths, self._make = what, paths, make
        self._seen = self._stamps()
        self._value = make()
        self._check_at = time.monotonic() + CHECK_S

    def get(self) -> Value:
        """What the files say, at most `CHECK_S` ago."""
        now = time.monotonic()
        if now >= self._check_at:
            self._check_at = now + CHECK_S
            if self._stamps() != self._seen:
                self.reload()
        return self._value

    def reload(self) -> None:
        """Read the files now."""
        self._seen = self._stamps()
        try:
            self._value = self._make()
        except StartupError as error:
            logger.error("the %s stay as they were: %s", self._what, error)
        else:
            logger.info("the %s were read again", self._what)

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(path) for path in self._paths]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ino, stat.st_size


class Tls:
    """The server's certificate, and with a client CA the demand that clients have one too."""

    def __init__(self, cert: Path, key: Path, client_ca: Path | None) -> None:
        """Read the files.

        Raises:
            StartupError: a file is missing or not what it should be, or the key is not the certificate's.
        """
        paths = [cert, key, *([client_ca] if client_ca else [])]
        self.files = Reloaded("TLS certificates", paths, lambda: _context(cert, key, client_ca))
        self.context = self.files.get()  # of every handshake that begins
        self.context.sni_callback = self._newest

    def _newest(self, handshake: ssl.SSLObject, _name: str | None, _begun: ssl.SSLContext) -> None:
        """Called by a handshake once the client's first words are there, whether or not they name a server."""
        handshake.context = self.files.get()


def _context(cert: Path, key: Path, client_ca: Path | None) -> ssl.SSLContext:
    for option, path in {"--tls-cert": cert, "--tls-key": key, "--tls-client-ca": client_ca}.items():
        if path:
            try:
                path.read_bytes()
            except OSError as error:
                raise StartupError(f"{option}: {path}: {error.strerror}; want a readable PEM file") from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["h2"])
    # A session that is resumed is not checked anew: a client whose CA was taken out would go on being let in.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET
    try:
        context.load_cert_chain(cert, key, password="")  # not asked for at the terminal
    except (ssl.SSLError, OSError) as error:
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            problem = f"the key in {key} is not that of the first certificate in {cert}"
        else:
            problem = f"{cert} and {key} are not a certificate and its unencrypted key: {error}"
        raise StartupError(
            f"--tls-cert, --tls-key: {problem}; want PEM files, the server's certificate first, then its issuers"
        ) from error
    if client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(client_ca)
        except (ssl.SSLError, OSError) as error:
            raise StartupError(f"--tls-client-ca: {client_ca}: no certificate: {error}; want PEM") from error
    return context


def tls(config: ServerConfig) -> Tls | None:
    """The server's TLS, None when it is not asked for.

    Raises:
        StartupError: a file is wrong.
    """
    return Tls(config.tls_cert, config.tls_key, config.tls_client_ca) if config.tls_cert and config.tls_key else None


class TokenGuard:
    """Lets calls with one of the file's bearer tokens through, to whichever service, and refuses all others.

    What it refuses is never read: neither its message nor whether there is such a method.
    """

    def __init__(self, path: Path) -> None:
        """Read the tokens.

        Raises:
            StartupError: the file cannot be read, or has a line that is no token, or none at all.
        """
        self.files = Reloaded("tokens", [path], lambda: _tokens(path))

    def intercept(self, details: rpc.CallDetails, find: rpc.Find) -> rpc.Handler | None:
        """What answers a call, which is not read yet."""
        problem = self._problem(details)
        if problem is None or details.method.startswith(OPEN):
            return find(details)
        return refusal(Unauthenticated(problem), details.method)

    def _problem(self, details: rpc.CallDetails) -> str | None:
        for key, value in details.invocation_metadata:
            if key == "authorization":
                return self._problem_of(value if isinstance(value, str) else value.decode("latin-1"))
        return f"no token: {_HOW}"

    def _problem_of(self, authorization: str) -> str | None:
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer":
            return f"authorization is of another kind than Bearer: {_HOW}"
        presented = token.strip().encode()
        right = False
        for known in self.files.get():  # all of them, each in a time that tells nothing
            right |= hmac.compare_digest(presented, known)
        return None if right else f"the token is none of those that this server accepts: {_HOW}"


def _tokens(path: Path) -> tuple[bytes, ...]:
    try:
        return tuple(token.encode() for token in read_tokens(path))
    except OSError as error:
        raise StartupError(f"--token-file: {path}: {error.strerror}; want a readable file, one token a line") from error
    except ValueError as error:
        raise StartupError(f"--token-file: {error}") from error
