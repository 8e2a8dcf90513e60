"""What HAProxy gets to read, and with what settings Ray Serve starts it.

The configuration comes from the template of the installed version of Ray: another version that
writes another form must not make HAProxy listen where it should not.
"""

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from milliways.cluster.ray import haproxy
from milliways.cluster.ray.start_haproxy import error_files, fitted
from tests.haproxy_config import written

FOLDER = Path("/run/here")
STATISTICS = """# pxname,svname,qcur,qmax,scur,smax
http_frontend,FRONTEND,,,3,3,
http-milliways,replica,0,0,2,2,
http-milliways,BACKEND,0,0,2,2,
default_backend,BACKEND,0,0,0,0,
"""


def binds(config: str) -> list[str]:
    return [line.strip() for line in config.splitlines() if line.strip().startswith("bind ")]


def test_listens_for_clients_only() -> None:
    assert len(binds(written())) == 3
    assert binds(fitted(written(), "127.0.0.1", FOLDER)) == ["bind 127.0.0.1:8000 proto h1"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::1", "::", "192.0.2.7"])
def test_listens_at_the_host_of_the_settings(host: str) -> None:
    assert binds(fitted(written(), host, FOLDER)) == [f"bind {host}:8000 proto h1"]


def test_refuses_a_listener_that_it_does_not_know() -> None:
    other = written() + "\nlisten more\n    bind *:7000\n"
    with pytest.raises(ValueError, match="7000"):
        fitted(other, "127.0.0.1", FOLDER)


def test_says_nothing_to_syslog() -> None:
    assert "127.0.0.1:514" in written()
    assert "514" not in fitted(written(), "127.0.0.1", FOLDER)


def test_asks_clients_to_come_again_while_it_knows_no_replica() -> None:
    config = fitted(written(has_backend=False), "127.0.0.1", FOLDER)
    assert "status 404" not in config
    assert "status 503 content-type application/json hdr Retry-After 1" in config
    assert "status 404" in fitted(written(), "127.0.0.1", FOLDER)


def test_own_errors_are_ours() -> None:
    config = fitted(written(), "127.0.0.1", FOLDER)
    files = [line.split()[-1] for line in config.splitlines() if "errorfile" in line]
    assert sorted(set(files)) == sorted(str(FOLDER / name) for name in error_files())
    for response in error_files().values():
        head, _, body = response.partition("\r\n\r\n")
        assert f"Content-Length: {len(body)}" in head
        assert set(json_of(body)) == {"message", "type", "param", "code"}


def json_of(body: str) -> dict[str, object]:
    return json.loads(body)["error"]


def test_sends_nothing_twice_and_cuts_no_stream() -> None:
    config = fitted(written(), "127.0.0.1", FOLDER)
    assert "retry-on conn-failure" in config
    assert "timeout server" not in config


@pytest.mark.parametrize("has_backend", [True, False])
def test_haproxy_accepts_it(tmp_path: Path, has_backend: bool) -> None:
    binary = haproxy.find_binary()
    if not binary:
        pytest.skip("HAProxy is not installed here")
    for name, response in error_files().items():
        (tmp_path / name).write_bytes(response.encode())
    # Of a test's folder the socket's name would be too long.
    config = written(has_backend=has_backend, socket_path=f"/tmp/{os.getpid()}.s")
    file = tmp_path / "haproxy.cfg"
    file.write_text(fitted(config, "127.0.0.1", tmp_path), "utf-8")
    checked = subprocess.run([binary, "-c", "-f", str(file)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment without settings of HAProxy, and restored afterwards."""
    before = dict(os.environ)
    for name in before:
        if "HAPROXY" in name or name == haproxy.ENABLE:
            monkeypatch.delenv(name)
    kept = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(kept)


@pytest.mark.usefixtures("environment")
def test_all_files_are_in_the_folder_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(haproxy, "find_binary", lambda: shutil.which("true"))
    # It asks the kernel.
    monkeypatch.setattr(haproxy, "_free_port", lambda: 20_001)
    assert haproxy.use_haproxy(tmp_path, "127.0.0.1")
    assert haproxy.is_enabled()
    paths = [v for k, v in os.environ.items() if k.startswith("RAY_SERVE_HAPROXY") and "/" in v]
    assert len(paths) == 6
    assert all(Path(path).is_relative_to(tmp_path) for path in paths)
    wrapper = Path(os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"])
    assert stat.S_IMODE(wrapper.stat().st_mode) == 0o700


@pytest.mark.usefixtures("environment")
def test_serves_own_proxy_stays_if_the_operator_wants_it(tmp_path: Path) -> None:
    os.environ[haproxy.ENABLE] = "0"
    assert not haproxy.use_haproxy(tmp_path, "127.0.0.1")
    assert not haproxy.is_enabled()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("environment")
def test_serves_own_proxy_stays_where_there_is_no_haproxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(haproxy, "find_binary", lambda: "")
    assert not haproxy.use_haproxy(tmp_path, "127.0.0.1")
    assert not haproxy.is_enabled()


def test_open_requests_are_counted_once() -> None:
    assert haproxy.open_requests(STATISTICS) == 2
    assert haproxy.open_requests("") == 0
