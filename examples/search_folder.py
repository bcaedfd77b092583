"""Searches a folder of pictures by words or by another picture: an index of vectors, and numpy, are all it takes.

Needs `pip install 'mmemb-deploy[cpu]'`. The first run embeds the folder into FOLDER.npz, later ones read that file:

    python examples/search_folder.py FOLDER "seven"
    python examples/search_folder.py FOLDER another.png
"""

import sys
from pathlib import Path

import numpy as np

from mmemb_deploy import Embedder

folder, query = Path(sys.argv[1]), sys.argv[2]
index = folder.with_suffix(".npz")
embedder = Embedder.load()

if not index.exists():
    files = sorted(folder.glob("*.png"))
    vectors = embedder.encode_document([{"image": file} for file in files])
    np.savez(index, files=[file.name for file in files], vectors=vectors)

with np.load(index) as stored:
    files, vectors = stored["files"], stored["vectors"]
# a picture is embedded as a document too: like is compared with like
asked = embedder.encode_document([{"image": query}]) if Path(query).is_file() else embedder.encode([query])
cosines = embedder.similarity(asked, vectors)[0]
for best in np.argsort(-cosines)[:3]:
    print(f"{cosines[best]:.2f}  {files[best]}")
