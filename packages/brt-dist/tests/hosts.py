"""Hosts of their own for ranks: network namespaces, joined by a switch, where the ranks meet."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import shutil
import subprocess

PORT = 29500  # of the store; each host has all ports to itself
_NAMES = itertools.count()
_CLONE_NEWNET = 0x40000000


class Hosts:
    """So many hosts and the switch, which is a host too: ``switch_address``."""

    switch_address = "10.77.0.254"

    def __init__(self, num_hosts: int) -> None:
        prefix = f"brt-{os.getpid()}-{next(_NAMES)}"
        self.switch = f"{prefix}-switch"
        self.names = [f"{prefix}-{host}" for host in range(num_hosts)]
        try:
            self._join()
        except BaseException:
            self.close()
            raise

    def _join(self) -> None:
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self.switch, "addr", "add", f"{self.switch_address}/24", "dev", "bridge")
        _ip("-n", self.switch, "link", "set", "bridge", "up")
        # What a host sends to itself goes by its loopback
        _ip("-n", self.switch, "link", "set", "lo", "up")
        for host, name in enumerate(self.names):
            _ip("netns", "add", name)
            ends = ("eth0", "netns", name, "type", "veth", "peer", "name", f"port{host}")
            _ip("-n", self.switch, "link", "add", *ends)
            _ip("-n", self.switch, "link", "set", f"port{host}", "master", "bridge", "up")
            _ip("-n", name, "addr", "add", f"10.77.0.{host + 1}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def cut(self, host: int) -> None:
        """Take a host's link down: nothing says so to the others."""
        _ip("-n", self.switch, "link", "set", f"port{host}", "down")

    def start(self, host: int, *command: str) -> subprocess.Popen[str]:
        """A program on a host, that says on stderr what fails."""
        words = ("ip", "netns", "exec", self.names[host], *command)
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "eth0", "BRT_PLUGINS": ""}
        return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)

    def processes(self) -> list[str]:
        """Processes that run on any of the hosts."""
        return [pid for name in self._made() for pid in _ip("netns", "pids", name).split()]

    def listening(self) -> list[str]:
        """Sockets that wait for connections on any of the hosts."""
        command = ("cat", "/proc/net/tcp", "/proc/net/tcp6")
        lines = [
            line.split()
            for name in self._made()
            for line in _ip("netns", "exec", name, *command).splitlines()
        ]
        return [words[1] for words in lines if words[3] == "0A"]

    def _made(self) -> list[str]:
        there = {line.split()[0] for line in _ip("netns", "list").splitlines()}
        return [name for name in (*self.names, self.switch) if name in there]

    def close(self) -> None:
        for name in self._made():
            _ip("netns", "delete", name)
        assert not self._made()


def enter(name: str) -> None:
    """This process lives on that host from now on; before it has any other thread or socket."""
    with open(f"/var/run/netns/{name}") as namespace:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(namespace.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {name}")


@functools.cache
def lacking() -> str:
    """Why hosts cannot be made here; "" where they can."""
    if shutil.which("ip") is None:
        return "no `ip` (package iproute2), which makes network namespaces"
    if os.geteuid() != 0:
        return "not root, who alone may make network namespaces"
    try:
        Hosts(1).close()
    except subprocess.CalledProcessError as error:
        return f"no network namespaces: {' '.join(error.cmd)}: {error.stderr.strip()}"
    return ""


def _ip(*words: str) -> str:
    return subprocess.run(("ip", *words), check=True, capture_output=True, text=True).stdout
