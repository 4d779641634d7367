"""A local Ray of our own: on loopback only, with a token that is its owner's alone, and without a dashboard."""

import json
import os
import subprocess
import sys

CODE = """
import json, psutil, ray, urllib.request
from mrd_ray.workers.cluster import cluster
with cluster() as grows:
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    opened = [(one.name(), c) for one in processes for c in one.net_connections("inet")]
    listening = [(name, *c.laddr) for name, c in opened if c.status == "LISTEN"]
    node = ray._private.worker.global_worker.node
    ray.get(ray.remote(lambda: None).remote())
    print(json.dumps({"listening": listening, "grows": grows, "dashboard": node.webui_url,
                      "nodes": [node["NodeManagerAddress"] for node in ray.nodes()]}))
"""


def test_what_a_local_ray_opens(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    unset = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = unset | {"HOME": str(home), "RAY_ADDRESS": "local"}
    done = subprocess.run(["bash", "-c", 'umask 022; exec "$0" -c "$1"', sys.executable, CODE], env=environment,
                          capture_output=True, text=True, check=True)  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name for name, *_ in found["listening"]} >= {"gcs_server", "raylet"}
    assert {address for _, address, _ in found["listening"]} <= {"127.0.0.1", "::ffff:127.0.0.1"}
    assert (found["nodes"], found["grows"]) == (["127.0.0.1"], False)
    assert not found["dashboard"]
    token = home / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.parent.stat().st_mode & 0o777 == 0o700


def test_a_token_that_others_can_read_is_closed(tmp_path):
    code = "from mrd_ray.workers.cluster import _keep_token_private; _keep_token_private()"
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("a" * 64)
    token.chmod(0o644)
    unset = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    for mode, expected in (("disabled", 0o644), ("token", 0o600)):
        environment = unset | {"HOME": str(tmp_path), "RAY_AUTH_MODE": mode}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
        assert (token.read_text(), token.stat().st_mode & 0o777) == ("a" * 64, expected)
