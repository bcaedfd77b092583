"""Searches documents by what their pages look like: a page is an image, a document is as near as its best page.

The bundle that comes with the package reads handwritten digits and no print, so every page here shows one digit. A
bundle of a large model takes pictures of real pages by the same calls.

Needs `pip install 'mmemb-deploy[cpu,bench]'`. Run it with

    python examples/embed_documents.py
"""

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from mmemb_deploy import Embedder

drawings = (load_digits().images * 255 / 16).astype(np.uint8)  # the first ten are 0 to 9
documents = {"invoice.pdf": [3, 1, 4], "letter.pdf": [1, 5], "report.pdf": [9, 2, 6]}
pages = [(name, number, digit) for name, digits in documents.items() for number, digit in enumerate(digits, start=1)]
images = [Image.fromarray(drawings[digit]).resize((32, 32), Image.Resampling.BICUBIC) for _, _, digit in pages]

embedder = Embedder.load()
page_vectors = embedder.encode_document([{"image": image} for image in images])  # documents never reason
for query in ("five", "three times three"):
    cosines = embedder.similarity(embedder.encode([query]), page_vectors)[0]
    name, number, _ = pages[cosines.argmax()]
    print(f"{query}: {name}, page {number}, cosine {cosines.max():.2f}")
