"""Searches PDFs by what their pages look like: a page is an image, a document is as near as its best page.

The bundle that comes with the package reads handwritten digits and no print, so every page here shows one digit. A
bundle of a large model takes real documents by the same calls.

Needs `pip install 'mmemb-deploy[cpu,media,bench]'`. Run it with

    python examples/embed_documents.py
"""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from mmemb_deploy import Embedder, pages

drawings = (load_digits().images * 255 / 16).astype(np.uint8)  # the first ten are 0 to 9
documents = {"invoice.pdf": [3, 1, 4], "letter.pdf": [1, 5], "report.pdf": [9, 2, 6]}
with tempfile.TemporaryDirectory() as folder:
    for name, digits in documents.items():
        first, *others = [Image.fromarray(drawings[digit]).resize((320, 320)) for digit in digits]
        first.save(Path(folder, name), save_all=True, append_images=others)

    embedder = Embedder.load()
    inputs = [page for name in documents for page in pages(Path(folder, name))]
    page_vectors = embedder.encode_document(inputs)  # documents never reason

for query in ("five", "three times three"):
    cosines = embedder.similarity(embedder.encode([query]), page_vectors)[0]
    best = inputs[cosines.argmax()]
    print(f"{query}: {best['document'].name}, page {best['pages'][0]}, cosine {cosines.max():.2f}")
