import socket

from atom.utils.network import get_open_port


def test_port_can_be_bound_on_loopback():
    port = get_open_port()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", port))
        sock.listen()
