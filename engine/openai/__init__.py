"""The OpenAI API as data: bodies of requests in, bodies of responses out. Knows no transport."""
