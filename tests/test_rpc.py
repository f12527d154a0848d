"""The gRPC server beneath the services: real channels to handlers of all kinds."""

import asyncio
import socket
import threading
import time
from contextlib import contextmanager

import grpc
import pytest
import uvloop
from conftest import wait_until

from serving import rpc
from serving.rpc.messages import prefixed
from serving.rpc.outgoing import Outgoing
from serving.rpc.stream import AHEAD_BYTES, Requests

SERVICE = "test.Service"


class Handlers:
    """What the tests call, and what became of it."""

    def __init__(self):
        self.started = threading.Event()
        self.cancelled = threading.Event()
        self.unblock = threading.Event()
        self.seen = []

    async def echo(self, data, call):
        self.seen.append((data, call.invocation_metadata(), call.peer(), call.time_remaining()))
        return data

    async def refuse(self, data, call):
        await call.abort(grpc.StatusCode.NOT_FOUND, "no such thing", (("hint-bin", b"\x01"),))

    async def fail(self, data, call):
        raise ValueError("a secret")

    async def wait(self, data, call):
        self.started.set()
        try:
            await asyncio.Event().wait()
        finally:
            if call.cancelled():
                self.cancelled.set()

    async def nap(self, data, call):
        self.started.set()
        await asyncio.sleep(0.3)
        return b"rested"

    async def swell(self, data, call):
        self.started.set()
        await asyncio.sleep(0.3)
        return bytes(3_000_000)

    async def block(self, data, call):
        self.started.set()
        self.unblock.wait(20)  # the whole loop does
        return data

    async def double(self, requests, call):
        async for data in requests:
            yield data + data

    async def count(self, requests, call):
        try:
            number = 0
            while True:
                number += 1
                yield b"%d" % number
        finally:
            self.cancelled.set()

    async def large(self, requests, call):
        for self.made in range(1, 1001):
            yield bytes(1 << 20)

    async def half(self, requests, call):
        for number in range(40):
            yield b"%d" % number
        raise ValueError("a secret")

    async def unread(self, requests, call):
        call.set_code(grpc.StatusCode.UNAVAILABLE)
        call.set_details("elsewhere")

    def generic(self):
        unary = {name: getattr(self, name) for name in ("echo", "refuse", "fail", "wait", "nap", "swell", "block")}
        streams = {name: getattr(self, name) for name in ("double", "count", "large", "half", "unread")}
        methods = {name: grpc.unary_unary_rpc_method_handler(method) for name, method in unary.items()}
        methods |= {name: grpc.stream_stream_rpc_method_handler(method) for name, method in streams.items()}
        return grpc.method_handlers_generic_handler(SERVICE, methods)


@contextmanager
def served(handlers, **settings):
    """A server on a thread of its own: a channel to it, and how to stop it."""
    ready, loop = threading.Event(), asyncio.new_event_loop()
    started = {}

    async def start():
        server = started["server"] = rpc.Server(**settings)
        server.add_generic_rpc_handlers((handlers.generic(),))
        started["port"] = server.add_port("127.0.0.1", 0)
        await server.start()
        ready.set()

    def run():
        loop.run_until_complete(start())
        loop.run_forever()

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(10)

    def stop(grace=None):
        return asyncio.run_coroutine_threadsafe(started["server"].stop(grace), loop)

    try:
        with grpc.insecure_channel(f"127.0.0.1:{started['port']}") as channel:
            yield channel, stop
    finally:
        stop().result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@pytest.fixture(params=[(), ("echo", "refuse", "fail", "wait", "nap")], ids=["found first", "read first"])
def server(request):
    """With and without somebody who may see to the calls himself, and does not."""
    handlers = Handlers()
    direct = rpc.Direct([f"/{SERVICE}/{name}" for name in request.param], lambda data, call: False)
    with served(handlers, direct=direct) as (channel, stop):
        yield handlers, channel, stop


def unary(channel, name):
    return channel.unary_unary(f"/{SERVICE}/{name}")


