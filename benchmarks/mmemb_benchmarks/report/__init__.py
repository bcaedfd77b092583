"""Results for readers: one self-contained page with its charts, and the tables of documents."""
