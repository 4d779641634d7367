"""The Ray cluster that a command works on: the one that runs, or one of its own; and why there is none."""

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
_CURRENT = "ray_current_cluster"  # the file in which `ray start` notes its address, for programs that name none


@contextlib.contextmanager
def cluster(log_to_driver: bool = True) -> Iterator[bool]:
    """Join the running cluster (RAY_ADDRESS, or the job's), or start a local one that ends with this block.

    Args:
        log_to_driver: whether what workers print appears here too.

    Yields whether nodes may still join: a cluster that was there before, and not this machine alone.

    Raises:
        UserError: there is no cluster at the address, or none can be started.
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
    except Exception as problem:  # it fails in many ways, plain OSError and Exception among them
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0].rstrip(".:")
        raise UserError(_cannot_start(reason) if address is None else _cannot_join(said_by, reason)) from problem
    try:
        if on_sigterm is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own prints a stack
        yield not any(child.name() == "gcs_server" for child in psutil.Process().children())  # it would be our own
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """A Ray started in this block listens on 127.0.0.1. For `_node_ip_address` Ray takes the machine's own instead."""
    clusters = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False  # what it has for systems on which it makes no clusters
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters


def _keep_token_private() -> None:
    """Make the token of a local Ray, unless one is given, or close it to others; Ray would leave both to the umask."""
    mode = os.environ.get("RAY_AUTH_MODE", "token").lower()
    if mode != "token" or os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    file = Path.home() / ".ray" / "auth_token"
    file.parent.mkdir(mode=0o700, exist_ok=True)
    if not file.exists():
        with tempfile.NamedTemporaryFile(dir=file.parent) as made, contextlib.suppress(FileExistsError):
            made.write(secrets.token_hex(32).encode())
            made.flush()
            os.link(made.name, file)  # whole, and not over that of another driver
    if file.stat().st_mode & 0o077:
        file.chmod(0o600)


def living_nodes() -> list[dict[str, float]]:
    """The resources of each."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _folder() -> Path:
    """Where Ray keeps its files, by its own rule."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")


def _address() -> tuple[str | None, str]:
    """The cluster that Ray would join, and what names it; None if it would start one."""
    if address := os.environ.get("RAY_ADDRESS"):
        return None if address == "local" else address, f"RAY_ADDRESS={address}"
    note = _folder() / "ray" / _CURRENT
    with contextlib.suppress(OSError):
        if address := note.read_text(encoding="utf-8").strip():
            return address, f"{address}, which {note} names"
    return None, ""


def _knock(address: str) -> None:
    """Raise OSError at once if nobody listens at HOST:PORT, which Ray finds after minutes or never."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS).close()


def _usable(folder: Path) -> None:
    """Raises OSError if Ray cannot keep its files there, which it finds after half a minute or words in its own way."""
    if not folder.is_absolute():
        raise OSError(f"its folder, {folder}, is no absolute path")
    if not os.access(folder, os.W_OK | os.X_OK) or not folder.is_dir():
        raise OSError(f"its folder, {folder}, is none that can be written to")


def _cannot_join(said_by: str, reason: str) -> str:
    how = "unset RAY_ADDRESS" if said_by.startswith("RAY_ADDRESS") else "run `ray stop`, or set RAY_ADDRESS=local,"
    return (
        f"cannot join the Ray cluster at {said_by}: {reason}. If that cluster has ended, {how} to start a local one; "
        "else set RAY_ADDRESS to HOST:6379"
    )


def _cannot_start(reason: str) -> str:
    folder = _folder()
    if "AF_UNIX" in reason:  # names of sockets end at 107 bytes
        return f"cannot start Ray: the path of its folder, {folder}, is too long for its sockets; set RAY_TMPDIR=/tmp"
    if str(folder) in reason:
        return f"cannot start Ray: {reason}; set RAY_TMPDIR=/tmp, or to another folder of yours"
    return (
        f"cannot start Ray on this machine: {reason}. If it was slow to start, start the same command again; its logs "
        f"are in {folder}/ray/session_latest/logs"
    )
