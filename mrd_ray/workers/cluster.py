"""The Ray cluster that a command works on: a running one, or a local one; and why neither can be used."""

import contextlib
import logging
import os
import secrets
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import ray_constants

from mrd_ray.errors import UserError

_KNOCK_SECONDS = 10.0
_CURRENT = "ray_current_cluster"  # the file where `ray start` writes its address, for programs that do not name one


@contextlib.contextmanager
def cluster(log_to_driver: bool = True) -> Iterator[bool]:
    """Join the running cluster (RAY_ADDRESS, or the job's), or start a local one that ends with this block.

    Args:
        log_to_driver: whether workers' output is also printed here.

    Yields whether nodes may still join: true on an existing cluster, false on a local one started here.

    Raises:
        UserError: there is no cluster at the address, or a local one cannot be started.
    """
    if ray.is_initialized():
        yield True
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    address, said_by = _address()
    try:
        if address is None:
            _usable(_folder())
        else:
            _knock(address)
        quiet: dict[str, Any] = {"log_to_driver": log_to_driver, "logging_level": logging.WARNING}
        if address is None:
            _keep_token_private()
            with _loopback_only():
                ray.init("local", include_dashboard=False, **quiet)
        else:
            ray.init(**quiet)
    except Exception as problem:  # Ray raises many types, including plain OSError and Exception
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0].rstrip(".:")
        raise UserError(_cannot_start(reason) if address is None else _cannot_join(said_by, reason)) from problem
    try:
        if on_sigterm is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own handler prints a stack
        yield not any(child.name() == "gcs_server" for child in psutil.Process().children())  # ours if local
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """Ray started in this block listens on 127.0.0.1. Ray replaces that `_node_ip_address` by the machine's address."""
    clusters = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False  # Ray's switch for systems where it does not support clusters
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters


def _keep_token_private() -> None:
    """Create a local Ray's token unless one is given, and let only its owner read it; Ray leaves that to the umask."""
    mode = os.environ.get("RAY_AUTH_MODE", "token").lower()
    if mode != "token" or os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    file = Path.home() / ".ray" / "auth_token"
    file.parent.mkdir(mode=0o700, exist_ok=True)
    if not file.exists():
        with tempfile.NamedTemporaryFile(dir=file.parent) as made, contextlib.suppress(FileExistsError):
            made.write(secrets.token_hex(32).encode())
            made.flush()
            os.link(made.name, file)  # complete at once, and never replaces another driver's token
    if file.stat().st_mode & 0o077:
        file.chmod(0o600)


def living_nodes() -> list[dict[str, float]]:
    """The resources of each living node."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _folder() -> Path:
    """Where Ray keeps its files, found by Ray's own rule."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")


def _address() -> tuple[str | None, str]:
    """The address of the cluster that Ray would join, and what names it; None if Ray would start one."""
    if address := os.environ.get("RAY_ADDRESS"):
        return None if address == "local" else address, f"RAY_ADDRESS={address}"
    note = _folder() / "ray" / _CURRENT
    with contextlib.suppress(OSError):
        if address := note.read_text(encoding="utf-8").strip():
            return address, f"{address}, which {note} names"
    return None, ""


def _knock(address: str) -> None:
    """Raise OSError at once if nothing listens at HOST:PORT; Ray would notice after minutes, or never."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS).close()


def _usable(folder: Path) -> None:
    """Raises OSError if Ray cannot keep its files there; Ray would notice late, or report it unclearly."""
    if not folder.is_absolute():
        raise OSError(f"its folder, {folder}, is not an absolute path")
    if not os.access(folder, os.W_OK | os.X_OK) or not folder.is_dir():
        raise OSError(f"its folder, {folder}, is not a folder that can be written to")


def _cannot_join(said_by: str, reason: str) -> str:
    how = "unset RAY_ADDRESS" if said_by.startswith("RAY_ADDRESS") else "run `ray stop`, or set RAY_ADDRESS=local,"
    return (
        f"cannot join the Ray cluster at {said_by}: {reason}. If that cluster has ended, {how} to start a local one. "
        "Otherwise set RAY_ADDRESS to HOST:6379"
    )


def _cannot_start(reason: str) -> str:
    folder = _folder()
    if "AF_UNIX" in reason:  # a socket's path has at most 107 bytes
        return f"cannot start Ray: the path of its folder, {folder}, is too long for its sockets; set RAY_TMPDIR=/tmp"
    if str(folder) in reason:
        return f"cannot start Ray: {reason}; set RAY_TMPDIR=/tmp, or another folder of yours"
    return (
        f"cannot start Ray on this machine: {reason}. If it was slow to start, run the same command again. Its logs "
        f"are in {folder}/ray/session_latest/logs"
    )
