"""A model of S3's pace on loopback: each answer begins after 30 ms and comes at 60 MB/s, connections do not share.

`python -m jobs.bench.paced` prints its port. It knows ranged GETs of one object of zeros, and nothing else of S3.
"""

from __future__ import annotations

import asyncio
import re
import sys

FIRST_BYTE_SECONDS = 0.030
RATE = 60e6
OBJECT_BYTES = 512 << 20
ETAG = "paced"

_CHUNK = 512 << 10
_ZEROS = memoryview(bytes(_CHUNK))
_RANGE = re.compile(rb"\r\nrange: bytes=(\d+)-(\d*)", re.IGNORECASE)


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection: request after request."""
    clock = asyncio.get_running_loop().time
    try:
        while True:
            request = await reader.readuntil(b"\r\n\r\n")
            found = _RANGE.search(request)
            start = int(found[1]) if found else 0
            stop = min(int(found[2]) + 1 if found and found[2] else OBJECT_BYTES, OBJECT_BYTES)
            began = clock()
            await asyncio.sleep(FIRST_BYTE_SECONDS)
            head = (
                f'HTTP/1.1 206 Partial Content\r\nContent-Length: {stop - start}\r\nETag: "{ETAG}"\r\n'
                f"Content-Range: bytes {start}-{stop - 1}/{OBJECT_BYTES}\r\nContent-Type: binary/octet-stream\r\n\r\n"
            )
            writer.write(head.encode())
            for sent in range(0, stop - start, _CHUNK):
                writer.write(_ZEROS[: min(_CHUNK, stop - start - sent)])
                await writer.drain()
                ahead = FIRST_BYTE_SECONDS + (sent + _CHUNK) / RATE - (clock() - began)
                if ahead > 0:
                    await asyncio.sleep(ahead)
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def serve() -> None:
    """On any free port of loopback, until it is killed."""
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    sys.exit(asyncio.run(serve()))
