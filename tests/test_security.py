"""TLS, mutual TLS and bearer tokens over real connections, with certificates made here."""

import asyncio
import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from certificates import encrypt, issue
from conftest import MODEL, running
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos import classifier_pb2, classifier_pb2_grpc, open_inference
from serving.client import AsyncClient, Client, predict_request
from serving.config import ServerConfig
from serving.credentials import Credentials, is_loopback, read_tokens
from serving.errors import InvalidArgument, StartupError, Unauthenticated, Unavailable
from serving.rpc import frames
from serving.security import CHECK_S, Reloaded, Tls, TokenGuard

IMAGE = np.zeros((1, 1, 28, 28), np.uint8)
TOKEN, OTHER = "a-token-of-32-characters-0123456", "another/token+of.other~characters_=="
SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def ca(folder):
    return issue(folder, "ca")


@pytest.fixture(scope="module")
def server_cert(folder, ca):
    return issue(folder, "server", ca)


@pytest.fixture(scope="module")
def client_cert(folder, ca):
    return issue(folder, "client", ca)


@pytest.fixture(scope="module")
def stranger(folder):
    """A client's certificate that somebody else signed."""
    return issue(folder, "stranger", issue(folder, "other-ca"))


@pytest.fixture(scope="module")
def tokens(folder):
    path = folder / "tokens"
    path.write_text(f"# who may call\n\n{TOKEN}  # the web site\n{OTHER}\n")
    return path


@pytest.fixture(scope="module")
def tls(repository, server_cert):
    with running(repository, tls_cert=server_cert.cert, tls_key=server_cert.key) as server:
        yield server.address


@pytest.fixture(scope="module")
def mutual(repository, server_cert, ca):
    with running(repository, tls_cert=server_cert.cert, tls_key=server_cert.key, tls_client_ca=ca.cert) as server:
        yield server.address


@pytest.fixture(scope="module")
def guarded(repository, tokens):
    with running(repository, token_file=tokens) as server:
        yield server.address


def predict(address, **credentials):
    with Client(address, 10, Credentials(**credentials)) as client:
        return len(client.predict(IMAGE).predictions)


def stream(address, **credentials):
    """Two requests over one stream: the numbers of predictions, or what was raised."""
    with Client(address, 10, Credentials(**credentials)) as client:
        return [len(answer.predictions) for answer in client.predict_stream([predict_request(IMAGE)] * 2)]


def statuses(address, **credentials):
    """How a call and a stream end, tried once."""
    secure = Credentials(**credentials).channel()
    with grpc.secure_channel(address, secure) if secure else grpc.insecure_channel(address) as channel:
        stub, codes = classifier_pb2_grpc.ClassifierStub(channel), []
        for call in (stub.Predict, stub.PredictStream):
            request = predict_request(IMAGE)
            try:
                list(call(iter([request])) if call == stub.PredictStream else [call(request)])
            except grpc.RpcError as error:
                codes.append(error.code())
        return codes


# --- TLS


def test_tls_answers_whoever_trusts_its_authority(tls, ca):
    assert predict(tls, ca=ca.cert) == 1
    assert stream(tls, ca=ca.cert) == [1, 1]


def test_tls_is_nothing_to_those_who_trust_another_or_speak_plain_text(tls, ca, stranger):
    assert statuses(tls, ca=stranger.cert) == [grpc.StatusCode.UNAVAILABLE] * 2
    assert statuses(tls, tls=True) == [grpc.StatusCode.UNAVAILABLE] * 2  # the system's authorities
    assert statuses(tls) == [grpc.StatusCode.UNAVAILABLE] * 2
    assert statuses(tls, ca=ca.cert) == []


