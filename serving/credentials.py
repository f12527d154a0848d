"""What a client shows to a server: TLS certificates and a bearer token."""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path

import grpc

from serving.errors import InvalidArgument

TOKEN_VARIABLE = "PARITYSERVE_TOKEN"  # of the environment
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # https://datatracker.ietf.org/doc/html/rfc6750#section-2.1


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """How to reach a server that asks for TLS or a token; without any of it, in plain text and as nobody.

    `ca` is who vouches for the server, the system's authorities when not given. `cert` and `key` are for a server with
    mutual TLS. Paths of PEM files; naming any of them switches TLS on.
    """

    tls: bool = False
    ca: Path | str | None = None
    cert: Path | str | None = None
    key: Path | str | None = None
    token: str = ""
    allow_plaintext_token: bool = False  # something else encrypts: a service mesh, a tunnel

    def channel(self) -> grpc.ChannelCredentials | None:
        """For a secure channel; None for an insecure one.

        Raises:
            InvalidArgument: a certificate without its key, or a key without its certificate.
            OSError: a file cannot be read.
        """
        if (self.cert is None) != (self.key is None):
            raise InvalidArgument("a client's certificate and its key belong together: got only one of them")
        if not (self.tls or self.ca or self.cert):
            return None
        ca, key, cert = (Path(path).read_bytes() if path else None for path in (self.ca, self.key, self.cert))
        return grpc.ssl_channel_credentials(ca, key, cert)

    def metadata(self, target: str) -> tuple[tuple[str, str], ...]:
        """For each call to `target`, host:port.

        Raises:
            InvalidArgument: the token is malformed, or would cross a network unencrypted.
        """
        if not self.token:
            return ()
        if not _TOKEN.fullmatch(self.token):
            raise InvalidArgument("the token has characters that no bearer token has (its value is not shown)")
        encrypted = self.tls or self.ca or self.cert
        if not (encrypted or self.allow_plaintext_token or is_loopback(target.rpartition(":")[0].strip("[]"))):
            raise InvalidArgument(
                f"the token is not sent unencrypted to {target}: use TLS (--tls or --tls-ca), "
                "or allow it where something else encrypts (--allow-plaintext-token)"
            )
        return (("authorization", f"Bearer {self.token}"),)


def add_credentials(command: argparse.ArgumentParser) -> None:
    """Give a command that calls a server the options that `given_credentials` reads."""
    command.add_argument("--tls", action="store_true", help="use TLS, with the system's certificate authorities")
    command.add_argument("--tls-ca", type=Path, metavar="PATH", help="use TLS; PEM file: who vouches for the server")
    command.add_argument("--tls-cert", type=Path, metavar="PATH", help="PEM file: our certificate, for mutual TLS")
    command.add_argument("--tls-key", type=Path, metavar="PATH", help="PEM file: our certificate's key")
    command.add_argument(
        "--token-file",
        type=Path,
        metavar="PATH",
        help=f"file with a bearer token, of which the first is sent (default: ${TOKEN_VARIABLE}, the token)",
    )
    command.add_argument(
        "--allow-plaintext-token", action="store_true", help="send it without TLS, where something else encrypts"
    )


def given_credentials(options: argparse.Namespace) -> Credentials:
    """What the options of `add_credentials` say.

    Raises:
        ValueError: the token file has no token.
        OSError: it cannot be read.
    """
    token = read_tokens(options.token_file)[0] if options.token_file else os.environ.get(TOKEN_VARIABLE, "")
    return Credentials(
        tls=options.tls,
        ca=options.tls_ca,
        cert=options.tls_cert,
        key=options.tls_key,
        token=token,
        allow_plaintext_token=options.allow_plaintext_token,
    )


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address, is this very machine and nothing else."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_tokens(path: Path) -> tuple[str, ...]:
    """The bearer tokens of a file: one a line; from # on, a line is a comment.

    Raises:
        ValueError: there is none, or a line is none; the text never has the line itself.
        OSError: the file cannot be read.
    """
    tokens = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        token = line.partition("#")[0].strip()
        if token and not _TOKEN.fullmatch(token):
            raise ValueError(f"{path}: line {number} is no bearer token; want one a line, of A-Z a-z 0-9 - . _ ~ + / =")
        if token:
            tokens.append(token)
    if not tokens:
        raise ValueError(f"{path}: there is no token in it; make one with: openssl rand -hex 32")
    return tuple(tokens)
