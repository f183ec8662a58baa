"""Replicas by Ray Serve, two on this machine: whatever happens to them, sessions go on."""

import importlib
import os
import socket
import sys
import time
from functools import partial

import httpx
import pytest
from serve_tiny import make_server

ray = pytest.importorskip("ray")
serve, ray_app = (importlib.import_module(name) for name in ("ray.serve", "sinkattn.serve.ray_app"))

pytestmark = pytest.mark.slow
SESSIONS = [f"s{index}" for index in range(16)]
SECONDS = 120  # of waiting for replicas


class Cluster:
    """Two replicas, and a client of them."""

    def __init__(self, folder, url):
        self.folder, self.http = folder, httpx.Client(base_url=url, timeout=60)
        self.run(2)

    def run(self, count):
        """Have so many replicas."""
        replicas = ray_app.Replicas(least=count, most=count, num_cpus=0.1)
        app = ray_app.application(partial(make_server, self.folder), max_streams=8, requests=32, replicas=replicas)
        serve.run(app, name=ray_app.NAME, route_prefix="/")
        self.wait_until(lambda: len(self.replicas()) == count)

    def replicas(self):
        """Names of the actors."""
        status = serve.status().applications[ray_app.NAME].deployments[ray_app.NAME]
        names = [x["name"] for x in ray.util.list_named_actors(all_namespaces=True)]
        running = sum(status.replica_states.values())
        names = [name for name in names if name.startswith(f"SERVE_REPLICA::{ray_app.NAME}#{ray_app.NAME}#")]
        return names if len(names) == running == status.replica_states.get("RUNNING") else []

    def wait_until(self, is_so):
        end = time.monotonic() + SECONDS
        while not is_so():
            assert time.monotonic() < end
            time.sleep(0.2)

    def request(self, method, path, id, **options):
        """A response, after errors of the server while a replica is lost."""
        end = time.monotonic() + SECONDS
        while True:
            try:
                response = self.http.request(method, path, headers={"X-Session-ID": id}, **options)
                if response.status_code < 500:
                    response.raise_for_status()
                    return response.json()
            except httpx.TransportError:
                pass
            assert time.monotonic() < end
            time.sleep(0.2)

    def say(self, text, id):
        body = {"messages": [{"role": "user", "content": text}], "append": True, "session_id": id}
        body |= {"model": "tiny", "max_tokens": 8, "temperature": 0}
        return self.request("POST", "/v1/chat/completions", id, json=body)["choices"][0]["message"]["content"]

    def say_all(self, text):
        return [self.say(f"{text} {id}", id) for id in SESSIONS]

    def shares(self):
        """Number of sessions at each replica."""
        lists = (self.request("GET", "/v1/sessions", id)["data"] for id in SESSIONS)
        live = {frozenset(x["id"] for x in each if x["status"] == "live") for each in lists}
        return [len(ids) for ids in live]

    def saved(self):
        """Number of sessions that are saved."""
        return len([*self.folder.glob("*.safetensors")])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 << 20,
        _node_ip_address="127.0.0.1",
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(x for x in sys.path if x), "OMP_NUM_THREADS": "1"}},
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield Cluster(tmp_path_factory.mktemp("sessions"), f"http://127.0.0.1:{port}")
    finally:
        ray.shutdown()


def say(running, text, id):
    return running.chat(text, session_id=id, append=True).choices[0].message.content


def test_sessions_go_on_whatever_happens_to_their_replica(cluster, make_server, run_server):
    with run_server(make_server(max_parked=8)) as alone:

        def expected(text):
            return [
                alone.chat(f"{text} {id}", session_id=id, append=True).choices[0].message.content for id in SESSIONS
            ]

        # Each stays at its replica, so nothing is saved.
        for text in ("One", "Two"):
            assert cluster.say_all(text) == expected(text)
        assert cluster.saved() == 0
        shares = cluster.shares()
        assert (len(shares), sum(shares)) == (2, len(SESSIONS))

        # One is killed: what was saved goes on, first at the other one, then at the one that has come for it.
        for id in SESSIONS:
            cluster.request("POST", f"/v1/sessions/{id}/save", id)
        ray.kill(ray.get_actor(cluster.replicas()[0], namespace="serve"))
        assert cluster.say_all("Three") == expected("Three")
        cluster.wait_until(lambda: len(cluster.replicas()) == 2)
        assert cluster.say_all("Four") == expected("Four")

        # Both leave for another one: they save all turns, also those after the last save.
        cluster.run(1)
        assert cluster.say_all("Five") == expected("Five")
        assert cluster.shares() == [len(SESSIONS)]

        # The end of all is like that: a server without Ray goes on.
        ray_app.end()
        with run_server(make_server(max_parked=8, folder=cluster.folder)) as last:
            assert [say(last, f"Six {id}", id) for id in SESSIONS] == expected("Six")
