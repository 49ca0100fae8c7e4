"""What holds for every test: no network, few threads, no deadline, files of ours in a temporary folder."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from rank_pool import RankPool, pool

os.environ.setdefault("OMP_NUM_THREADS", "2")  # read by torch at its import: no need to import it here
os.environ["HF_HUB_OFFLINE"] = "1"
CACHE = Path(__file__).parents[1] / "build" / "cache"  # compiled kernels outlive a run of the tests, nothing else does
os.environ["TINYCHAT_CACHE"] = str(CACHE)  # while tests are collected

hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")


def is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host in {"localhost", ""}
    return address.is_loopback or address.is_unspecified


def check_address(address: object) -> None:
    """Raises for every address but a path (AF_UNIX) and this machine."""
    if isinstance(address, tuple) and not is_loopback(str(address[0])):
        pytest.fail(f"a test reached for the network: {address[0]}:{address[1]}")


class GuardedSocket(socket.socket):
    """A socket that connects to this machine only."""

    def connect(self, address: object) -> None:  # type: ignore[override]
        check_address(address)
        super().connect(address)  # type: ignore[arg-type]

    def connect_ex(self, address: object) -> int:  # type: ignore[override]
        check_address(address)
        return super().connect_ex(address)  # type: ignore[arg-type]


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    resolve = socket.getaddrinfo

    def resolve_here(host: str | None, port: object, *args: int, **kwargs: int) -> list[tuple[object, ...]]:
        check_address((host or "", port))
        return resolve(host, port, *args, **kwargs)  # type: ignore[arg-type, return-value]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "socket", GuardedSocket)
        patch.setattr(socket, "getaddrinfo", resolve_here)
        yield


@pytest.fixture(autouse=True, scope="session")
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TINYCHAT_HOME", "TINYCHAT_CACHE"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        (CACHE / "kernels").mkdir(parents=True, exist_ok=True)
        Path(os.environ["TINYCHAT_CACHE"], "kernels").symlink_to(CACHE / "kernels")
        yield


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Processes that play the ranks of a tensor-parallel group."""
    with pool() as running:
        yield running