def test_a_handler_is_told_who_asks_and_until_when(server):
    handlers, channel, _ = server
    assert unary(channel, "echo")(b"hello", timeout=50, metadata=(("who", "me"),)) == b"hello"
    assert unary(channel, "echo")(b"") == b""
    (data, metadata, peer, remaining), (_, _, _, none) = handlers.seen
    assert data == b"hello"
    assert ("who", "me") in [tuple(pair) for pair in metadata]
    assert peer.startswith("ipv4:127.0.0.1:")
    assert 40 < remaining <= 50.2  # gRPC rounds so long a timeout up to the next tenth of a second
    assert none is None


def test_an_abort_is_a_status_with_text_and_metadata(server):
    _, channel, _ = server
    with pytest.raises(grpc.RpcError) as raised:
        unary(channel, "refuse")(b"", timeout=10)
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND
    assert raised.value.details() == "no such thing"
    assert ("hint-bin", b"\x01") in [tuple(pair) for pair in raised.value.trailing_metadata()]


def test_an_unexpected_error_is_logged_and_not_told(server, caplog):
    _, channel, _ = server
    with pytest.raises(grpc.RpcError) as raised:
        unary(channel, "fail")(b"", timeout=10)
    assert raised.value.code() is grpc.StatusCode.UNKNOWN
    assert "secret" not in raised.value.details()
    assert "a secret" in caplog.text


def test_a_method_that_is_not_there(server):
    _, channel, _ = server
    with pytest.raises(grpc.RpcError) as raised:
        unary(channel, "nothing")(b"", timeout=10)
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_unary_call_without_a_request(server):
    _, channel, _ = server
    call = channel.stream_stream(f"/{SERVICE}/echo")(iter(()), timeout=10)
    with pytest.raises(grpc.RpcError) as raised:
        next(call)
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert raised.value.details() == f"/{SERVICE}/echo needs one request, got none"


def test_a_stream_is_answered_as_it_comes(server):
    _, channel, _ = server
    go_on = threading.Event()

    def requests():
        yield b"a"
        assert go_on.wait(10)
        yield b"b"

    answers = channel.stream_stream(f"/{SERVICE}/double")(requests(), timeout=20)
    assert next(answers) == b"aa"
    go_on.set()
    assert list(answers) == [b"bb"]


def test_a_stream_can_be_refused_before_it_sends_anything(server):
    _, channel, _ = server
    never = threading.Event()

    def requests():
        never.wait(10)
        yield b""

    with pytest.raises(grpc.RpcError) as raised:
        next(channel.stream_stream(f"/{SERVICE}/unread")(requests(), timeout=20))
    never.set()
    assert (raised.value.code(), raised.value.details()) == (grpc.StatusCode.UNAVAILABLE, "elsewhere")


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_a_handler_ends_when_nobody_waits(server, how):
    handlers, channel, _ = server
    call = unary(channel, "wait").future(b"", timeout=1 if how == "deadline" else 60)
    assert handlers.started.wait(10)
    if how == "cancel":
        call.cancel()
    assert handlers.cancelled.wait(10)


def test_many_calls_at_once_each_get_their_own_answer(server):
    _, channel, _ = server
    calls = {number: unary(channel, "echo").future(str(number).encode(), timeout=60) for number in range(1000)}
    assert all(call.result() == str(number).encode() for number, call in calls.items())


def test_stopping_lets_calls_finish_in_time(server):
    handlers, channel, stop = server
    call = unary(channel, "nap").future(b"", timeout=60)
    assert handlers.started.wait(10)
    stop(grace=60).result(10)
    assert call.result() == b"rested"
    with pytest.raises(grpc.RpcError) as raised:
        unary(channel, "echo")(b"", timeout=10)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


def test_stopping_cancels_calls_that_take_longer(server):
    handlers, channel, stop = server
    call = unary(channel, "wait").future(b"", timeout=60)
    assert handlers.started.wait(10)
    began = time.monotonic()
    stop(grace=0.2).result(10)
    assert time.monotonic() - began >= 0.2
    assert handlers.cancelled.wait(10)
    assert isinstance(call.exception(), grpc.RpcError)


