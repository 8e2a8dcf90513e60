"""The configuration that the installed Ray Serve writes for HAProxy."""

import warnings

from jinja2 import Environment

with warnings.catch_warnings():
    # Serve's models use what pydantic will remove.
    warnings.simplefilter("ignore", DeprecationWarning)
    from ray.serve._private import haproxy as serves
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE
    from ray.serve.config import HTTPOptions


def written(
    host: str = "127.0.0.1",
    *,
    port: int = 8000,
    socket_path: str = "/run/here/s",
    has_backend: bool = True,
    replica_port: int = 30_000,
) -> str:
    """What Ray Serve writes, with one replica of the application or none."""
    config = serves.HAProxyConfig(
        http_options=HTTPOptions(host=host, port=port),
        socket_path=socket_path,
        # Nothing is restored in a test.
        enable_hap_optimization=False,
        error_file_path="/run/here/500.http",
        metrics_enabled=False,
    )
    server = serves.ServerConfig(
        name="replica", host="127.0.0.1", port=replica_port, replica_id="r"
    )
    backend = serves.BackendConfig(
        name="http-milliways", path_prefix="/", app_name="milliways", servers=[server]
    )
    backends = [backend] if has_backend else []
    environment = Environment()
    environment.filters["haproxy_fmt"] = str
    enriched = [
        {"backend": one, "health_config": one.build_health_check_config(config)} for one in backends
    ]
    return environment.from_string(HAPROXY_CONFIG_TEMPLATE).render(
        config=config,
        backends=backends,
        backends_with_health_config=enriched,
        grpc_backends=[],
        grpc_backends_with_health_config=[],
        healthz_rules="",
        route_info=config.build_health_route_info(backends),
        has_ingress_request_router=False,
        metrics_socket_path="/run/here/metrics",
    )
