"""`mmemb serve`: one bundle behind the HTTP interfaces of OpenAI, Cohere and text-embeddings-inference."""
