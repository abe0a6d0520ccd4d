"""Continues a text with plain onnxruntime, token ids in, token ids out: python generate.py [NEW_TOKENS [ID ...]]"""

import sys

import numpy as np
from run import BUNDLE, open_session, run

MODEL = BUNDLE["decoder"]


def generate(session, prompt, new_tokens):
    cache = {c["past"]: np.zeros((1, c["heads"], 0, c["size"]), c["dtype"]) for c in MODEL["cache"]}
    tokens, new, length = [], list(prompt), 0
    while len(tokens) < new_tokens and not (tokens and tokens[-1] in MODEL["eos"]):
        positions = np.arange(length, length + len(new))[None]
        length += len(new)
        feeds = {"input_ids": np.array([new]), "attention_mask": np.ones((1, length)), "position_ids": positions}
        feeds = {name: feeds[name].astype(dtype) for name, dtype in MODEL["tokens"].items()}
        results = run(session, {**feeds, **cache})
        cache = {c["past"]: results[c["present"]] for c in MODEL["cache"]}
        new = [int(results["logits"][0, -1].argmax())]
        tokens += new
    return tokens


if __name__ == "__main__":
    numbers = [int(text) for text in sys.argv[1:]]
    print(*generate(open_session(), numbers[1:] or MODEL["prompt"], *(numbers[:1] or [len(MODEL["expected"])])))
