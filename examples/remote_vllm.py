"""Lets a vLLM server write the rationales, and embeds them from the bundle's own cache.

Needs `pip install 'mmemb-deploy[cpu,remote]'` and a server that holds the checkpoint that the bundle was exported from:

    vllm serve CHECKPOINT --served-model-name policy
    python examples/remote_vllm.py http://localhost:8000/v1
"""

import sys

from mmemb_deploy import Embedder, RemoteReasoner

address = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000/v1"
reasoner = RemoteReasoner(address, model="policy", timeout=30, on_failure="direct")
embedder = Embedder.load(reasoner=reasoner)

questions = ["seven", "six minus eight times two"]
for question, detail in zip(questions, embedder.encode_detailed(questions).details, strict=True):
    if detail.fallback:
        print(f"{question}: embedded without reasoning, since {detail.fallback}")
    elif detail.rationale:
        print(f"{question}: {detail.rationale} (written by {detail.rationale_source})")
    else:
        print(f"{question}: needed no reasoning, so that the server was not asked")
