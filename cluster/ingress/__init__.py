"""The ingress: HTTP and gRPC for clients, text to tokens, and the journal of each request.

    from milliways.cluster.ingress.ingress import Ingress
    from milliways.cluster.ingress.openai.app import make_http_app
    from milliways.cluster.ingress.public_grpc.server import IngressGrpcServer
    from milliways.cluster.ingress.served_model import load_served_model
    from milliways.cluster.settings.config import ModelSettings

    async def serve(source):  # a TokenSource, such as routing's RouterSource
        ingress = Ingress(load_served_model(ModelSettings(path="demo")), source)
        await IngressGrpcServer(ingress, port=50051).start()
        return make_http_app(ingress)  # an ASGI application; /v1/models works at once

- `openai/` owns the HTTP API, `public_grpc/` the gRPC API. Both call `Ingress`, never each other.
- `routing/` owns the choice of a router, retries and hedging.
- `front` and `http_protocol` stand before everything else, in Serve's proxy.
- This folder owns what they share: admission, readiness, metrics, request ids, resume points.

Invariants:

- A request's tokens depend on its body and its id only, so any replica can resume it.
- A client receives each token exactly once and in order, even if routers die meanwhile.
- When a client leaves, its request is cancelled everywhere.
"""
