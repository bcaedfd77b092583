"""Embeds three questions, shows what was thought about each, and finds its answer among ten words.

Needs `pip install 'mmemb-deploy[cpu]'`. Run it with

    python examples/embed_text.py
"""

from mmemb_deploy import Embedder

embedder = Embedder.load()  # the small bundle that comes with the package; a path loads any other one
questions = ["seven", "three plus four", "six minus eight times two"]
answers = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

result = embedder.encode_detailed(questions)  # the gate decides, question by question, whether to reason first
similarity = embedder.similarity(result.embeddings, embedder.encode_document(answers))  # cosines, one row a question

print(f"{'question':<28}{'route':<8}{'thought':<22}answer")
for question, detail, row in zip(questions, result.details, similarity, strict=True):
    print(f"{question:<28}{detail.route:<8}{detail.rationale or '-':<22}{answers[row.argmax()]}")
