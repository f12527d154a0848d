"""Serve exported bundles over gRPC. Nothing here needs torch but the TorchScript backend."""

__version__ = "0.1.0"
