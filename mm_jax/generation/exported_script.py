"""Answers turns by an exported folder with transformers alone: the script that `exported.py` runs.

python exported_script.py FOLDER TURNS.pkl FOUND.pkl
"""

import copy
import pickle
import sys

import torch
from transformers import AutoModelForCausalLM, AutoProcessor


def main(folder: str, given: str, found: str) -> None:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    ).eval()
    greedy = copy.deepcopy(model.generation_config)
    greedy.update(do_sample=False, temperature=None, top_k=None, top_p=None)
    answers = []
    with open(given, "rb") as file:
        turns = pickle.load(file)
    for turn in turns:
        inputs = processor(**turn)
        with torch.no_grad():
            logits = model(**inputs).logits[0].numpy()
        answer = processor.answer(model, greedy, **turn)
        answers.append({"ids": inputs["input_ids"][0].numpy(), "logits": logits, **answer})
    if "mm_jax" in sys.modules:
        raise RuntimeError("the folder's code imports mm_jax")
    with open(found, "wb") as file:
        pickle.dump(answers, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
