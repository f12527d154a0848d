"""The gRPC services: each decodes a request, asks the repository and its scheduler, and encodes the answer."""
