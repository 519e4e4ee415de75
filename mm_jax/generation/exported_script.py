"""Answers turns by an exported folder with transformers alone: a script that `exported.py` runs.

python exported_script.py FOLDER TURNS.pkl FOUND.pkl
"""

import copy
import pickle
import sys

# What a machine with torch, transformers and PyAV need not have.
ABSENT = ("mm_jax", "jax", "PIL", "librosa", "soxr", "scipy", "accelerate")


def main(folder: str, given: str, found: str) -> None:
    sys.modules.update(dict.fromkeys(ABSENT))
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    ).eval()
    greedy = copy.deepcopy(model.generation_config)
    greedy.update(do_sample=False, temperature=None, top_k=None, top_p=None)
    answers = []
    with open(given, "rb") as file:
        turns, texts = pickle.load(file)
    for i, turn in enumerate(turns):
        inputs = processor(**turn)
        with torch.no_grad():  # in files: a long prompt's are a gigabyte
            np.save(f"{found}{i}.npy", model(**inputs).logits[0].numpy())
        answer = processor.answer(model, **turn, generation_config=greedy)
        answers.append({"ids": inputs["input_ids"][0].numpy(), **answer})
    ids = [processor.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    with open(found, "wb") as file:
        pickle.dump((answers, ids), file)


if __name__ == "__main__":
    main(*sys.argv[1:])