def test_the_asyncio_client_speaks_tls_and_sends_the_token(tls, guarded, ca):
    async def scenario():
        async with AsyncClient(tls, 10, Credentials(ca=ca.cert)) as client:
            assert len((await client.predict(IMAGE)).predictions) == 1
        async with AsyncClient(guarded, 10, Credentials(token=TOKEN)) as client:
            assert len((await client.predict(IMAGE)).predictions) == 1
            assert [model.name for model in await client.list_models()] == [MODEL]

            async def requests():
                yield predict_request(IMAGE)

            assert [len(answer.predictions) async for answer in client.predict_stream(requests())] == [1]
        async with AsyncClient(guarded, 10) as client:
            with pytest.raises(Unauthenticated):
                await client.predict(IMAGE)

    asyncio.run(scenario())


def test_mutual_tls_wants_a_certificate_of_the_clients_authority(mutual, ca, client_cert, stranger):
    mine = {"ca": ca.cert, "cert": client_cert.cert, "key": client_cert.key}
    assert predict(mutual, **mine) == 1
    assert stream(mutual, **mine) == [1, 1]
    assert statuses(mutual, ca=ca.cert) == [grpc.StatusCode.UNAVAILABLE] * 2
    strange = {"ca": ca.cert, "cert": stranger.cert, "key": stranger.key}
    assert statuses(mutual, **strange) == [grpc.StatusCode.UNAVAILABLE] * 2
    with pytest.raises(Unavailable, match=f"^{mutual}: "):
        predict(mutual, **strange)


def test_tritons_client_speaks_tls_mutual_tls_and_sends_a_token(tls, mutual, guarded, ca, client_cert):
    image = triton.InferInput("image", IMAGE.shape, "UINT8")
    image.set_data_from_numpy(IMAGE)

    def infer(client, headers=None):
        return client.infer(MODEL, [image], headers=headers).as_numpy("logits").shape

    with triton.InferenceServerClient(tls, ssl=True, root_certificates=str(ca.cert)) as client:
        assert infer(client) == (1, 10)
    files = {"private_key": str(client_cert.key), "certificate_chain": str(client_cert.cert)}
    with triton.InferenceServerClient(mutual, ssl=True, root_certificates=str(ca.cert), **files) as client:
        assert infer(client) == (1, 10)
    with triton.InferenceServerClient(guarded) as client:
        assert infer(client, {"authorization": f"Bearer {TOKEN}"}) == (1, 10)
        with pytest.raises(triton.InferenceServerException, match="no token: send the metadata") as raised:
            infer(client)
        assert raised.value.status() == "StatusCode.UNAUTHENTICATED"


def test_a_new_certificate_is_used_without_a_restart(repository, tmp_path, ca, server_cert, stranger, caplog):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def put(issued):
        cert.write_bytes(issued.cert.read_bytes())
        key.write_bytes(issued.key.read_bytes())

    put(server_cert)
    with (
        running(repository, tls_cert=cert, tls_key=key) as server,
        Client(server.address, 10, Credentials(ca=ca.cert)) as connected,
    ):
        assert len(connected.predict(IMAGE).predictions) == 1
        key.write_text("not a key")
        server.server.reload()
        assert "the TLS certificates stay as they were: --tls-cert, --tls-key: " in caplog.text
        assert predict(server.address, ca=ca.cert) == 1
        put(stranger)
        server.server.reload()
        assert statuses(server.address, ca=ca.cert) == [grpc.StatusCode.UNAVAILABLE] * 2
        assert predict(server.address, ca=stranger.cert.with_name("other-ca.pem")) == 1
        assert len(connected.predict(IMAGE).predictions) == 1  # who is connected stays so


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"tls_cert": "none.pem"}, r"--tls-cert: .*none\.pem: No such file or directory; want a readable PEM file"),
        ({"tls_key": "none.key"}, r"--tls-key: .*none\.key: No such file"),
        ({"tls_client_ca": "none.pem"}, r"--tls-client-ca: .*none\.pem: No such file"),
        (
            {"tls_key": "stranger.key"},
            r"the key in .*stranger\.key is not that of the first certificate in .*server\.pem",
        ),
        ({"tls_cert": "server.key"}, r"server\.key and .*server\.key are not a certificate and its unencrypted key"),
        ({"tls_key": "locked.key"}, r"server\.pem and .*locked\.key are not a certificate and its unencrypted key"),
        ({"tls_client_ca": "server.key"}, r"--tls-client-ca: .*server\.key: no certificate"),
        ({"tls_cert": "."}, r"--tls-cert: .*: Is a directory; want a readable PEM file"),
    ],
)
def test_a_wrong_file_keeps_the_server_from_starting(repository, folder, server_cert, stranger, settings, problem):
    encrypt(server_cert, folder / "locked.key")
    given = {"tls_cert": "server.pem", "tls_key": "server.key", **settings}
    with (
        pytest.raises(StartupError, match=problem),
        running(repository, **{name: folder / file for name, file in given.items()}),
    ):
        pass


