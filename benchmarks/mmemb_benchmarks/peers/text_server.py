"""What a served peer reads and, for sentence-transformers, what serves it; a peer's own interpreter runs this file.

`python text_server.py save CHECKPOINT FOLDER` writes the language model as a Qwen3 checkpoint in sentence-transformers'
form, which infinity and vLLM read too: with text alone, Qwen3-VL's decoder is Qwen3's. `python text_server.py serve
FOLDER PORT` is sentence-transformers behind FastAPI, as tutorials show it: a request is an `encode` in the thread pool.
"""

# A peer's packages are in an environment of its own.
# pyright: reportMissingImports=false
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
)  # of both configurations
MODULES = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}


def save(checkpoint: str, folder: Path) -> None:
    """Write the language model, its tokenizer, and that the last token is pooled and normalised."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen3Config, Qwen3Model

    whole: Any = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="float32")
    text = whole.model.language_model
    theta = text.config.rope_parameters["rope_theta"]
    config = Qwen3Config(
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        **{name: getattr(text.config, name) for name in SAME},
    )
    with torch.device("meta"):
        model: Any = Qwen3Model(config)
    model.load_state_dict(text.state_dict(), assign=True)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)  # with one, a text would be wrapped as a message
    # transformers 4, which infinity uses, has another place for the first and another name for the second
    _add(folder / "config.json", rope_theta=theta)
    _add(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    listed = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(MODULES.items())
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    for path in filter(None, MODULES):
        (folder / path).mkdir()
    pooling = {"word_embedding_dimension": config.hidden_size, "pooling_mode_lasttoken": True}
    pooling |= {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 4096, "do_lower_case": False}))


def _add(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def serve(folder: str, port: int) -> None:
    """Answer OpenAI's `/v1/embeddings`."""
    import uvicorn
    from fastapi import FastAPI
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": "float32"})
    app = FastAPI()

    def embeddings(ask: dict[str, Any]) -> dict[str, Any]:
        texts = [ask["input"]] if isinstance(ask["input"], str) else ask["input"]
        rows = [{"index": index, "embedding": row.tolist()} for index, row in enumerate(model.encode(texts))]
        return {"object": "list", "data": rows, "model": ask["model"]}

    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": folder, "object": "model"}]}

    app.post("/v1/embeddings")(embeddings)
    app.get("/v1/models")(models)
    uvicorn.run(app, port=port, log_level="warning")


if __name__ == "__main__":
    if sys.argv[1] == "save":
        save(sys.argv[2], Path(sys.argv[3]))
    else:
        serve(sys.argv[2], int(sys.argv[3]))
