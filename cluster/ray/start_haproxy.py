"""Starts HAProxy in place of Ray Serve, with a configuration that fits one local cluster.

    python -IS start_haproxy.py HOST HAPROXY -db -f CONFIG …

Serve writes the configuration before each start, and has no settings for some of it. This process
changes the file, and then becomes HAProxy:

- HAProxy listens for clients at `HOST`, and nowhere else: Serve would open two more ports, for
  statistics, on all addresses. Its admin socket has these figures as well.
- It speaks HTTP/1 with clients, as Serve's own proxy does: one request at a time on a connection.
- It does not send a line for each request to the machine's syslog.
- Where no replica answers, clients get an error in OpenAI's shape that says when to come again.
- It ends when the process that started it ends, however that ends. Otherwise it would keep the
  port, and the proxy that Serve starts in its place could not listen.

This file runs without the installed packages, because it runs each time that a replica comes or
goes.
"""

import ctypes
import json
import os
import re
import signal
import sys
from pathlib import Path

FRONTEND = "frontend http_frontend"
# Sections that do nothing but listen on ports of their own.
EXTRA_LISTENERS = ("frontend prometheus", "listen stats")
UNAVAILABLE_FILE = "unavailable.http"
MALFORMED_FILE = "malformed.http"
RETRY_AFTER_S = 1
# Otherwise a client may speak HTTP/2, and the limit on connections is none on requests.
_HTTP1 = "proto h1"
_PR_SET_PDEATHSIG = 1
_SECTION = re.compile(r"^(?=\S)", re.MULTILINE)
_BIND = re.compile(r"^(\s*bind )(\S+):(\d+)(.*)$", re.MULTILINE)
_LOG_TARGET = re.compile(r"^\s+log (?!global\b).*\n", re.MULTILINE)
_ERROR_FILE = re.compile(r"^(\s+errorfile \d+ ).*$", re.MULTILINE)
_USE_BACKEND = re.compile(r"^\s+use_backend ", re.MULTILINE)
_NOT_FOUND = re.compile(r"^(\s+)http-request return status 404 .*$", re.MULTILINE)


def fitted(config: str, host: str, folder: Path) -> str:
    """The configuration with the changes above; `folder` has the files of `error_files`.

    Raises:
        ValueError: the configuration has another form than we know.
    """
    sections = [part for part in _SECTION.split(config) if part]
    kept = [part for part in sections if not part.startswith(EXTRA_LISTENERS)]
    # Until Serve has said where the application is, no path has a backend.
    knows_backends = any(_USE_BACKEND.search(part) for part in kept)
    changed = "".join(_fitted_section(part, host, folder, knows_backends) for part in kept)
    listeners = [match.group(0).split()[1] for match in _BIND.finditer(changed)]
    if len(listeners) != 1 or not listeners[0].startswith(f"{host}:"):
        raise ValueError(f"the proxy of Ray Serve would listen on {listeners}, not on {host}")
    return changed


def _fitted_section(section: str, host: str, folder: Path, knows_backends: bool) -> str:
    name = section.partition("\n")[0].rstrip()
    if name == "global":
        return _LOG_TARGET.sub("", section)
    if name == "defaults":
        changed = _ERROR_FILE.sub(
            lambda match: f"{match.group(1)}{folder / UNAVAILABLE_FILE}", section
        )
        return f"{changed.rstrip()}\n    errorfile 400 {folder / MALFORMED_FILE}\n"
    if name == FRONTEND:
        return _BIND.sub(rf"\g<1>{host}:\g<3> {_HTTP1}", section)
    if name == "backend default_backend" and not knows_backends:
        return _NOT_FOUND.sub(
            lambda match: f"{match.group(1)}{_refusal()}",
            section,
        )
    return section


def _refusal() -> str:
    body = _body("the server is starting", "server_error")
    headers = f"hdr Retry-After {RETRY_AFTER_S}"
    return f"http-request return status 503 content-type application/json {headers} string '{body}'"


def error_files() -> dict[str, str]:
    """The responses of HAProxy itself, by the name of their file."""
    unavailable = _body("the server is not available now", "server_error")
    malformed = _body("the request is not HTTP, or its headers are too long", _INVALID)
    return {
        UNAVAILABLE_FILE: _response("503 Service Unavailable", unavailable, retries=True),
        MALFORMED_FILE: _response("400 Bad Request", malformed, retries=False),
    }


_INVALID = "invalid_request_error"


def _body(message: str, kind: str) -> str:
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": None}})


def _response(status: str, body: str, *, retries: bool) -> str:
    lines = [
        f"HTTP/1.1 {status}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-cache",
        "Connection: close",
    ]
    if retries:
        lines.append(f"Retry-After: {RETRY_AFTER_S}")
    return "\r\n".join([*lines, "", body])


def _end_with_parent() -> None:
    """Makes the kernel kill this process when its parent ends; that outlasts `exec`."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def main(arguments: list[str]) -> None:
    """Becomes HAProxy."""
    host, binary, *options = arguments
    _end_with_parent()
    config = Path(options[options.index("-f") + 1])
    for name, response in error_files().items():
        (config.parent / name).write_bytes(response.encode())
    try:
        text = fitted(config.read_text("utf-8"), host, config.parent)
    except ValueError as error:
        sys.exit(str(error))
    config.write_text(text, "utf-8")
    os.execv(binary, [binary, *options])


if __name__ == "__main__":
    main(sys.argv[1:])