# --- tokens


def test_each_of_the_tokens_opens_every_service(guarded):
    assert predict(guarded, token=TOKEN) == predict(guarded, token=OTHER) == 1
    assert stream(guarded, token=TOKEN) == [1, 1]
    with Client(guarded, 10, Credentials(token=TOKEN)) as client:
        assert [model.name for model in client.list_models()] == [MODEL]


def every_rpc() -> list[tuple[str, bool]]:
    """Each method's path, and whether it is a stream; with one that does not exist."""
    found = [
        ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", True),
        ("/no.such.Service/Method", False),
    ]
    classifier = classifier_pb2.DESCRIPTOR.services_by_name["Classifier"]
    for service in (classifier, open_inference.POOL.FindServiceByName(open_inference.SERVICE)):
        found += [(f"/{service.full_name}/{method.name}", method.server_streaming) for method in service.methods]
    return found


@pytest.mark.parametrize(("path", "streaming"), every_rpc())
@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ((), "no token: send the metadata 'authorization: Bearer <token>'"),
        ((("authorization", "Bearer wrong"),), "the token is none of those that this server accepts: send"),
        ((("authorization", f"Bearer {TOKEN[:-1]}"),), "the token is none of those"),
        ((("authorization", f"Basic {TOKEN}"),), "authorization is of another kind than Bearer: send"),
        ((("authorization", TOKEN),), "authorization is of another kind than Bearer"),
    ],
    ids=["none", "wrong", "part", "basic", "bare"],
)
def test_every_rpc_refuses_a_missing_or_wrong_token(guarded, path, streaming, metadata, text):
    with grpc.insecure_channel(guarded) as channel:
        call = channel.stream_stream(path) if streaming else channel.unary_unary(path)
        with pytest.raises(grpc.RpcError) as raised:
            list(call(iter([b""]) if streaming else b"", metadata=metadata, timeout=10))
    assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert text in raised.value.details()
    assert TOKEN not in raised.value.details()


def test_the_right_token_opens_reflection_too(guarded):
    with grpc.insecure_channel(guarded) as channel:
        ask = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = ask(iter([request]), metadata=(("authorization", f"bearer {TOKEN}"),), timeout=10)
    assert len(answer.list_services_response.service) == 4


def test_health_needs_no_token(guarded):
    with grpc.insecure_channel(guarded) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(health_pb2.HealthCheckRequest(), timeout=10).status == SERVING
        assert next(stub.Watch(health_pb2.HealthCheckRequest(), timeout=10)).status == SERVING


def test_a_changed_token_file_is_read_again(repository, tmp_path, caplog):
    path = tmp_path / "tokens"
    path.write_text(TOKEN)
    with running(repository, token_file=path) as server:
        assert predict(server.address, token=TOKEN) == 1
        path.write_text("# nobody\n")
        server.server.reload()
        assert f"the tokens stay as they were: --token-file: {path}: there is no token in it" in caplog.text
        assert predict(server.address, token=TOKEN) == 1
        path.write_text(OTHER)
        server.server.reload()
        assert predict(server.address, token=OTHER) == 1
        with pytest.raises(Unauthenticated, match="the token is none of those that this server accepts"):
            predict(server.address, token=TOKEN)


