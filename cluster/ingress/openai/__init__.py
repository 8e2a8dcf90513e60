"""The HTTP API for clients, in the shape of OpenAI's.

    from milliways.cluster.ingress.openai.app import make_http_app

    app = make_http_app(ingress)  # an Ingress; uvicorn.run(app, port=8000) serves it

- `app` builds the application with /health, /ready and /metrics; `routes` answers /v1/....
- `bodies` reads bodies, `values` parses fields of several types, `requests` makes requests of them.
- `fields` has the tables of what other servers' clients send besides.
- `responses` makes response objects and chunks; `errors` makes error objects.
- `tokenizing` answers /tokenize, /detokenize and /tokenizer_info.
- `streaming` sends an answer as server-sent events.
- `exchange` reads a body and runs the handler until it ends or the client leaves.

Invariant: every error has OpenAI's shape. Once a stream has begun, an error is its last event
before [DONE].
"""