def test_an_interceptor_answers_before_anything_is_read():
    found = []

    def guard(details, find):
        found.append(details.method)
        if details.method.endswith("echo"):

            async def refuse(requests, call):
                call.set_code(grpc.StatusCode.UNAUTHENTICATED)

            return grpc.stream_stream_rpc_method_handler(refuse)
        return find(details)

    handlers = Handlers()
    with served(handlers, interceptors=[guard]) as (channel, _):
        with pytest.raises(grpc.RpcError) as raised:
            unary(channel, "echo")(b"", timeout=10)
        assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert unary(channel, "nap")(b"", timeout=10) == b"rested"
    assert found == [f"/{SERVICE}/echo", f"/{SERVICE}/nap"]
    assert handlers.seen == []


def test_calls_are_refused_before_they_are_read():
    asked = []
    refusal = rpc.Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many", (("hint-bin", b"\x02"),))

    def refuse(method, coming):
        asked.append((method, coming))
        return refusal if coming >= 10 else None

    method = f"/{SERVICE}/echo"
    handlers = Handlers()
    with served(handlers, limit=rpc.Limit([method], refuse)) as (channel, _):
        first = unary(channel, "block").future(b"first", timeout=60)
        assert handlers.started.wait(10)
        calls = [unary(channel, "echo").future(b"x" * 100_000, timeout=60) for _ in range(30)]
        probe = unary(channel, "nap").future(b"", timeout=60)
        time.sleep(0.5)  # all of it waits in the server's socket
        handlers.unblock.set()
        errors = [error for call in calls if (error := call.exception())]
        assert probe.result() == b"rested"
        assert first.result() == b"first"
        assert unary(channel, "echo")(b"again", timeout=10) == b"again"
    assert {name for name, _ in asked} == {method}
    assert len(asked) == len(calls) + 1
    assert len(errors) == sum(coming >= 10 for _, coming in asked)
    assert asked[-1] == (method, 0)
    assert {(error.code(), error.details()) for error in errors} <= {(refusal.code, "too many")}
    assert all(("hint-bin", b"\x02") in [tuple(pair) for pair in error.trailing_metadata()] for error in errors)


def test_what_is_refused_need_not_be_sent(server):
    """A request of many megabytes, of which the server takes in next to nothing."""
    refusal = rpc.Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "no", ())
    limit = rpc.Limit([f"/{SERVICE}/echo"], lambda method, coming: refusal)
    with served(Handlers(), limit=limit) as (channel, _):
        for _ in range(5):
            with pytest.raises(grpc.RpcError) as raised:
                unary(channel, "echo")(bytes(3 << 20), timeout=10)
            assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert unary(channel, "nap")(b"", timeout=10) == b"rested"


def test_a_call_may_be_answered_without_a_handler(caplog):
    seen, inbox = [], rpc.Inbox()

    def direct(data, call):
        """Answers later, told by a thread of its own; leaves a call without a request's bytes to the handlers."""
        if data == b"fails":
            raise ValueError("a secret")
        if data == b"waits":
            seen.append(call)
        elif data == b"refused":
            call.fail(grpc.StatusCode.NOT_FOUND, "no", (("hint-bin", b"1"),))
        elif data:
            threading.Thread(target=inbox.tell, args=(call.end, data + call.details.method.encode())).start()
        return bool(data)

    handlers, method = Handlers(), f"/{SERVICE}/echo"
    with served(handlers, direct=rpc.Direct([method], direct), inbox=inbox) as (channel, _):
        assert unary(channel, "echo")(b"direct ", timeout=10) == b"direct " + method.encode()
        assert unary(channel, "echo")(b"", timeout=10) == b""
        assert unary(channel, "nap")(b"found first", timeout=10) == b"rested"
        with pytest.raises(grpc.RpcError) as raised:
            unary(channel, "echo")(b"refused", timeout=10)
        assert (raised.value.code(), raised.value.details()) == (grpc.StatusCode.NOT_FOUND, "no")
        assert ("hint-bin", b"1") in [tuple(pair) for pair in raised.value.trailing_metadata()]
        with pytest.raises(grpc.RpcError) as raised:
            unary(channel, "echo")(b"fails", timeout=10)
        assert (raised.value.code(), raised.value.details()) == (grpc.StatusCode.UNKNOWN, "internal error")
        assert "a secret" in caplog.text
        leaving = unary(channel, "echo").future(b"waits", timeout=10)
        wait_until(lambda: seen)
        assert not seen[0].cancelled()
        leaving.cancel()
        wait_until(lambda: seen[0].cancelled())
        inbox.tell(seen[0].end, b"too late")
        assert unary(channel, "echo")(b"goes on ", timeout=10) == b"goes on " + method.encode()
    assert [data for data, *_ in handlers.seen] == [b""]


