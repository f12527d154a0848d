"""A gRPC server on asyncio's own sockets: HTTP/2, and what gRPC makes of it.

grpcio's servers cost 200 to 400 us of CPU for each call, three times what a small model does, and 130 us for one that
is refused: its core wakes threads, makes objects and writes to the socket for each call by itself. Here, all that one
read from a socket brings is taken in at once, and all answers of a batch go out with one write.

It has what this project's services need of `grpc.aio.Server` and no more, under the same names, and knows nothing of
them. Header compression is the library hpack's; TLS and sockets are the event loop's.

    server.py       ports, handlers, stopping
    connection.py   one connection: the frames that come, how it begins and ends
    outgoing.py     the frames that go, as far as the windows let them out
    signs.py        signs of life, and the age of a connection
    call.py         one call, as its handler knows it
    stream.py       the requests of a stream
    headers.py      header blocks
    messages.py     messages with their prefixes, packed or not
    frames.py       HTTP/2's numbers
    inbox.py        how other threads reach the event loop
"""

from serving.rpc.call import Aborted, Call, Handler
from serving.rpc.headers import CallDetails
from serving.rpc.inbox import Inbox
from serving.rpc.options import Options
from serving.rpc.server import Direct, Find, Limit, Refusal, Server

__all__ = [
    "Aborted",
    "Call",
    "CallDetails",
    "Direct",
    "Find",
    "Handler",
    "Inbox",
    "Limit",
    "Options",
    "Refusal",
    "Server",
]
