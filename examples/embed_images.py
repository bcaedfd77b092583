"""Embeds pictures of handwritten digits: one alone, and several together with a question about them.

Needs `pip install 'mmemb-deploy[cpu,bench]'`; scikit-learn, in `bench`, brings the digits. Run it with

    python examples/embed_images.py
"""

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from mmemb_deploy import Embedder

drawings = (load_digits().images * 255 / 16).astype(np.uint8)  # 8 x 8 pixels each; the first ten are 0 to 9
pictures = [Image.fromarray(drawing).resize((32, 32), Image.Resampling.BICUBIC) for drawing in drawings[:10]]

embedder = Embedder.load()
inputs = [
    {"image": pictures[5]},
    {"images": [pictures[3], pictures[4]], "text": "a + b"},
    {"images": [pictures[9], pictures[8], pictures[2]], "text": "a - b x c"},
]
result = embedder.encode_detailed(inputs)
names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
similarity = embedder.similarity(result.embeddings, embedder.encode_document(names))
for content, detail, row in zip(inputs, result.details, similarity, strict=True):
    shown = content.get("text", "one picture")
    print(f"{shown:<12} {detail.route:<7} {detail.rationale or '-':<20} nearest name: {names[row.argmax()]}")
