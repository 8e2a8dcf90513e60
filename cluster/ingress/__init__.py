"""The ingress: HTTP and gRPC for clients, text to tokens, and the journal of every request."""
