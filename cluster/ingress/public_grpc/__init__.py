"""gRPC for clients: GenerateService, health and reflection."""
