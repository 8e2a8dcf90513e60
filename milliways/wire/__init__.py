"""What processes say to each other, and how it becomes bytes.

    parts = codec.encode_request(1, call, fence)
    data = codec.join(parts)                          # one protobuf message, for gRPC
    fields = codec.split_request(data)
    payload = PayloadReader(data, fields.payload_start, fields.num_payload_bytes)
    fence, call = codec.decode_request(fields, payload)

Owns calls and results (`calls`), views (`view`) and placements (`placement`), the tree of errors
(`errors`, `status_codes`), the bytes of all these (`codec`, `frames`, `shm`), the list of
transports (`transports`), and the settings of channels (`channels`, `limits`, `tls`).

Invariants:
- A decoder returns a valid value or raises MalformedMessageError; it never trusts a peer's sizes.
- Arrays have the same bits after they were encoded and decoded, over any transport.
- An error keeps its type from a router to a client.
"""
