"""The wire contracts: `make protos` generates the `*_pb2*` and `*.binpb` files from the .proto files."""
