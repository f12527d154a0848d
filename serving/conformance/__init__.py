"""A check of any server against the Open Inference Protocol, Triton's extensions of it, and gRPC's own services."""
