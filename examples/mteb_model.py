"""Scores a bundle by mteb, the public benchmark of embeddings, on a task of four questions that lies in memory.

Needs `pip install 'mmemb-deploy[cpu,eval]'`. Run it with

    python examples/mteb_model.py
"""

import mteb
from datasets import Dataset, disable_progress_bars
from mteb.abstasks import AbsTaskRetrieval

from mmemb_benchmarks.mteb_model import MtebModel
from mmemb_deploy import Embedder

QUESTIONS = {"seven": "seven", "one minus six": "five", "six plus one": "seven", "four times four times three": "eight"}
ANSWERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


class Sums(AbsTaskRetrieval):
    """Find the result. A public task is `mteb.get_task("NanoNQRetrieval")`, and is downloaded."""

    metadata = mteb.TaskMetadata(
        name="Sums",
        description="Sums in words.",
        type="Retrieval",
        category="t2t",
        dataset={"path": "in/memory", "revision": "1"},
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
    )

    def load_data(self, **_: object) -> None:
        """Put queries, corpus, and who answers whom where mteb looks for them."""
        queries = [{"id": question, "text": question} for question in QUESTIONS]
        corpus = [{"id": answer, "text": answer} for answer in ANSWERS]
        relevant = {question: {answer: 1} for question, answer in QUESTIONS.items()}
        columns = {"queries": Dataset.from_list(queries), "corpus": Dataset.from_list(corpus)}
        self.dataset = {"default": {"test": {**columns, "relevant_docs": relevant, "top_ranked": None}}}
        self.data_loaded = True


disable_progress_bars()
for reasoning in ("never", "auto"):
    model = MtebModel(Embedder.load(), reasoning)
    result = mteb.evaluate(model, Sums(), cache=None, co2_tracker=False, show_progress_bar=False)
    (usage,) = model.usage.values()
    score = result.task_results[0].get_score()
    print(f"{reasoning}: NDCG@10 {score:.3f}, {usage.reasoned} of {usage.queries} questions reasoned")
