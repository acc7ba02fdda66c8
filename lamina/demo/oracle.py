"""The same checkpoint and prompt in ``transformers`` alone, in this process, which the cluster must reproduce.

``python -m lamina.demo.oracle CHECKPOINT PROMPT TOKENS`` prints the ids of at most TOKENS generated tokens as
a JSON list, including the end-of-sequence token if the model ends its answer earlier.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    """Decode greedily in float32."""
    from lamina.model.cache import keep_inductor_private

    keep_inductor_private()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    path, prompt, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()
    ids = AutoTokenizer.from_pretrained(path, local_files_only=True)(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False)
    sys.stdout.write(json.dumps(out[0, ids.shape[1] :].tolist()) + "\n")


if __name__ == "__main__":
    main()
