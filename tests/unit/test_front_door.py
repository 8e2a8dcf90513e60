"""Serve's proxy gets our front: by a callback that it calls itself."""

import os
import warnings

import pytest
import uvicorn
import uvicorn.config

with warnings.catch_warnings():
    # Serve's models use what pydantic will remove.
    warnings.simplefilter("ignore")
    from ray.serve._private import http_util
    from ray.serve.config import HTTPOptions

from milliways.cluster.ingress.front import Front
from milliways.cluster.ingress.http_protocol import NoUpgradeProtocol
from milliways.cluster.ray.environment import guard_proxies

SETTING = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"


async def application(scope: object, receive: object, send: object) -> None:
    raise AssertionError("it is not called")


def test_serve_puts_the_front_before_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SETTING, raising=False)
    guard_proxies()
    # Serve reads the environment when it is imported.
    monkeypatch.setattr(http_util, SETTING, os.environ[SETTING])
    protocols = uvicorn.config.HTTP_PROTOCOLS
    monkeypatch.setitem(protocols, "auto", protocols["auto"])

    options = http_util.configure_http_middlewares(HTTPOptions(middlewares=[]))
    app = http_util._apply_middlewares(application, options.middlewares)
    assert isinstance(app, Front)
    assert isinstance(app._app, http_util.RequestIdMiddleware)

    config = uvicorn.Config(lambda: app, factory=True, log_config=None)
    config.load()
    assert config.http_protocol_class is NoUpgradeProtocol
