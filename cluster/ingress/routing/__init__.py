"""Which router serves a request, and what happens when that router fails or is silent."""
