"""What a client asks for, as pure objects: requests, their sequences, and what was delivered.

    request = GenerationRequest(prompt_ids=(5, 6), max_tokens=8, stop=("\\n",))
    journal = Journal(request)
    journal.try_deliver(0, index=0, token_id=7, is_finished=False)
    message = route_request(journal, "request-1", timeout_s=60.0)

Owns the checks of a request, the rules that its tokens obey, the states of a sequence, stop
strings, and the messages between ingress and router. Has no clock, no network and no thread.

Invariants:
- A request is valid: its constructor raises InvalidRequestError naming field, value and limit.
- A sequence's state is a function of its tokens, so any router can continue it from the journal.
- A journal has each token once and in order; it never skips one.
"""
