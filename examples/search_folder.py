"""Searches a folder of pictures by words or by another picture.

Needs `pip install 'mmemb-deploy[cpu]'`. The first run embeds the folder into FOLDER.npz, later ones read that file:

    python examples/search_folder.py FOLDER "seven"
    python examples/search_folder.py FOLDER another.png

For folders of any size, and of pages, videos and texts too, `mmemb embed` writes the file, and `mmemb search` reads it.
"""

import sys
from pathlib import Path

import numpy as np

from mmemb_deploy import Embedder, Vectors

folder, query = Path(sys.argv[1]), sys.argv[2]
stored = folder.with_suffix(".npz")
embedder = Embedder.load()
if not stored.exists():
    files = sorted(folder.glob("*.png"))
    vectors = embedder.encode_document([{"image": file} for file in files])
    np.savez(stored, id=[file.name for file in files], embedding=vectors)

# a picture is embedded as a document too: like is compared with like
asked = embedder.encode_document([{"image": query}]) if Path(query).is_file() else embedder.encode([query])
(hits,) = Vectors.open(stored).search(asked, k=3)
for hit in hits:
    print(f"{hit.score:.2f}  {hit.file}")
