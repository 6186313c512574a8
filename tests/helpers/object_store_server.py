"""A store that speaks S3's or Google Cloud Storage's protocol, in a process of its own: object_store_server.py s3|gs

Prints its address and serves until its standard input ends. Moto and gcp-storage-emulator stand in for the clouds
alone: the clients are the real s3fs and gcsfs.
"""

from __future__ import annotations

import sys


def main() -> None:
    if sys.argv[1] == "s3":
        from moto.server import ThreadedMotoServer

        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        print(f"http://{host}:{port}", flush=True)
    else:
        from gcp_storage_emulator.server import create_server

        server = create_server("127.0.0.1", 0, in_memory=True)
        server.start()
        host, port = server._api._httpd.socket.getsockname()
        print(f"http://{host}:{port}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
