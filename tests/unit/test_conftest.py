"""The guards of the test suite itself."""

import os
import socket

import pytest
from pytest_socket import SocketConnectBlockedError


def test_other_machines_cannot_be_reached():
    with (
        socket.socket() as plain,
        pytest.warns(UserWarning, match="198.51.100.1"),
        pytest.raises(SocketConnectBlockedError),
    ):
        plain.connect(("198.51.100.1", 80))


def test_loopback_can_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname(), timeout=5):
            peer, _ = server.accept()
        assert peer.recv(1) == b""
        peer.close()


def test_the_environment_is_known():
    assert not [name for name in os.environ if name.startswith("HEADRACE_")]
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert os.environ["RAY_AUTH_MODE"] == "disabled"


def test_time_stands_still(clock):
    start = clock()
    clock.advance(2.5)
    assert clock() == start + 2.5
