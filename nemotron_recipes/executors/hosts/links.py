"""What one host knows of its network, and its part of a measurement between two: called on each of them, by agent.py on
those behind ssh. Standard library only.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import platform
import re
import secrets
import socket
import struct
import threading
import time
from array import array
from contextlib import suppress
from pathlib import Path
from typing import Any

CONNECT_SECONDS = 3.0
IDLE_SECONDS = 20.0  # a listener to which nobody comes ends
STREAMS = 4  # one core copies about 20 Gb/s
PIECE = 1 << 20  # bytes
TOKEN_BYTES = 16

_NET, _RDMA = Path("/sys/class/net"), Path("/sys/class/infiniband")
_SIOCGIFCONF, _SIOCGIFNETMASK, _IFREQ = 0x8912, 0x891B, 40  # <linux/sockios.h>; sizeof(struct ifreq), 64 bits
_DRIVER = "/proc/driver/nvidia/version"
_NO_LINKS = ("lo", "docker", "virbr", "tailscale", "wg")


def interfaces() -> list[dict[str, Any]]:
    """IPv4 interfaces that are up, other than those of this machine alone.

    name, address, network ("10.0.0.0/24"), speed (Mb/s; 0: the kernel doesn't know it, as of Wi-Fi), hcas (RDMA
    devices of the same port that are up: a Spark shows each port as two).
    """
    found = []
    for name, address in _addresses():
        if name.startswith(_NO_LINKS) or not _is_up(_NET / name):
            continue
        mask = _asked(_SIOCGIFNETMASK, name)
        network = str(ipaddress.ip_network(f"{address}/{mask}", strict=False))
        speed = read(_NET / name / "speed")
        told = {"name": name, "address": address, "network": network, "hcas": _hcas(name)}
        found.append({**told, "speed": int(speed) if speed.isdecimal() else 0})
    return found


def listen(address: str) -> list[Any]:
    """Take what `send` sends to `address` once, in a thread of its own: [port, token that the sender must know]."""
    listener = socket.create_server((address, 0), backlog=STREAMS)
    listener.settimeout(IDLE_SECONDS)
    token = secrets.token_hex(TOKEN_BYTES // 2)
    threading.Thread(target=_accept, args=(listener, token.encode()), daemon=True).start()
    return [listener.getsockname()[1], token]


def send(name: str, address: str, to: str, port: int, token: str, seconds: float) -> float:
    """Gb/s that arrive at `to` through the interface `name`, within `seconds` of sending. OSError: nobody is there."""
    streams = []
    try:
        for _ in range(STREAMS):
            streams.append(_connected(name, address, to, port))
        got: list[int] = []
        began = time.monotonic()
        threads = [
            threading.Thread(target=_send, args=(stream, token.encode(), began + seconds, got)) for stream in streams
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.monotonic() - began
    finally:
        for stream in streams:
            stream.close()
    if len(got) < len(streams):
        raise OSError(None, f"the connection from {address} to {to} broke off")
    return sum(got) * 8 / took / 1e9


def fault(name: str, address: str) -> str:
    """Why nothing can come through an interface of this machine now; "" where nothing is to be seen."""
    if not (_NET / name).exists():
        return f"interface {name} is gone"
    if not _is_up(_NET / name) or read(_NET / name / "carrier") == "0":
        return f"{name} is down"
    if address not in own_addresses():
        return f"{name} has lost its address {address}"
    return ""


def knock(name: str, address: str, to: str, port: int) -> str:
    """The same, and whether `to` answers at that port through the interface."""
    found = fault(name, address)
    if not found:
        try:
            _connected(name, address, to, port).close()
        except OSError as error:
            found = f"{to} does not answer through {name}: {error.strerror or error}"
    return found


def own_addresses() -> list[str]:
    """All IPv4 addresses of this machine."""
    return [address for _, address in _addresses()]


def resolved(name: str) -> list[str]:
    """The IPv4 addresses that this machine knows a name by; none where it knows none."""
    try:
        return sorted({str(found[4][0]) for found in socket.getaddrinfo(name, None, socket.AF_INET)})
    except OSError:
        return []


def me() -> dict[str, Any]:
    """What must be alike on hosts that work together; driver: its version, "" without one; time: seconds since 1970."""
    driver = re.search(r"\b\d+\.\d+(\.\d+)?\b", read(_DRIVER))
    own = {"machine": platform.machine(), "uid": os.getuid(), "gid": os.getgid()}
    return {**own, "driver": driver[0] if driver else "", "time": time.time()}


def ports() -> list[list[Any]]:
    """RDMA devices: [device, interface, whether it is up, speed in Mb/s as text]."""
    return [
        [device.name, net.name, _is_up(net), read(net / "speed")]
        for device in sorted(_RDMA.glob("*"))
        for net in sorted((device / "device" / "net").glob("*"))
    ]


def read(file: str | Path) -> str:
    """The text of a file of the kernel's; "" where there is none."""
    try:
        return Path(file).read_text().strip()
    except OSError:
        return ""


