"""Shows what reasoning costs and what it brings, for several settings of the gate, on questions about digits.

A question scores a hit if the nearest of its ten candidates is a right one. Tokens are those that the model writes
before it embeds, and each takes time.

Needs `pip install 'mmemb-deploy[cpu,bench]'`. Run it with

    python examples/gate_budget.py
"""

import time

import numpy as np

from mmemb_deploy import Embedder
from mmemb_deploy.evaluation.digitchain import DigitChain
from mmemb_deploy.evaluation.pairs import Judge, Pair

examples = [each for each in DigitChain("test", seed=0).mixed(100) if each.family != "match"]
questions = [each.content for each in examples]

embedder = Embedder.load()
judge = Judge(embedder, [Pair.of(each) for each in examples])
budgets = [{"reasoning": "never"}, {"reasoning_rate": 0.1}, {"threshold": 0.3}, {}, {"reasoning": "always"}]
embedder.encode(questions)  # the images are encoded here, so that no budget is timed with them
for budget in budgets:
    began = time.perf_counter()
    result = embedder.encode_detailed(questions, **budget)
    seconds = time.perf_counter() - began
    share = np.mean([detail.route == "reason" for detail in result.details])
    tokens = np.mean([detail.rationale_tokens for detail in result.details])
    hits = judge.hits(result.embeddings).mean()
    print(f"{budget or 'default'!s:<25} reasons {share:>4.0%}  tokens {tokens:>4.1f}  hits {hits:.3f}  {seconds:.2f} s")