def test_an_interceptor_that_fails_ends_the_call(caplog):
    def fail(details, find):
        raise ValueError("a secret")

    with served(Handlers(), interceptors=[fail]) as (channel, _), pytest.raises(grpc.RpcError) as raised:
        unary(channel, "echo")(b"", timeout=10)
    assert raised.value.code() is grpc.StatusCode.UNKNOWN
    assert "a secret" in caplog.text


@pytest.mark.parametrize("size", [1, 5_000, 100_000])
def test_a_stream_answers_each_of_many_requests_in_order(server, size):
    _, channel, _ = server
    requests = [number.to_bytes(2, "big") * size for number in range(300)]
    answers = channel.stream_stream(f"/{SERVICE}/double")(iter(requests), timeout=60)
    assert list(answers) == [data + data for data in requests]


def test_a_stream_makes_no_answers_that_its_client_does_not_take(server):
    handlers, channel, _ = server
    call = channel.stream_stream(f"/{SERVICE}/large")(iter(()), timeout=60)
    next(call)
    made = 0
    while handlers.made != made:
        made = handlers.made
        time.sleep(0.5)
    assert made < 100  # gRPC's own windows have room for some megabytes
    assert sum(map(len, call)) == 999 << 20
    assert handlers.made == 1000


def test_what_a_stream_had_answered_before_it_failed_arrives(server, caplog):
    _, channel, _ = server
    call = channel.stream_stream(f"/{SERVICE}/half")(iter(()), timeout=20)
    answers = []
    with pytest.raises(grpc.RpcError) as raised:
        answers.extend(call)
    assert raised.value.code() is grpc.StatusCode.UNKNOWN
    assert answers == [b"%d" % number for number in range(40)]
    assert "a secret" in caplog.text


class Source:
    """What requests are of, and what it was told."""

    def __init__(self):
        self.widened = []

    def widen(self):
        self.widened.append(None)

    def taken(self, size):
        """Nobody counts."""


@pytest.mark.parametrize("size", [10, 30_000, 1_000_000])
def test_a_stream_whose_requests_nobody_takes_holds_its_client_up(size):
    """What waits is less than what is read ahead and one window; then each that is taken makes room."""
    source = Source()
    widened = source.widened

    async def scenario():
        requests = Requests(source, "identity", 1 << 22, None)
        waiting = 0
        while waiting < AHEAD_BYTES:
            widened.clear()
            requests.received(prefixed(bytes(size)), ends=False)
            waiting += 5 + size
            assert bool(widened) == (waiting < AHEAD_BYTES)
        while waiting >= AHEAD_BYTES:
            assert not widened
            assert await anext(requests) == bytes(size)
            waiting -= 5 + size
        assert widened
        requests.received(b"", ends=True)
        rest = [data async for data in requests]
        assert len(rest) == waiting // (5 + size)
        assert [data async for data in requests] == []

    asyncio.run(scenario())


def test_requests_may_come_in_any_pieces():
    sent = [b"", b"a", b"bc" * 5000, b"", b"d" * 70_000]
    data = b"".join(map(prefixed, sent))

    async def scenario(step):
        requests = Requests(Source(), "identity", 1 << 20, bytes.upper)
        for at in range(0, len(data), step):
            requests.received(data[at : at + step], ends=at + step >= len(data))
        assert [each async for each in requests] == [each.upper() for each in sent]

    for step in (1, 3, 4, 5, 6, 1000, len(data)):
        asyncio.run(scenario(step))


