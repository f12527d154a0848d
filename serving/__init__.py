"""Serve exported bundles over gRPC. Nothing here needs torch but the TorchScript backend."""