def test_a_change_is_noticed_without_being_told(tmp_path, monkeypatch):
    """At most `CHECK_S` later, and in between the file is not looked at."""
    now = 0.0
    monkeypatch.setattr("serving.security.time.monotonic", lambda: now)
    path = tmp_path / "file"
    path.write_text("one")
    read = Reloaded("words", [path], path.read_text)
    assert read.get() == "one"
    path.write_text("three")
    assert read.get() == "one"
    now = CHECK_S
    assert read.get() == "three"
    path.unlink()
    path.with_name("new").write_text("other")  # as long: its inode tells
    path.with_name("new").rename(path)
    now = 2 * CHECK_S
    assert read.get() == "other"


def test_the_guard_judges_a_token_whatever_its_bytes(tokens):
    guard = TokenGuard(tokens)
    assert guard._problem_of(f"Bearer {TOKEN}") is None
    for presented in ("Bearer ", "Bearer ü", "Bearer \x00", "", " ", f"Bearer {TOKEN} {TOKEN}"):
        assert guard._problem_of(presented)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "there is no token in it; make one with: openssl rand -hex 32"),
        ("# only\n  # comments", "there is no token in it"),
        ("good\nnot good", "line 2 is no bearer token; want one a line"),
        ("pässword", "line 1 is no bearer token"),
    ],
)
def test_a_wrong_token_file_keeps_the_server_from_starting(repository, tmp_path, text, problem):
    path = tmp_path / "tokens"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(StartupError, match=f"--token-file: {path}: {problem}"), running(repository, token_file=path):
        pass


def test_a_token_file_that_is_not_there(repository, tmp_path):
    with (
        pytest.raises(StartupError, match=r"--token-file: .*none: No such file or directory; want a readable file"),
        running(repository, token_file=tmp_path / "none"),
    ):
        pass


# --- settings


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"tls_cert": "c"}, "--tls-cert and --tls-key belong together"),
        ({"tls_key": "k"}, "--tls-cert and --tls-key belong together"),
        ({"tls_client_ca": "c"}, "--tls-client-ca needs TLS"),
        ({"token_file": "t", "host": "0.0.0.0"}, r"anyone on the way to --host 0\.0\.0\.0 could read the tokens"),
        ({"token_file": "t", "host": "::"}, "anyone on the way to --host :: could read the tokens"),
    ],
)
def test_settings_that_do_not_go_together(settings, problem):
    with pytest.raises(ValueError, match=problem):
        ServerConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"host": "127.0.0.1"},
        {"host": "::1"},
        {"host": "localhost"},
        {"host": "0.0.0.0", "tls_cert": "c", "tls_key": "k"},
        {"host": "0.0.0.0", "allow_plaintext_token": True},
    ],
)
def test_tokens_where_nobody_can_read_them(settings):
    assert ServerConfig(token_file="t", **settings).token_file == Path("t")


@pytest.mark.parametrize("target", ["127.0.0.1:8001", "[::1]:8001", "localhost:8001", "127.8.8.8:1"])
def test_a_client_sends_its_token_in_plain_text_to_this_machine_only(target):
    assert Credentials(token=TOKEN).metadata(target) == (("authorization", f"Bearer {TOKEN}"),)
    with pytest.raises(InvalidArgument, match=r"the token is not sent unencrypted to example\.com:8001: use TLS"):
        Credentials(token=TOKEN).metadata("example.com:8001")
    assert Credentials(token=TOKEN, allow_plaintext_token=True).metadata("example.com:8001")
    assert Credentials(token=TOKEN, tls=True).metadata("example.com:8001")


def test_wrong_credentials_of_a_client(tmp_path):
    with pytest.raises(InvalidArgument, match="belong together"):
        Credentials(cert=tmp_path / "c").channel()
    with pytest.raises(FileNotFoundError):
        Credentials(ca=tmp_path / "none").channel()
    with pytest.raises(InvalidArgument, match=r"characters that no bearer token has \(its value is not shown\)"):
        Credentials(token="a b").metadata("127.0.0.1:1")
    assert not is_loopback("0.0.0.0")
    assert not is_loopback("localhost.example.com")


