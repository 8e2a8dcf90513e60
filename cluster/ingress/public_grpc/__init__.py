"""The gRPC API for clients: GenerateService, health and reflection.

    from milliways.cluster.ingress.public_grpc.server import IngressGrpcServer

    server = IngressGrpcServer(ingress, host="127.0.0.1", port=50051)  # in a running event loop
    await server.start()

- `server` opens the port; `service` answers GenerateService; `health` answers grpc.health.v1.
- `malformed_requests` makes undecodable requests the client's fault.

Invariant: each call ends with OK or with a status whose code and details name the error.
"""
