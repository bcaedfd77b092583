"""`mmemb serve`: one bundle behind the HTTP interfaces of OpenAI, Cohere, Voyage and text-embeddings-inference."""
