"""Serves a tiny random model on a free port, which is printed.

The arguments are the folder of saved sessions, and how many streams there may be.
"""

import sys
import threading
import time
from pathlib import Path

import uvicorn
from chat_models import CHATML, with_template
from tiny_server import tiny_server

from sinkattn.hf.load import load
from sinkattn.serve import events
from sinkattn.serve.app import create_app


def make_server(folder, max_streams=8, max_parked=8):
    """A server whose replies do not end by themselves."""
    tokenizer = with_template(load()[1], CHATML)
    return tiny_server(tokenizer, max_streams=max_streams, max_parked=max_parked, folder=folder)


def main():
    events.CUT_AFTER = 0.3
    folder, num_streams = Path(sys.argv[1]), int(sys.argv[2])
    app = create_app(make_server(folder, num_streams, max_parked=0))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=3))

    def tell_port():
        while not server.started:
            time.sleep(0.01)
        print(server.servers[0].sockets[0].getsockname()[1], flush=True)

    threading.Thread(target=tell_port, daemon=True).start()
    server.run()


if __name__ == "__main__":
    main()