def test_the_tokens_of_a_file(tokens):
    assert read_tokens(tokens) == (TOKEN, OTHER)


def test_the_commands_show_certificates_and_tokens(repository, server_cert, client_cert, ca, tokens, tmp_path):
    def models(*words, **variables):
        return subprocess.run(
            [sys.executable, "-m", "serving", "models", "--server", server.address, *map(str, words)],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "COLUMNS": "160", **variables},
            capture_output=True,
            text=True,
            timeout=120,
        )

    with running(
        repository,
        tls_cert=server_cert.cert,
        tls_key=server_cert.key,
        tls_client_ca=ca.cert,
        token_file=tokens,
    ) as server:
        files = ("--tls-ca", ca.cert, "--tls-cert", client_cert.cert, "--tls-key", client_cert.key)
        for done in (models(*files, "--token-file", tokens), models(*files, PARITYSERVE_TOKEN=OTHER)):
            assert done.returncode == 0, done.stderr
            assert MODEL in done.stdout
        done = models(*files)
        assert done.returncode == 1
        assert done.stderr == "error: no token: send the metadata 'authorization: Bearer <token>'\n"
        done = models(*files, PARITYSERVE_TOKEN="not a token")
        assert done.returncode == 1
        assert "its value is not shown" in done.stderr


def test_a_certificate_alone_is_read_only_when_it_changed(folder, server_cert):
    tls = Tls(server_cert.cert, server_cert.key, None)
    first = tls.files.get()
    assert tls.files.get() is first
    tls.files.reload()
    assert tls.files.get() is not first


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_client_whose_authority_was_taken_out_does_not_resume(tmp_path, server_cert, ca, client_cert, version):
    """A session that is resumed is not checked anew."""
    authorities = tmp_path / "authorities.pem"
    shutil.copy(ca.cert, authorities)
    tls = Tls(server_cert.cert, server_cert.key, authorities)
    client = ssl.create_default_context(cafile=ca.cert)
    client.load_cert_chain(client_cert.cert, client_cert.key)
    client.maximum_version = version

    def connect(session):
        """What a client has of a connection for the next one."""
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        asks = client.wrap_bio(to_client, to_server, server_hostname="localhost", session=session)
        answers = tls.context.wrap_bio(to_server, to_client, server_side=True)
        for _ in range(3):
            for side in (asks, answers):
                with contextlib.suppress(ssl.SSLWantReadError):
                    side.do_handshake()
        answers.write(b"hello")
        assert asks.read() == b"hello"
        return asks.session

    session = connect(connect(None))
    shutil.copy(issue(tmp_path, "another").cert, authorities)
    tls.files.reload()
    for kept in (None, session):
        with pytest.raises(ssl.SSLError, match=r"(?i)certificate"):
            connect(kept)


@pytest.mark.parametrize("hurried", [False, True])
def test_a_client_that_does_not_close_its_side_of_tls_does_not_hold_a_server(repository, server_cert, ca, hurried):
    settings = {"tls_cert": server_cert.cert, "tls_key": server_cert.key, "drain_delay_s": 0, "drain_s": 60}
    context = ssl.create_default_context(cafile=ca.cert)
    context.set_alpn_protocols(["h2"])
    with running(repository, **settings) as server:
        host, _, port = server.address.rpartition(":")
        with (
            socket.create_connection((host, int(port))) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as silent,
        ):
            silent.sendall(frames.PREFACE + frames.settings({}))
            assert silent.recv(1)

            async def stop():
                hurry = asyncio.Event()
                if hurried:
                    asyncio.get_running_loop().call_later(0.1, hurry.set)
                began = time.monotonic()
                await server.server.stop(hurry)
                return time.monotonic() - began

            took_s = asyncio.run_coroutine_threadsafe(stop(), server.loop).result(60)
            assert took_s < (1.5 if hurried else 10)