def _accept(listener: socket.socket, token: bytes) -> None:
    threads: list[threading.Thread] = []
    with listener, suppress(OSError):
        while len(threads) < STREAMS:
            stream, _ = listener.accept()
            threads.append(threading.Thread(target=_take, args=(stream, token), daemon=True))
            threads[-1].start()


def _take(stream: socket.socket, token: bytes) -> None:
    """Count what comes, and say it at its end; a stranger is hung up on."""
    with stream, suppress(OSError):
        stream.settimeout(IDLE_SECONDS)
        if stream.recv(len(token), socket.MSG_WAITALL) != token:
            return
        buffer, total = bytearray(PIECE), 0
        while count := stream.recv_into(buffer):
            total += count
        stream.sendall(struct.pack("!Q", total))


def _connected(name: str, address: str, to: str, port: int) -> socket.socket:
    stream = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        stream.settimeout(CONNECT_SECONDS)
        # Two interfaces in one network (link-local ones are) would both leave by the same; older kernels let only root.
        with suppress(PermissionError):
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, name.encode() + b"\0")
        stream.bind((address, 0))
        stream.connect((to, port))
        stream.settimeout(IDLE_SECONDS)
    except BaseException:
        stream.close()
        raise
    return stream


def _send(stream: socket.socket, token: bytes, deadline: float, got: list[int]) -> None:
    with suppress(OSError):
        stream.sendall(token)
        piece = bytes(PIECE)
        while time.monotonic() < deadline:
            stream.sendall(piece)
        stream.shutdown(socket.SHUT_WR)
        said = stream.recv(8, socket.MSG_WAITALL)
        if len(said) == 8:
            got.append(struct.unpack("!Q", said)[0])


def _hcas(name: str) -> list[str]:
    """The RDMA devices that are up and are the same function of a card: 0000:01:00.1 and 0002:01:00.1."""
    place = _function(_NET / name / "device")
    found = []
    for device in sorted(_RDMA.glob("*")) if place else ():
        up = any(_is_up(net) for net in (device / "device" / "net").glob("*"))
        if up and _function(device / "device") == place:
            found.append(device.name)
    return found


def _function(device: Path) -> str:
    """PCI's bus:device.function, without the domain; "" of what is no PCI device."""
    parts = os.path.basename(os.path.realpath(device)).split(":") if device.exists() else []
    return ":".join(parts[1:]) if len(parts) == 3 else ""


def _addresses() -> list[tuple[str, str]]:
    """(interface, IPv4 address), in the kernel's order; netdevice(7)."""
    room = array("B", bytes(_IFREQ * 128))
    place, size = room.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        filled = struct.unpack("iL", fcntl.ioctl(asking, _SIOCGIFCONF, struct.pack("iL", size, place)))[0]
    entries = [room.tobytes()[start : start + _IFREQ] for start in range(0, filled, _IFREQ)]
    return [(entry[:16].split(b"\0")[0].decode(), socket.inet_ntoa(entry[20:24])) for entry in entries]


def _asked(question: int, name: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        said = fcntl.ioctl(asking, question, struct.pack("256s", name.encode()[:15]))
    return socket.inet_ntoa(said[20:24])


def _is_up(interface: Path) -> bool:
    return read(interface / "operstate") in ("up", "unknown")
