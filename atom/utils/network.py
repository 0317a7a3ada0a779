"""Ports on this host."""

import socket

LOOPBACK = "127.0.0.1"


def get_open_port(host: str = LOOPBACK) -> int:
    """A TCP port that nobody listens on now; another process may take it before the caller binds it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])
