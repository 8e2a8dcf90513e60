"""HTTP for clients, in the shape of OpenAI's API."""
