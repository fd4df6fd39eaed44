"""What transformers computes from a folder, where torch is installed: `reference.py FOLDER ASKED.npz FOUND.npz`.

ASKED.npz: `ids` i64[T], `prompt` i64[P] and `new`, how many tokens may follow it, and for every row r `row_r` i64[n] and
`trained_r` bool[n]. FOUND.npz: `logits` f32[T, V], `answer` i64[up to `new`], and `loss` over all trained tokens of the rows.
"""

import sys

import numpy as np
import torch
import transformers


def main(folder: str, asked: str, found: str) -> None:
    given = np.load(asked)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, prompt = torch.tensor(given["ids"])[None], torch.tensor(given["prompt"])[None]
    summed, count = 0.0, 0
    with torch.no_grad():
        logits = model(ids).logits[0].numpy()
        whole = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=int(given["new"]), do_sample=False
        )
        for number in range(sum(name.startswith("row_") for name in given)):
            row, trained = torch.tensor(given[f"row_{number}"]), torch.tensor(given[f"trained_{number}"])[1:]
            scores = model(row[None]).logits[0, :-1].double().log_softmax(-1)
            summed -= scores.gather(1, row[1:, None])[trained].sum().item()
            count += int(trained.sum())
    answer = whole[0, prompt.shape[1] :].numpy()
    np.savez(found, logits=logits, answer=answer, loss=summed / max(count, 1), tokens=count)


if __name__ == "__main__":
    main(*sys.argv[1:])
