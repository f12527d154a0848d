"""Measurements of the server: speed, overload, and hours of mixed use. Nothing here is part of the server."""
