"""A language model from PyTorch to text: exported with its KV cache, compiled, stored with 8-bit weights, streamed.

    python examples/generate_text.py

The model is the real stories260k, which lies in the package; for your own, pass a Hugging Face model to
``export_causal_lm`` (``AutoModelForCausalLM.from_pretrained(folder)``).
"""

from __future__ import annotations

import onnxlathe as lathe
from onnxlathe.models import zoo
from onnxlathe.models.stories import BOS, stories_tokenizer
from onnxlathe.passes import QuantizeWeights


def main() -> None:
    model = lathe.export_causal_lm(zoo.build("stories260k").module)
    out = lathe.compile(model, ["cpu-fp32", QuantizeWeights(bits=8)], threads=2, speed_gate=False)
    out.report.print()
    out.save("stories.onnx")

    tokenizer = stories_tokenizer()
    texts = ["Once upon a time", "The little dog"]
    prompts = [[BOS, *tokenizer.encode(text).ids] for text in texts]
    session = lathe.Session("stories.onnx", threads=2)
    for text, prompt, tokens in zip(texts, prompts, session.generate(prompts, max_new_tokens=40), strict=True):
        print(tokenizer.decode([*prompt, *tokens]))
        assert len(tokens) <= 40 and text in tokenizer.decode([*prompt, *tokens])


if __name__ == "__main__":
    main()
