"""What a client asks, as pure objects: requests, their sequences, and what was delivered."""