def test_a_stream_that_is_left_is_closed_at_once(server):
    handlers, channel, _ = server
    call = channel.stream_stream(f"/{SERVICE}/count")(iter((b"",)), timeout=20)
    assert next(call) == b"1"
    call.cancel()
    assert handlers.cancelled.wait(10)


def test_a_port_that_is_taken():
    first = rpc.Server()
    port = first.add_port("127.0.0.1", 0)
    with pytest.raises(OSError, match="in use"):
        rpc.Server().add_port("127.0.0.1", port)
    with pytest.raises(OSError, match="in use"):
        rpc.Server(options=rpc.Options(reuse_port=True)).add_port("127.0.0.1", port)
    asyncio.run(first.stop(None))
    again = rpc.Server()
    assert again.add_port("127.0.0.1", port) == port
    asyncio.run(again.stop(None))


@pytest.mark.parametrize(
    ("host", "target"),
    [
        ("localhost", "localhost"),
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "[::1]"),
        ("0.0.0.0", "127.0.0.1"),
        ("0.0.0.0", "[::1]"),
        ("::", "127.0.0.1"),
    ],
)
def test_a_host_is_listened_on_at_all_its_addresses(host, target):
    handlers = Handlers()

    async def serve():
        server = rpc.Server()
        server.add_generic_rpc_handlers((handlers.generic(),))
        port = server.add_port(host, 0)
        await server.start()
        async with grpc.aio.insecure_channel(f"{target}:{port}") as channel:
            assert await channel.unary_unary(f"/{SERVICE}/echo")(b"hello", timeout=10) == b"hello"
        await server.stop(None)

    if ":" in host + target:
        with socket.socket(socket.AF_INET6) as probe:
            try:
                probe.bind(("::1", 0))
            except OSError as error:
                pytest.skip(f"::1 is not an address of this machine: {error}")
    asyncio.run(serve())
    if target != "localhost":
        assert handlers.seen[0][2].startswith("ipv6:[::1]:" if ":" in target else "ipv4:127.0.0.1:")


class Transport:
    """Notes what is written."""

    def __init__(self):
        self.written = []

    def get_extra_info(self, name):
        return None

    def is_closing(self):
        return False

    def write(self, data):
        self.written.append(data)


def test_what_one_turn_of_the_event_loop_gives_goes_with_one_write():
    async def scenario():
        transport = Transport()
        outgoing = Outgoing(transport, rpc.Inbox(), lambda stream: None)
        for _ in range(2):
            for data in (b"one ", b"after ", b"the other"):
                asyncio.get_running_loop().call_soon(outgoing.write, data)
            await asyncio.sleep(0.01)
        outgoing.write(b"this, ")
        outgoing.write(bytes(1 << 20))  # must not wait for more
        assert [len(data) for data in transport.written] == [19, 19, 6 + (1 << 20)]
        await asyncio.sleep(0.01)
        assert transport.written[:2] == [b"one after the other"] * 2
        assert len(transport.written) == 3

    asyncio.run(scenario())


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_what_a_socket_does_not_take_at_once_follows_in_order(new_loop):
    sent = [number.to_bytes(4, "big") * 5_000 for number in range(500)]  # 10 MB, more than a socket holds

    async def scenario():
        ours, theirs = socket.socketpair()
        transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=ours)
        outgoing = Outgoing(transport, rpc.Inbox(), lambda stream: None)
        theirs.setblocking(False)
        received = b""
        for number, data in enumerate(sent):
            outgoing.write(data)
            if number == 400:
                assert transport.get_write_buffer_size()
                received = theirs.recv(1 << 20)  # there is room again, and what comes now must not overtake
        reader, writer = await asyncio.open_connection(sock=theirs)
        received += await reader.readexactly(sum(map(len, sent)) - len(received))
        assert received == b"".join(sent)
        outgoing.write(b"the last")
        assert await reader.readexactly(8) == b"the last"
        writer.close()  # who has gone is no error, and gets nothing
        await asyncio.sleep(0.01)
        for _ in range(3):
            outgoing.write(bytes(1 << 20))
        assert transport.is_closing()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(scenario())
